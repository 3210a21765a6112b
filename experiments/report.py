"""What a sweep found: a row for all runs that differ in their seed only, as tables and as figures."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

from experiments.points import Point, as_word, resolved

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


def read_summary(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def finished_summary(point: Point, folder: Path) -> dict | None:
    """The summary of the point's run if it has ended: by early stopping, or after as many epochs as are asked for now."""
    summary = read_summary(folder / point.name)
    if not summary or not summary["finished"]:
        return None
    options = resolved(point, folder)
    return summary if options["early_stopping"] or summary["epochs"] == options["num_epochs"] else None


def is_finished(point: Point, folder: Path) -> bool:
    return finished_summary(point, folder) is not None


def with_earlier(points: list[Point], folder: Path) -> list[Point]:
    """These points, and those that other sweeps started in the same folder."""
    names = {point.name for point in points}
    earlier = []
    for path in sorted(folder.glob("*/point.json")):
        if path.parent.name not in names:
            earlier.append(Point(**json.loads(path.read_text())))
    return [*points, *earlier]


def summarize(points: list[Point], folder: Path) -> list[dict]:
    """A row for all points that differ in their seed only: means of what ended, and standard deviations over the seeds."""
    columns = list(dict.fromkeys(name for point in points for name in point.varying if name != "seed"))
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(json.dumps(point.varying | {"seed": None}, sort_keys=True), []).append(point)
    rows = []
    for group in groups.values():
        summaries = [summary for point in group if (summary := finished_summary(point, folder))]
        row = {name: as_cell(group[0].varying.get(name, "")) for name in columns}
        row |= {"runs": len(summaries), "of": len(group)}
        for measure, (path, unit) in MEASURES.items():
            values = []
            for summary in summaries:
                for key in path:
                    summary = summary[key]
                values.append(summary / unit)
            row[measure] = statistics.fmean(values) if values else math.nan
            row[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def as_cell(value):
    """A value of the grid as a number where it is one (YAML reads 1e-3 as a text), lists in a word."""
    if isinstance(value, list):
        return as_word(value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def write_summary(points: list[Point], folder: Path, draw_plots: bool = True) -> None:
    """summary.csv, summary.md and the plots, from whatever has ended so far."""
    from utils import as_csv, as_png, write_atomically

    rows = summarize(with_earlier(points, folder), folder)
    cells = [{name: "" if is_nan(value) else value for name, value in row.items()} for row in rows]
    write_atomically(folder / "summary.csv", as_csv(cells))
    write_atomically(folder / "summary.md", as_markdown(rows))
    done = [row for row in rows if row["runs"]]
    if done and draw_plots:
        for name, figure in draw(done).items():
            write_atomically(folder / f"{name}.png", as_png(figure))


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_markdown(rows: list[dict]) -> str:
    """Means, with standard deviations over seeds where they are of interest."""
    columns = [name for name in rows[0] if not name.endswith("_std")]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for name in columns:
            value, spread = row[name], row.get(f"{name}_std", math.nan)
            if is_nan(value):
                cells.append("")
            elif name == "parameters":
                cells.append(f"{value:,.0f}")
            elif name in MEASURES:
                cells.append(f"{value:.4g}" + ("" if is_nan(spread) or name == "mflops_per_image" else f" ± {spread:.2g}"))
            else:
                cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "top1 and top5 are of the last epoch, on the test set, in percent; means of the runs that ended, ± standard deviation."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def draw(rows: list[dict]) -> dict:
    """Figures by name: accuracy against each cost, and against every option that was swept through numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    swept = [name for name in itertools.takewhile(lambda name: name != "runs", rows[0]) if len({row[name] for row in rows}) > 1]
    styles = list(itertools.product("os^vDP", [f"C{number}" for number in range(10)]))
    costs = {
        "latency_ms_per_image": "latency (ms per image)",
        "mflops_per_image": "MFLOPs per image",
        "parameters": "parameters",
        "peak_memory_mb": "peak memory (MB)",
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axis, (cost, label) in zip(figure.subplots(2, 2).flatten(), costs.items(), strict=True):
        for row, (marker, color) in zip(rows, itertools.cycle(styles), strict=False):
            spread = 0 if is_nan(row["top1_std"]) else row["top1_std"]
            axis.errorbar(
                row[cost], row["top1"], spread, fmt=marker, color=color, ms=7, lw=1, capsize=2, label=label_of(row, swept)
            )
        values = [row[cost] for row in rows]
        if max(values) > 3 * min(values):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_xlabel(label)
        axis.set_ylabel("test top-1 (%)")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figures = {"tradeoff": figure}
    for option in swept:
        if all(
            isinstance(row[option], (int, float)) and not isinstance(row[option], bool) for row in rows if row[option] != ""
        ):
            figures[f"top1_by_{option}"] = draw_option(rows, option, [name for name in swept if name != option])
    return figures


def draw_option(rows: list[dict], option: str, others: list[str]):
    """Accuracy against one option, a line for every combination of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row[option] != "":
            lines.setdefault(label_of(row, others), []).append(row)
    for label, of_line in lines.items():
        of_line.sort(key=lambda row: row[option])
        spreads = [0 if is_nan(row["top1_std"]) else row["top1_std"] for row in of_line]
        axis.errorbar(
            [row[option] for row in of_line], [row["top1"] for row in of_line], spreads, marker="o", capsize=2, label=label
        )
    axis.set_xlabel(option)
    axis.set_ylabel("test top-1 (%)")
    axis.set_xticks(sorted({row[option] for row in rows if row[option] != ""}))
    axis.grid(alpha=0.3)
    if others:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def label_of(row: dict, names: list[str]) -> str:
    plain = ("program", "layer")
    return ", ".join(str(row[name]) if name in plain else f"{name} {row[name]}" for name in names if row[name] != "") or "all"
