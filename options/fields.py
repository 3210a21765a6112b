"""Fields of dataclasses that are options: what each accepts, its checks, and values from texts.

Knows no particular option and needs no torch: the table of options is `options/`, the parser is `options/parser.py`.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import reprlib
from dataclasses import Field, field, fields
from typing import NamedTuple

from options.reading import as_path


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
    return did_you_mean(name, valid) or "; a custom mixer is FILE.py:Class or package.module:Class"


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


def check_option(name: str, value, spec: Spec):
    """`value` as the option holds it: lists become tuples, aliases stay. Raises ValueError."""
    if value is None and spec.optional:
        return None
    if not spec.many:
        return check_one(name, value, spec)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name}={shown(value)} is not a list of at least one value; in a file it is written as [1, 2]")
    return tuple(check_one(name, item, spec) for item in value)


def check_fields(config) -> None:
    """Check type, choices and range of every option of a (frozen) config."""
    for name, spec in specs(type(config)).items():
        object.__setattr__(config, name, check_option(name, getattr(config, name), spec))


def build(config: type, values: dict, **more):
    """A config from those of the plain values, by name, that are its own."""
    return config(**{name: values[name] for name in specs(config) if name in values} | more)


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


# The most that an option accepts, where nothing smaller is in its nature: far above what any run needs.
SIDE = 2**14  # of an image, a map or a window


TOKENS = 2**24
WIDTH = 2**20  # channels or features
LAYERS = 10**4
BATCH = 10**7  # images
IMAGES = 10**10
EPOCHS = 10**7
LARGEST = 1e38  # of a number that float32 holds
