"""Sums over channels, over neighbors, and over the pairs that chose a token, and the largest neighbor: bound by memory.

Sums over the pairs that chose a token are atomic additions in any order. Under `torch.use_deterministic_algorithms` they run
through the pairs sorted by token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels.triton_common import block, cdiv, chosen_offset, load_rows, new_rows, parts_of, row_offset, rows_of, strides_of


@triton.jit
def _pair_kernel(
    rows,
    rows_strides,
    x,
    x_strides,
    index,
    index_strides,
    weight,
    output,
    pairs,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    SQUARED: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """For each pair the sum over channels of row x neighbor (x weight of the slot), or of (row - neighbor)^2."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    there = pair < pairs
    row, slot = pair // K, pair % K
    own = row_offset(row, N, rows_strides)
    chosen = chosen_offset(index, index_strides, row, slot, there, N, x_strides)
    total = tl.zeros((BP,), tl.float32)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        a = load_rows(rows, own, there, channels, C).to(tl.float32)
        b = load_rows(x, chosen, there, channels, C).to(tl.float32)
        part = (a - b) * (a - b) if SQUARED else a * b
        if weight is not None:
            part *= load_rows(weight, slot * C, there, channels, C).to(tl.float32)
        total += tl.sum(part, axis=1)
    tl.store(output + pair, total, mask=there)


