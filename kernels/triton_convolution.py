"""The convolution over slots: an implicit matrix product, (rows, K * C) x (K * C, D), with a left operand that is loaded by
index and never materialized."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels.triton_common import block, cdiv, chosen_offset, load_rows, parts_of, row_offset, rows_of
from kernels.triton_sums import spread

ORDERED_ELEMENTS = 2**24  # written at a time by the deterministic gradient of the values


@triton.jit
def _load_scaled(values, chosen, scores, row, k, there, channels, K: tl.constexpr, C: tl.constexpr):
    """Neighbors times their scores, in the dtype of the values."""
    x = load_rows(values, chosen, there, channels, C)
    if scores is not None:
        scale = tl.load(scores + row * K + k, mask=there, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
    return x


@triton.jit
def _convolution_kernel(
    values,
    values_strides,
    index,
    index_strides,
    scores,
    weight,
    output,
    count,
    N,
    D,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """BN rows x BD output channels: the sum over slots and blocks of channels of a product of tiles."""
    blocks = tl.cdiv(D, BD)  # blocks of the same rows run side by side, as they load the same neighbors
    row = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    there = row < count
    out = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    total = tl.zeros((BN, BD), tl.float32)
    for step in range(K * CHANNEL_BLOCKS):
        k = step // CHANNEL_BLOCKS
        channels = (step % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
        chosen = chosen_offset(index, index_strides, row, k, there, N, values_strides)
        x = _load_scaled(values, chosen, scores, row, k, there, channels, K, C)
        w = load_rows(weight + k * C, out * (K * C), out < D, channels, C)  # (BD, BC)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    there_too = there[:, None] & (out < D)[None, :]
    tl.store(output + row.to(tl.int64)[:, None] * D + out[None, :], total, mask=there_too)


@triton.jit
def _weight_grad_kernel(
    grad,
    grad_strides,
    values,
    values_strides,
    index,
    index_strides,
    scores,
    partial,
    count,
    N,
    D,
    rows_per_part,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """For one part of the rows, BD output channels and BC channels of one slot: grad^T x neighbors; the parts are added up
    later."""
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    k = tl.program_id(1) // CHANNEL_BLOCKS
    channels = (tl.program_id(1) % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
    out = tl.program_id(2) * BD + tl.arange(0, BD)
    begin = tl.program_id(0) * rows_per_part
    total = tl.zeros((BD, BC), tl.float32)
    for first in range(0, rows_per_part, BN):
        row = begin + first + tl.arange(0, BN)
        there = row < count
        chosen = chosen_offset(index, index_strides, row, k, there, N, values_strides)
        x = _load_scaled(values, chosen, scores, row, k, there, channels, K, C)
        g = tl.load(
            grad + row_offset(row, N, grad_strides)[:, None] + out[None, :], mask=there[:, None] & (out < D)[None, :], other=0.0
        )
        total = tl.dot(g.T, x, total, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * D + out)[:, None] * (K * C) + (k * C + channels)[None, :]
    tl.store(partial + place, total, mask=(out < D)[:, None] & (channels < C)[None, :])


@triton.jit
def _rows_grad_kernel(
    grad,
    grad_strides,
    values,
    values_strides,
    index,
    index_strides,
    scores,
    weight,
    grad_scores,
    grad_values,  # (groups, M, C), added to; or
    grad_pairs,  # (groups * N, K, C), written
    count,
    N,
    M,
    D,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of one slot of BN rows, grad x weight of the slot: times the neighbors it is the gradient of their scores, times
    the scores the gradient of the neighbors."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    k = tl.program_id(1)
    chosen = chosen_offset(index, index_strides, row, k, there, N, values_strides)
    token = chosen_offset(index, index_strides, row, k, there, N, (M, 1, 0, 1))
    to_score = tl.zeros((BN,), tl.float32)
    for c in range(0, C, BC):
        channels = c + tl.arange(0, BC)
        to_slot = tl.zeros((BN, BC), tl.float32)
        for d in range(0, D, BD):
            out = d + tl.arange(0, BD)
            g = tl.load(
                grad + row_offset(row, N, grad_strides)[:, None] + out[None, :],
                mask=there[:, None] & (out < D)[None, :],
                other=0.0,
            )
            w = load_rows(weight + k * C, out * (K * C), out < D, channels, C)  # (BD, BC)
            to_slot = tl.dot(g, w, to_slot, input_precision=PRECISION)
        there_too = there[:, None] & (channels < C)[None, :]
        if scores is not None:
            x = load_rows(values, chosen, there, channels, C).to(tl.float32)
            to_score += tl.sum(to_slot * x, axis=1)
            to_slot *= tl.load(scores + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        if grad_values is not None:
            tl.atomic_add(grad_values + token[:, None] * C + channels[None, :], to_slot, mask=there_too, sem="relaxed")
        if grad_pairs is not None:
            pair = row.to(tl.int64) * K + k
            tl.store(grad_pairs + pair[:, None] * C + channels[None, :], to_slot, mask=there_too)
    if scores is not None:
        tl.store(grad_scores + row * K + k, to_score, mask=there)


def _precision(dtype: torch.dtype) -> str:
    """Of products in the convolution: float32 as for any matrix product of PyTorch, TF32 only where the user allows it."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _tiles(dtype: torch.dtype, C: int, D: int, wide: tuple[int, int, int], narrow: tuple[int, int, int]) -> dict[str, int]:
    """Choose BN, BD, BC, no larger than the tensor: `narrow` for 16 bits, `wide` for float32, which multiplies without tensor
    cores, so that operands share the registers with sums."""
    BN, BD, BC = wide if dtype == torch.float32 else narrow
    return {"BN": BN, "BD": block(D, BD), "BC": block(C, BC), "num_warps": 8}


