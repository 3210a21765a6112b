"""Figures of a sweep: accuracy against each cost, against every option that was swept through numbers, and by epoch.

Rows are rows of the summary: dicts of the swept options and of the measures. Nothing here imports torch.
"""

import csv
import itertools
import math
import os
import re
import statistics
from pathlib import Path

from experiments.panels import (
    COLUMN,
    PAGE,
    Mark,
    Section,
    legend_below,
    legend_of_sections,
    log_locator,
    make_panels,
    short_number,
)
from options.layers import LAYERS1D_ROWS, layers_of
from runs.files import drawable

COSTS = {
    "latency_ms_per_image": "latency (ms per image)",
    "mflops_per_image": "MFLOPs per image",
    "parameters": "parameters",
    "peak_memory_mb": "peak memory (MB)",
}
TOP1 = "test top-1 (%)"
MARKERS = "os^vDPX*<>ph"
LINE_STYLES = ("-", "--", ":", "-.")
COLORS = 20  # of matplotlib's tab20
LONGEST_LABEL = 60  # letters; a legend of longer ones would leave no room for the curves
ZOOM = 3  # points below the best row that the zoomed figure shows
MOST_LINES = 20  # in one panel, where there is an option to split the lines by


# ---------------------------------------------------------------------------------------------------------------
# Colors, markers, labels
# ---------------------------------------------------------------------------------------------------------------


