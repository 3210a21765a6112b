"""The points of a sweep: which runs its YAML file asks for, what they are called, and whether their options fit."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from options.fields import as_words, did_you_mean, specs
from options.layers import layer_label
from options.parser import parse_yaml, read_yaml
from options.runs import PROGRAMS, Options, Program, parse_options, same_value
from options.training import RESUME_MAY_CHANGE

ROOT = Path(__file__).resolve().parent.parent  # where the programs are
KEYS = ("program", "options", "grid", "seed")
MOST_POINTS = 100_000
LONGEST_NAME = 255  # bytes, of a folder in most file systems
SET_BY_THE_SWEEP = ("output_dir", "resume", "export")


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder: what varies
    program: str
    values: dict  # options by name, as in the sweep
    varying: dict  # those of them in which the points differ

    @property
    def test_only(self) -> bool:
        """Whether the run evaluates a checkpoint instead of training."""
        return str(self.values.get("test_only")).lower() == "true"

    def argv(self, folder: Path) -> list[str]:
        """The command line after the program; a training goes on with the run in this folder."""
        words = []
        for name, value in self.values.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [*words, "--output_dir", str(folder / self.name), *["--resume"] * (not self.test_only)]


def combinations(axes: dict) -> Iterator[dict]:
    """Every choice of one value per name; a value that is not a list is the only choice."""
    choices = [value if isinstance(value, list) else [value] for value in axes.values()]
    for values in itertools.product(*choices):
        yield dict(zip(axes, values, strict=True))


def read_sweep(path: str, changes: list[str]) -> tuple[list[tuple[str, dict]], list[str]]:
    """Points (program, options by name) and axes of a sweep file, changed by `--set name=v1,v2`. Raises ValueError.

    A mapping of the grid may have a program and options of its own; `program` is then an axis, and the first one.
    """
    sweep = read_yaml(path)
    for key in sweep:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, KEYS)}; a sweep has {', '.join(KEYS)}")
    options, grid = sweep.get("options") or {}, sweep.get("grid") or {}
    grids = [dict(one) if isinstance(one, dict) else one for one in (grid if isinstance(grid, list) else [grid])]
    if not isinstance(options, dict) or not all(isinstance(one, dict) for one in grids):
        raise ValueError(f"{path}: options is a mapping, and grid a mapping or a list of mappings, of option names to values")
    programs = [one.pop("program", sweep.get("program")) for one in grids]
    own = [one.pop("options", None) or {} for one in grids]
    for program in programs:
        find_program(program, path)
    every = {"seed": sweep["seed"]} if "seed" in sweep else {}
    axes = [name for one in [*grids, every] for name in one]
    for name, values in map(parse_change, changes):
        grids, own = ([{key: value for key, value in one.items() if key != name} for one in ones] for ones in (grids, own))
        options = {key: value for key, value in options.items() if key != name}
        every[name] = values
        axes.append(name)
    for one in [options, every, *grids, *own]:
        if not isinstance(one, dict):
            raise ValueError(f"{path}: options is a mapping of option names to values")
        check_values(path, one)
    refuse_too_many(path, [one | every for one in grids])
    points = [
        (program, options | constants | point)
        for program, constants, one in zip(programs, own, grids, strict=True)
        for point in combinations(one | every)
    ]
    # What --set removed may leave twins. A dict of texts finds them in one pass.
    distinct = list({json.dumps(point, sort_keys=True): point for point in points}.values())
    axes = sorted(dict.fromkeys(axes), key="seed".__eq__)  # the seed last
    return distinct, ["program", *axes] if len(set(programs)) > 1 else axes


def refuse_too_many(path: str, grids: list[dict]) -> None:
    """Raise ValueError with the number of points of these grids, if there are too many; none of them is made."""
    sizes = [math.prod(len(values) for values in grid.values() if isinstance(values, list)) for grid in grids]
    if (count := sum(sizes)) > MOST_POINTS:
        raise ValueError(f"{path}: asks for {count:,} runs, more than the {MOST_POINTS:,} of a sweep; drop values or axes")


def find_config(points: list[Point], sweep: str) -> list[Point]:
    """The points with `config:` as a file that is there: seen from here, else beside the sweep's file, else among the programs.

    Names of points stay, whatever folder the sweep is started from.
    """
    found = []
    for point in points:
        config = point.values.get("config")
        if isinstance(config, str):
            candidates = [Path(config), Path(sweep).parent / config, ROOT / config]
            config = next((str(path) for path in candidates if path.is_file()), config)
            point = point._replace(values=point.values | {"config": config})
        found.append(point)
    return found


def program_path(name: str) -> Path:
    return ROOT / name


def find_program(name: str, path: str) -> Program:
    """A command line of ours, or a Python file of another one that has its `PROGRAM`. Raises ValueError, naming the sweep."""
    if isinstance(name, str) and name in PROGRAMS:
        return PROGRAMS[name]
    file = program_path(str(name))
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{path}: program is {name!r}; give {', '.join(PROGRAMS)} or a Python file that has a PROGRAM")
    program = _program_in(file.resolve())
    if not isinstance(program, Program):
        raise ValueError(f"{path}: program {name} has no PROGRAM, as examples/compare_with_timm.py has it")
    return program


@functools.cache  # every point of a sweep asks for its program, several times
def _program_in(file: Path) -> object:
    """What the Python file calls PROGRAM, or None."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return getattr(module, "PROGRAM", None)


