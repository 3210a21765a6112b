"""Pictures of the generated tasks, and the map of abilities: how much of each task every mixer of a sweep has learned."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.figures import read_metrics
from experiments.panels import COLUMN, PAGE, make_panels, wrapped
from experiments.report import read_summary
from experiments.trained import read_config
from options.data import TASKS
from options.layers import layer_label
from readers.tasks import class_names, generate

LEARNED = 90  # percent of the validation images
COLUMNS = ("layer", "task", "seed", "top1", "steps")


def draw_tasks(images: int = 4):
    """Draw some training and some test images of each task, with their classes."""
    figure, axes = make_panels(len(TASKS) * 2 * images, 2 * images, PAGE / (2 * images), PAGE / (2 * images) + 0.2)
    for task, row in zip(TASKS, axes.reshape(len(TASKS), -1), strict=True):
        parts = [generate(task, 0, part, np.arange(images)) for part in ("train", "test")]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        for axis, image, label in zip(row, pixels.transpose(0, 2, 3, 1), labels, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(class_names(task)[label], fontsize=6)
        row[0].set_ylabel(task)
    return figure


class Result(NamedTuple):
    """Outcome of one run."""

    top1: float  # on test images, in the epoch that the validation images chose
    solved: float  # 0: chance, 1: all images right
    steps: int | None  # until `LEARNED` percent; None: never


def read_results(path: Path) -> dict[str, dict[str, dict[int, Result]]]:
    """Read the finished runs of a sweep's folder, or the table of such runs, by layer, task and seed.

    Raises ValueError if none is of a task.
    """
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for layer, task, seed, top1, steps in read_table(path) if path.suffix == ".csv" else read_runs(path):
        chance = 100 / TASKS[task]
        result = Result(top1, max(0, (top1 - chance) / (100 - chance)), steps)
        found.setdefault(layer, {}).setdefault(task, {})[seed] = result
    if not found:
        raise ValueError(f"{path} holds no finished run of a generated task; train configs/sweeps/abilities.yaml first")
    return found


def read_runs(sweep: Path) -> Iterator[tuple[str, str, int, float, int | None]]:
    for folder in sorted(path.parent for path in sweep.glob("*/summary.json")):
        options, summary = read_config(folder), read_summary(folder)
        task = str(options["dataset"]).removeprefix("task_")
        if task not in TASKS or summary is None or not summary["finished"]:
            continue
        steps = math.ceil(summary["train_images"] / options["batch_size"])
        learned = (round(row["epoch"]) * steps for row in read_metrics(folder) if row["val_top1"] >= LEARNED)
        yield layer_label(options["layer"]), task, options["seed"], summary["best"]["test_top1"], next(learned, None)


def read_table(path: Path) -> Iterator[tuple[str, str, int, float, int | None]]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            steps = int(row["steps"]) if row["steps"] else None
            yield row["layer"], row["task"], int(row["seed"]), float(row["top1"]), steps


def as_rows(results: dict[str, dict[str, dict[int, Result]]]) -> list[dict]:
    """Return a row of `COLUMNS` for each run; `read_table` reads them."""
    return [
        {"layer": layer, "task": task, "seed": seed, "top1": result.top1, "steps": result.steps}
        for layer, tasks in results.items()
        for task, seeds in tasks.items()
        for seed, result in seeds.items()
    ]


def mean_solved(tasks: dict[str, dict[int, Result]]) -> float:
    """Return the mean over the eight tasks of the means over seeds; tasks that have not been run count as chance."""
    return sum(sum(result.solved for result in seeds.values()) / len(seeds) for seeds in tasks.values()) / len(TASKS)


def draw_abilities(results: dict[str, dict[str, dict[int, Result]]]):
    """Draw two maps of mixers by tasks, a cell per seed: how much is solved, and steps until it is learned; gray: not run."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    layers = sorted(results, key=lambda layer: -mean_solved(results[layer]))
    seeds = sorted({seed for tasks in results.values() for by_seed in tasks.values() for seed in by_seed})
    runs = [[results[layer].get(task, {}).get(seed) for task in TASKS for seed in seeds] for layer in layers]
    missing = np.array([[run is None for run in row] for row in runs])
    solved = np.array([[run.solved if run else math.nan for run in row] for row in runs])
    steps = np.array([[run.steps if run and run.steps else math.nan for run in row] for row in runs])
    top1 = np.array([[run.top1 if run else math.nan for run in row] for row in runs])
    panels = {
        "solved (0: chance, 1: every test image); text: top-1 in percent; gray: not run": (
            solved,
            Normalize(0, 1),
            "viridis",
            top1,
        ),
        f"steps until {LEARNED} % of the validation images, in hundreds; white: never": (
            steps,
            LogNorm(),
            "viridis_r",
            steps / 100,
        ),
    }
    width = max(COLUMN, 0.17 * len(TASKS) * len(seeds) + 1.5)
    figure, axes = make_panels(2, 1, width, 0.8 + 0.12 * len(layers))
    for axis, (title, (values, norm, colors, texts)) in zip(axes, panels.items(), strict=True):
        cells = colormaps[colors].with_extremes(bad="white")(norm(np.ma.masked_invalid(values)))
        cells[missing] = colormaps["gray"](0.85)
        axis.imshow(cells, aspect="auto", interpolation="nearest")
        for (y, x), text in np.ndenumerate(texts):
            if not math.isnan(text):
                color = "w" if cells[y, x, :3].sum() < 1.4 else "k"
                axis.text(x, y, f"{text:.0f}", ha="center", va="center", fontsize=5, color=color)
        for edge in range(len(seeds), len(TASKS) * len(seeds), len(seeds)):
            axis.axvline(edge - 0.5, color="w", lw=2)
        axis.set_xticks([len(seeds) * (number + 0.5) - 0.5 for number in range(len(TASKS))], TASKS, fontsize=6, rotation=30)
        axis.set_yticks(range(len(layers)), layers, fontsize=6)
        axis.tick_params(length=0)
        axis.set_title(wrapped(title, figure))
    figure.supxlabel(wrapped(f"task; one column per seed ({', '.join(map(str, seeds))})", figure), fontsize=7)
    return figure
