"""Hyperparameters chosen on validation images: a first stage trains every row of a sweep at every value.

The choice has the same budget for each row. It reads nothing but validation metrics.
"""

import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments.points import Point, check_values, group_points, name_of, parse_change
from experiments.report import as_cell, finished_summary
from options.data import is_task
from options.parser import read_yaml

MEASURES = {"val_top1": max, "val_loss": min}
FOLDER = "select"  # of the first stage, a sweep of its own within the folder of the sweep
SEED = 1000  # of the first stage, unless the sweep says otherwise


class Selection(NamedTuple):
    """Values to choose from, by option."""

    axes: dict[str, list]
    by: str
    seeds: list[int]


def read_selection(path: str, changes: list[str], by: str | None) -> Selection | None:
    """Read `select:` of a sweep file: values by option, `by` and `seed`; --select and --by win. Raises ValueError."""
    given = read_yaml(path).get("select") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: select is a mapping, such as {{lr: [3e-4, 1e-3, 3e-3], by: val_top1}}")
    axes = given | dict(parse_change(change, "--select") for change in changes)
    by, seeds = by or given.get("by", "val_top1"), axes.pop("seed", SEED)
    axes.pop("by", None)
    if not axes:
        if by != "val_top1":
            raise ValueError(f"--by {by} needs values to choose from: --select lr=3e-4,1e-3,3e-3")
        return None
    if by not in MEASURES:
        raise ValueError(f"--by {by} is neither {' nor '.join(MEASURES)}; nothing is chosen on test images")
    check_values(path, axes)
    axes = {name: values if isinstance(values, list) else [values] for name, values in axes.items()}
    return Selection(axes, by, seeds if isinstance(seeds, list) else [seeds])


def rows_of(points: list[Point], selection: Selection) -> list[list[Point]]:
    """Return the trainings of each row. Raises ValueError if a row sets an option that is to be chosen."""
    rows = [group for group in group_points(points) if not group[0].test_only]
    for name in selection.axes:
        if any(name in point.varying for point in points):
            raise ValueError(f"{name} varies in the sweep and is to be chosen by select; drop one of them")
    return rows


def candidates_of(row: list[Point], selection: Selection) -> list[tuple[dict, list[Point]]]:
    """Return every combination of values, with the points that try it."""
    found = []
    for values in itertools.product(*selection.axes.values()):
        choice = dict(zip(selection.axes, values, strict=True))
        tried = []
        for seed in selection.seeds:
            change = choice | {"seed": seed}
            varying = {name: value for name, value in row[0].varying.items() if name != "seed"} | change
            all_values = row[0].values | change
            tried.append(Point(name_of(varying, all_values), row[0].program, all_values, varying))
        found.append((choice, tried))
    return found


def first_stage(points: list[Point], selection: Selection) -> list[Point]:
    rows = rows_of(points, selection)
    return [point for row in rows for _, tried in candidates_of(row, selection) for point in tried]


def check_validation(options: dict[str, dict]) -> None:
    """Raise ValueError for a run of the first stage without validation images. options: of each run, by name."""
    for name, values in options.items():
        if not values["val_fraction"] and not is_task(values["dataset"]):
            raise ValueError(f"{name} has no validation images to choose on; set val_fraction, such as 0.1")


def choose(points: list[Point], folder: Path, selection: Selection) -> tuple[list[Point], list[str]]:
    """Return the points with the chosen values, and the names of those without a choice yet, which get the first values.

    A value counts once the runs of all its seeds have ended; ties go to the first value.
    """
    best, undecided = {}, []
    for row in rows_of(points, selection):
        scores = []
        for choice, tried in candidates_of(row, selection):
            found = [finished_summary(point, folder / FOLDER) for point in tried]
            if all(found):
                scores.append((statistics.fmean(one["best"][selection.by] for one in found), choice))
        names = [point.name for point in row]
        undecided += [] if scores else names
        first = {name: values[0] for name, values in selection.axes.items()}
        pick = MEASURES[selection.by](scores, key=lambda one: one[0])[1] if scores else first
        best |= dict.fromkeys(names, pick)
    chosen = {name: tuple((option, as_cell(value)) for option, value in pick.items()) for name, pick in best.items()}
    points = [
        point._replace(values=point.values | best.get(point.name, {}), chosen=chosen.get(point.name, ())) for point in points
    ]
    return points, undecided
