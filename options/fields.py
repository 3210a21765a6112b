"""Dataclass fields that are options: what each accepts, its checks, and its value from text.

Knows no particular option and needs no torch; the parser is `options/parser.py`.
"""

import difflib
import math
import numbers
import operator
import os
import re
from dataclasses import Field, field, fields
from typing import NamedTuple


class Spec(NamedTuple):
    """Values that an option accepts: `low` to `high` inclusive, `below` exclusive; `least` is the smallest next to 0.

    Every number has a `high` or `below` that no real run reaches, so that a typing error ends in one line and not in a crash
    wherever the number is used.
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
    repeat: bool = False  # the flag can be repeated, and adds to the values of a file
    flag: bool = True  # False: only files can set it
    path: bool = False  # "~" stands for the home folder


NOT_GIVEN = object()  # stands for the default of an option that its config decides (`option(decided=True)`)


def option(default, help: str, *, kind: type | None = None, many: bool = False, decided: bool = False, **accepts) -> Field:
    """Make a dataclass field that is also a flag, of the type of its default, or of `kind` where the default is None.

    With `decided` the field starts as `NOT_GIVEN`, so that the config can tell a default from the same value given: its
    `__post_init__` must call `decide`. `--help` shows the default.
    """
    many = many or isinstance(default, tuple)
    kind = kind or type(default[0] if many else default)
    spec = Spec(kind, help, default, many=many, optional=default is None, **accepts)
    return field(default=NOT_GIVEN if decided else default, metadata={"option": spec})


def decide(config, values: dict) -> None:
    """Fill the `decided` options of a frozen config that were not given: with these values, else with their defaults."""
    for name, spec in specs(type(config)).items():
        if getattr(config, name) is NOT_GIVEN:
            object.__setattr__(config, name, values.get(name, spec.default))


def with_default(config: type, name: str, default, decided: bool = False) -> Field:
    """Redeclare an inherited option with another default; `decided` as in `option`."""
    spec = config.__dataclass_fields__[name].metadata["option"]
    return field(default=NOT_GIVEN if decided else default, metadata={"option": spec._replace(default=default)})


def specs(config: type) -> dict[str, Spec]:
    """Return the options of a config dataclass by name."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


# Options of other code bases, and ours.
SYNONYMS = {
    "aa": "auto_augment",
    "attention_probs_dropout_prob": "attention_dropout",
    "attention_type": "layer",
    "bs": "batch_size",
    "depth": "num_layers",
    "drop": "dropout",
    "embed_dim": "d_model",
    "epochs": "num_epochs",
    "exp_name": "output_dir",
    "expansion_steps": "expansion_step",
    "hidden_dropout_prob": "dropout",
    "hidden_size": "d_model",
    "image_size": "resize",
    "img_size": "resize",
    "input_size": "resize",
    "intermediate_size": "d_mlp",
    "learning_rate": "lr",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "opt": "optimizer",
    "results_path": "output_dir",
    "save_model_every": "save_every",
    "sched": "scheduler",
    "smoothing": "label_smoothing",
    "wd": "weight_decay",
    "workers": "num_workers",
}


def _bare(name) -> str:
    return str(name).removeprefix("--").lower().replace("-", "_")


def did_you_mean(name: str, valid) -> str:
    """Suggest the valid name for a synonym, or else the closest in spelling, as the end of an error message."""
    names = {_bare(one): one for one in valid}
    synonym = SYNONYMS.get(_bare(name))
    close = difflib.get_close_matches(synonym if synonym in names else _bare(name), names, n=1, cutoff=0.65)
    return f"; did you mean {names[close[0]]}?" if close else ""