def convolution(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None) -> Tensor:
    """weight (D, K * C) and scores (G, N, K) without gaps: (G, N, D)."""
    (G, N, K), C, D = index.shape, values.shape[2], weight.shape[0]
    output = values.new_empty((G, N, D))
    tiles = _tiles(values.dtype, C, D, wide=(64, 64, 16), narrow=(128, 128, 32))
    common.launch(
        _convolution_kernel,
        (cdiv(G * N, tiles["BN"]) * cdiv(D, tiles["BD"]),),
        *(*rows_of(values), *rows_of(index), scores, weight, output, G * N, N, D),
        device=values.device,
        K=K,
        C=C,
        PRECISION=_precision(values.dtype),
        **tiles,
    )
    return output


def convolution_weight_grad(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None) -> Tensor:
    (G, N, K), C, D = index.shape, values.shape[2], weight.shape[0]
    tiles = _tiles(values.dtype, C, D, wide=(16, 64, 64), narrow=(64, 128, 64))
    blocks = K * cdiv(C, tiles["BC"]), cdiv(D, tiles["BD"])
    parts, rows_per_part = parts_of(G * N, blocks, tiles["BN"])
    partial = values.new_empty((parts, D, K * C), dtype=torch.float32)
    common.launch(
        _weight_grad_kernel,
        (parts, *blocks),
        *(*rows_of(grad), *rows_of(values), *rows_of(index), scores, partial, G * N, N, D, rows_per_part),
        device=values.device,
        K=K,
        C=C,
        PRECISION=_precision(values.dtype),
        **tiles,
    )
    return partial.sum(0).to(weight.dtype)


def convolution_rows_grad(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and of the scores; empty where none is wanted."""
    (G, N, K), (_, M, C) = index.shape, values.shape
    grad_values = values.new_empty(0)
    grad_scores = values.new_empty(0 if scores is None else (G, N, K), dtype=torch.float32)
    if need_values and torch.are_deterministic_algorithms_enabled():
        # Gradients of pairs are written for some groups at a time, then added up by token.
        grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
        step = max(1, ORDERED_ELEMENTS // (N * K * C))
        for start in range(0, G, step):
            part = slice(start, min(start + step, G))
            pairs = values.new_empty((part.stop - start, N * K, C), dtype=torch.float32)
            some = None if scores is None else scores[part]
            _launch_rows_grad(grad[part], values[part], index[part], weight, some, grad_scores[part], None, pairs)
            grad_values[part] = spread(pairs, index[part].reshape(-1, N * K, 1), None, values[part])
    elif need_values:
        summed = values.new_zeros((G, M, C), dtype=torch.float32)
        _launch_rows_grad(grad, values, index, weight, scores, grad_scores, summed, None)
        grad_values = summed.to(values.dtype)
    elif scores is not None:
        _launch_rows_grad(grad, values, index, weight, scores, grad_scores, None, None)
    return grad_values, grad_scores


def _launch_rows_grad(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    grad_scores: Tensor,
    grad_values: Tensor | None,
    grad_pairs: Tensor | None,
) -> None:
    (G, N, K), (_, M, C), D = index.shape, values.shape, weight.shape[0]
    tiles = _tiles(values.dtype, C, D, wide=(64, 16, 32), narrow=(64, 64, 64))
    common.launch(
        _rows_grad_kernel,
        (cdiv(G * N, tiles["BN"]), K),
        *(*rows_of(grad), *rows_of(values), *rows_of(index), scores, weight),
        *(None if scores is None else grad_scores, grad_values, grad_pairs, G * N, N, M, D),
        device=values.device,
        K=K,
        C=C,
        PRECISION=_precision(values.dtype),
        **tiles,
    )
