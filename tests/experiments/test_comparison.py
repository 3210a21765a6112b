"""Statistics of a sweep: against SciPy, against a known truth, and on a table made by hand."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from experiments.comparison import compare, find_baselines, holm, image_interval, mean_with_interval, share_within, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 9, 30])
def test_student_is_scipys(df):
    for t in (0.0, 0.1, 1.0, 2.5, 12.0, 400.0):
        assert share_within(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-12)
    for share in (0.5, 0.9, 0.95, 0.99):
        assert t_quantile(share, df) == pytest.approx(stats.t.ppf((1 + share) / 2, df), rel=1e-9)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_interval_and_p_value_are_scipys(seeds):
    values = np.random.default_rng(seeds).normal(0.5, 1, seeds).tolist()
    found, expected = mean_with_interval(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx((np.mean(values), interval.low, interval.high, expected.pvalue))


def test_few_and_equal_seeds():
    assert mean_with_interval([1.0, 2.0])[0] == 1.5 and math.isnan(mean_with_interval([1.0, 2.0]).low)
    assert mean_with_interval([2.0] * 3) == (2, 2, 2, 0) and mean_with_interval([0.0] * 3) == (0, 0, 0, 1)


def test_holm_by_its_definition():
    """Reject the smallest p at level / n, the next at level / (n - 1), and so on until one stays."""
    p_values = [0.01, math.nan, 0.04, 0.03, 0.005, 0.5]
    corrected = holm(p_values)
    assert math.isnan(corrected[1])
    for level in np.linspace(0.001, 0.999, 200):
        rejected, left = set(), sorted(p for p in p_values if not math.isnan(p))
        while left and left[0] <= level / len(left):
            rejected.add(left.pop(0))
        assert rejected == {p for p, c in zip(p_values, corrected, strict=True) if c <= level}


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("deviation", [0.0, 0.3, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, deviation):
    """Two models of known accuracy, whose seeds deviate and whose test sets are finite."""
    rng, truth, images, repeats = np.random.default_rng(0), 0.4, 10_000, 2000
    shares = [0.80 + rng.normal(0, deviation / 100, (repeats, seeds)) for _ in range(2)]
    first, second = (rng.binomial(images, share + more) / images for share, more in zip(shares, (0, truth / 100), strict=True))
    covered = 0
    for differences in (100 * (second - first)).tolist():
        found = mean_with_interval(differences)
        covered += found.low <= truth <= found.high
    assert 0.93 < covered / repeats < 0.97


def test_the_bootstrap_is_scipys():
    differences = np.random.default_rng(0).choice([-1, -1 / 3, 0, 1 / 3, 1], 2000, p=[0.05, 0.1, 0.6, 0.15, 0.1])
    found = image_interval(differences)
    expected = stats.bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.1)


def write_predictions(folder, right, images=100):
    folder.mkdir()
    labels = np.arange(images) % 10
    last = np.where(np.arange(images) < right, labels, (labels + 1) % 10)
    np.savez(folder / "test_predictions.npz", labels=labels, last=last)
    return float(100 * right / images), folder


def test_rows_are_compared_with_the_baseline_of_their_options(tmp_path):
    rows = [
        {"layer": layer, "K": K, "d_model": d}
        for d in (8, 16)
        for layer, K in (("Attention", ""), ("ConvNN", 4), ("KvtAttention", 4))
    ]
    top1 = {("Attention", 8): (50, 52, 54), ("ConvNN", 8): (60, 61, 65), ("KvtAttention", 8): (50, 53, 53)}
    top1 |= {("Attention", 16): (70, 71, 72), ("ConvNN", 16): (70, 70), ("KvtAttention", 16): ()}
    runs = [
        {
            seed: write_predictions(tmp_path / f"{row['layer']}-{row['d_model']}-{seed}", right)
            for seed, right in enumerate(top1[row["layer"], row["d_model"]])
        }
        for row in rows
    ]
    found = compare(rows, runs, ["layer", "K", "d_model"], "Attention")
    assert math.isnan(found[0]["difference"]) and found[0]["told_apart"] == ""
    of_convnn = stats.ttest_1samp([10, 9, 11], 0)
    assert found[1]["difference"] == 10 and found[1]["p_holm"] == pytest.approx(2 * of_convnn.pvalue)
    assert found[1]["told_apart"] == "yes" and found[2]["told_apart"] == "no" and found[2]["difference"] == 0
    assert found[1]["these_seeds_low"] < 10 < found[1]["these_seeds_high"]
    assert found[4]["difference"] == -0.5 and math.isnan(found[4]["difference_low"])  # two seeds
    assert math.isnan(found[5]["difference"])
    assert find_baselines(rows, ["layer", "K", "d_model"], "Conv1d") == [None] * 6


def test_order_does_not_matter():
    values = [random.Random(0).gauss(0, 1) for _ in range(5)]
    assert mean_with_interval(values) == pytest.approx(mean_with_interval(values[::-1]))