@triton.jit
def _gather_sum_kernel(
    rows,
    rows_strides,
    x,
    x_strides,
    index,
    index_strides,
    scale,
    weight,
    output,
    output_strides,
    count,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """For each row the sum over its slots of neighbor x scale of the pair x weight of the slot; with rows, of
    2 (row - neighbor) instead of the neighbor, the slope of a squared distance."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    if rows is not None:
        own = load_rows(rows, row_offset(row, N, rows_strides), there, channels, C).to(tl.float32)
    total = tl.zeros((BN, BC), tl.float32)
    for k in range(K):
        chosen = chosen_offset(index, index_strides, row, k, there, N, x_strides)
        part = load_rows(x, chosen, there, channels, C).to(tl.float32)
        if rows is not None:
            part = 2.0 * (own - part)
        if scale is not None:
            part *= tl.load(scale + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        if weight is not None:
            part *= tl.load(weight + k * C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
        total += part
    there_too = there[:, None] & (channels < C)[None, :]
    tl.store(output + row_offset(row, N, output_strides)[:, None] + channels[None, :], total, mask=there_too)


@triton.jit
def _gather_max_kernel(
    x,
    x_strides,
    index,
    index_strides,
    largest,
    winner,
    count,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """For each row and channel the largest of the neighbors, and the row that it came from; the first slot wins ties."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    slots = index + row_offset(row, N, index_strides)
    best = load_rows(x, chosen_offset(index, index_strides, row, 0, there, N, x_strides), there, channels, C)
    token = tl.load(slots, mask=there, other=0).to(tl.int32)[:, None] + tl.zeros((BN, BC), tl.int32)
    for k in range(1, K):
        part = load_rows(x, chosen_offset(index, index_strides, row, k, there, N, x_strides), there, channels, C)
        chosen = tl.load(slots + k, mask=there, other=0).to(tl.int32)
        token = tl.where(part > best, chosen[:, None], token)
        best = tl.where(part > best, part, best)
    there_too = there[:, None] & (channels < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(largest + place, best, mask=there_too)
    tl.store(winner + place, token, mask=there_too)


@triton.jit
def _passed_back(
    rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C: tl.constexpr
):
    """Terms that pairs add to the tokens they chose: row x scale of the pair x weight of the slot.

    With x, the row is 2 (neighbor - row).
    """
    row, slot = pair // K, pair % K
    part = load_rows(rows, row_offset(row, N, rows_strides), there, channels, C).to(tl.float32)
    if x is not None:
        chosen = chosen_offset(index, index_strides, row, slot, there, N, x_strides)
        part = 2.0 * (load_rows(x, chosen, there, channels, C).to(tl.float32) - part)
    if scale is not None:
        part *= tl.load(scale + pair, mask=there, other=0.0).to(tl.float32)[:, None]
    if weight is not None:
        part *= load_rows(weight, slot * C, there, channels, C).to(tl.float32)
    return part


@triton.jit
def _spread_atomic_kernel(
    rows,
    rows_strides,
    x,
    x_strides,
    index,
    index_strides,
    scale,
    weight,
    output,
    output_strides,
    pairs,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Add the term of each pair to the row of output, float32, of the token that it chose."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    there = pair < pairs
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    part = _passed_back(rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C)
    token = chosen_offset(index, index_strides, pair // K, pair % K, there, N, output_strides)
    there_too = there[:, None] & (channels < C)[None, :]
    tl.atomic_add(output + token[:, None] + channels[None, :], part, mask=there_too, sem="relaxed")


@triton.jit
def _spread_sorted_kernel(
    rows,
    rows_strides,
    x,
    x_strides,
    index,
    index_strides,
    scale,
    weight,
    pairs,  # sorted by the token that they chose
    starts,  # where each token's begin
    output,
    output_strides,
    N,
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Sum, for one token, the terms of the pairs that chose it, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    first, end = tl.load(starts + token), tl.load(starts + token + 1)
    total = tl.zeros((BP, BC), tl.float32)
    while first < end:
        number = first + tl.arange(0, BP)
        there = number < end
        pair = tl.load(pairs + number, mask=there, other=0).to(tl.int32)
        total += _passed_back(
            rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C
        )
        first += BP
    tl.store(output + row_offset(token, M, output_strides) + channels, tl.sum(total, axis=0), mask=channels < C)


@triton.jit
def _depthwise_weight_grad_kernel(
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
    rows_per_part,
    K: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Depthwise: for one part of the rows and one slot, the sum of grad x neighbor (x score); the parts are added up later."""
    k = tl.program_id(1)
    channels = tl.program_id(2) * BC + tl.arange(0, BC)
    begin = tl.program_id(0) * rows_per_part
    total = tl.zeros((BN, BC), tl.float32)
    for first in range(0, rows_per_part, BN):
        row = begin + first + tl.arange(0, BN)
        there = row < count
        chosen = chosen_offset(index, index_strides, row, k, there, N, values_strides)
        product = load_rows(values, chosen, there, channels, C).to(tl.float32)
        product *= load_rows(grad, row_offset(row, N, grad_strides), there, channels, C).to(tl.float32)
        if scores is not None:
            product *= tl.load(scores + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        total += product
    tl.store(partial + (tl.program_id(0) * K + k) * C + channels, tl.sum(total, axis=0), mask=channels < C)


def _incoming(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs by the token they chose: their numbers, and the first of each token."""
    groups = len(index)
    offset = torch.arange(groups, dtype=torch.int32, device=index.device).mul_(tokens).view(-1, 1, 1)
    chosen, pairs = (index.int() + offset).flatten().sort(stable=True)
    every = torch.arange(groups * tokens + 1, dtype=torch.int32, device=index.device)
    return pairs, torch.searchsorted(chosen, every)


def dot_pairs(rows: Tensor, x: Tensor, index: Tensor, weight: Tensor | None = None, squared_distance: bool = False) -> Tensor:
    """Sum over channels of row x neighbor (x weight of the slot, (K, C)), or squared distances: (G, N, K), float32."""
    (G, N, K), C = index.shape, x.shape[-1]
    output = x.new_empty((G, N, K), dtype=torch.float32)
    pairs = 64
    common.launch(
        _pair_kernel,
        (cdiv(G * N * K, pairs),),
        *(*rows_of(rows), *rows_of(x), *rows_of(index), weight, output, G * N * K, N),
        device=x.device,
        K=K,
        C=C,
        SQUARED=squared_distance,
        BP=pairs,
        BC=block(C, 64),
        num_warps=4,
    )
    return output


def sum_neighbors(
    x: Tensor, index: Tensor, scale: Tensor | None, weight: Tensor | None = None, minus: Tensor | None = None
) -> Tensor:
    """Sum over slots of neighbors, or of 2 (minus - neighbors), times scale (G, N, K) and weight (K, C): (G, N, C)."""
    (G, N, K), C = index.shape, x.shape[-1]
    output = new_rows(x, N)
    BN, BC = 32, block(C, 64)
    common.launch(
        _gather_sum_kernel,
        (cdiv(G * N, BN), cdiv(C, BC)),
        *(*((None, None) if minus is None else rows_of(minus)), *rows_of(x), *rows_of(index)),
        *(None if scale is None else scale.contiguous(), weight, output, strides_of(output), G * N, N),
        device=x.device,
        K=K,
        C=C,
        BN=BN,
        BC=BC,
        num_warps=4,
    )
    return output


def max_rows(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Largest neighbor by channel, and the row it came from: x (G, M, C), index (G, N, K) -> (G, N, C) each."""
    (G, N, K), C = index.shape, x.shape[-1]
    largest, winner = x.new_empty((G, N, C)), x.new_empty((G, N, C), dtype=torch.int32)
    BN, BC = 32, block(C, 64)
    common.launch(
        _gather_max_kernel,
        (cdiv(G * N, BN), cdiv(C, BC)),
        *(*rows_of(x), *rows_of(index), largest, winner, G * N, N),
        device=x.device,
        K=K,
        C=C,
        BN=BN,
        BC=BC,
        num_warps=4,
    )
    return largest, winner


def spread(
    rows: Tensor, index: Tensor, scale: Tensor | None, like: Tensor, weight: Tensor | None = None, minus: bool = False
) -> Tensor:
    """Sum over the pairs that chose a token of row times scale (G, N, K) and weight (K, C), or, with `minus`, of
    2 (token of `like` - row) times scale: (G, N, C) -> as `like` (G, M, C)."""
    (G, N, K), (*_, M, C) = index.shape, like.shape
    scale = None if scale is None else scale.contiguous()
    given = (*rows_of(rows), *(rows_of(like) if minus else (None, None)), *rows_of(index), scale, weight)
    BC = block(C, 64)
    if torch.are_deterministic_algorithms_enabled():
        output = new_rows(like, M)
        common.launch(
            _spread_sorted_kernel,
            (G * M, cdiv(C, BC)),
            *(*given, *_incoming(index, M), output, strides_of(output), N, M),
            device=like.device,
            K=K,
            C=C,
            BP=16,
            BC=BC,
            num_warps=2,
        )
        return output
    output = new_rows(like, M, torch.float32, zero=True)
    common.launch(
        _spread_atomic_kernel,
        (cdiv(G * N * K, 32), cdiv(C, BC)),
        *(*given, output, strides_of(output), G * N * K, N),
        device=like.device,
        K=K,
        C=C,
        BP=32,
        BC=BC,
        num_warps=4,
    )
    return output.to(like.dtype)


def depthwise_weight_grad(grad: Tensor, values: Tensor, index: Tensor, scores: Tensor | None) -> Tensor:
    """Gradient of depthwise weights (K, C), in float32: the sum over rows of grad x neighbor (x score)."""
    (G, N, K), C = index.shape, values.shape[-1]
    BN, BC = 32, block(C, 64)
    blocks = K, cdiv(C, BC)
    parts, rows_per_part = parts_of(G * N, blocks, BN)
    partial = values.new_empty((parts, K, C), dtype=torch.float32)
    common.launch(
        _depthwise_weight_grad_kernel,
        (parts, *blocks),
        *(*rows_of(grad), *rows_of(values), *rows_of(index), scores, partial, G * N, N, rows_per_part),
        device=values.device,
        K=K,
        C=C,
        BN=BN,
        BC=BC,
        num_warps=4,
    )
    return partial.sum(0)
