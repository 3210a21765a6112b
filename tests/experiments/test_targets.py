"""Cases of `make bench`: equal results, memory within its targets, and the lines about given times.

Times themselves are for `make bench`: nothing here depends on how fast a machine is.
"""

import csv

import pytest
import torch
from torch import nn

import benchmark
from experiments import targets
from experiments.naive import Naive, has_naive_form
from experiments.targets import Limit, Target, floor_of, main, measure_data, measure_search, measure_target
from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import ConvNN2d, ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.local import MultiHeadLocalAttention, MultiHeadMaskedAttention, NeighborhoodAttention
from options.neighbors import NeighborConfig
from runs.measure import Case, peak_memory

CPU = torch.device("cpu")
SLACK = 4 / 3  # of a target for memory, before a test fails: libraries differ in what they allocate for themselves


def layers():
    layout = TokenLayout(7, 6, 1)
    for metric in ("matmul", "cosine", "euclidean"):
        neighbors = NeighborConfig(K=5, magnitude_type=metric)
        for pattern in ("NA", "BA"):
            yield ConvNN2d(3, 8, neighbors, shuffle_pattern=pattern), (2, 3, 12, 10)
        for softmax in (True, False):
            yield ConvNNAttention2d(3, 8, neighbors, softmax_topk_val=softmax), (2, 3, 8, 6)
            for kind in ("depthwise", "standard"):
                options = {"layout": layout, "softmax_topk_val": softmax, "convolution_type": kind}
                yield MultiHeadConvNNAttention(16, 2, neighbors, **options), (2, 43, 16)
    yield MultiHeadKvtAttention(16, 2, 5), (2, 43, 16)
    yield MultiHeadLocalAttention(16, 2, layout=TokenLayout(20, 20, 1), window_size=3), (2, 401, 16)
    yield MultiHeadMaskedAttention(16, 2, layout=layout, mask_type="2d_all_neighbors", expansion_step=1), (2, 43, 16)
    yield NeighborhoodAttention(16, 2, layout=TokenLayout(20, 20), kernel_size=3), (2, 400, 16)


@pytest.mark.parametrize(("layer", "shape"), list(layers()))
def test_naive_forms_compute_the_same(layer, shape):
    layer = layer.double()  # where no two neighbors are as near as noise
    for value in layer.parameters():
        nn.init.normal_(value, std=0.3)
    assert has_naive_form(layer)
    results = []
    x = torch.randn(shape).double()
    direction = torch.randn_like(layer(x))
    for form in (layer, Naive(layer)):
        given = x.clone().requires_grad_()
        out = form(given)
        results.append([out, *torch.autograd.grad((out * direction).sum(), [given, *layer.parameters()])])
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-9 * max(1, naive.abs().max().item()), rtol=1e-9)


def test_layers_without_a_naive_form():
    window = NeighborConfig(K=9, similarity_type="Loc")  # which is a convolution
    assert not has_naive_form(ConvNN2d(3, 4, window, padding=1)) and not has_naive_form(nn.Conv2d(3, 4, 3))
    assert not has_naive_form(ConvNN2d(3, 4, NeighborConfig(K=4, sampling_type="random", num_samples=8)))
    assert not has_naive_form(MultiHeadKvtAttention(8, 2, 3, attention_dropout=0.1))
    assert not has_naive_form(ConvNNAttention2d(3, 4, NeighborConfig(K=4), attention_dropout=0.1))


def test_floor_of_a_target():
    layer = nn.Linear(3, 5, bias=False)
    fast_products, fast_copies = (
        {"matmul_fp32_gflops": 1, "copy_gb_per_s": 1e-3},
        {"matmul_fp32_gflops": 1e-6, "copy_gb_per_s": 1},
    )
    gflops, mb, seconds = floor_of(Target("", layer, torch.randn(7, 3), 1, None), [fast_products, fast_copies])
    assert gflops == pytest.approx(3 * 2 * 7 * 3 * 5 / 1e9)
    assert mb == pytest.approx(2 * 4 * (7 * 3 + 7 * 5 + 3 * 5) / 1e6)
    assert seconds == pytest.approx([568 / 1e9 / 1e-3, 630 / 1e9 / 1e-6])


