"""Choice of the backend: by the device (`auto`), or by hand."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("auto", "chunked", "triton", "reference")

_chosen = os.environ.get("CONVNN_KERNELS", "auto")
if _chosen not in BACKENDS:
    raise ValueError(f"CONVNN_KERNELS={_chosen!r} is not one of {', '.join(BACKENDS)}")


def chosen() -> str:
    """Return the backend in use: `auto`, or the chosen one."""
    return _chosen


def choose(name: str) -> None:
    """Compute by this backend from now on. Raises ValueError for an unknown name."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is not one of {', '.join(BACKENDS)}")
    _chosen = name


@functools.cache
def triton_kernels():
    """Return the module of Triton kernels, or None without Triton, which comes with PyTorch for CUDA on Linux."""
    if importlib.util.find_spec("triton") is None:
        return None
    from kernels import cuda

    return cuda


_failure: str | None = None  # error of Triton's first failed compilation


def attempt(compute: Callable, *given):
    """Return `compute(*given)`, or None where Triton could not compile it; then warn once and go on without Triton."""
    global _failure
    try:
        return compute(*given)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # another kernel would meet the same
    except Exception as error:  # no ptxas, an old driver, a tile that is too large for the device
        _failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        warnings.warn(f"Triton kernels are not used: {_failure[:300]}", stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def may_use_triton() -> bool:
    return _chosen in ("auto", "triton") and _failure is None and triton_kernels() is not None


def running_on(device: torch.device) -> str:
    """Return the backend that computes on this device: `triton`, `cpu`, `chunked` or `reference`."""
    if _chosen in ("chunked", "reference"):
        return _chosen
    return "cpu" if device.type == "cpu" else "triton" if device.type == "cuda" and may_use_triton() else "chunked"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Compute by this backend within the context."""
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def is_plain() -> bool:
    """Return True where the plain form runs, which consists of PyTorch's own operators.

    It runs if it was chosen, where the graph must not hold custom operators (`torch.export`, ONNX, `torch.jit.trace`), and
    under the transforms of `torch.func`, which cannot see into them.
    """
    if _chosen == "reference" or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
