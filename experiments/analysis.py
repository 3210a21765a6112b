"""Neighbors that trained runs choose: distances, hubs, mass and overlaps by layer, as rows of a table and as a figure.

A row is {run, layer, measure, of, value}; `of` names the distance, the epochs or the other run where there are several. Rows
of the runs `window` (the K nearest by location, as in a convolution) and `chance` (K tokens drawn) are there to compare with.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from dataset import channel_stats
from experiments.figures import color_of
from experiments.measures import (
    distance_shares,
    gini,
    head_overlap,
    join_heads,
    mean_distance,
    mirrored,
    neighbor_distances,
    overlap,
    random_index,
    skewness,
    softmax_mass,
    times_chosen,
)
from experiments.mixing import ABSENT, Mixing, record_mixing, record_run
from experiments.panels import PAGE, legend_below, make_panels
from experiments.trained import Run, load_model, load_runs
from neighbors import grid_locations, location_neighbors
from runs.files import drawable

COLUMNS = ["run", "layer", "measure", "of", "value"]
REFERENCES = {"window": {"color": "black", "ls": "--"}, "chance": {"color": "gray", "ls": ":"}}
PANELS = {  # measures by layer, and the labels of their axes
    "mean distance": "mean distance (tokens)",
    "gini": "hubs: Gini of times chosen",
    "skewness": "hubs: skewness of times chosen",
    "softmax mass": "share of the softmax that K hold",
    "overlap of heads": "overlap of two heads",
    "overlap under a flip": "overlap under a flip",
    "overlap under noise": "overlap under noise",
}


def analyze_runs(folders: list[Path], images: int, pairs: int | None, noise: float, data_path: str | None) -> list[dict]:
    """Return the rows of all runs, on the same test images. Raises ValueError as `load_runs` and `record_run`.

    pairs: number of neighbors kept per token in layers that mix all pairs; None: the K of the run.
    """
    runs = load_runs(folders, images, data_path)
    kept = [pairs or run.options.model.K for run in runs]
    layers = [record_run(run, K)[1] for run, K in zip(runs, kept, strict=True)]
    rows = []
    for run, K, found in zip(runs, kept, layers, strict=True):
        for mixing in found:
            rows += _of_layer(run.name, mixing)
        rows += _under_changes(run, found, K, noise)
        rows += _between_epochs(run, K)
    for mixing in layers[0]:
        rows += _of_index("window", mixing, _window(mixing))
        rows += _of_index("chance", mixing, random_index(tuple(mixing.index.shape), mixing.num_keys))
        by_chance = mixing.index.shape[-1] / mixing.num_keys
        rows += [_row("chance", mixing, measure, by_chance) for measure in PANELS if measure.startswith("overlap")]
    for (one, of_one), (other, of_other) in itertools.combinations(zip(runs, layers, strict=True), 2):
        rows += _between_runs(one.name, other.name, of_one, of_other)
    return rows


def _row(run: str, mixing: Mixing, measure: str, value: float | Tensor, of: str = "") -> dict:
    return dict(zip(COLUMNS, (run, mixing.name, measure, of, float(value)), strict=True))


def _of_layer(run: str, mixing: Mixing) -> list[dict]:
    rows = _of_index(run, mixing, mixing.index)
    distances = neighbor_distances(mixing.index, mixing.grid, mixing.padding, mixing.class_tokens)
    rows.append(_row(run, mixing, "weighed mean distance", mean_distance(distances, mixing.weights)))
    if mixing.index.shape[1] > 1:
        rows.append(_row(run, mixing, "overlap of heads", head_overlap(mixing.index).mean()))
    if mixing.is_share and mixing.scored is not None:
        query, key, metric, temperature = mixing.scored
        parts = [part.flatten(0, 1) for part in (query, key, mixing.index)]
        rows.append(_row(run, mixing, "softmax mass", softmax_mass(*parts, metric, temperature).mean()))
    elif mixing.is_share and not mixing.is_whole:
        rows.append(_row(run, mixing, "softmax mass", mixing.share.mean()))
    return rows


def _of_index(run: str, mixing: Mixing, index: Tensor) -> list[dict]:
    """Measure distances, and how unevenly the keys of an image (and head) are chosen."""
    distances = neighbor_distances(index, mixing.grid, mixing.padding, mixing.class_tokens)
    counts = times_chosen(index, mixing.num_keys)
    shares = distance_shares(distances, max(mixing.grid) - 2 * mixing.padding).tolist()
    return [
        _row(run, mixing, "mean distance", mean_distance(distances)),
        *(_row(run, mixing, "share of distances", share, f"from {number}") for number, share in enumerate(shares)),
        _row(run, mixing, "gini", gini(counts).mean()),
        _row(run, mixing, "skewness", skewness(counts).mean()),
    ]


def _window(mixing: Mixing) -> Tensor:
    """Return the (N, K) nearest by location, the neighbors of a convolution; class tokens have none."""
    places = grid_locations(mixing.grid)
    low, high = mixing.padding, torch.tensor(mixing.grid) - mixing.padding
    own = ((places >= low) & (places < high)).all(dim=1).nonzero().flatten()
    nearest = location_neighbors(2 * places, min(mixing.index.shape[-1], len(places)), own) + mixing.class_tokens
    return torch.cat([nearest.new_full((mixing.class_tokens, nearest.shape[1]), ABSENT), nearest])


# ---------------------------------------------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------------------------------------------


def _under_changes(run: Run, found: list[Mixing], K: int, noise: float) -> list[dict]:
    """Measure the overlap with neighbors on flipped images (flipped back), and on images with noise on the pixels."""
    _, std = channel_stats(run.options.data)
    drawn = torch.randn(run.images.shape, generator=torch.Generator().manual_seed(0))
    _, flipped = record_mixing(run.model, run.images.flip(3), K)
    _, noisy = record_mixing(run.model, run.images + drawn * noise / std, K)
    rows = []
    for mixing, other, third in zip(found, flipped, noisy, strict=True):
        back = mirrored(other.index, mixing.grid, mixing.padding, mixing.class_tokens)
        rows.append(_row(run.name, mixing, "overlap under a flip", overlap(mixing.index, back).mean()))
        rows.append(_row(run.name, mixing, "overlap under noise", overlap(mixing.index, third.index).mean(), f"{noise:g}"))
    return rows


def kept_epochs(folder: Path) -> list[int]:
    """Return the epochs whose weights a run with --save_every has kept."""
    return sorted(int(path.stem.removeprefix("epoch_")) for path in folder.glob("epoch_*.pt"))


def _between_epochs(run: Run, K: int) -> list[dict]:
    """Measure the overlap of the neighbors after each kept epoch with the ones after the kept epoch before."""
    epochs = kept_epochs(run.folder)
    passes = [record_mixing(load_model(run.folder, run.options, f"epoch_{n}.pt"), run.images, K)[1] for n in epochs]
    return [
        _row(run.name, now, "overlap of epochs", overlap(now.index, before.index).mean(), f"{earlier} and {later}")
        for (earlier, first), (later, second) in itertools.pairwise(zip(epochs, passes, strict=True))
        for now, before in zip(second, first, strict=True)
    ]


def _between_runs(one: str, other: str, layers: list[Mixing], others: list[Mixing]) -> list[dict]:
    """Measure the overlap of two runs, layer by layer as far as their tokens are the same, of the K strongest over all heads.

    Heads have no order that two runs share.
    """
    rows = []
    for a, b in zip(layers, others, strict=False):
        if (a.grid, a.padding, a.class_tokens) == (b.grid, b.padding, b.class_tokens):
            joined = (join_heads(mixing.index, mixing.weights, mixing.num_keys) for mixing in (a, b))
            rows.append(_row(one, a, "overlap of runs", overlap(*joined).mean(), other))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------


def draw_analysis(rows: list[dict]):
    """Draw a panel of distances per run, then one per measure by layer, of the runs and of the references."""
    rows = [row | {name: drawable(row[name]) for name in ("run", "of")} for row in rows]
    names = [name for name in dict.fromkeys(row["run"] for row in rows) if name not in REFERENCES]
    measures = {row["measure"] for row in rows}
    drawings = [(_draw_distances, name) for name in names]
    drawings += [(_draw_measure, name) for name in PANELS if any(_values(rows, run, name) for run in names)]
    drawings += [(_draw_runs, "")] * ("overlap of runs" in measures) + [(_draw_epochs, "")] * ("overlap of epochs" in measures)
    figure, axes = make_panels(len(drawings), min(3, len(drawings)), PAGE / 3, 2)
    for axis, (draw, name) in zip(axes, drawings, strict=True):
        draw(axis, rows, names, name)
        axis.grid(alpha=0.3)
    handles, labels = axes[len(names)].get_legend_handles_labels()  # of the first measure
    labels = [f"{number}: {label}" if label in names else label for number, label in enumerate(labels, 1)]
    legend_below(figure, handles, labels)
    return figure


def _values(rows: list[dict], run: str, measure: str) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in rows if row["run"] == run and row["measure"] == measure}


def _by_layer(axis, lines: dict[str, dict[str, float]]) -> None:
    """Plot lines of values by layer; layers are numbered as they come, and named where their numbers would not tell."""
    layers = list(dict.fromkeys(layer for values in lines.values() for layer in values))
    for number, (label, values) in enumerate(lines.items()):
        looks = REFERENCES.get(label, {"color": color_of(number), "marker": "."})
        axis.plot([layers.index(layer) for layer in values], values.values(), label=label, **looks)
    short = [layer.partition(" ")[2] for layer in layers]
    axis.set_xticks(range(len(layers)), short, rotation=90 if max(map(len, short)) > 3 else 0)
    axis.set_xlabel(layers[0].partition(" ")[0])


def _draw_measure(axis, rows: list[dict], names: list[str], measure: str) -> None:
    lines = {name: _values(rows, name, measure) for name in [*names, *REFERENCES]}
    _by_layer(axis, {name: values for name, values in lines.items() if values})
    axis.set_ylabel(PANELS[measure])
    if measure not in ("skewness", "mean distance"):
        axis.set_ylim(0, 1)


def _draw_distances(axis, rows: list[dict], names: list[str], run: str) -> None:
    from matplotlib import colormaps

    layers = list(_values(rows, run, "mean distance"))
    colors = colormaps["viridis"]([number / max(1, len(layers) - 0.5) for number in range(len(layers))])
    lines = [(run, layer, {"color": color, "label": layer}) for layer, color in zip(layers, colors, strict=True)]
    compared = next(iter(_values(rows, "window", "mean distance")))  # the first layer of the first run
    lines += [(name, compared, looks) for name, looks in REFERENCES.items()]
    for name, layer, looks in lines:
        of = {"run": name, "layer": layer, "measure": "share of distances"}
        shares = [row["value"] for row in rows if of.items() <= row.items()]
        if name == run or len(shares) == len(axis.lines[0].get_xdata()):  # on a grid as large as the first run's
            axis.plot(range(len(shares)), shares, **looks)
    axis.set_title(run)
    axis.set(xlabel="distance (tokens, rounded down)", ylabel="share of the neighbors", ylim=(0, None))
    axis.legend(fontsize=6)


def _draw_runs(axis, rows: list[dict], names: list[str], _) -> None:
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["measure"] == "overlap of runs":
            label = f"{names.index(row['run']) + 1} and {names.index(row['of']) + 1}"
            lines.setdefault(label, {})[row["layer"]] = row["value"]
    _by_layer(axis, lines | {"chance": _values(rows, "chance", "overlap of heads")})
    axis.set(ylabel="overlap of runs, heads joined", ylim=(0, 1))
    axis.legend(fontsize=6, title="runs, as below", title_fontsize=6)


def _draw_epochs(axis, rows: list[dict], names: list[str], _) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["measure"] == "overlap of epochs":
            lines.setdefault((row["run"], row["layer"]), []).append((int(row["of"].split()[-1]), row["value"]))
    beside = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right"}
    for (name, layer), points in lines.items():
        axis.plot(*zip(*points, strict=True), ".-", color=color_of(names.index(name)), lw=0.8)
        axis.annotate(layer.partition(" ")[2], points[0], fontsize=6, **beside)
    axis.margins(x=0.1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="overlap with the kept epoch before", ylim=(0, 1))