def color_of(number: int) -> tuple:
    """Return a color of tab20, whose colors come in pairs of a dark and a light one: first the ten dark ones."""
    from matplotlib import colormaps

    return colormaps["tab20"]((2 * number + number // 10 % 2) % COLORS)


def look_of(number: int, runs: list[list[float]]) -> dict:
    """Return the style of a line over epochs; runs of one or two epochs need a marker to be seen."""
    style = LINE_STYLES[number // COLORS % len(LINE_STYLES)]
    return {"color": color_of(number), "ls": style, "marker": "." if min(map(len, runs)) < 3 else None}


def label_of(row: dict, names: list[str]) -> str:
    plain = ("program", "layer")
    words = (str(row[name]) if name in plain else f"{name} {row[name]}" for name in names if row[name] != "")
    return drawable(", ".join(words)) or "all"


def numbered(values) -> dict:
    return {value: number for number, value in enumerate(dict.fromkeys(values))}


def mark_rows(rows: list[dict], swept: list[str]) -> tuple[list[Mark], list[Section]]:
    """Return a mark for each row, and the legend that explains them.

    Rows of several programs have a marker and a section per program. Otherwise, if one option can be told by color and
    the combinations of the others by marker, the legend names these, which are fewer than the rows.
    """
    if "program" in swept:
        return _mark_programs(rows, [name for name in swept if name != "program"])
    for name in swept:
        rest = [other for other in swept if other != name]
        colors = numbered(row[name] for row in rows)
        markers = numbered(label_of(row, rest) for row in rows)
        if 1 < len(markers) <= len(MARKERS) and len(colors) <= COLORS and len(colors) + len(markers) < len(rows):
            marks = [Mark(color_of(colors[row[name]]), MARKERS[markers[label_of(row, rest)]]) for row in rows]
            by_color = {"none" if value == "" else drawable(str(value)): Mark(color_of(n), "o") for value, n in colors.items()}
            by_marker = {label: Mark("dimgray", MARKERS[n]) for label, n in markers.items()}
            return marks, [Section(name, by_color), Section(", ".join(rest), by_marker)]
    marks = [Mark(color_of(number), MARKERS[number // COLORS % len(MARKERS)]) for number in range(len(rows))]
    return marks, [Section("", {label_of(row, swept): mark for row, mark in zip(rows, marks, strict=True)})]


def _mark_programs(rows: list[dict], rest: list[str]) -> tuple[list[Mark], list[Section]]:
    sections = {row["program"]: Section(str(row["program"]), {}) for row in rows}
    first, used = {}, 0  # a marker for every 20 rows of a program, where colors begin again
    for program in sections:
        first[program] = used
        used += math.ceil(sum(row["program"] == program for row in rows) / COLORS)
    marks = []
    for row in rows:
        section = sections[row["program"]]
        marker = MARKERS[(first[row["program"]] + len(section.entries) // COLORS) % len(MARKERS)]
        marks.append(Mark(color_of(len(section.entries)), marker))
        section.entries[label_of(row, rest)] = marks[-1]
    return marks, list(sections.values())


def label_groups(kinds: list[dict], folders: list[list[Path]]) -> list[str]:
    """Name each group of runs by the options in which the groups differ or, if these are too many, by its folder.

    kinds: the options of each group; folders: the folders of its runs, one per seed.
    """
    if len({"patch_size" in kind for kind in kinds}) > 1:  # runs of both programs, which share some options only
        kinds = [{"program": "ViT" if "patch_size" in kind else "AllConvNet"} | kind for kind in kinds]
    # A hash is of no use to a reader: where nothing else differs, folders name the groups.
    names = dict.fromkeys(name for kind in kinds for name in kind if name != "layer_sha256")
    differing = [name for name in names if len({str(kind[name]) for kind in kinds if name in kind}) > 1]
    labels = []
    for kind in kinds:
        own = [name for name in differing if name in kind]
        labels.append(label_of(kind, own) if own else str(kind.get("layer", "run")))
    if max(map(len, labels)) > LONGEST_LABEL or len(set(labels)) < len(labels):
        parent = os.path.commonpath([group[0].resolve() for group in folders])
        paths = [os.path.relpath(group[0].resolve(), parent) for group in folders]
        labels = [drawable(re.sub(r"[_-]?seed-?\d+$", "", path)) for path in paths]
    seeds = [f" ({len(group)} seeds)" if len(group) > 1 else "" for group in folders]
    return [label + note for label, note in zip(labels, seeds, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Accuracy against a cost, and against an option
# ---------------------------------------------------------------------------------------------------------------


def swept_options(rows: list[dict]) -> list[str]:
    """Return the options in which the rows differ; options stand before the measures."""
    options = itertools.takewhile(lambda name: name != "runs", rows[0])
    return [name for name in options if len({row[name] for row in rows}) > 1]


def spread_of(row: dict) -> float:
    return 0 if math.isnan(row["top1_std"]) else row["top1_std"]


def draw(rows: list[dict]) -> dict:
    """Return figures by name: accuracy against each cost, and against every option that was swept through numbers."""
    swept = swept_options(rows)
    figures = {"tradeoff": draw_tradeoff(rows, swept)}
    close = [row for row in rows if row["top1"] > max(one["top1"] for one in rows) - ZOOM]
    if 2 < len(close) < len(rows):
        figures["tradeoff_zoom"] = draw_tradeoff(close, swept, rows)
    for option in swept:
        values = [row[option] for row in rows if row[option] != ""]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            others = [name for name in swept if name != option]
            ends = branches_alone(rows, others) if option == "branch_ratio" else []
            figures[f"top1_by_{option}"] = draw_option(rows + ends, option, others)
    return figures


def branches_alone(rows: list[dict], others: list[str]) -> list[dict]:
    """Return, for two layers side by side, the rows of each layer alone as shares of 0 and 1, where the sweep has them.

    An option that the layer alone does not read may have any value beside the other layer.
    """
    side_by_side = [row for row in rows if row["branch_ratio"] != ""]
    there = {(row["branch_ratio"], *(row[name] for name in others)) for row in side_by_side}
    found = {}
    for row in side_by_side:
        line = {name: row[name] for name in others}
        for share, layer in enumerate(branches_of(str(row.get("layer", "")))):
            fits = {name: ("", value) for name, value in line.items()} | {"layer": (layer,)}
            alone = [one for one in rows if layer and all(one[name] in values for name, values in fits.items())]
            key = share, *line.values()
            if len(alone) == 1 and key not in there:
                found[key] = alone[0] | line | {"branch_ratio": share}
    return list(found.values())


def branches_of(layer: str) -> tuple[str, str]:
    """Return the layers that have all features at a branch_ratio of 0 and of 1; empty for a layer without branches."""
    if layer in LAYERS1D_ROWS:
        first, second = LAYERS1D_ROWS[layer].branches or ("", "")  # the share is the first one's
        return second, first
    layers = layers_of(layer)
    return (layers[0], layers[1]) if len(layers) == 2 else ("", "")


def dominated(rows: list[dict], cost: str) -> list[bool]:
    """Tell for each row if another one is at least as accurate and as cheap, and better in one of the two."""
    points = [(row["top1"], -row[cost]) for row in rows]
    return [any(a >= one[0] and b >= one[1] and (a, b) != one for a, b in points) for one in points]


def draw_tradeoff(rows: list[dict], swept: list[str], marked: list[dict] | None = None):
    """Plot top-1 against latency, FLOPs, parameters and memory: a panel each, a point per row.

    A line joins the Pareto front; dominated points are faint.

    Args:
        marked: rows of the whole table, whose colors and markers these rows have; default: these.
    """
    from matplotlib.ticker import MaxNLocator

    marked = marked or rows
    marks, sections = mark_rows(marked, swept)
    marks = [mark for row, mark in zip(marked, marks, strict=True) if row in rows]
    figure, axes = make_panels(len(COSTS), 2, PAGE / 2, 2.4)
    for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
        faint = dominated(rows, cost)
        front = sorted((row[cost], row["top1"]) for row, is_faint in zip(rows, faint, strict=True) if not is_faint)
        axis.plot(*zip(*front, strict=True), color="silver", lw=1, zorder=0)
        for row, (color, marker), is_faint in zip(rows, marks, faint, strict=True):
            style = {"color": color, "capsize": 2, "alpha": 0.35 if is_faint else 1}
            axis.errorbar(row[cost], row["top1"], spread_of(row), fmt=marker, **style)
        values = [row[cost] for row in rows]
        is_wide = max(values) > 3 * min(values)
        if is_wide:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.xaxis.set_major_locator(log_locator(values) if is_wide else MaxNLocator(5))
        axis.xaxis.set_major_formatter(short_number)
        axis.set(xlabel=label, ylabel=TOP1 + " ± deviation" * any(map(spread_of, rows)))
        axis.grid(alpha=0.3)
    front = {"Pareto front; other points are faint": Mark("silver", "_")}
    sections = [*sections, Section("", front)] if sections[-1].title else [Section("", sections[-1].entries | front)]
    legend_of_sections(figure, sections)
    return figure


def draw_option(rows: list[dict], option: str, others: list[str]):
    """Plot accuracy against one option, a line for every combination of the others."""
    figure, (axis,) = make_panels(1, 1, COLUMN, 2.4)
    rows = [row for row in rows if row[option] != ""]
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(label_of(row, others), []).append(row)
    marks, sections = mark_rows([of_line[0] for of_line in lines.values()], others)
    for (label, of_line), (color, marker) in zip(lines.items(), marks, strict=True):
        points = sorted((row[option], row["top1"], spread_of(row)) for row in of_line)
        x, top1, spreads = zip(*points, strict=True)
        axis.errorbar(x, top1, spreads, color=color, marker=marker, capsize=2, label=label)
    axis.set(xlabel=option, ylabel=TOP1 + " ± deviation" * any(map(spread_of, rows)))
    values = sorted({row[option] for row in rows})
    if 0 < 16 * values[0] <= values[-1]:  # as 1, 2, 4, ..., 64, which would lie upon each other
        axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if others:
        legend_of_sections(figure, sections)
    return figure


# ---------------------------------------------------------------------------------------------------------------
# Accuracy by epoch
# ---------------------------------------------------------------------------------------------------------------


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a run's metrics.csv, one per epoch. Raises ValueError if there is none, or no such table."""
    path = folder / "metrics.csv"
    needed = [f"{part}_{measure}" for part in ("train", "test") for measure in ("loss", "top1")]
    try:
        with path.open(encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no metrics.csv; its run has not ended its first epoch") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the table of a run ({error})") from None
    if not rows or not all(name in row for row in rows for name in needed):
        raise ValueError(f"{path} is not the table of a run: it lacks {', '.join(needed)}")
    return rows


def plot_seeds(axis, runs: list[list[float]], band: float = 0.2, **style) -> float:
    """Plot the mean of several runs by epoch, in a band of their range; return its last value.

    Runs that ended early shorten the line: a mean over fewer seeds would jump there.
    """
    of_epochs = list(zip(*runs, strict=False))
    epochs = range(1, len(of_epochs) + 1)
    mean = [statistics.fmean(values) for values in of_epochs]
    axis.plot(epochs, mean, **style)
    if len(runs) > 1:
        low, high = list(map(min, of_epochs)), list(map(max, of_epochs))
        axis.fill_between(epochs, low, high, color=style["color"], alpha=band, lw=0)
    return mean[-1]


def draw_curves(rows: list[dict], curves: list[list[list[float]]]):
    """Plot test top-1 by epoch, one line per row and one panel per program; legends begin with the best last epoch.

    curves: for each row its runs, for each run the test top-1 of its epochs. More lines than one panel can show are split by
    an option, where one splits them into few enough.
    """
    swept = swept_options(rows)
    by = panel_option(rows, swept)
    rest = [name for name in swept if name != by]
    panels: dict = {}
    for row, runs in zip(rows, curves, strict=True):
        panels.setdefault(row[by] if by else "", {})[label_of(row, rest)] = runs
    numbers = numbered(label for lines in panels.values() for label in lines)
    if len(numbers) > COLORS:  # too many for a label to have its own color in all panels: colors are of one panel each
        numbers = {}
    columns = min(2, len(panels))
    of_legend = 1 if max(len(label) for lines in panels.values() for label in lines) > 18 else 2  # columns
    below = 0 if len(panels) == 1 else 0.35 + 0.15 * max(map(len, panels.values())) / of_legend  # inches under each panel
    figure, axes = make_panels(len(panels), columns, PAGE / 2 if columns > 1 else COLUMN, 2.4 + below, sharey=True)
    for number, (axis, (value, lines)) in enumerate(zip(axes, panels.items(), strict=True)):
        handles, labels = draw_panel(axis, lines, numbers)
        if number % columns == 0:
            axis.set_ylabel(TOP1 + "; band: range of seeds" * any(len(runs) > 1 for runs in curves))
        if len(panels) == 1:
            legend_below(figure, handles, labels)
        else:
            axis.set_title(label_of({by: value}, [by]) if value != "" else f"no {by}")
            where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}  # under the axis and its label
            axis.legend(handles, labels, **where, ncols=of_legend if len(labels) > 3 else 1)
    return figure


def draw_panel(axis, lines: dict[str, list[list[float]]], numbers: dict[str, int]) -> tuple[list, list[str]]:
    """Plot a line per label, colored by its number (default: counted in the panel); return handles and labels, best first."""
    entries = []
    for count, (label, runs) in enumerate(lines.items()):
        end = plot_seeds(axis, runs, **look_of(numbers.get(label, count), runs))
        entries.append((end, axis.lines[-1], f"{label}  {end:.1f} %"))
    by_epoch(axis)
    axis.set_xlabel("epoch (legend: the last one)")
    entries.sort(key=lambda entry: entry[0], reverse=True)
    return [handle for _, handle, _ in entries], [label for _, _, label in entries]


def by_epoch(axis) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def panel_option(rows: list[dict], swept: list[str]) -> str | None:
    """Return the option whose values have a panel each, if there should be several."""
    if "program" in swept:
        return "program"
    if len(rows) <= MOST_LINES:
        return None
    for name in swept:
        values = [row[name] for row in rows]
        if len(set(values)) <= 12 and max(map(values.count, values)) <= MOST_LINES:
            return name
    return None
