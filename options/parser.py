"""Command lines and YAML files from dataclasses whose fields are options; errors are one line.

Knows no particular option and needs no torch: what a field accepts stands in `options/fields.py`.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import yaml

from options.fields import KINDS, WRITTEN, Spec, as_number, as_words, convert, did_you_mean, specs
from options.reading import path_problem, read_text

# ---------------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors and warnings are one line each."""

    given: frozenset[str] = frozenset()  # options on the command line
    stated: dict = {}  # noqa: RUF012  values from the command line and its file, by name
    file: str | None = None  # --config

    def error(self, message: str):
        """Print the message in one line, with the file that gave the value, and exit with status 2."""
        message = re.sub(r"^argument (\S+): expected one argument$", r"\1 needs a value", message)
        message = re.sub(r"^argument (\S+): expected at least one argument$", r"\1 needs at least one value", message)
        name = re.match(r"(\w+)=", message)
        in_file = name and name[1] in self.stated and name[1] not in self.given
        self.exit(2, self._line("error", f"--config {self.file!r}: {message}" if in_file else message))

    def warn(self, message: str) -> None:
        self._print_message(self._line("warning", message), sys.stderr)

    def _line(self, kind: str, message: str) -> str:
        # All processes that torchrun starts on a machine read the same options; only the first one prints.
        silent = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"
        return "" if silent else f"{self.prog}: {kind}: {' '.join(message.split())}\n"


def _add_option(group, name: str, spec: Spec, default) -> None:
    """Add a flag with a text value: `convert` and the configs raise the same errors for flags, YAML and Python."""
    suffix = "" if default is None else f" (default: {as_words(default)})".replace("%", "%%")
    metavar = spec.metavar or ("{" + ",".join(spec.choices) + "}" if spec.choices else spec.kind.__name__.upper())
    flags = [f"--{name}", *(f"--{alias}" for alias in spec.aliases)]
    kwargs = {"dest": name, "default": argparse.SUPPRESS, "help": spec.help + suffix, "metavar": metavar}
    if spec.kind is bool:
        group.add_argument(*flags, **kwargs | {"nargs": "?", "const": "True", "metavar": "True|False"})
        no = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(f"--no-{name}", action="store_const", const="False", **no)
    else:
        group.add_argument(*flags, **kwargs, nargs="+" if spec.many else None, action="extend" if spec.repeat else None)


def make_parser(
    model_type: type, others: tuple[type, ...], description: str, defaults: dict, prog: str | None
) -> OneLineParser:
    """Make a parser of the options of a model and of other configs, which take precedence for an option in both.

    --help lists an option under its `group`, or else under the `heading` of its config.
    """
    parser = OneLineParser(prog=prog, description=description, usage="%(prog)s [options]", allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)  # -1e-3 is a value as well, not a flag
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file of options; flags on the command line win"
    )
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


