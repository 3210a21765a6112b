"""Host time of layers in eager mode, without a GPU.

python benchmark.py host

Python, PyTorch and Triton spend this time on each call before its kernels start. Tensors are tiny and on the CPU, and Triton
launches into a driver that starts nothing; PyTorch's own operators run on the CPU, in place of their launches. Times are
medians of CPU time, which leaves other processes out, over measurements in turns, with quartiles.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from experiments.tables import as_markdown
from kernels import attention, cuda, operators
from layers1d import MultiHeadAttention, MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import ConvNN2d
from mixers.base import TokenLayout
from options.parser import OneLineParser, number_type
from runs.measure import spread, versions

CALLS = 20  # in one measurement
DEVICE = -1  # number of the device that starts nothing, which no real one has


class Driver:
    """A driver of an H100 that is not there."""

    get_current_device = staticmethod(lambda: DEVICE)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


class Nothing(CompiledKernel):
    """A kernel that was neither compiled nor loaded, and does nothing."""

    module, function, name, src, packed_metadata = True, 0, "nothing", None, ()

    def __init__(self):
        self._run = lambda *arguments: None

    def __del__(self):
        pass


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Let operators on CPU tensors run their Triton functions, and let Triton compile and start nothing."""

    def compile_nothing(kernel: JITFunction, key, *_):
        return kernel.device_caches[DEVICE][0].setdefault(key, Nothing())

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", Driver()))
        stack.enter_context(patch.object(JITFunction, "_do_compile", compile_nothing))
        for operator, *_ in operators.BACKENDS:
            if function := getattr(cuda, operator._name, None):
                stack.enter_context(patch.dict(operator._backend_fns, cpu=function))
        stack.enter_context(patch.object(cuda, "INTERPRETED", True))  # kernels cover tensors on the CPU
        stack.enter_context(patch.object(attention, "pays", lambda query: True))
        stack.enter_context(patch.object(attention, "compose", lambda _, *given: attention._on_cuda(*given)))
        stack.enter_context(patch.object(attention, "compose_backward", lambda _, *given: attention._backward_on_cuda(*given)))
        yield


def make_cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]]:
    """Return functions, their inputs, and parameters: whole layers, and attention on the query, key and value of the heads."""
    B, N, H, d, K = 2, 5, 2, 8, 3
    tokens, layout = torch.randn(B, N, H * d, requires_grad=True), TokenLayout(1, N)
    heads = [part.requires_grad_() for part in torch.randn(B, N, 3, H, d).permute(2, 0, 3, 1, 4).unbind()]
    attention = MultiHeadAttention(H * d, H)
    convnn = MultiHeadConvNNAttention(H * d, H, K=K, magnitude_type="matmul")
    kvt = MultiHeadKvtAttention(H * d, H, K)
    image = ConvNN2d(4, 6, K=K)
    return {
        "attention": (attention, [tokens], [*attention.parameters()]),
        "ConvNN attention": (convnn, [tokens], [*convnn.parameters()]),
        "KVT": (kvt, [tokens], [*kvt.parameters()]),
        "ConvNN2d": (image, [torch.randn(B, 4, 3, 3, requires_grad=True)], [*image.parameters()]),
        "attention, no projections": (lambda *qkv: attention.mix(*qkv, False)[0], heads, []),
        "ConvNN attention, no projections": (lambda *qkv: convnn.mix(*qkv, False, layout)[0], heads, [convnn.conv.weight]),
        "KVT, no projections": (lambda *qkv: kvt.mix(*qkv, False)[0], heads, []),
    }


def passes(function: Callable[..., Tensor], inputs: list[Tensor], parameters: list[Tensor]) -> tuple[Callable, Callable]:
    """Return `CALLS` forward passes without gradient, and as many forward and backward passes."""
    grad = torch.ones_like(function(*inputs))

    @torch.no_grad()
    def forward() -> None:
        for _ in range(CALLS):
            function(*inputs)

    def both() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(function(*inputs), [*inputs, *parameters], grad)

    return forward, both


def microseconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return 1e6 / CALLS * (time.process_time() - start)


def measure(rounds: int) -> list[dict]:
    """Return a row for each case; the ratio is to attention, with its projections or without."""
    with without_gpu():
        cases = make_cases()
        steps = [step for case in cases.values() for step in passes(*case)]
        times = iter(np.array([[microseconds(step) for step in steps] for _ in range(rounds + 1)])[1:].T)  # less a warm-up
    rows, attention = [], {}
    for name in cases:
        forward, both = next(times), next(times)
        row = {"layer": name, "forward_us": float(np.median(forward))} | spread("both_us", both, np.ones_like(both))
        rows.append(row | spread("ratio", both, attention.setdefault("no projections" in name, both)))
    return rows


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmark.py host", description=__doc__.splitlines()[0], allow_abbrev=False)
    count = number_type(int, 1, 10**6)
    parser.add_argument("--repeats", type=count, default=31, help="measurements of each, in turns (default: 31)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {versions()['torch']}, microseconds\n\n{as_markdown(measure(args.repeats))}")
    return 0
