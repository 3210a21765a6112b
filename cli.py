"""Command lines and YAML files from dataclasses: fields that are flags, their checks, a parser whose errors are one line.

Knows no particular option and needs no torch: the table of options is `options.py`.
"""

from __future__ import annotations

import argparse
import difflib
import math
import numbers
import os
import re
import reprlib
import sys
from dataclasses import Field, field, fields
from pathlib import Path
from typing import NamedTuple

import yaml

from reading import as_path, read_text, what_is_wrong_with

# ---------------------------------------------------------------------------------------------------------------
# Fields that are options
# ---------------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What an option accepts. `low` and `high` are allowed themselves, `below` is not; `least` is the smallest next to 0.

    Every number has a `high` or `below` that no honest run reaches, so that a slip of the hand is one line instead of a crash
    in whatever the number is multiplied with.
    """

    kind: type
    help: str
    default: object = None
    many: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    below: float | None = None
    least: float | None = None
    aliases: tuple[str, ...] = ()
    group: str = ""  # heading in --help; empty: that of the config
    metavar: str = ""  # what --help calls a value; empty: its choices or its kind
    repeat: bool = False  # of many values: given again, the flag adds to them, and flags add to those of a file
    flag: bool = True  # False: files have it, command lines do not
    address: bool = False  # beside the choices, the address of a class goes as well: FILE.py:Class, package.module:Class


class NotGiven:
    """Stands in for the default of an option whose config decides what holds when it is not given (`option(decided=True)`)."""

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN = NotGiven()


def option(default, help: str, *, kind: type | None = None, many: bool = False, decided: bool = False, **accepts) -> Field:
    """A dataclass field that is a flag as well; its type is that of the default, or (many) `kind` where that is None.

    With `decided` the field starts as `NOT_GIVEN`, so that the config can tell a default from the same value given: its
    `__post_init__` must `decide`. `--help` shows the default.
    """
    many = many or isinstance(default, tuple)
    kind = kind or type(default[0] if many else default)
    spec = Spec(kind, help, default, many=many, optional=default is None, **accepts)
    return field(default=NOT_GIVEN if decided else default, metadata={"option": spec})


def decide(config, values: dict) -> None:
    """In a (frozen) config, put these values where a `decided` option was not given, and the default where there is none."""
    for name, spec in specs(type(config)).items():
        if getattr(config, name) is NOT_GIVEN:
            object.__setattr__(config, name, values.get(name, spec.default))


def redefault(config: type, name: str, default) -> Field:
    """The option `name` of `config` with another default, for a dataclass that inherits it."""
    spec = config.__dataclass_fields__[name].metadata["option"]
    return field(default=default, metadata={"option": spec._replace(default=default)})


def specs(config: type) -> dict[str, Spec]:
    """The options of a config dataclass, by name."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


def did_you_mean(name: str, valid) -> str:
    names = {str(one).lower(): one for one in valid}
    close = difflib.get_close_matches(str(name)[:100].lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {names[close[0]]}?" if close else ""


def address_hint(name: str, valid) -> str:
    """What a name that is not one of the valid ones may have meant, where the address of a class goes as well."""
    if name.endswith(".py"):
        return f"; name its class as well: {name}:Class"
    return did_you_mean(name, valid) or "; a class of your own is FILE.py:Class or package.module:Class"


def as_words(value) -> str:
    """A value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


class _Short(reprlib.Repr):
    """repr of at most a few hundred characters, which never visits more of a value than it shows."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 2, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_int(self, x, level):
        return str(x) if abs(x) < 10**60 else f"a number of {x.bit_length()} bits"  # Python refuses to print very long ones


shown = _Short().repr


def _as_kind(value, kind: type):
    """Numbers of other types, as NumPy's, as Python's own; everything else as it is."""
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def check_one(name: str, value, spec: Spec):
    """`value` as the option holds it (a whole number becomes a float where a float is asked for). Raises ValueError."""
    value = _as_kind(value, spec.kind)
    if type(value) is not spec.kind:
        raise ValueError(f"{name}={shown(value)} is not {KINDS[spec.kind]}")
    if spec.kind is str:
        value = _check_text(name, value)
    if spec.kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} is not a finite number")
    if spec.choices and value not in spec.choices and not (spec.address and ":" in value):
        hint = (address_hint if spec.address else did_you_mean)(value, spec.choices)
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(str, spec.choices))}{hint}")
    bounds = [f"at least {spec.low}"] * (spec.low is not None) + [f"at most {spec.high}"] * (spec.high is not None)
    bounds += [f"below {spec.below}"] * (spec.below is not None)
    if (
        (spec.low is not None and value < spec.low)
        or (spec.high is not None and value > spec.high)
        or (spec.below is not None and value >= spec.below)
    ):
        raise ValueError(f"{name}={shown(value)} must be {' and '.join(bounds)}")
    if spec.least is not None and 0 < value < spec.least:
        raise ValueError(f"{name}={value} must be 0 or at least {spec.least}")
    return value


