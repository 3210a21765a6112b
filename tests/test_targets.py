"""The speed that is promised, as ratios within one process, and that what is compared computes the same."""

import pytest
import torch
from torch import nn

from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention, TokenLayout
from layers2d import ConvNN2d, ConvNNAttention2d
from naive_layers import Naive, has_naive_form
from options import NeighborConfig
from place_attention import MultiHeadLocalAttention, MultiHeadMaskedAttention, NeighborhoodAttention
from targets import Target, floor_of, machine_rates, main, make_targets, measure_data, measure_target

CPU = torch.device("cpu")
SLACK = 4 / 3  # of a target, before a test fails: machines differ, and are shared


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
    for value in layer.parameters():
        nn.init.normal_(value, std=0.3)
    assert has_naive_form(layer)
    results = []
    x = torch.randn(shape)
    direction = torch.randn_like(layer(x))
    for form in (layer, Naive(layer)):
        given = x.clone().requires_grad_()
        out = form(given)
        results.append([out, *torch.autograd.grad((out * direction).sum(), [given, *layer.parameters()])])
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-5 * max(1, naive.abs().max().item()), rtol=1e-5)


def test_layers_without_a_naive_form():
    near = NeighborConfig(K=9, similarity_type="Loc")
    assert not has_naive_form(ConvNN2d(3, 4, near)) and not has_naive_form(nn.Conv2d(3, 4, 3))
    assert not has_naive_form(ConvNN2d(3, 4, NeighborConfig(K=9), padding=1))
    assert not has_naive_form(ConvNN2d(3, 4, NeighborConfig(K=4, sampling_type="random", num_samples=8)))
    assert not has_naive_form(MultiHeadKvtAttention(8, 2, 3, attention_dropout=0.1))


def test_floor_of_a_target():
    layer = nn.Linear(3, 5, bias=False)
    rates = {"matmul_fp32_gflops": 1e-6, "copy_gb_per_s": 1e-3}
    floor = floor_of(Target("", layer, torch.randn(7, 3), 1, None), rates)
    assert floor["gflops"] == pytest.approx(3 * 2 * 7 * 3 * 5 / 1e9)
    assert floor["least_mb"] == pytest.approx(2 * 4 * (7 * 3 + 7 * 5 + 3 * 5) / 1e6)
    assert floor["floor_ms"] == pytest.approx(max(630 / 1e9 / 1e-6, 568 / 1e9 / 1e-3) * 1e3)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.timing
@pytest.mark.parametrize("target", make_targets(), ids=lambda target: target.name)
def test_targets(target, two_threads):
    if target.precision == "bf16":
        rates = machine_rates(CPU)
        if rates["matmul_bf16_gflops"] < 2 * rates["matmul_fp32_gflops"]:
            pytest.skip(f"bfloat16 products are not fast here: {rates}")
    row = measure_target(target, 4, CPU)
    assert row["time_ratio"] <= SLACK * target.time, row
    assert target.memory is None or row["memory_ratio"] <= SLACK * target.memory, row


@pytest.mark.timing
@pytest.mark.parametrize(("resize", "least"), [(32, 10), (224, 1)])
def test_data_keeps_up(resize, least, two_threads):
    row = measure_data(resize, 2000 if resize == 32 else 500, CPU, batch_size=64)
    assert row["ratio"] >= least / SLACK, row


def test_wrong_options_of_the_targets(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for line, words in (("--repeats 0", "--repeats"), (f"--output_dir {tmp_path / 'file'}", "--output_dir"), ("--x", "--x")):
        with pytest.raises(SystemExit) as end:
            main(line.split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and words in error