def small_layers():
    """The targets with a bound for memory, with fewer channels, images or tokens, and the bound at that size."""
    options, dots = NeighborConfig(K=9), NeighborConfig(K=9, magnitude_type="matmul")
    patches, wide = TokenLayout(14, 14, 1), TokenLayout(48, 48)
    yield ConvNN2d(32, 32, options, shuffle_pattern="BA"), (32, 32, 32, 32), 1 / 3, "fp32"
    yield ConvNN2d(16, 32, options, shuffle_pattern="BA"), (32, 16, 32, 32), 1 / 4, "bf16"
    yield ConvNN2d(16, 32, options), (4, 16, 32, 32), 1 / 4, "fp32"
    yield MultiHeadConvNNAttention(64, 1, dots, layout=patches), (24, 197, 64), 1 / 4, "fp32"
    yield MultiHeadKvtAttention(192, 3, 9), (8, 197, 192), 1 / 1.5, "fp32"
    # A naive form of attention by place grows with the square of the tokens, the layer with their number: a tenth at 4,096.
    yield MultiHeadLocalAttention(64, 1, layout=wide, window_size=24), (1, 48 * 48, 64), 4096 / (48 * 48) / 10, "fp32"
    yield NeighborhoodAttention(64, 1, layout=wide, kernel_size=7), (1, 48 * 48, 64), 4096 / (48 * 48) / 10, "fp32"


@pytest.mark.parametrize(("layer", "shape", "most", "precision"), list(small_layers()))
def test_memory_against_the_naive_form(layer, shape, most, precision):
    x = torch.randn(shape)
    ours, theirs = (
        Case(layer, x.clone(), precision=precision, compiled=False),
        Case(Naive(layer), x, precision="fp32", compiled=False),
    )
    # The least of three: what was allocated before, and is freed meanwhile, the profiler does not take off.
    least = min(peak_memory(ours.training, CPU) for _ in range(3))
    assert least <= SLACK * most * peak_memory(theirs.training, CPU)


# --- what is said of times, with a clock that the tests set -----------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the next measurements will seem to take, in order; what is measured runs nevertheless."""
    seconds = []

    def seconds_of(function, device):
        function()
        return seconds.pop(0)

    monkeypatch.setattr("runs.measure.seconds_of", seconds_of)
    return seconds


def limits():
    """A machine that does 2 GFLOP of either kind, and copies 3 GB."""
    work = {"matmul_fp32_gflops": 2, "matmul_bf16_gflops": 2, "copy_gb_per_s": 3}
    return {name: Limit(lambda: None, number) for name, number in work.items()}


def small_target(time, memory=None, **more):
    return Target("a linear layer", nn.Linear(3, 5), torch.randn(7, 3), time, memory, nn.Linear(3, 5), **more)


def test_ratios_are_medians_over_pairs_with_quartiles(clock):
    rounds = [(9, 1), (1, 2), (3, 2), (10, 4), (2, 2), (4, 1)]  # the first is a warm-up; ratios 0.5, 1.5, 2.5, 1, 4
    clock.extend(seconds for ours, theirs in rounds for seconds in (ours, theirs, 1, 1, 1))
    row = measure_target(small_target(1.4), 5, CPU, limits())
    assert not clock
    assert (row["ms"], row["against_ms"]) == (3000, 2000)
    assert (row["time_ratio_q1"], row["time_ratio"], row["time_ratio_q3"]) == (1, 1.5, 2.5)
    floor = 3 * 2 * 7 * 3 * 5 / 1e9 / 2  # products: the copies take less
    assert row["floor_ms"] == pytest.approx(1e3 * floor) and row["times_the_floor"] == pytest.approx(3 / floor)
    assert row["missed"] == "time ratio"


@pytest.mark.parametrize(
    ("ours", "memory", "missed"),
    [(1, None, ""), (1, 100, ""), (3, 100, "time ratio"), (1, 0.01, "memory ratio"), (3, 0.01, "time ratio, memory ratio")],
)
def test_what_a_target_misses(clock, ours, memory, missed):
    clock.extend([ours, 2, 1, 1, 1] * 2)
    row = measure_target(small_target(1.0, memory), 1, CPU, limits())
    assert row["missed"] == missed and row["memory_ratio"] == row["mb"] / row["against_mb"]


