import csv

import pytest
import torch

import benchmark
from benchmark import make_mixers, measure, parse
from options.layers import LAYERS1D_NAMES, LAYERS2D_NAMES
from runs.measure import Case, count_flops, count_parameters, peak_memory, training_flops

CPU = torch.device("cpu")


class Bar:
    total = 0

    def update(self):
        pass


def run(line, tmp_path):
    assert benchmark.main([*line.split(), "--device", "cpu", "--output_dir", str(tmp_path / "out")]) == 0
    return list(csv.DictReader((tmp_path / "out" / "benchmark.csv").open()))


def test_a_row_for_every_layer_size_precision_and_execution(tmp_path, capsys):
    # 36: from 64 tokens on, PyTorch refuses attention of bfloat16 where ATEN_CPU_CAPABILITY hides the AVX-512 oneDNN finds.
    line = "vit --layer Linformer ConvNNAttention --tokens 16 36 --d_model 8 --num_heads 2 --repeats 1 --batch_size 2 --K 4"
    rows = run(f"{line} --precision fp32 bf16", tmp_path)
    found = [(row["tokens"], row["layer"], row["precision"], row["execution"]) for row in rows]
    assert found == [
        (tokens, layer, precision, "eager")
        for tokens in ("16", "36")
        for layer in ("Linformer", "ConvNNAttention")
        for precision in ("fp32", "bf16")
    ]
    measured = ("latency_ms_per_image", "images_per_s", "forward_backward_ms", "peak_memory_mb", "forward_mflops")
    assert all(float(row[name]) > 0 for row in rows for name in measured)
    text = capsys.readouterr().out
    assert sum(line.startswith("| Linformer") for line in text.splitlines()) == 4 and "does not see" in text
    assert line in (tmp_path / "out" / "benchmark.md").read_text()
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_images(tmp_path):
    rows = run("allconvnet --layer Conv2d Conv2d/ConvNN --channels 4 6 --resolution 8 --repeats 1", tmp_path)
    assert [(row["layer"], row["tokens"], row["execution"]) for row in rows] == [
        ("Conv2d", "64", "eager"),
        ("Conv2d/ConvNN", "64", "eager"),
    ]
    assert rows[0]["parameters"] == str(4 * 6 * 9 + 6)
    assert float(rows[0]["forward_mflops"]) == 2 * 64 * 4 * 6 * 9 / 1e6
    assert float(rows[0]["forward_backward_mflops"]) == 3 * 2 * 64 * 4 * 6 * 9 / 1e6
    assert not (tmp_path / "out" / "scaling.png").exists()  # there is one size only


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.parametrize("size", [32, 128])
def test_a_backbone_is_measured_whole(name, size):
    _, _, configs = parse(f"allconvnet --model {name} --layer ConvNN Conv2d --resolution {size}".split())
    with torch.device("meta"):
        for config, layer in zip(configs, ("ConvNN", "Conv2d"), strict=True):
            ((label, network, images),) = make_mixers(config, 1)
            assert label == f"{name} with {layer}" and images.shape == (1, 3, size, size)
            assert count_parameters(network) > 5e6
        assert count_flops(network, images) > 1e8


def test_compiled_rows_are_compiled(tmp_path, monkeypatch):
    """A graph of its own for each case: one image, a batch, and training. (Inductor itself would take a minute.)"""
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda mixer, **more: real(mixer, backend=backend, fullgraph=True, **more))
    line = "vit --layer Linformer --tokens 4 16 --d_model 8 --num_heads 2 --repeats 2 --precision fp32 bf16"
    rows = run(f"{line} --execution eager compiled", tmp_path)
    assert len(rows) == 8 and len(graphs) == 2 * 2 * 3


def test_warm_up_is_left_out(monkeypatch):
    _, bench, configs = parse("vit --layer Linformer --tokens 4 --d_model 8 --num_heads 2 --repeats 3".split())
    seen, real = [], Case.row
    monkeypatch.setattr(
        Case, "row", lambda case: seen.append({key: len(times) for key, times in case.times.items()}) or real(case)
    )
    calls = []
    monkeypatch.setattr(Case, "latency", lambda case: calls.append(1))
    list(measure(bench, configs, CPU, Bar()))
    assert seen == [{"latency": 3, "forward": 3, "training": 3}] and len(calls) == 4


