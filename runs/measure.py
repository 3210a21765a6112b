"""Cost of a computation: parameters, FLOPs, time and memory, defined once for training, benchmark and targets.

torch is imported inside functions: programs that measure report a wrong option before they load it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MEASURED = ("latency_ms_per_image", "latency_std_ms", "images_per_s", "forward_backward_ms", "peak_memory_mb")


# ---------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs
# ---------------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_of(function: Callable[[], object]) -> int:
    """Count the FLOPs of a call, a multiply-add as two.

    `torch.utils.flop_counter` counts matrix products, convolutions, attention, and the search, the scores and the aggregation
    of neighbors. A Fourier transform of n numbers counts as 5 n log2(n), of real numbers as half of it. Element-wise work,
    normalization, softmax, top-K and gather are not seen.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def transform(factor: float, result: bool = False) -> Callable[..., int]:
        def count(shape, dim, *_, out_shape, **__) -> int:
            shape = out_shape if result else shape  # of the real numbers
            return round(factor * math.prod(shape) * math.log2(math.prod(shape[axis] for axis in dim)))

        return count

    aten = torch.ops.aten
    transforms = {aten._fft_c2c: transform(5), aten._fft_r2c: transform(2.5), aten._fft_c2r: transform(2.5, result=True)}
    # The counter does not know every fused attention kernel. The plain form, two products, counts the same on all devices.
    with FlopCounterMode(display=False, custom_mapping=transforms) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def count_flops(model: nn.Module, image: Tensor) -> int:
    """Count the FLOPs of one forward pass in eval mode."""
    with _inference(model):
        return flops_of(lambda: model(image))


def training_flops(mixer: nn.Module, x: Tensor) -> int:
    """Count the FLOPs of forward and backward, with gradients of the input and of all parameters."""
    flops = flops_of(lambda: mixer(x.requires_grad_()).sum().backward())
    mixer.zero_grad()
    return flops


@contextlib.contextmanager
def _inference(model: nn.Module):
    """Set eval mode without gradients; restore the mode afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Measure the wall-clock seconds of one call, including the work that it leaves on the device."""
    import torch

    # Kernels run asynchronously on a GPU: wait for earlier ones before the clock starts and for these before it stops.
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds, which ignores the few measurements that something else disturbed."""
    return 1e3 * statistics.median(seconds)


def measure_latency(model: nn.Module, image: Tensor, seconds: float = 1.0) -> dict[str, float]:
    """Measure a forward pass in eval mode on an image (1, C, H, W) for some seconds.

    Returns the median as `latency_ms_per_image` and the standard deviation as `latency_std_ms`.
    """
    times, end = [], time.perf_counter() + seconds
    with _inference(model):
        # 3 for warm-up, then at least 10 and at most 100.
        while len(times) < 13 or (time.perf_counter() < end and len(times) < 103):
            times.append(seconds_of(lambda: model(image), image.device))
    return {"latency_ms_per_image": median_ms(times[3:]), "latency_std_ms": 1e3 * statistics.stdev(times[3:])}


def take_turns(functions: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[tuple[float, ...]]:
    """Measure functions by turns, so that a slow minute of the machine hits all of them; return `rounds` seconds for each.

    A first round, in which tables are built, is dropped.
    """
    times = [[seconds_of(function, device) for function in functions] for _ in range(rounds + 1)][1:]
    return list(zip(*times, strict=True))


def spread(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of paired measurements, as `name`, `name`_q1 and `name`_q3."""
    import numpy as np

    lower, middle, upper = np.quantile([a / b for a, b in zip(ours, theirs, strict=True)], (0.25, 0.5, 0.75)).tolist()
    return {name: middle, f"{name}_q1": lower, f"{name}_q3": upper}


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of the bytes that the CUDA or the CPU allocator holds while `function` runs."""
    import torch

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    # The CPU allocator keeps no statistics; the profiler records each allocation (positive) and release (negative).
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        result = function()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del result  # kept until here: the memory that a function needs includes its result
    return peak


def process_peak_memory(device: torch.device) -> dict:
    """Return the peak memory of the process so far, in bytes: of the CUDA allocator, else resident memory."""
    import torch

    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "CUDA allocator"}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_memory_bytes": peak, "peak_memory_of": "process (resident)"}


# ---------------------------------------------------------------------------------------------------------------
# A layer under measurement
# ---------------------------------------------------------------------------------------------------------------


class Case:
    """A layer under measurement: its input, precision and execution.

    x: a batch; latency is measured on its first image. compiled: for these shapes alone.
    """

    def __init__(self, mixer: nn.Module, x: Tensor, *, precision: str, compiled: bool):
        import torch

        self.mixer = mixer
        self.device = x.device
        self.x = x.requires_grad_()
        self.image = x[:1].detach()
        self.call = torch.compile(mixer, dynamic=False) if compiled else mixer
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.autocast = lambda: torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        self.no_grad = torch.no_grad
        self.is_too_large = False  # for the memory of the device
        self.times: dict[str, list[float]] = {"latency": [], "forward": [], "training": []}

    def latency(self) -> None:
        """Forward of one image."""
        self.mixer.eval()
        with self.no_grad(), self.autocast():
            self.call(self.image)

    def forward(self) -> None:
        self.mixer.eval()
        with self.no_grad(), self.autocast():
            self.call(self.x)

    def training(self) -> None:
        """Forward and backward, gradients of the input and of all parameters."""
        self.mixer.train()
        self.mixer.zero_grad()
        self.x.grad = None
        with self.autocast():
            out = self.call(self.x)
        out.float().sum().backward()

    def measure(self) -> None:
        """Measure each once more."""
        for name, times in self.times.items():
            times.append(seconds_of(getattr(self, name), self.device))

    def row(self) -> dict:
        """Return the results, by the names in MEASURED."""
        latency = [1e3 * seconds for seconds in self.times["latency"]]
        self.mixer.zero_grad()
        self.x.grad = None
        values = (
            statistics.mean(latency),
            statistics.stdev(latency) if len(latency) > 1 else 0.0,
            len(self.x) / statistics.median(self.times["forward"]),
            median_ms(self.times["training"]),
            peak_memory(self.training, self.device) / 1e6,
        )
        return dict(zip(MEASURED, values, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if files have changed since; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError):
        if (root / ".git").exists():
            command = ["git", "describe", "--always", "--dirty", "--tags", "--abbrev=12"]
            return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    return None


def versions() -> dict:
    """Return the versions of this code, Python, CUDA and the packages that results depend on."""
    import torch

    found = {"commit": commit(), "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "torchvision", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # small data sets train without torchvision
            found[name] = metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
