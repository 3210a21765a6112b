"""Helpers of the Triton kernels: loading rows and launching.

In the kernels, a row is a query, numbered through all groups (images x heads) of N; a pair is one of its K slots, numbered
likewise; an offset is where a row of a tensor begins, from its strides of group and row. A tile has BN rows, BM keys or BP
pairs, and BC channels or BD output channels; elements beyond the end are read as 0 and not written.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Later versions of Triton fuse products and sums only if told. Without a bound ptxas spills to reach a higher occupancy.
COMPILATION = {"enable_fp_fusion": True, "maxnreg": 168}


@triton.jit
def row_offset(row, N, strides):
    return (row // N).to(tl.int64) * strides[0] + (row % N).to(tl.int64) * strides[1]


@triton.jit
def chosen_offset(index, index_strides, row, slot, there, N, strides):
    """Where the row that this slot chose begins."""
    chosen = tl.load(index + row_offset(row, N, index_strides) + slot, mask=there, other=0)
    return (row // N).to(tl.int64) * strides[0] + chosen * strides[1]


@triton.jit
def load_rows(x, offset, there, channels, C: tl.constexpr):
    return tl.load(x + offset[:, None] + channels[None, :], mask=there[:, None] & (channels < C)[None, :], other=0.0)


def launch(kernel, grid: tuple[int, ...], *arguments, device: torch.device, **options):
    """Launch the kernel and return its compiled form, which knows its registers and spills; None under the interpreter."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        return kernel[grid](*arguments, **options, **COMPILATION)


def rows_of(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the tensor (groups, rows, channels) with contiguous channels, and its strides of group and row."""
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    return x, x.stride()[:2]


def block(size: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(size), most))


def parts_of(rows: int, blocks: tuple[int, int], BN: int) -> tuple[int, int]:
    """For sums over rows in two stages: parts, as many as fill a GPU together with the blocks, and rows in each."""
    parts = max(1, min(triton.cdiv(1024, blocks[0] * blocks[1]), triton.cdiv(rows, 8 * BN)))
    return parts, triton.cdiv(triton.cdiv(rows, parts), BN) * BN
