"""What a sweep found: a row for all runs that differ in their seed only, as tables and as figures."""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
from pathlib import Path

from experiments.figures import draw, draw_curves, read_metrics
from experiments.points import Point, as_word, resolved, stated
from experiments.published import NOTE, Published, as_text, put_beside
from options.parser import read_yaml

FAILURE = "failure.txt"  # in the folder of a point whose last run failed
MEASURES = {  # column -> where it stands in summary.json, and what it is divided by
    "top1": (("final", "test_top1"), 1),
    "top5": (("final", "test_top5"), 1),
    "best_top1": (("best", "test_top1"), 1),
    "parameters": (("parameters",), 1),
    "mflops_per_image": (("flops_per_image",), 1e6),
    "epoch_seconds": (("average_epoch_seconds",), 1),
    "latency_ms_per_image": (("latency_ms_per_image",), 1),
    "peak_memory_mb": (("peak_memory_bytes",), 1e6),
}
COSTS_OF_MODEL = ("parameters", "flops_per_image", "latency_ms_per_image", "peak_memory_bytes")  # which an evaluation has too


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def read_summary(folder: Path) -> dict | None:
    """The summary.json of a run, None if there is none or if it lacks what a summary has."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        numbers = [measure_in(summary, name) for name in MEASURES] + [summary["epochs"]]
        return summary if isinstance(summary["finished"], bool) and all(map(math.isfinite, numbers)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_in(summary: dict, name: str) -> float:
    """A measure of the table in a run's summary. Raises KeyError or TypeError where the summary is not one."""
    path, unit = MEASURES[name]
    for key in path:
        summary = summary[key]
    return summary / unit


