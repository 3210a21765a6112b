"""Results of a sweep: a row for all runs that differ in their seed only, as tables and as figures."""

import contextlib
import functools
import json
import math
import operator
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import comparison
from experiments.figures import draw, draw_curves, read_metrics, swept_options
from experiments.papers import as_tex, draw_ranking
from experiments.points import Point, as_word, group_points, options_of, resolved
from experiments.published import NOTE, Published, as_text, put_beside
from options.fields import specs
from options.parser import read_yaml
from options.training import TrainConfig
from runs import Stopped
from runs.files import as_csv, as_figure, write_atomically

FAILURE = "failure.txt"  # in the folder of a point whose last run failed
MEASURES = {  # column -> its place in summary.json, and its unit
    "top1": (("final", "test_top1"), 1),
    "top5": (("final", "test_top5"), 1),
    "best_top1": (("best", "test_top1"), 1),
    "parameters": (("parameters",), 1),
    "mflops_per_image": (("flops_per_image",), 1e6),
    "epoch_seconds": (("average_epoch_seconds",), 1),
    "latency_ms_per_image": (("latency_ms_per_image",), 1),
    "peak_memory_mb": (("peak_memory_bytes",), 1e6),
    "val_top1": (("best", "val_top1"), 1),
}
OPTIONAL = ("val_top1",)  # of runs that hold validation images out
HYPERPARAMETERS = [name for name, spec in specs(TrainConfig).items() if not spec.group and name != "num_epochs"]


COSTS_OF_MODEL = ("parameters", "flops_per_image", "latency_ms_per_image", "peak_memory_bytes")  # also in an evaluation
TOP1_NOTE = (
    "top1 and top5 are of the last epoch, or of the evaluated checkpoint, on the test set, in percent; means of the runs that "
    "ended, ± standard deviation. best_top1 is the test top-1 of the epoch with the best top-1 on validation images; without "
    "them (val_fraction 0) the test images choose that epoch, which flatters it."
)


class Beside(NamedTuple):
    """Numbers to put beside the rows of a summary: of others, by the name of the point; differences to a layer."""

    published: dict[str, Published]
    baseline: str | None


