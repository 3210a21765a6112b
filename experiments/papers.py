"""Tables and figures of a sweep for papers: a LaTeX table, and the rows ranked with intervals."""

import math

from experiments.comparison import mean_with_interval
from experiments.figures import TOP1, label_of
from experiments.panels import COLUMN, make_panels

COLUMNS = {
    "top1": "Top-1 (\\%)",
    "difference": "Difference",
    "val_top1": "Val. top-1 (\\%)",
    "parameters": "Parameters (M)",
    "mflops_per_image": "MFLOPs",
    "latency_ms_per_image": "Latency (ms)",
}
UNITS = {"parameters": 1e6}


def as_tex(rows: list[dict], swept: list[str], notes: list[str]) -> str:
    """Return a booktabs table of the rows that have runs: swept options, accuracies ± deviation, costs."""
    columns = [name for name in COLUMNS if name in rows[0]]
    heads = [escape(name) for name in swept] + [COLUMNS[name] for name in columns]
    lines = ["% \\usepackage{booktabs}", *(f"% {note}" for note in notes)]
    lines += [f"\\begin{{tabular}}{{{'l' * len(swept)}{'r' * len(columns)}}}", "\\toprule", join(heads), "\\midrule"]
    done = [row for row in rows if row["runs"]]
    lines += [join([escape(str(row[name])) for name in swept] + [cell(row, name) for name in columns]) for row in done]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def join(cells: list[str]) -> str:
    return " & ".join(cells) + " \\\\"


def escape(text: str) -> str:
    return "".join("\\" + letter if letter in "&%$#_{}" else letter for letter in text)


def cell(row: dict, name: str) -> str:
    value = row[name]
    if math.isnan(value):
        return "--"
    if name == "difference":
        low, high = row["difference_low"], row["difference_high"]
        return f"${value:+.2f}$" + ("" if math.isnan(low) else f" $[{low:.2f}, {high:.2f}]$")
    if name in ("top1", "val_top1"):
        spread = row[f"{name}_std"]
        return f"${value:.2f}" + ("$" if math.isnan(spread) else f" \\pm {spread:.2f}$")
    return f"{value / UNITS.get(name, 1):.3g}"


def draw_ranking(rows: list[dict], swept: list[str], seeds: list[list[float]]):
    """Draw the rows by mean top-1, the best on top: every seed as a dot, the mean with its 95 % t interval over seeds.

    seeds: the top-1 of each row's runs. Rows of fewer than three seeds have no interval.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number]["top1"])
    labels = [label_of(rows[number], swept) for number in order]
    figure, (axis,) = make_panels(1, 1, COLUMN + 0.05 * max(0, max(map(len, labels)) - 20), 0.6 + 0.14 * len(rows))
    for height, number in enumerate(order):
        found = mean_with_interval(seeds[number])
        axis.plot(seeds[number], [height] * len(seeds[number]), ".", color="silver")
        if not math.isnan(found.low):
            axis.plot([found.low, found.high], [height] * 2, "-", color="tab:blue")
        axis.plot(found.mean, height, "o", color="tab:blue", ms=3)
    axis.set_yticks(range(len(rows)), labels)
    axis.set_xlabel(f"{TOP1}: mean, 95 % t interval, seeds")
    axis.grid(alpha=0.3)
    return figure
