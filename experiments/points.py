"""Points of a sweep: the runs that its YAML file asks for, their names, and checks of their options."""

import contextlib
import functools
import io
import itertools
import json
import runpy
from pathlib import Path
from typing import NamedTuple

from options.fields import as_words, did_you_mean, specs
from options.layers import layer_label
from options.parser import parse_yaml, read_yaml
from options.runs import PROGRAMS, Options, Program, parse_options, same_value
from options.training import RESUME_MAY_CHANGE

ROOT = Path(__file__).resolve().parent.parent  # where the programs are
KEYS = ("program", "options", "grid", "seed", "select")
NOT_IN_A_SWEEP = ("output_dir", "resume", "export", "help")


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder: the values that vary
    program: str
    values: dict  # options by name, as in the sweep
    varying: dict  # the values in which the points differ
    chosen: tuple[tuple[str, object], ...] = ()  # options and the values that a first stage chose on validation images

    @property
    def test_only(self) -> bool:
        return str(self.values.get("test_only")).lower() == "true"

    def argv(self, folder: Path) -> list[str]:
        """Return the command line after the program; a training resumes the run in this folder."""
        words = []
        for name, value in self.values.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [*words, "--output_dir", str(folder / self.name), *["--resume"] * (not self.test_only)]


def read_sweep(path: str, changes: list[str]) -> tuple[list[tuple[str, dict]], list[str]]:
    """Read the points (program, options by name) and axes of a sweep file, changed by `--set name=v1,v2`.

    A mapping of the grid may have its own program and options; `program` is then the first axis. Raises ValueError.
    """
    sweep = read_yaml(path)
    for key in sweep:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(key, KEYS)}; a sweep has {', '.join(KEYS)}")
    shared, grids = sweep.get("options") or {}, sweep.get("grid") or {}
    grids = grids if isinstance(grids, list) else [grids]
    constants = [one.get("options") or {} for one in grids if isinstance(one, dict)]
    if not all(isinstance(one, dict) for one in [shared, *grids, *constants]):
        raise ValueError(f"{path}: options is a mapping, and grid a mapping or a list of mappings, of option names to values")
    changed = dict(map(parse_change, changes))
    programs, points, axes = [], [], {}
    for grid, own in zip(grids, constants, strict=True):
        programs.append(grid.get("program", sweep.get("program")))
        find_program(programs[-1], path)
        varying = {name: values for name, values in grid.items() if name not in ("program", "options")}
        axes |= varying
        fixed = {name: value for name, value in (shared | own).items() if name not in changed}
        varying = {name: values for name, values in varying.items() if name not in changed}
        varying |= ({"seed": sweep["seed"]} if "seed" in sweep else {}) | changed
        check_values(path, fixed | varying)
        choices = [values if isinstance(values, list) else [values] for values in varying.values()]
        points += [(programs[-1], fixed | dict(zip(varying, values, strict=True))) for values in itertools.product(*choices)]
    # Points can be equal without an axis that --set removed. A dict of texts finds them in one pass.
    distinct = list({json.dumps(point, sort_keys=True): point for point in points}.values())
    axes = [name for name in axes | changed if name != "seed"] + ["seed"] * ("seed" in {*axes, *changed, *sweep})
    return distinct, ["program", *axes] if len(set(programs)) > 1 else axes


def parse_change(change: str, flag: str = "--set") -> tuple[str, list]:
    """Parse name=v1,v2 into the name and the values, which are written as in YAML."""
    name, _, text = change.partition("=")
    try:
        values = parse_yaml(f"[{text}]")
    except ValueError:
        values = None
    if not name or not values:
        raise ValueError(f"{flag} {change!r} is not name=value or name=value1,value2")
    return name, values


def check_values(path: str, options: dict) -> None:
    for name, value in options.items():
        if name in NOT_IN_A_SWEEP:
            raise ValueError(f"{path}: {name} cannot be set in a sweep; leave it out")
        if value == []:
            raise ValueError(f"{path}: {name} has no values")
        values = value if isinstance(value, list) else [value]
        for one in itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in values):
            if not isinstance(name, str) or not isinstance(one, str | int | float | None):
                raise ValueError(f"{path}: {name}={one} is not an option with a number or a text")


def find_config(points: list[Point], sweep: str) -> list[Point]:
    """Find the file of `config:` from here, else beside the sweep's file, else among the programs.

    Names of points stay, whatever folder the sweep is started from.
    """
    found = []
    for point in points:
        if config := point.values.get("config"):
            candidates = [folder / str(config) for folder in (Path(), Path(sweep).parent, ROOT)]
            config = next((str(path) for path in candidates if path.is_file()), config)
            point = point._replace(values=point.values | {"config": config})
        found.append(point)
    return found


