"""Helpers of the Triton kernels: loading rows and launching.

In the kernels, a row is a query, numbered through all groups (images x heads) of N; a pair is one of its K slots, numbered
likewise; an offset is where a row of a tensor begins, from its `strides_of`. A tile has BN rows, BM keys or BP
pairs, and BC channels or BD output channels; elements beyond the end are read as 0 and not written.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Later versions of Triton fuse products and sums only if told. Without a bound ptxas spills to reach a higher occupancy.
COMPILATION = {"enable_fp_fusion": True, "maxnreg": 168}


# Launches that were compiled, by all that Triton compiles for: types and alignment of tensors, and values of numbers.
_compiled: dict[tuple, tuple] = {}
MOST_COMPILED = 4096  # numbers of tokens and images are among them, so there is a bound


@triton.jit
def group_offset(group, strides):
    """Where a group begins. One head makes the divisor a constant of one, which costs nothing."""
    return (group // strides[3]).to(tl.int64) * strides[0] + (group % strides[3]).to(tl.int64) * strides[2]


@triton.jit
def row_offset(row, N, strides):
    return group_offset(row // N, strides) + (row % N).to(tl.int64) * strides[1]


@triton.jit
def chosen_offset(index, index_strides, row, slot, there, N, strides):
    """Where the row that this slot chose begins."""
    chosen = tl.load(index + row_offset(row, N, index_strides) + slot, mask=there, other=0)
    return group_offset(row // N, strides) + chosen * strides[1]


@triton.jit
def load_rows(x, offset, there, channels, C: tl.constexpr):
    return tl.load(x + offset[:, None] + channels[None, :], mask=there[:, None] & (channels < C)[None, :], other=0.0)


def launch(kernel, grid: tuple[int, ...], *arguments, device: torch.device, **options):
    """Launch a kernel, past Triton's look at every argument if the same was launched before.

    Args:
        arguments: those before the constants, which are among the options.

    Returns:
        The compiled kernel, which knows its registers and spills; None under the interpreter.
    """
    given = tuple([(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments])
    key = id(kernel), device.index, grid, given, *options.values()
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if found := _compiled.get(key):
            compiled, run, constants = found
            run(*arguments, *constants)
            return compiled
        compiled = kernel[grid](*arguments, **options, **COMPILATION)
        if compiled is not None:
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
            _compiled[key] = compiled, compiled[(*grid, 1, 1)], constants
        return compiled


Strides = tuple[int, int, int, int]  # of image, row and head, then the number of heads


def strides_of(x: Tensor) -> Strides:
    """Strides of (groups, rows, channels), or of (images, heads, rows, channels), which are images x heads groups."""
    if x.ndim == 3:
        group, row, _ = x.stride()
        return group, row, 0, 1
    image, head, row, _ = x.stride()
    return image, row, head, x.shape[1]


def rows_of(x: Tensor) -> tuple[Tensor, Strides]:
    """Return the tensor with contiguous channels, and its strides."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, strides_of(x)


def new_rows(like: Tensor, rows: int, dtype: torch.dtype | None = None, *, zero: bool = False) -> Tensor:
    """Make a tensor as `like` with another number of rows; heads lie side by side in a row, as a projection reads them."""
    new = like.new_zeros if zero else like.new_empty
    if like.ndim == 3:
        return new((len(like), rows, like.shape[2]), dtype=dtype or like.dtype)
    images, heads, _, channels = like.shape
    return new((images, rows, heads, channels), dtype=dtype or like.dtype).transpose(1, 2)


def cdiv(size: int, part: int) -> int:
    """`triton.cdiv`, which takes ten times as long."""
    return -(-size // part)


@functools.cache
def block(size: int, most: int, least: int = 16) -> int:
    """Return a power of two for `size` elements, within these bounds."""
    return max(least, min(triton.next_power_of_2(size), most))


def parts_of(rows: int, blocks: tuple[int, int], BN: int) -> tuple[int, int]:
    """For sums over rows in two stages: parts, as many as fill a GPU together with the blocks, and rows in each."""
    parts = max(1, min(cdiv(1024, blocks[0] * blocks[1]), cdiv(rows, 8 * BN)))
    return parts, cdiv(cdiv(rows, parts), BN) * BN
