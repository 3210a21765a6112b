"""What a computation costs: parameters, FLOPs, time and memory, each defined once for training, benchmark and targets.

torch is imported where it is used, as programs that measure report a wrong option before they load it.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
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
    """FLOPs of what `function` runs, a multiply-add counted as two.

    Counted by `torch.utils.flop_counter`: matrix products, convolutions, attention, and the search, the scores and
    the aggregation of neighbors. It does not see element-wise work, normalization, softmax, top-K and gather.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know every fused attention kernel; the plain form, two products, counts the same on all devices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def count_flops(model: nn.Module, image: Tensor) -> int:
    """FLOPs of one forward pass in eval mode, counted by `flops_of`."""
    with _inference(model):
        return flops_of(lambda: model(image))


def training_flops(mixer: nn.Module, x: Tensor) -> int:
    """FLOPs of forward and backward, with gradients of the input and of all parameters, counted by `flops_of`."""
    flops = flops_of(lambda: mixer(x.requires_grad_()).sum().backward())
    mixer.zero_grad()
    return flops


@contextlib.contextmanager
def _inference(model: nn.Module):
    """Eval mode without gradients; the mode it was in comes back afterwards."""
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
    """Wall-clock seconds of one call, the work it leaves on the device included."""
    import torch

    # Kernels run asynchronously on a GPU: wait for earlier ones before the clock starts and for these before it stops.
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def median_ms(seconds: Sequence[float]) -> float:
    """Median in milliseconds: unlike a mean, it ignores the few measurements that something else disturbed."""
    return 1e3 * statistics.median(seconds)


def measure_latency(model: nn.Module, image: Tensor, seconds: float = 1.0) -> float:
    """Median milliseconds of a forward pass in eval mode on this image (1, C, H, W), for about so many seconds."""
    times, end = [], time.perf_counter() + seconds
    with _inference(model):
        # 3 for warm-up, then at least 10 and at most 100.
        while len(times) < 13 or (time.perf_counter() < end and len(times) < 103):
            times.append(seconds_of(lambda: model(image), image.device))
    return median_ms(times[3:])


def take_turns(functions: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each function, a tuple of `rounds` for each.

    They take turns, so that a slow minute of the machine hits all of them; a first round, in which tables are built, is
    dropped.
    """
    times = [[seconds_of(function, device) for function in functions] for _ in range(rounds + 1)][1:]
    return list(zip(*times, strict=True))


def spread(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of pairs measured side by side, under `name`, `name`_q1 and `name`_q3."""
    import numpy as np

    lower, middle, upper = np.quantile([a / b for a, b in zip(ours, theirs, strict=True)], (0.25, 0.5, 0.75)).tolist()
    return {name: middle, f"{name}_q1": lower, f"{name}_q3": upper}


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Peak of the bytes that are allocated while `function` runs, by the CUDA or the CPU allocator."""
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
    del result  # kept until here: what a function returns is part of what it needs
    return peak


def process_peak_memory(device: torch.device) -> dict:
    """Peak memory of the whole process so far, in bytes, and which: of the CUDA allocator, else resident memory."""
    import torch

    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "CUDA allocator"}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_of": "process (resident)"}


# ---------------------------------------------------------------------------------------------------------------
# A layer under measurement
# ---------------------------------------------------------------------------------------------------------------


class Case:
    """A layer, its input, and the precision and execution it is measured in.

    x: a batch; latency is that of its first image. `compiled` compiles for these shapes alone.
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
        """Forward of one image, as in use."""
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
        """One more measurement of each."""
        for name, times in self.times.items():
            times.append(seconds_of(getattr(self, name), self.device))

    def row(self) -> dict:
        """What was measured, by the names in MEASURED."""
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
# Where it was measured
# ---------------------------------------------------------------------------------------------------------------


def versions() -> dict:
    """Of Python, CUDA and the packages that results depend on."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "torchvision", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # small data sets train without torchvision
            found[name] = metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