def read_evaluation(point: Point, folder: Path) -> dict | None:
    """What a point with test_only has found, in the form of a run's summary; None if it has not been evaluated so."""
    try:
        wanted = stated(point, folder)
    except ValueError:  # of another sweep, whose `config:` or checkpoint is gone
        wanted = point.values
    for path in sorted((folder / point.name).glob("test_results*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            given = found["options"] | {"checkpoint": found["checkpoint"]}
            if all(given[name] == value for name, value in wanted.items() if name in given):
                row = {f"test_{name}": found[name] for name in ("top1", "top5", "loss")}
                costs = {name: found[name] for name in COSTS_OF_MODEL}
                return {"finished": True, "epochs": 0, "final": row, "best": row, "average_epoch_seconds": math.nan, **costs}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def finished_summary(point: Point, folder: Path) -> dict | None:
    """The summary of the point's run if it has ended: by early stopping, or after as many epochs as are asked for now."""
    if point.test_only:
        return read_evaluation(point, folder)
    summary = read_summary(folder / point.name)
    if not summary or not summary["finished"]:
        return None
    try:
        options = resolved(point, folder)
    except ValueError:  # of another sweep, whose `config:` or program is gone: what the run itself wrote down counts
        try:
            options = read_yaml(str(folder / point.name / "config.yaml"))
            return summary if summary["epochs"] == options["num_epochs"] or options["early_stopping"] else None
        except (ValueError, KeyError):
            return None
    return summary if options["early_stopping"] or summary["epochs"] == options["num_epochs"] else None


def is_finished(point: Point, folder: Path) -> bool:
    return finished_summary(point, folder) is not None


def with_earlier(points: list[Point], folder: Path) -> list[Point]:
    """These points, and those that other sweeps started in the same folder. A damaged note of one is a warning."""
    names = {point.name for point in points}
    earlier = []
    for path in sorted(folder.glob("*/point.json")):
        if path.parent.name in names:
            continue
        try:
            point = Point(**json.loads(path.read_text(encoding="utf-8")))
            if not (point.name == path.parent.name and isinstance(point.values, dict) and isinstance(point.varying, dict)):
                raise ValueError("values that do not fit")
            earlier.append(point)
        except (OSError, ValueError, TypeError) as error:
            warn_once(f"{path} is not the note of a point ({error}); the summary is made without it")
    return [*points, *earlier]


def group_points(points: list[Point]) -> list[list[Point]]:
    """The points that differ in their seed only, together."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(json.dumps(point.varying | {"seed": None}, sort_keys=True), []).append(point)
    return list(groups.values())


def summarize(points: list[Point], folder: Path) -> list[dict]:
    """A row for all points that differ in their seed only: means of what ended, and standard deviations over the seeds."""
    columns = list(dict.fromkeys(name for point in points for name in point.varying if name != "seed"))
    rows = []
    for group in group_points(points):
        found = [finished_summary(point, folder) for point in group]
        summaries = [summary for summary in found if summary]
        failed = [point for point, summary in zip(group, found, strict=True) if not summary and failure_of(point, folder)]
        row = {name: as_cell(group[0].varying.get(name, "")) for name in columns}
        row |= {"runs": len(summaries), "of": len(group), "failed": len(failed)}
        for measure in MEASURES:
            values = [value for summary in summaries if not is_nan(value := measure_in(summary, measure))]
            row[measure] = statistics.fmean(values) if values else math.nan
            row[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    if not any(row["failed"] for row in rows):  # the rule: no column of zeros
        for row in rows:
            del row["failed"]
    return rows


def as_cell(value):
    """A value of the grid as a number where it is one (YAML reads 1e-3 as a text), lists in a word."""
    if isinstance(value, list):
        return as_word(value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def failure_of(point: Point, folder: Path) -> str:
    """Why the last run of a point failed, in a line; empty if it did not, or has not been started."""
    try:
        return (folder / point.name / FAILURE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def update_summary(
    points: list[Point], folder: Path, draw_plots: bool = True, published: dict[str, Published] | None = None
) -> bool:
    """`write_summary`; where it cannot be written, a warning instead, as runs are worth more than tables of them."""
    from runs import Stopped

    try:
        write_summary(points, folder, draw_plots, published)
    except Stopped as error:
        print(f"warning: {error}", file=sys.stderr)
        return False
    return True


def write_summary(
    points: list[Point], folder: Path, draw_plots: bool = True, published: dict[str, Published] | None = None
) -> None:
    """summary.csv, summary.md and the plots, from whatever has ended so far.

    published: what others found, by the name of the point; it stands beside ours.
    """
    from runs.files import as_csv, as_png, write_atomically

    points = with_earlier(points, folder)
    rows = summarize(points, folder)
    if published:
        of_group = [next((published[p.name] for p in group if p.name in published), None) for group in group_points(points)]
        rows = put_beside(rows, of_group)
    cells = [{name: "" if is_nan(value) else value for name, value in row.items()} for row in rows]
    write_atomically(folder / "summary.csv", as_csv(cells))
    failures = {point.name: failure_of(point, folder) for point in points if not is_finished(point, folder)}
    write_atomically(folder / "summary.md", as_markdown(rows, {name: line for name, line in failures.items() if line}))
    done = [row for row in rows if row["runs"]]
    if not done or not draw_plots:
        return
    figures = draw(done)
    curves = [curves_of(group, folder) for group in group_points(points)]
    drawn = [(row, runs) for row, runs in zip(rows, curves, strict=True) if runs]
    if drawn:
        figures["curves"] = draw_curves(*map(list, zip(*drawn, strict=True)))
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", as_png(figure))


def curves_of(group: list[Point], folder: Path) -> list[list[float]]:
    """Test top-1 by epoch of the points that have ended. One whose table cannot be read is left out, with a warning."""
    curves = []
    for point in group:
        if not point.test_only and is_finished(point, folder):
            try:
                curves.append([row["test_top1"] for row in read_metrics(folder / point.name)])
            except ValueError as error:
                warn_once(f"{error}; the curves are drawn without it")
    return curves


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_markdown(rows: list[dict], failures: dict[str, str] | None = None) -> str:
    """Means, with standard deviations over seeds where they are of interest, and why points failed, by name."""
    ours = [name for name in rows[0] if not name.startswith("published_")]
    columns = [
        name for name in rows[0] if not name.endswith("_std") and (name in ours or name.removeprefix("published_") in ours)
    ]
    heads = [name.replace("published_", "published ") for name in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for name in columns:
            value, spread = row[name], row.get(f"{name}_std", math.nan)
            if name.startswith("published_"):
                cells.append(as_text(row, name.removeprefix("published_")))
            elif is_nan(value):
                cells.append("")
            elif name == "parameters":
                cells.append(f"{value:,.0f}")
            elif name in MEASURES:
                cells.append(f"{value:.4g}" + ("" if is_nan(spread) or name == "mflops_per_image" else f" ± {spread:.2g}"))
            else:
                cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "top1 and top5 are of the last epoch, or of the evaluated checkpoint, on the test set, in percent; means of the "
        "runs that ended, ± standard deviation."
    )
    lines += ["", note, *(["", NOTE] if "published_source" in rows[0] else [])]
    if failures:
        lines += ["", "Failed, and tried again by the next call of the sweep:", ""]
        lines += [f"- {name}: {why}" for name, why in failures.items()]
    return "\n".join(lines) + "\n"