def program_path(name: str) -> Path:
    return ROOT / name


def find_program(name: str, path: str) -> Program:
    """Return a program of ours, or the `PROGRAM` of a Python file. Raises ValueError, naming the sweep."""
    if str(name) in PROGRAMS:
        return PROGRAMS[str(name)]
    file = program_path(str(name))
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{path}: program is {name!r}; give {', '.join(PROGRAMS)} or a Python file that has a PROGRAM")
    program = _globals_of(file.resolve()).get("PROGRAM")
    if not isinstance(program, Program):
        raise ValueError(f"{path}: program {name} has no PROGRAM, as examples/compare_with_timm.py has it")
    return program


@functools.cache  # every point of a sweep asks for its program, several times
def _globals_of(file: Path) -> dict:
    return runpy.run_path(str(file))


def name_points(points: list[tuple[str, dict]], axes: list[str]) -> list[Point]:
    """Name the points by their values on the axes, so that a part of a sweep has the names of the whole."""
    named = []
    for program, values in points:
        of_axis = {"program": find_program(program, program).family} | values
        varying = {}
        for name in (name for name in axes if name in of_axis):
            varying |= readable(name, of_axis[name])
        named.append(Point(name_of(varying, values), program, values, varying))
    return named


def group_points(points: list[Point]) -> list[list[Point]]:
    """Group the points that differ in their seed only: the rows of a summary."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(json.dumps(point.varying | {"seed": None}, sort_keys=True), []).append(point)
    return list(groups.values())


def readable(name: str, value) -> dict:
    """Return a value as names, tables and figures show it: a class by its name, its options as further options."""
    if name == "layer" and isinstance(value, str):
        return {name: layer_label(value)}
    if name == "mixer_option":
        texts = value if isinstance(value, list) else [value] * (value is not None)
        return {option: setting for option, _, setting in (str(text).partition("=") for text in texts)}
    return {name: value}


def name_of(varying: dict, values: dict) -> str:
    plain = ("program", "layer")
    parts = [as_word(value) if name in plain else f"{name}-{as_word(value)}" for name, value in varying.items()]
    return "_".join(parts) or as_word(layer_label(str(values.get("layer", "run"))))


def as_word(value) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in text)


def leave_out_unread(points: list[Point]) -> tuple[list[Point], str]:
    """Drop the values that a point's model does not read, and then repeated points; return a line about it, or "".

    Names depend on the point alone, so a part of a sweep has the names of the whole. A point with a mistake stays:
    `check_points` reports it.
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
    """Return the options that the point's model does not read, each with the option that makes it so and its value."""
    program = find_program(point.program, point.name)
    if not point.varying.keys() & specs(program.model).keys() - {"layer"}:  # saves a parser for each of many points
        return {}
    try:
        model = options_of(point, Path())[0].model
    except ValueError:
        return {}
    return {name: (other, getattr(model, other)) for name, other in model.without_effect(defaults=True).items()}


def check_points(points: list[Point], folder: Path) -> dict[str, dict]:
    """Return every option of each point's run, by the name of the point.

    Raises ValueError for the first point with wrong options, or with a folder that holds another run.
    """
    runs, found = {}, {}
    for point in points:
        if point.name in found:
            raise ValueError(
                f"two points would be named {point.name}; make their values differ in letters or digits, and classes in name"
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
        may_change = name in RESUME_MAY_CHANGE and name != "early_stopping"
        if name == "num_epochs" and value != options[name]:
            may_change = value < options[name] and options["scheduler"] == "none" and not options["early_stopping"]
        if name in options and not same_value(name, options[name], value) and not may_change:
            raise ValueError(
                f"{point.name}: {folder} holds a run with {name}={value}, not {options[name]}; "
                "remove it, or use another --output_dir"
            )


def resolved(point: Point, folder: Path) -> dict:
    """Return every option of the point's run by name. Raises ValueError with the message of its program."""
    return options_of(point, folder)[0].as_dict()


def options_of(point: Point, folder: Path) -> tuple[Options, set[str]]:
    """Return the checked options of the point's run, and the names that its values state. Raises ValueError as `resolved`."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            options, parser = parse_options(find_program(point.program, point.name), "", point.argv(folder), prog=point.program)
    except SystemExit:
        raise ValueError(f"{point.name}: {message.getvalue().split('error: ', 1)[-1].strip()}") from None
    return options, set(parser.stated)
