"""Which backend computes: by the device (`auto`), or one that is chosen by hand."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "chunked", "triton", "reference")

_chosen = os.environ.get("CONVNN_KERNELS", "auto")
if _chosen not in BACKENDS:
    raise ValueError(f"CONVNN_KERNELS={_chosen!r} is not one of {', '.join(BACKENDS)}")


def chosen() -> str:
    """The backend in use: `auto`, or the one that was chosen."""
    return _chosen


def choose(name: str) -> None:
    """Compute by this backend from now on. Raises ValueError for an unknown name."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is not one of {', '.join(BACKENDS)}")
    _chosen = name


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
    """Whether the plain form is to run, which is made of PyTorch's own operators.

    Where it was chosen, where the graph must not hold operators of ours (`torch.export`, ONNX, `torch.jit.trace`), and under
    the transforms of `torch.func`, which cannot see into them.
    """
    if _chosen == "reference" or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