NOTHING = Beside({}, None)


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def read_summary(folder: Path) -> dict | None:
    """Read the summary.json of a run; None if there is none or if it is incomplete."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        numbers = [measure_in(summary, name) for name in MEASURES if name not in OPTIONAL] + [summary["epochs"]]
        return summary if isinstance(summary["finished"], bool) and all(map(math.isfinite, numbers)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_in(summary: dict, name: str) -> float:
    """Return a measure of the table from a run's summary; NaN for an optional one that is missing.

    Raises KeyError or TypeError for anything else.
    """
    path, unit = MEASURES[name]
    if name in OPTIONAL and path[-1] not in summary[path[0]]:
        return math.nan
    return functools.reduce(operator.getitem, path, summary) / unit


def read_evaluation(point: Point, folder: Path) -> dict | None:
    """Return the result of a point with test_only in the form of a run's summary; None if it has not been evaluated so."""
    wanted = point.values
    with contextlib.suppress(ValueError):  # of another sweep, whose `config:` or checkpoint is gone
        options, names = options_of(point, folder)
        wanted = {name: value for name, value in options.as_dict().items() if name in names}
    for path in sorted((folder / point.name).glob("test_results*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            given = found["options"] | {"checkpoint": found["checkpoint"]}
            if all(given[name] == value for name, value in wanted.items() if name in given):
                row = {f"test_{name}": found[name] for name in ("top1", "top5", "loss")}
                costs = {name: found[name] for name in COSTS_OF_MODEL}
                return {"finished": True, "epochs": 0, "final": row, "best": row, "average_epoch_seconds": math.nan, **costs}
    return None


def finished_summary(point: Point, folder: Path) -> dict | None:
    """Return the summary of the point's run if it has ended: by early stopping, or after the epochs that are asked for now."""
    if point.test_only:
        return read_evaluation(point, folder)
    summary = read_summary(folder / point.name)
    if not summary or not summary["finished"]:
        return None
    try:
        options = resolved(point, folder)
    except ValueError:  # of another sweep, whose `config:` or program is gone: the run's own file counts
        options = {}
        with contextlib.suppress(ValueError):
            options = read_yaml(str(folder / point.name / "config.yaml"))
    return summary if options.get("early_stopping") or summary["epochs"] == options.get("num_epochs") else None


def finished_summaries(points: list[Point], folder: Path) -> dict[str, dict]:
    """Return the summaries of the points that have ended, by name. Each point's options are resolved for it."""
    found = {point.name: finished_summary(point, folder) for point in points}
    return {name: summary for name, summary in found.items() if summary}


def is_finished(point: Point, folder: Path) -> bool:
    return finished_summary(point, folder) is not None


def with_earlier(points: list[Point], folder: Path) -> list[Point]:
    """Return these points and the ones that other sweeps started in the same folder; warn about a damaged note."""
    names = {point.name for point in points}
    earlier = []
    for path in sorted(path for path in folder.glob("*/point.json") if path.parent.name not in names):
        try:
            point = Point(**json.loads(path.read_text(encoding="utf-8")))
            if not (point.name == path.parent.name and isinstance(point.values, dict) and isinstance(point.varying, dict)):
                raise ValueError("values that do not fit")
            earlier.append(point)
        except (OSError, ValueError, TypeError) as error:
            warn_once(f"{path} is not the note of a point ({error}); the summary is made without it")
    return [*points, *earlier]


def summarize(points: list[Point], folder: Path, finished: dict[str, dict] | None = None) -> list[dict]:
    """Return a row for all points that differ in their seed only: means of finished runs, and standard deviations.

    finished: the result of `finished_summaries`, where it is known already.
    """
    finished = finished_summaries(points, folder) if finished is None else finished
    columns = list(dict.fromkeys(name for point in points for name in point.varying if name != "seed"))
    chosen = dict.fromkeys(name for point in points for name, _ in point.chosen)
    rows = []
    for group in group_points(points):
        summaries = [finished[point.name] for point in group if point.name in finished]
        failed = [point for point in group if point.name not in finished and failure_of(point, folder)]
        row = {name: as_cell(group[0].varying.get(name, "")) for name in columns}
        row |= {"runs": len(summaries), "of": len(group), "failed": len(failed)}
        row |= {name: dict(group[0].chosen).get(name, "") for name in chosen}
        for measure in MEASURES:
            values = [value for summary in summaries if not is_nan(value := measure_in(summary, measure))]
            row[measure] = statistics.fmean(values) if values else math.nan
            row[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    unused = [] if any(row["failed"] for row in rows) else ["failed"]  # the rule: no column of zeros
    unused += [name for name in OPTIONAL if all(math.isnan(row[name]) for row in rows)]
    unused += [f"{name}_std" for name in unused]
    return [{name: value for name, value in row.items() if name not in unused} for row in rows]


def as_cell(value):
    """Return a value of the grid as a number where it is one (YAML reads 1e-3 as a text), and lists as a word."""
    if isinstance(value, list):
        return as_word(value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def failure_of(point: Point, folder: Path) -> str:
    """Return the reason why the last run of a point failed, or an empty text."""
    path = folder / point.name / FAILURE
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def write_summary(points: list[Point], folder: Path, draw_plots: bool = True, beside: Beside = NOTHING) -> bool:
    """Write summary.csv, summary.md, summary.tex and the plots from the runs that have ended so far.

    Without space on the disk, warn and return False: runs are worth more than tables of them.
    """
    try:
        for name, data in _files_of(with_earlier(points, folder), folder, draw_plots, beside):
            write_atomically(folder / name, data)
    except Stopped as error:
        print(f"warning: {error}", file=sys.stderr)
        return False
    return True


def _files_of(points: list[Point], folder: Path, draw_plots: bool, beside: Beside) -> Iterator[tuple]:
    groups, published = group_points(points), beside.published
    finished = finished_summaries(points, folder)
    rows = summarize(points, folder, finished)
    swept = swept_options(rows)
    if published:
        rows = put_beside(rows, [next((published[p.name] for p in group if p.name in published), None) for group in groups])
    notes = [TOP1_NOTE, *[NOTE] * bool(published)]
    runs = [
        {
            point.varying.get("seed"): (measure_in(finished[point.name], "top1"), folder / point.name)
            for point in group
            if point.name in finished
        }
        for group in groups
    ]
    if beside.baseline:
        differences = comparison.compare(rows, runs, swept, beside.baseline)
        rows = [row | columns for row, columns in zip(rows, differences, strict=True)]
        notes.append(comparison.note_on(beside.baseline))
    if tuned := [name for name in HYPERPARAMETERS if name in swept]:
        notes.append(
            f"{' and '.join(tuned)} varies in this table: to pick its best row is to choose on test images; `select` chooses "
            "on validation images."
        )
    yield "summary.csv", as_csv([{name: "" if is_nan(value) else value for name, value in row.items()} for row in rows])
    failures = {point.name: failure_of(point, folder) for point in points if point.name not in finished}
    yield "summary.md", as_markdown(rows, notes, {name: line for name, line in failures.items() if line})
    yield "summary.tex", as_tex(rows, swept, notes)
    done = [row for row in rows if row["runs"]]
    if not done or not draw_plots:
        return
    figures = draw(done) | {
        "ranking": draw_ranking(done, swept, [[top1 for top1, _ in found.values()] for found in runs if found])
    }
    trained = [[point for point in group if point.name in finished and not point.test_only] for group in groups]
    drawn = [(row, curves) for row, group in zip(rows, trained, strict=True) if (curves := curves_of(group, folder))]
    if drawn:
        figures["curves"] = draw_curves(*map(list, zip(*drawn, strict=True)))
    for name, figure in figures.items():
        yield f"{name}.png", as_figure(figure)


def curves_of(group: list[Point], folder: Path) -> list[list[float]]:
    """Return test top-1 by epoch of trainings that have ended; warn about a table that cannot be read."""
    curves = []
    for point in group:
        try:
            curves.append([row["test_top1"] for row in read_metrics(folder / point.name)])
        except ValueError as error:
            warn_once(f"{error}; the curves are drawn without it")
    return curves


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_markdown(rows: list[dict], notes: list[str], failures: dict[str, str]) -> str:
    """Return a table of means, with standard deviations over seeds where they are of interest, and the failures by point."""
    columns = [name for name in rows[0] if not name.endswith("_std")]
    columns = [name for name in columns if not name.startswith("published_") or name.removeprefix("published_") in rows[0]]
    columns = [name.removesuffix("_low") for name in columns if name not in comparison.FOLDED]
    heads = [name.replace("published_", "published ") for name in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row, name) for name in columns) + " |" for row in rows]
    lines += [line for note in notes for line in ("", note)]
    if failures:
        lines += ["", "Failed, and tried again by the next call of the sweep:", ""]
        lines += [f"- {name}: {why}" for name, why in failures.items()]
    return "\n".join(lines) + "\n"


def _cell(row: dict, name: str) -> str:
    if name in comparison.INTERVALS:
        return comparison.as_text(row, name)
    value, spread = row[name], row.get(f"{name}_std", math.nan)
    if name.startswith("published_"):
        return as_text(row, name.removeprefix("published_"))
    if is_nan(value):
        return ""
    if name == "parameters":
        return f"{value:,.0f}"
    if name == "p_holm":
        return f"{value:.2g}"
    if name in MEASURES:
        return f"{value:.4g}" + ("" if is_nan(spread) or name == "mflops_per_image" else f" ± {spread:.2g}")
    return str(value)