@pytest.mark.parametrize(("bf16", "missed"), [(1.0, ""), (0.5, "time ratio")])
def test_bfloat16_has_a_target_for_its_time_only_where_its_products_are_fast(clock, bf16, missed):
    clock.extend([3, 2, 1, bf16, 1] * 2)
    row = measure_target(small_target(1.0, precision="bf16"), 1, CPU, limits())
    assert row["missed"] == missed and row["time_target"] == (1 if missed else None) and row["time_ratio"] == 1.5


def test_the_search_has_a_target(clock):
    for seconds, missed in (((1, 2), ""), ((2, 1), "time ratio")):
        clock.extend(seconds * 4)
        row = measure_search(3, CPU)
        assert row["time_ratio"] == seconds[0] / seconds[1] and row["missed"] == missed and not clock


@pytest.mark.parametrize(("per_image", "missed"), [(12, ""), (6, "rate ratio")])
def test_data_is_compared_with_the_best_number_of_workers(clock, monkeypatch, per_image, missed):
    monkeypatch.setattr(targets, "cpu_cores", lambda: 2)
    candidates = [9, 9, 9, 5, 9, 7]  # 0, 1 and 2 workers, after a warm-up each
    clock.extend([*candidates, *([1, per_image] * 4)])
    row = measure_data(8, 10, 20, 3, CPU, batch_size=8)
    assert row["workers"] == 1 and row["rate_ratio"] == row["rate_ratio_q1"] == per_image
    assert row["images_per_s"] == 20 and row["per_image_images_per_s"] == pytest.approx(20 / per_image)
    assert row["missed"] == missed and not clock


@pytest.mark.parametrize("missed", ["target", "search", "data", ""])
def test_the_exit_status_follows_the_rows(missed, clock, monkeypatch, tmp_path, capsys):
    def row(name):
        ratios = {"time_ratio": 0.5, "time_ratio_q1": 0.4, "time_ratio_q3": 0.6}
        return {"case": name, **ratios, "missed": "time ratio" if name == missed else ""}

    def of_target(target, *_):
        assert target.against is not None or has_naive_form(target.layer)
        return row("target" if "BA" in target.name else "other")

    monkeypatch.setattr(targets, "make_limits", lambda device: limits())
    monkeypatch.setattr(targets, "measure_target", of_target)
    monkeypatch.setattr(targets, "measure_search", lambda *_: row("search"))
    monkeypatch.setattr(targets, "measure_data", lambda side, *_: row("data" if side == 224 else "other"))
    bf16 = 1 if missed else 8  # seconds of its product, where float32's takes one
    clock.extend([1, bf16, 1] * 3)
    status = benchmark.main(["targets", "--repeats", "2", "--device", "cpu", "--output_dir", str(tmp_path)])
    assert status == (1 if missed else 0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert ("bfloat16 is left out: its products run at 0.12 of float32's speed here" in lines) == (bf16 == 8)
    assert err.splitlines()[-1] == f"{12 - (bf16 == 8)}/{12 - (bf16 == 8)} data: time_ratio 0.5 (0.4 to 0.6), ETA 00:00"
    assert [line for line in lines if line.startswith("missed")] == [f"missed: {missed}: time ratio"] * bool(missed)
    for name, number in (("targets", 9 - (bf16 == 8)), ("search", 1), ("data", 2)):
        assert len(list(csv.DictReader((tmp_path / f"{name}.csv").open()))) == number
    assert "--repeats 2" in (tmp_path / "targets.md").read_text()


def test_a_product_is_no_larger_than_it_may_take(monkeypatch):
    monkeypatch.setattr(targets, "seconds_of", lambda function, device: function().shape[0] ** 3 / 1024**3)
    for longest, rows in ((100, 2048), (8, 2048), (7.9, 1024), (0.9, 512), (1e-9, 256)):
        product = targets.make_product(torch.float32, CPU, longest)
        assert product.run().shape == (rows, rows) and product.work == 2 * rows**3 / 1e9


def test_wrong_options_of_the_targets(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for line, words in (("--repeats 0", "--repeats"), (f"--output_dir {tmp_path / 'file'}", "--output_dir"), ("--x", "--x")):
        with pytest.raises(SystemExit) as end:
            main(line.split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error