def check_value(name: str, value, kind: type, low: float, high: float):
    """`value` as a Python number. Raises ValueError unless it is one of that kind within the range."""
    return check_one(name, value, Spec(kind, "", low=low, high=high))


def _check_text(name: str, value: str) -> str:
    """The text as the locale's paths are written. Raises ValueError for what no file, table or terminal can carry on."""
    if value == "":
        raise ValueError(f"{name}='' is empty; give a value or leave {name} out")
    if any(ord(character) < 32 or character == "\x7f" for character in value):
        raise ValueError(f"{name}={shown(value)} holds a control character; use letters that can be printed")
    try:
        return as_path(value)
    except UnicodeError:
        raise ValueError(f"{name}={shown(value)} is not UTF-8, as config.yaml has it; use another name") from None


def check_fields(config) -> None:
    """Check type, choices and range of every option of a (frozen) config; lists become tuples, aliases stay."""
    for name, spec in specs(type(config)).items():
        value = getattr(config, name)
        if value is None and spec.optional:
            continue
        if spec.many:
            if not isinstance(value, (list, tuple)) or not value:
                raise ValueError(
                    f"{name}={shown(value)} is not a list of at least one value; in a file it is written as [1, 2]"
                )
            value = tuple(check_one(name, item, spec) for item in value)
        else:
            value = check_one(name, value, spec)
        object.__setattr__(config, name, value)


def build(config: type, values: dict, **more):
    """A config from those of the plain values, by name, that are its own."""
    return config(**{name: values[name] for name in specs(config) if name in values} | more)


# ---------------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors and warnings are one line each; `given` names the options that the command line itself gave."""

    LONGEST = 2000  # characters of a message, whatever it quotes
    given: frozenset[str] = frozenset()
    stated: dict = {}  # noqa: RUF012  what the command line and its file give, by name, once it is known

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.repeated: dict[str, tuple] = {}  # flags given several times: the first of their values, and the last
        self._seen: dict[str, object] = {}
        for name, action in ((None, _Store), ("store", _Store), ("store_const", _StoreConst)):
            self.register("action", name, action)

    def see(self, name: str, value) -> None:
        """Note the value of a flag of the command line."""
        if self._seen.setdefault(name, value) != value:
            self.repeated[name] = (self._seen[name], value)

    def note_repeated(self) -> None:
        """A line on stdout for every flag that was given several times: the last one counts, as everywhere with argparse.

        Not a warning on stderr: scripts put their flags behind those of others on purpose.
        """
        for name, (first, last) in self.repeated.items():
            line = self._line("note", f"--{name} is given more than once: {as_words(last)} counts, not {as_words(first)}")
            self._print_message(line, sys.stdout)

    def error(self, message: str):
        """One line, exit status 2; `name=value` in a message becomes the flag a user would type."""
        self.exit(2, self._line("error", message))

    def warn(self, message: str) -> None:
        self._print_message(self._line("warning", message), sys.stderr)

    def _line(self, what: str, message: str) -> str:
        names = "|".join(re.escape(action.dest) for action in self._actions)
        message = re.sub(rf"(?<!\S)({names})=", r"--\1 ", " ".join(message.split()))
        if len(message) > self.LONGEST:
            message = f"{message[: self.LONGEST // 2]} ... {message[-self.LONGEST // 2 :]}"
        # Of the processes that torchrun starts on a machine, which all read the same options, one speaks.
        silent = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"
        return "" if silent else f"{self.prog}: {what}: {message}\n"


class _Store(argparse._StoreAction):
    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is not None:
            parser.see(self.dest, values)
        super().__call__(parser, namespace, values, option_string)


class _StoreConst(argparse._StoreConstAction):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.see(self.dest, self.const)
        super().__call__(parser, namespace, values, option_string)


