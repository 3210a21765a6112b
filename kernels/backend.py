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


_failed: set[tuple] = set()  # operators and configurations that Triton could not compile
# Words of errors of the device, which another kernel would meet too.
FATAL = (
    "CUDA error",
    "out of memory",
    "illegal",
    "misaligned address",
    "launch failure",
    "launch timed out",
    "device-side assert",
)


def is_device_error(error: Exception) -> bool:
    """Return True for an error of the device, such as an illegal address, which leaves nothing to fall back to."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FATAL)


def _configuration(compute: Callable, given: tuple) -> tuple:
    """Return what a kernel is compiled for: the operator, dtype and channels of its tensors, and its other arguments."""
    name = getattr(compute, "__name__", type(compute).__name__)
    return name, *(f"{str(x.dtype).removeprefix('torch.')} {x.shape[-1]}" if isinstance(x, torch.Tensor) else x for x in given)


def attempt(compute: Callable, *given):
    """Return `compute(*given)`, or None where Triton cannot compile it for such arguments, with one warning.

    Errors of the device are raised, and under `triton` every error.
    """
    if _failed and _configuration(compute, given) in _failed:
        return None
    try:
        return compute(*given)
    except Exception as error:  # no ptxas, an old driver, a tile that is too large for the device
        message = str(error).strip() or "no message"
        if _chosen == "triton" or is_device_error(error):
            raise
        name, *arguments = configuration = _configuration(compute, given)
        _failed.add(configuration)
        reason = f"{type(error).__name__}: {message.splitlines()[0][:300]}"
        warnings.warn(f"{name}({', '.join(map(str, arguments))}) runs without Triton: {reason}", stacklevel=2)
        return None


def check_fallback(name: str, given: tuple) -> None:
    """Raise RuntimeError under `triton` where an operator has no kernel for such arguments; empty tensors need none."""
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    if _chosen != "triton" or any(x.numel() == 0 for x in tensors):
        return
    shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tensors)
    raise RuntimeError(f"kernels=triton: no Triton kernel computes {name} of {shapes}; use kernels=auto")


@torch.compiler.assume_constant_result
def may_use_triton() -> bool:
    """Return True where Triton may compute. Raises RuntimeError under `triton` where it is not installed."""
    if _chosen == "triton" and triton_kernels() is None:
        raise RuntimeError("kernels=triton: Triton is not installed; use kernels=auto, or PyTorch for CUDA on Linux")
    return _chosen in ("auto", "triton") and triton_kernels() is not None


def on_cuda(name: str, choose_kernel: Callable, otherwise: Callable, given: tuple):
    """Compute an operator by its Triton kernel, or by `otherwise`.

    choose_kernel: from `kernels.cuda` and the arguments, the kernel; False if it does not cover them, None if there is none.
    Raises RuntimeError under `triton` for False.
    """
    if may_use_triton():
        kernel = choose_kernel(triton_kernels(), *given)
        if kernel and (found := attempt(kernel, *given)) is not None:
            return found
        if kernel is False:
            check_fallback(name, given)
    return otherwise(*given)


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