def parse_change(change: str) -> tuple[str, list]:
    """name=v1,v2 -> name and values, which are written as in YAML."""
    name, equals, text = change.partition("=")
    try:
        values = parse_yaml(f"[{text}]")
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if not name or not equals or not values:
        raise ValueError(f"--set {change!r} is not name=value or name=value1,value2")
    return name, values


def check_values(path: str, options: dict) -> None:
    for name, value in options.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is not the name of an option")
        if value == []:
            raise ValueError(f"{path}: {name} has no values")
        values = value if isinstance(value, list) else [value]
        flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for one in flat:
            if one is not None and not isinstance(one, (str, int, float)):
                raise ValueError(f"{path}: {name} has the value {one}, which is neither a number nor a text")


def name_points(points: list[tuple[str, dict]], axes: list[str]) -> list[Point]:
    """Points with a name each: their values on the axes. So a part of a sweep has the names that the whole has."""
    named = []
    for program, values in points:
        of_axis = {"program": find_program(program, program).family} | values
        varying = {}
        for name in (name for name in axes if name in of_axis):
            varying |= readable(name, of_axis[name])
        named.append(Point(name_of(varying, values), program, values, varying))
    return named


def readable(name: str, value) -> dict:
    """A value on an axis as names, tables and figures have it: a class by its name, options of it as options of their own."""
    if name == "layer" and isinstance(value, str):
        return {name: layer_label(value)}
    if name == "mixer_option":
        texts = value if isinstance(value, list) else [value] * (value is not None)
        return {option: setting for option, _, setting in (str(text).partition("=") for text in texts)}
    return {name: value}


def name_of(varying: dict, values: dict) -> str:
    """The folder of the point that has these values, of which `varying` are on the axes."""
    plain = ("program", "layer")
    parts = [as_word(value) if name in plain else f"{name}-{as_word(value)}" for name, value in varying.items()]
    return "_".join(parts) or as_word(layer_label(str(values.get("layer", "run"))))


def leave_out_unread(points: list[Point]) -> tuple[list[Point], str]:
    """The points without what their models do not read, each run once, and a line that says so ("" if all is read).

    Whether a value is read depends on its own point alone, so names are those of the whole sweep in a part of it too. A point
    with a mistake stays as it is: `check_points` says what is wrong.
    """
    kept, because = {}, {}
    for point in points:
        unread = {name: why for name, why in _unread(point).items() if name in point.varying}
        for name, (other, value) in unread.items():
            because.setdefault(name, {}).setdefault(f"{other}={as_words(value)}")
        values, varying = ({n: v for n, v in d.items() if n not in unread} for d in (point.values, point.varying))
        one = Point(name_of(varying, values), point.program, values, varying) if unread else point
        kept.setdefault(json.dumps(one, sort_keys=True), one)
    if not because:
        return points, ""
    what = "; ".join(f"{name} is not read under {_some(list(others))}" for name, others in because.items())
    return list(kept.values()), f"{what}; left out there, {len(points)} combinations are {len(kept)} runs"