def _add_option(group, name: str, spec: Spec, default) -> None:
    """Values are collected as text; `convert` and the dataclasses give the same errors for flags, YAML and Python."""
    shown = "" if default is None else f" (default: {as_words(default)})".replace("%", "%%")
    metavar = spec.metavar or ("{" + ",".join(spec.choices) + "}" if spec.choices else spec.kind.__name__.upper())
    flags = [f"--{name}", *(f"--{alias}" for alias in spec.aliases)]
    kwargs = {"dest": name, "default": argparse.SUPPRESS, "help": spec.help + shown, "metavar": metavar}
    if spec.kind is bool:
        group.add_argument(*flags, **kwargs | {"nargs": "?", "const": "True", "metavar": "True|False"})
        no = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(f"--no-{name}", action="store_const", const="False", **no)
    else:
        group.add_argument(*flags, **kwargs, nargs="+" if spec.many else None, action="extend" if spec.repeat else None)


def _add_lines(group, lines: dict[str, str]) -> None:
    """Lines of --help that look like flags; none of them is one, since the parser ends when it has shown them."""
    for line, help in lines.items():
        group.add_argument(f"--{line}", action="store_true", default=argparse.SUPPRESS, help=help.replace("%", "%%"))


def make_parser(
    model_type: type, others: tuple[type, ...], description: str, defaults: dict, prog: str | None
) -> OneLineParser:
    """Flags of a model and of other configs; where both have one of the same name it is that of the others.

    The heading of an option in --help is its `group`, or else the `heading` of its config.
    """
    parser = OneLineParser(prog=prog, description=description, usage="%(prog)s [options]", allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)  # -1e-3 is a value as well, not a flag
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags on the command line win")
    elsewhere = {name for config in others for name in specs(config)}
    groups = {}
    for config in (model_type, *others):
        for name, spec in sorted(specs(config).items(), key=lambda one: one[1].group != ""):
            if not spec.flag or (config is model_type and name in elsewhere):
                continue
            heading = spec.group or config.heading
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            _add_option(groups[heading], name, spec, defaults.get(name, spec.default))
    return parser


def convert(name: str, value, spec: Spec):
    """Text from the command line (or `1e-3`, which YAML reads as text) to the option's type."""
    if isinstance(value, list) and spec.many:
        if spec.optional and [str(item).lower() for item in value] == ["none"]:
            return None
        return tuple(convert(name, item, spec._replace(many=False)) for item in value)
    if not isinstance(value, str) or spec.kind is str or spec.many:
        return None if spec.optional and value in ("none", "None") else value
    if spec.optional and value.lower() == "none":
        return None
    if spec.kind is bool:
        booleans = {"true": True, "false": False}
        if value.lower() not in booleans:
            raise ValueError(f"{name}={shown(value)} is not True or False")
        return booleans[value.lower()]
    try:
        return as_number(value, spec.kind)
    except ValueError as error:
        raise ValueError(f"{name}={shown(value)} {error}") from None


# Numbers as everybody reads them: no 1_000, 0x10, 010 (8 to some) or 1:30 (90 to YAML).
WRITTEN = {
    int: re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    float: re.compile(r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?|inf|infinity|nan)", re.I),
}


def as_number(text: str, kind: type):
    """The int or float that a text says, in plain decimal digits. Raises ValueError: "is not a whole number"."""
    try:
        if WRITTEN[kind].fullmatch(text):
            return kind(text)
    except ValueError:  # of more digits than Python reads
        pass
    how = " in plain decimal digits" if re.match(r"[-+]?(0[0-9a-z_]|[0-9][0-9.]*[_:])", text, re.I) else ""
    raise ValueError(f"is not {KINDS[kind]}{how}")