def as_words(value) -> str:
    """Write a value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _as_kind(value, kind: type):
    """Convert numbers of other types, such as NumPy's, to Python's; an integer beyond any float becomes infinite."""
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.inf
    return value


def check_one(name: str, value, spec: Spec):
    """Check one value and return it; integers become floats for a float option. Raises ValueError."""
    value = _as_kind(value, spec.kind)
    if type(value) is not spec.kind:
        raise ValueError(f"{name}={value!r} is not {KINDS[spec.kind]}")
    if spec.kind is str:
        _check_text(name, value)
    if spec.path:
        value = os.path.expanduser(value)
    if spec.kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} is not a finite number")
    if spec.choices and value not in spec.choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(spec.choices)}{did_you_mean(value, spec.choices)}")
    for bound, words, holds in (
        (spec.low, "at least", operator.ge),
        (spec.high, "at most", operator.le),
        (spec.below, "below", operator.lt),
    ):
        if bound is not None and not holds(value, bound):
            raise ValueError(f"{name}={value!r} must be {words} {bound}")
    if spec.least is not None and 0 < value < spec.least:
        raise ValueError(f"{name}={value} must be 0 or at least {spec.least}")
    return value


def check_value(name: str, value, kind: type, low: float, high: float):
    """Return the value as a Python number of this kind. Raises ValueError for another type, or a value out of range."""
    return check_one(name, value, Spec(kind, "", low=low, high=high))


def _check_text(name: str, value: str) -> None:
    """Raise ValueError for a text that no file, table or terminal can hold."""
    if value == "":
        raise ValueError(f"{name}='' is empty; give a value or leave {name} out")
    if any(ord(character) < 32 or character == "\x7f" for character in value):
        raise ValueError(f"{name}={value!r} holds a control character; use letters that can be printed")
    if any("\ud800" <= character <= "\udfff" for character in value):  # as Python reads bytes of another encoding
        raise ValueError(f"{name}={value!r} is not UTF-8; use another name")


def check_option(name: str, value, spec: Spec):
    """Check a value and return it; lists become tuples. Raises ValueError."""
    if value is None and spec.optional:
        return None
    if not spec.many:
        return check_one(name, value, spec)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name}={value!r} is not a list of at least one value; in a file it is written as [1, 2]")
    return tuple(check_one(name, item, spec) for item in value)


def check_fields(config) -> None:
    """Check type, choices and range of every option of a frozen config."""
    for name, spec in specs(type(config)).items():
        object.__setattr__(config, name, check_option(name, getattr(config, name), spec))


def build(config: type, values: dict, **more):
    """Build a config from the values that are options of it."""
    return config(**{name: values[name] for name in specs(config) if name in values} | more)


def convert(name: str, value, spec: Spec):
    """Convert text from the command line (or `1e-3`, a text in YAML) to the option's type."""
    if spec.optional and as_words(value).lower() == "none":
        return None
    if isinstance(value, list) and spec.many:
        return tuple(convert(name, item, spec._replace(many=False, optional=False)) for item in value)
    if not isinstance(value, str) or spec.kind is str or spec.many:
        return value
    if spec.kind is bool:
        booleans = {"true": True, "false": False}
        if value.lower() not in booleans:
            raise ValueError(f"{name}={value!r} is not True or False")
        return booleans[value.lower()]
    try:
        return as_number(value, spec.kind)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} {error}") from None


# Numbers that cannot be misread: no 1_000, 0x10, 010 (8 to some) or 1:30 (90 to YAML).
WRITTEN = {
    int: re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    float: re.compile(r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?|inf|infinity|nan)", re.I),
}


def as_number(text: str, kind: type):
    """Parse an int or float in plain decimal digits. Raises ValueError: "is not a whole number"."""
    if WRITTEN[kind].fullmatch(text):
        return kind(text)
    notation = " in plain decimal digits" if re.match(r"[-+]?(0[0-9a-z_]|[0-9][0-9.]*[_:])", text, re.I) else ""
    raise ValueError(f"is not {KINDS[kind]}{notation}")


# Upper bounds of options, far above what any run needs.
SIDE = 2**14  # of an image, a map or a window
TOKENS = 2**24
WIDTH = 2**20  # channels or features
LAYERS = 10**4
BATCH = 10**7  # images
IMAGES = 10**10
EPOCHS = 10**7
LARGEST = 1e38  # of a number that float32 holds