def _some(words: list[str], most: int = 6) -> str:
    return ", ".join(words[:most]) + f" and {len(words) - most} others" * (len(words) > most)


def _unread(point: Point) -> dict[str, tuple]:
    """Options that the point's model does not read, each with the option that makes it so and its value."""
    if "help" in point.values or not point.varying.keys() & _model_options(point):  # saves a parser for each of many points
        return {}
    try:
        model = options_of(point, Path())[0].model
    except ValueError:
        return {}
    return {name: (other, getattr(model, other)) for name, other in model.without_effect(defaults=True).items()}


def _model_options(point: Point) -> set[str]:
    return specs(find_program(point.program, point.name).model).keys() - {"layer"}


def as_word(value) -> str:
    """A value as part of a folder's name."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in text)


def check_points(points: list[Point], folder: Path) -> dict[str, dict]:
    """Every option of each point's run, by the name of the point.

    Raises ValueError for the first point whose options do not fit, or whose folder holds a run with others.
    """
    counts, runs, found = Counter(point.name for point in points), {}, {}
    for point in points:
        if "help" in point.values:
            raise ValueError(f"{point.name}: help is no option of a run; leave it out")
        for name in SET_BY_THE_SWEEP:
            if name in point.values:
                raise ValueError(f"{point.name}: {name} is set by the sweep; leave it out")
        if counts[point.name] > 1:
            raise ValueError(
                f"two points would be named {point.name}; make their values differ in letters or digits, and classes in name"
            )
        if (length := len(os.fsencode(point.name))) > LONGEST_NAME:
            raise ValueError(
                f"{point.name[:40]}...: the folder's name would have {length} bytes, of which {LONGEST_NAME} are allowed; "
                "put what does not vary into options instead of grid, and long values into files that config: names"
            )
        options = found[point.name] = resolved(point, folder)
        if options["test_only"] and not point.test_only:
            raise ValueError(f"{point.name}: test_only is set by a file of options; set it in the sweep, which must know of it")
        same = runs.setdefault(json.dumps(options | {"output_dir": ""}), point.name)
        if same != point.name:
            raise ValueError(f"{same} and {point.name} are the same run; drop one of them")
        check_folder(point, options, folder / point.name)
    return found


def check_folder(point: Point, options: dict, folder: Path) -> None:
    """Raise ValueError if the folder holds a run with other options; one without a schedule may be made longer."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{point.name}: {folder} is a file, not a folder; remove it, or use another --output_dir")
    path = folder / "config.yaml"
    for name, value in (read_yaml(str(path)) if path.exists() else {}).items():
        may_change = name in RESUME_MAY_CHANGE
        if name == "num_epochs" and value != options[name]:
            may_change = value < options[name] and options["scheduler"] == "none" and not options["early_stopping"]
        elif name == "early_stopping":
            may_change = False
        if name in options and not same_value(name, options[name], value) and not may_change:
            raise ValueError(
                f"{point.name}: {folder} holds a run with {name}={value}, not {options[name]}; "
                "remove it, or use another --output_dir"
            )


def resolved(point: Point, folder: Path) -> dict:
    """Every option of the point's run by name. Raises ValueError with the message that its program would end with."""
    return options_of(point, folder)[0].as_dict()


def stated(point: Point, folder: Path) -> dict:
    """Those options of the point's run that the sweep or a file that it names gives. Raises ValueError as `resolved` does."""
    options, names = options_of(point, folder)
    return {name: value for name, value in options.as_dict().items() if name in names}


def options_of(point: Point, folder: Path) -> tuple[Options, set[str]]:
    """The checked options of the point's run, and the names of those that are stated. Raises ValueError as `resolved` does."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            options, parser = parse_options(find_program(point.program, point.name), "", point.argv(folder), prog=point.program)
    except SystemExit:
        raise ValueError(f"{point.name}: {message.getvalue().split('error: ', 1)[-1].strip()}") from None
    return options, set(parser.stated)