def test_what_does_not_fit_leaves_empty_cells(tmp_path, monkeypatch, capsys):
    def training(case):
        if case.x.shape[1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Case, "training", training)
    rows = run("vit --layer Linformer --tokens 16 64 --d_model 8 --num_heads 2 --repeats 1", tmp_path)
    assert [row["forward_backward_ms"] == "nan" for row in rows] == [False, True]
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["Case.training", "make_mixers"])
def test_short_memory_leaves_an_empty_cell_or_one_line(where, tmp_path, monkeypatch, capsys):
    """Of the CPU, whose allocator raises a RuntimeError."""
    real = make_mixers

    def training(case):
        torch.empty(2**60, dtype=torch.uint8)

    def make(config, *more):
        if config.grid[0] == 8:
            torch.empty(2**60, dtype=torch.uint8)
        return real(config, *more)

    monkeypatch.setattr(f"benchmark.{where}", training if where == "Case.training" else make)
    line = "vit --layer Linformer --tokens 16 64 --d_model 8 --num_heads 2 --repeats 1 --device cpu"
    status = benchmark.main([*line.split(), "--output_dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "benchmark.csv").open()))
    out, err = capsys.readouterr()
    if where == "Case.training":
        assert status == 0 and [row["forward_backward_ms"] for row in rows] == ["nan", "nan"] and "out of memory" in out
    else:
        assert status == 1 and [row["tokens"] for row in rows] == ["16"]
        assert err.splitlines()[-1].startswith("stopped: out of memory while making the layers at --resolution 8")


@pytest.mark.parametrize("family", ["vit", "allconvnet"])
def test_all_layers_are_measured_unless_some_are_named(family):
    _, bench, configs = parse([family])
    assert [config.layer for config in configs] == 2 * [*(LAYERS1D_NAMES if family == "vit" else LAYERS2D_NAMES)]
    assert bench.resolution == (16, 32)
    assert {config.image_size for config in configs} == ({(256, 256), (512, 512)} if family == "vit" else {(16, 16), (32, 32)})


def test_attention_comes_with_separate_projections_if_they_are_asked_for(capsys):
    *_, (config,) = parse("vit --layer Attention --tokens 9 --d_model 8 --num_heads 2 --pool cls".split())
    assert len(list(make_mixers(config, 3))) == 1
    (_, merged, x), (label, apart, same) = make_mixers(config, 3, baseline=True)
    assert label == "Attention (q, k, v apart)" and x.shape == same.shape == (3, 10, 8)
    parts = apart.query, apart.key, apart.value
    for part, weight, bias in zip(parts, merged.qkv.weight.chunk(3), merged.qkv.bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = weight, bias
    apart.proj = merged.proj
    torch.testing.assert_close(apart(x), merged(x))
    assert training_flops(merged, x) == training_flops(apart, x)
    assert capsys.readouterr().err == ""
    for line in ("vit --layer Linformer", "allconvnet --layer Attention"):
        parse(f"{line} --baseline".split())
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "warning: --baseline is not used" in warning


def test_attention_flops_against_a_hand_count():
    line = "vit --layer Attention --tokens 64 --d_model 8 --num_heads 2 --repeats 1 --batch_size 2 --baseline"
    _, bench, configs = parse(line.split())
    merged, apart = measure(bench, configs, CPU, Bar())
    # projections, scores and their products with values; a multiply-add is two; backward does each product twice
    flops = 2 * (64 * 4 * 8 * 8 + 2 * 64 * 64 * 8) / 1e6
    for row in (merged, apart):
        assert row["forward_mflops"] == pytest.approx(flops) and row["forward_backward_mflops"] == pytest.approx(3 * flops)
        assert row["parameters"] == 4 * 8 * 8 + 4 * 8 and row["tokens"] == 64


def test_what_is_timed_is_what_it_says():
    calls = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            calls.append((len(x), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    for precision in ("fp32", "bf16"):
        case = Case(Spy(4, 4), torch.randn(5, 4), precision=precision, compiled=False)
        case.measure()
        is_autocast = precision == "bf16"
        assert calls == [(1, False, is_autocast), (5, False, is_autocast), (5, True, is_autocast)]
        assert case.x.grad is not None and case.mixer.weight.grad is not None
        assert {name: len(times) for name, times in case.times.items()} == {"latency": 1, "forward": 1, "training": 1}
        calls.clear()


def test_rows_hold_medians_and_rates():
    case = Case(torch.nn.Linear(4, 4), torch.randn(5, 4), precision="fp32", compiled=False)
    case.times = {"latency": [0.001, 0.002, 0.006], "forward": [0.1, 0.2, 9.0], "training": [0.5, 0.7, 0.6]}
    row = case.row()
    assert row["latency_ms_per_image"] == pytest.approx(3) and row["latency_std_ms"] == pytest.approx(7**0.5)
    assert row["images_per_s"] == pytest.approx(5 / 0.2) and row["forward_backward_ms"] == pytest.approx(600)


def test_peak_of_live_bytes():
    def work():
        first = torch.ones(1000)
        del first
        return torch.ones(3000), torch.ones(500)

    assert peak_memory(work, CPU) == pytest.approx(4 * 3500, abs=512)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "required: family"),
        ("resnet", "invalid choice: 'resnet'; vit; allconvnet"),
        ("vit --layer Atention", "did you mean Attention?"),
        ("allconvnet --layer GPSA", "layer='GPSA'"),
        ("vit --tokens 100 101", "tokens=101 is not a square"),
        ("vit --tokens 100 --resolution 10", "drop one of them"),
        ("vit --d_model 10 --num_heads 3", "num_heads=3"),
        ("vit --batch_size 0", "batch_size=0 must be at least 1"),
        ("vit --repeat 0", "did you mean --repeats?"),
        ("vit --precision fp8", "fp32, bf16, fp16"),
        ("vit --layer KvtAttention --tokens 4", "K=9 is more than the 4 tokens"),
        ("vit --layer NeighborhoodAttention --kernel_size 9 --resolution 8", "kernel_size=9"),
        ("allconvnet --channels 4", "channels=4 must be two numbers"),
        ("vit --device cuda --layer Attention", "--device cuda"),
    ],
)
def test_errors_are_one_line(line, says, capsys, tmp_path, monkeypatch):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    try:
        status = benchmark.main(line.split())
    except SystemExit as end:
        status = end.code
    text = capsys.readouterr().err
    assert status == 2 and all(part in text for part in says.split("; ")) and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_against_the_naive_form(tmp_path):
    line = "vit --layer ConvNNAttention Performer --tokens 16 --d_model 8 --num_heads 2 --repeats 1 --batch_size 2 --K 4"
    rows = run(f"{line} --against naive", tmp_path)
    assert [row["layer"] for row in rows] == ["ConvNNAttention", "ConvNNAttention (naive)", "Performer"]
    fast, naive, other = rows
    for ratio, column in (("time_ratio", "forward_backward_ms"), ("memory_ratio", "peak_memory_mb")):
        assert float(fast[ratio]) == pytest.approx(float(fast[column]) / float(naive[column]))
        assert other[ratio] == "" == naive[ratio]
    assert fast["parameters"] == naive["parameters"]
