"""Differences of the rows of a sweep to a baseline, paired by seed, with intervals and corrected p-values.

A difference of means over seeds has a t interval. A hierarchical bootstrap over seeds and images covers less than it says with
three or five seeds, so the bootstrap over images is a column of its own, about these seeds only.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
LEAST_SEEDS = 3  # for an interval
DRAWS = 10_000
INTERVALS = ("difference", "these_seeds")  # shown with their ends in one cell
FOLDED = ("difference_low", "difference_high", "these_seeds_high")


class Difference(NamedTuple):
    """Difference in top-1 (percent points) with its interval, and the p-value of no difference; NaN where unknown."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def share_within(t: float, df: int) -> float:
    """Return P(|T| <= t) of Student's t distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for n in range(2 if odd else 1, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * n / (n + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_quantile(share: float, df: int) -> float:
    """Return t with P(|T| <= t) = share, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, df) < share else (low, middle)
    return high


def mean_with_interval(values: list[float]) -> Difference:
    """Return the mean of independent values, its t interval, and the p-value of a true mean of 0."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < LEAST_SEEDS:
        return Difference(mean)
    error, df = statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    half = t_quantile(LEVEL, df) * error
    return Difference(mean, mean - half, mean + half, 1 - share_within(abs(mean) / error, df))


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979); NaN stays and does not count."""
    order = sorted((p, number) for number, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = list(p_values), 0.0
    for rank, (p, number) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[number] = largest
    return corrected


def image_interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the interval of the mean difference over test images (percent points), by the bootstrap.

    differences (images,): of the shares of seeds that classify an image correctly. Images of one value are exchangeable, so
    drawing how many of each value a resample holds is drawing images.
    """
    values, counts = np.unique(differences, return_counts=True)
    images = counts.sum()
    means = np.random.default_rng(0).multinomial(images, counts / images, DRAWS) @ values / images
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return 100 * float(low), 100 * float(high)


def read_correct(folder: Path) -> np.ndarray | None:
    """Return which test images the last epoch of a run, or an evaluation, classified correctly; None without predictions."""
    try:
        with np.load(folder / "test_predictions.npz") as found:
            return found["labels"] == found["last" if "last" in found else "predicted"]
    except (OSError, ValueError, KeyError):
        return None


def find_baselines(rows: list[dict], options: list[str], layer: str) -> list[dict | None]:
    """Return for each row the row of the baseline layer with the same other options; None without one, and for itself.

    An option that the baseline does not read, an empty cell, matches any value.
    """
    candidates = [row for row in rows if row.get("layer") == layer]
    others = [name for name in options if name != "layer"]
    found = []
    for row in rows:
        fitting = (one for one in candidates if all(one[name] in (row[name], "") for name in others))
        baseline = next(fitting, None)
        found.append(None if baseline is row else baseline)
    return found


def compare(rows: list[dict], runs: list[dict], options: list[str], layer: str) -> list[dict]:
    """Return for each row the columns of its comparison with the baseline.

    Args:
        runs: for each row, the top-1 and folder of its finished runs, by seed.
        options: in which the rows differ.
        layer: of the baseline.
    """
    baselines = find_baselines(rows, options, layer)
    of_row = dict(zip(map(id, rows), runs, strict=True))
    differences, intervals = [], []
    for own, baseline in zip(runs, baselines, strict=True):
        other = {} if baseline is None else of_row[id(baseline)]
        pairs = [(own[seed], other[seed]) for seed in own if seed in other]
        differences.append(mean_with_interval([a - b for (a, _), (b, _) in pairs]))
        correct = [(read_correct(folder), read_correct(there)) for (_, folder), (_, there) in pairs]
        is_whole = correct and all(a is not None and b is not None and len(a) == len(b) for a, b in correct)
        by_image = np.mean([a.astype(float) - b for a, b in correct], axis=0) if is_whole else None
        intervals.append((math.nan, math.nan) if by_image is None else image_interval(by_image))
    corrected = holm([one.p for one in differences])
    return [
        {
            "difference": one.mean,
            "difference_low": one.low,
            "difference_high": one.high,
            "p_holm": p,
            "told_apart": "" if math.isnan(p) else "yes" if p < 1 - LEVEL else "no",
            "these_seeds_low": low,
            "these_seeds_high": high,
        }
        for one, p, (low, high) in zip(differences, corrected, intervals, strict=True)
    ]


def as_text(row: dict, name: str) -> str:
    """Return a cell of the readable table: `+0.42 [-0.10, 0.94]`."""
    if math.isnan(row["difference"]):
        return ""
    low, high = ("these_seeds_low", "these_seeds_high") if name == "these_seeds" else ("difference_low", "difference_high")
    interval = "" if math.isnan(row[low]) else f"[{row[low]:.2f}, {row[high]:.2f}]"
    return interval if name == "these_seeds" else f"{row['difference']:+.2f} {interval}".strip()


def note_on(layer: str) -> str:
    return (
        f"difference is top-1 minus that of {layer}, paired by seed, with a 95 % t interval over seeds (none below "
        f"{LEAST_SEEDS}); p_holm is corrected for the number of rows (Holm); told_apart is yes below {1 - LEVEL:.2f}. "
        "these_seeds is a bootstrap over the test images: what to expect of these trained models on other images, and not of "
        "other seeds."
    )
