import importlib.util
import sys

import pytest
import torch

import benchmark
from kernels import operators

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for CUDA only")


@TRITON
def test_a_row_for_each_layer_and_for_what_it_does_between_its_projections(capsys):
    x = torch.randn(2, 7, 4)
    before = operators.find_scored_neighbors(x, x, 3, None, None)
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["host", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    layers = ["attention", "ConvNN attention", "KVT"]
    assert [row[0] for row in rows] == [*layers, "ConvNN2d", *(f"{layer}, no projections" for layer in layers)]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[1:])
    assert rows[0][5] == rows[4][5] == "1.00"
    # Afterwards operators on a CPU compute on it again.
    assert all(map(torch.equal, operators.find_scored_neighbors(x, x, 3, None, None), before))


@TRITON
def test_layers_reach_the_launcher(monkeypatch):
    from experiments import host

    launched = []
    monkeypatch.setattr(host.Nothing, "launch_metadata", lambda *given: launched.append(given))
    with host.without_gpu():
        for name, case in host.make_cases().items():
            forward, _ = host.passes(*case)
            launched.clear()
            forward()
            assert len(launched) == (0 if name.startswith("attention") else host.CALLS * (3 if name == "ConvNN2d" else 2)), name


def test_without_triton_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["host"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