def nonempty_path(text: str) -> Path:
    """`argparse` type: a path that is not empty, as `Path("")` is the working directory; "~" is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty")
    return Path(text).expanduser()


def output_path(text: str) -> Path:
    """`argparse` type: a path that can be written to, as far as its name shows."""
    path = nonempty_path(text)
    if problem := path_problem(str(path)):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return path


def number_type(kind: type, low: float | None = None, high: float | None = None):
    """Make an `argparse` type: a number from `low` to `high` in plain decimal digits."""

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


MOST_BYTES = 100_000  # largest YAML file: fifty times a config.yaml, and parsed within seconds


class _PlainLoader(yaml.SafeLoader):
    """YAML without duplicate keys, aliases and tags.

    Nested aliases would expand a few hundred bytes to billions of values. As in YAML 1.2, only true and false are booleans and
    only decimal digits are numbers: `no` and `1:30`, in YAML 1.1 False and 90, are texts.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: an alias (*{event.anchor}); write the value out")
        if event.tag is not None:  # a tag could turn 1:30 into 90, or make a set, a date or an object
            raise ValueError(f"line {event.start_mark.line + 1}: a tag ({event.tag}); write the value without it")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping as a key: the constructor rejects it
            if key.value in seen:
                raise ValueError(f"the key {key.value!r} is given twice")
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
    """Parse YAML. Raises ValueError with the line and the problem."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        start = error.context_mark
        context = f"{error.context}{f' from line {start.line + 1}' if start else ''}, " if error.context else ""
        raise ValueError(f"line {error.problem_mark.line + 1}: {context}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def read_yaml(path: str) -> dict:
    """Read the mapping in a YAML file. Raises ValueError in one line for anything else."""
    try:
        values = parse_yaml(read_text(path, MOST_BYTES))
    except OSError as error:
        raise ValueError(f"{path!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path!r} must be a mapping, one `name: value` per line")
    return values


def _read_options(path: str, known: dict[str, Spec]) -> dict:
    """Read options from a YAML file, by their names without aliases. Raises ValueError for an unknown name."""
    values = read_yaml(path)
    aliases = {alias: name for name, spec in known.items() for alias in spec.aliases}
    for alias in aliases.keys() & values.keys():
        if aliases[alias] in values:
            raise ValueError(f"{path!r}: {alias!r} is an alias of {aliases[alias]!r}; drop one of them")
        values[aliases[alias]] = values.pop(alias)
    for name in values:
        if name not in known:
            raise ValueError(f"{path!r}: unknown key {name!r}{did_you_mean(name, known)}")
    return values


def merge(values: dict, given: dict, known: dict[str, Spec]) -> dict:
    """Override values by the given ones; a repeatable option keeps both, the given ones last."""
    both = [
        name for name, spec in known.items() if spec.repeat and isinstance(values.get(name), (list, tuple)) and given.get(name)
    ]
    return values | given | {name: [*values[name], *given[name]] for name in both}


def read_values(
    model_type: type,
    others: tuple[type, ...],
    description: str,
    argv: list[str] | None,
    defaults: dict,
    prog: str | None = None,
) -> tuple[dict, OneLineParser]:
    """Read flags and a YAML file, which flags override. Returns the converted values by name, and the parser.

    `model_type.drop_overridden(values, given)` drops values of the file that flags make void, and
    `model_type.more_help(given)` adds groups to --help: (title, text, {line: help}).
    """
    parser = make_parser(model_type, others, description, defaults, prog)
    known = {name: spec for config in (model_type, *others) for name, spec in specs(config).items()}
    argv = sys.argv[1:] if argv is None else argv
    if asked := {"-h", "--help"}.intersection(argv):
        given = vars(parser.parse_known_args([word for word in argv if word not in asked])[0])
        try:
            for title, text, lines in model_type.more_help(given):
                group = parser.add_argument_group(title, text)
                for line, help in lines.items():  # shown like flags, but never parsed
                    group.add_argument(f"--{line}", action="store_true", help=help.replace("%", "%%"))
        except ValueError as error:
            parser.error(str(error))
    given, rest = parser.parse_known_args(argv)
    given = vars(given)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        hint = did_you_mean(rest[0].partition("=")[0], flags)
        if rest[0].startswith("-"):
            parser.error(f"unknown option {rest[0]}{hint}")
        parser.error(f"a value without an option: {rest[0]!r}{hint or '; write its option before it, as in --seed 1'}")
    paths = list(dict.fromkeys(given.pop("config")))
    if len(paths) > 1:
        parser.error(f"--config is given more than once ({', '.join(paths)}); a run takes one file")
    parser.given = frozenset(given)
    parser.file = os.path.expanduser(paths[0]) if paths else None
    try:
        values = {} if parser.file is None else _read_options(parser.file, known)
    except ValueError as error:
        parser.error(f"--config {error}")
    try:
        parser.stated = merge(model_type.drop_overridden(values, given), given, known)
        parser.stated = {name: convert(name, value, known[name]) for name, value in parser.stated.items()}
        return parser.stated, parser
    except ValueError as error:
        parser.error(str(error))