def some_path(text: str) -> Path:
    """A type for `argparse`: a path that is not empty, which would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty")
    return Path(text)


def new_path(text: str) -> Path:
    """A type for `argparse`: a path that can be written to, as far as its name tells."""
    wrong = "is empty" if not text else what_is_wrong_with(text)
    if wrong:
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong}")
    return Path(text)


def number_type(kind: type, low: float | None = None, high: float | None = None):
    """A type for `argparse`: a number, of at least `low` and at most `high`, in plain decimal digits."""

    def read(text: str):
        try:
            value = as_number(text, kind)
            if low is not None and not value >= low:
                raise ValueError(f"is not {KINDS[kind]}")
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}" + f" of at least {low}" * (low is not None)) from None
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {high}")
        return value

    return read


# ---------------------------------------------------------------------------------------------------------------
# YAML, and both together
# ---------------------------------------------------------------------------------------------------------------


MOST_BYTES = 100_000  # of a YAML file: fifty times config.yaml, and what is read within seconds


class _PlainLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error instead of the last one winning, and in which nothing is an alias
    or has a tag.

    Aliases of aliases make a few hundred bytes stand for billions of values. As in YAML 1.2, a plain word is a truth value if
    it is true or false, and a number if it is in decimal digits: `no` and `1:30`, to YAML 1.1 False and 90, are texts.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(f"line {event.start_mark.line + 1}: an alias (*{event.anchor}); write the value out")
        event = self.peek_event()
        if event.tag is not None:  # which makes 90 of 1:30, a set, a date or an object
            raise ValueError(f"line {event.start_mark.line + 1}: a tag ({event.tag}); write the value without it")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping as a key: the constructor says what is wrong with it
            if key.value in seen:
                raise ValueError(f"the key {shown(key.value)} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for kind, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", WRITTEN[int].pattern, "-+0123456789"),
    (
        "float",
        r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), list(first))


def parse_yaml(text: str):
    """The value that a YAML text says. Raises yaml.YAMLError, ValueError and RecursionError."""
    return yaml.load(text, Loader=_PlainLoader)


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file; ValueError in one line for whatever is wrong with it."""
    try:
        values = parse_yaml(read_text(path, MOST_BYTES))
    except OSError as error:
        raise ValueError(f"config={path!r}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"config={path!r}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config={path!r} must be a list of `name: value` lines")
    return values


def _read_options(path: str, known: dict[str, Spec]) -> dict:
    """What a YAML file gives, aliases replaced by the names they stand for. Raises ValueError for a name that is not known."""
    values = read_yaml(path)
    aliases = {alias: name for name, spec in known.items() for alias in spec.aliases}
    for alias in aliases.keys() & values.keys():
        if aliases[alias] in values:
            raise ValueError(f"config={path!r}: {alias!r} is another name of {aliases[alias]!r}; drop one of them")
        values[aliases[alias]] = values.pop(alias)
    for name in values:
        if name not in known:
            raise ValueError(f"config={path!r}: unknown key {shown(name)}{did_you_mean(name, known)}")
    return values


def over(values: dict, given: dict, known: dict[str, Spec]) -> dict:
    """The values with the given ones over them; of an option that may be repeated, those that are given come after."""
    both = [
        name for name, spec in known.items() if spec.repeat and isinstance(values.get(name), (list, tuple)) and given.get(name)
    ]
    return values | given | {name: [*values[name], *given[name]] for name in both}


def _did_you_mean_flag(word: str, flags: list[str]) -> str:
    """A suggestion of a flag; for one letter (`-b`) those that begin with it, as there are no short flags but -h."""
    if re.fullmatch(r"-\w", word):
        close = sorted({flag for flag in flags if flag.startswith(f"-{word}") and not flag.startswith("--no-")})
        one_of = "one of " if len(close) > 1 else ""
        return f"; did you mean {one_of}{', '.join(close)}?" if close else ""
    return did_you_mean(word, [flag for flag in flags if flag.startswith("--")])


def read_values(
    model_type: type,
    others: tuple[type, ...],
    description: str,
    argv: list[str] | None,
    defaults: dict,
    prog: str | None = None,
) -> tuple[dict, OneLineParser]:
    """What flags and, under them, a YAML file give, by name and converted, and the parser, whose `error` ends in one line.

    `model_type.values_that_hold(values, given)` says which values of the file still hold beside those of the command line, and
    `model_type.more_help(given)` what --help lists besides: (title, text, {line: help}).
    """
    parser = make_parser(model_type, others, description, defaults, prog)
    known = {name: spec for config in (model_type, *others) for name, spec in specs(config).items()}
    argv = sys.argv[1:] if argv is None else argv
    if asked := {"-h", "--help"}.intersection(argv):
        given = vars(parser.parse_known_args([word for word in argv if word not in asked])[0])
        try:
            for title, text, lines in model_type.more_help(given):
                _add_lines(parser.add_argument_group(title, text), lines)
        except ValueError as error:
            parser.error(str(error))
    given, rest = parser.parse_known_args(argv)
    given = vars(given)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        what = f"unknown option {rest[0]}" if rest[0].startswith("-") else f"a value without an option: {rest[0]!r}"
        parser.error(f"{what}{_did_you_mean_flag(rest[0].split('=')[0], flags)}")
    path = given.pop("config")
    if "config" in parser.repeated:
        parser.error(f"--config is given more than once ({', '.join(parser.repeated['config'])}); a run takes one file")
    parser.given = frozenset(given)
    try:
        values = {} if path is None else model_type.values_that_hold(_read_options(path, known), given)
        return {name: convert(name, value, known[name]) for name, value in over(values, given, known).items()}, parser
    except ValueError as error:
        parser.error(str(error))
