"""Measurements with a clock that the tests set: nothing here depends on the speed of a machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from options.machine import cpu_cores
from runs import measure
from runs.measure import count_flops, flops_of, measure_latency, median_ms, peak_memory, spread, take_turns, training_flops

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent


def clock(monkeypatch, seconds):
    """These seconds one after the other, then the last one again and again."""
    seconds = list(seconds)

    def seconds_of(function, device):
        function()
        return seconds.pop(0) if len(seconds) > 1 else seconds[0]

    monkeypatch.setattr(measure, "seconds_of", seconds_of)


def test_latency_is_a_median_without_the_warm_up(monkeypatch):
    clock(monkeypatch, [9.0, 9.0, 9.0, 1.0, 8.0, 1.0, 7.0, 3.0, 3.0, 5.0, 5.0, 5.0, 2.0])
    seen = []

    class Spy(nn.Dropout):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Spy()
    assert measure_latency(model, torch.zeros(1, 3), seconds=0) == 4000  # of 1, 1, 2, 3, 3, 5, 5, 5, 7, 8
    assert seen == [(False, False)] * 13 and model.training


def test_the_mode_of_a_model_comes_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    model = Broken()
    with pytest.raises(ValueError, match="broken"):
        count_flops(model, torch.zeros(1, 3))
    assert model.training and torch.is_grad_enabled()


def test_flops_of_fourier_transforms():
    """5 n log2(n) for n complex numbers in each transform, half of it for real ones: 3 transforms of 4 x 8 numbers."""
    real, half = torch.zeros(3, 4, 8), torch.zeros(3, 4, 5, dtype=torch.complex64)
    for function, flops in (
        (lambda: torch.fft.fft2(real + 0j), 3 * 5 * 32 * 5),
        (lambda: torch.fft.rfft2(real), 3 * 2.5 * 32 * 5),
        (lambda: torch.fft.irfft2(half, s=(4, 8)), 3 * 2.5 * 32 * 5),
    ):
        assert flops_of(function) == flops


def test_functions_take_turns_and_the_first_round_is_dropped(monkeypatch):
    clock(monkeypatch, [50, 60, 1, 2, 3, 4])
    calls = []
    assert take_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2, CPU) == [(1, 3), (2, 4)]
    assert calls == ["a", "b"] * 3


def test_medians_and_quartiles():
    assert median_ms([3.0, 1.0, 100.0]) == 3000
    assert spread("x", [1, 4, 9, 16, 25], [1, 2, 3, 4, 5]) == {"x": 3, "x_q1": 2, "x_q3": 4}


def test_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cpu_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cpu_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_cores() == 1


def test_what_measures_loads_torch_only_to_measure():
    code = "import sys, benchmark, experiments.targets, runs.measure, options.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_one_definition_each():
    """Training, the benchmark and its targets measure with the same function."""
    from experiments import targets

    assert measure_latency is measure.measure_latency and flops_of is measure.flops_of
    assert training_flops is targets.training_flops is measure.training_flops
    assert peak_memory is targets.peak_memory is measure.peak_memory
