"""The operators of `neighbors.py` as Triton kernels: searching, scoring and aggregating without anything of size N x M.

One function per operator, with its signature; before a call, `covers_search`, `covers_pairs`, `covers_aggregate` or
`covers_weighted_sum` says whether the kernels take these tensors: on CUDA (or, under TRITON_INTERPRET=1, on a CPU), in float32,
bfloat16 or float16, K at most 64. Tensors may have any strides. Sums are in float32. The search ranks float32 inputs by products
of full float32 precision; NaN ranks above infinity, and of equal scores the smallest row of key wins.

Sums over the pairs that chose a token are atomic additions in any order, or, under `torch.use_deterministic_algorithms`, run
through the pairs sorted by token. Nothing here waits for the device.

In the kernels, a row is a query, numbered through all groups (images x heads) of N; a pair is one of its K slots, numbered
likewise; an offset is where a row of a tensor begins, from its strides of group and row. A tile has BN rows, BM keys or BP
pairs, and BC channels or BD output channels; what lies beyond the end is read as 0 and not written.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_NEIGHBORS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ELEMENTS = 2**31 - 2**16  # what a number of 32 bits counts, less a tile
ORDERED_ELEMENTS = 2**24  # what the deterministic gradient of the standard convolution writes at a time


# Later versions of Triton fuse products and sums only if told. Without a bound ptxas spills to reach a higher occupancy.
COMPILATION = {"enable_fp_fusion": True, "maxnreg": 168}


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _offset(row, N, strides):
    return (row // N).to(tl.int64) * strides[0] + (row % N).to(tl.int64) * strides[1]


@triton.jit
def _chosen_offset(index, index_strides, row, slot, there, N, strides):
    """Where the row that this slot chose begins."""
    chosen = tl.load(index + _offset(row, N, index_strides) + slot, mask=there, other=0)
    return (row // N).to(tl.int64) * strides[0] + chosen * strides[1]


@triton.jit
def _load_rows(x, offset, there, channels, C: tl.constexpr):
    return tl.load(x + offset[:, None] + channels[None, :], mask=there[:, None] & (channels < C)[None, :], other=0.0)


# ---------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _to_ordered(x):
    """float32 as int32 in the same order: both zeros equal, every NaN above infinity."""
    bits = tl.where(x == x, tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True), 0x7FC00000)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_ordered(bits):
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _load_centered(x, offset, there, channels, center, C: tl.constexpr):
    rows = _load_rows(x, offset, there, channels, C)
    if center is not None:
        rows = rows.to(tl.float32) - tl.load(center + channels, mask=channels < C, other=0.0)[None, :]
    return rows


@triton.jit
def _key_terms_kernel(key, strides, center, terms, rows, M, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """One number per key: what its products are multiplied by, 1 / |key|, or with a center, of each group, what is added to
    them, -|key - center|^2 / 2."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < rows
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        x = _load_rows(key, _offset(row, M, strides), there, channels, C).to(tl.float32)
        if center is not None:
            x -= _load_rows(center, (row // M) * C, there, channels, C)
        total += tl.sum(x * x, axis=1)
    term = 1.0 / tl.maximum(tl.sqrt(total), 1e-12) if center is None else -0.5 * total
    tl.store(terms + row, term, mask=there)


@triton.jit
def _search_kernel(
    query,
    query_strides,
    key,  # the candidates among all_keys
    key_strides,
    all_keys,
    all_strides,
    center,
    terms,
    candidates,
    self_index,
    index,
    products,
    N,
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """The K nearest keys of BN queries: the queries stay, tiles of BM keys stream, the best stay in registers, unsorted.

    One of the best is 64 bits: the score in its order-preserving form above the inverted column, so that one comparison ranks
    scores and, of equal ones, prefers the smaller column. Columns come in rising order, so a later key must be better than the
    worst that is kept, not as good: a tile in which no row has a better score costs its product and one maximum.
    """
    blocks = tl.cdiv(N, BN)  # those of one group run side by side, as its keys stay in the cache then
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    there = row < N
    own_offset = group * query_strides[0] + row * query_strides[1]
    key += group * key_strides[0]
    if center is not None:
        center += group * C
    if terms is not None:
        terms += group * M
    if self_index is not None:
        own = tl.load(self_index + row, mask=there, other=0)
    FORCED: tl.constexpr = 0 if self_index is None else 1
    EMPTY: tl.constexpr = -(2**31)  # below the form of every score
    UNBEATEN: tl.constexpr = 2**63 - 1
    SPARE: tl.constexpr = KP - (K - FORCED)  # so many slots hold what nothing beats: exactly the others change
    slot = tl.arange(0, KP)
    empty = (tl.full((KP,), EMPTY, tl.int64) << 32) | slot
    best = tl.where((slot >= SPARE)[None, :] & there[:, None], empty[None, :], UNBEATEN)
    worst = tl.min(best, axis=1)

    channels = tl.arange(0, BC)
    if C <= BC:
        queries = _load_centered(query, own_offset, there, channels, center, C)
    for first in range(0, M, BM):
        column = first + tl.arange(0, BM)
        valid = column < M
        if C <= BC:
            keys = _load_centered(key, column * key_strides[1], valid, channels, center, C)
            score = tl.dot(queries, keys.T, input_precision="ieee")
        else:
            score = tl.zeros((BN, BM), tl.float32)
            for c in range(0, C, BC):
                queries = _load_centered(query, own_offset, there, c + channels, center, C)
                keys = _load_centered(key, column * key_strides[1], valid, c + channels, center, C)
                score = tl.dot(queries, keys.T, score, input_precision="ieee")
        if center is not None:
            score += tl.load(terms + column, mask=valid, other=0.0)[None, :]
        elif terms is not None:  # the length of the query does not change an order
            score *= tl.load(terms + column, mask=valid, other=0.0)[None, :]
        allowed = valid[None, :]
        if self_index is not None:
            token = column.to(tl.int64) if candidates is None else tl.load(candidates + column, mask=valid, other=-1)
            allowed = allowed & (token[None, :] != own[:, None])
        score = tl.where(allowed, _to_ordered(score), EMPTY)

        # Each pass takes the largest score that each row has left in the tile; if it is better, it replaces the worst.
        top = tl.max(score, axis=1)
        while tl.max((top > (worst >> 32).to(tl.int32)).to(tl.int32), axis=0) > 0:
            taken = tl.min(tl.where(score == top[:, None], column[None, :], 0x7FFFFFFF), axis=1)
            item = (top.to(tl.int64) << 32) | (0x7FFFFFFF - taken)
            best = tl.where((best == worst[:, None]) & (item > worst)[:, None], item[:, None], best)
            worst = tl.min(best, axis=1)
            score = tl.where(column[None, :] == taken[:, None], EMPTY, score)
            top = tl.max(score, axis=1)

    best = tl.sort(best, descending=True)
    kept = there[:, None] & (slot >= SPARE)[None, :]
    place = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if candidates is not None:
        place = tl.load(candidates + place, mask=kept, other=0)
    first_pair = (group * N + row) * K
    pair = first_pair[:, None] + (FORCED - SPARE) + slot[None, :]
    tl.store(index + pair, place, mask=kept)
    if products is not None:
        tl.store(products + pair, _from_ordered((best >> 32).to(tl.int32)), mask=kept)
    if self_index is not None:
        tl.store(index + first_pair, own, mask=there)
        if products is not None:
            product = tl.zeros((BN,), tl.float32)
            for c in range(0, C, BC):
                queries = _load_rows(query, own_offset, there, c + channels, C).to(tl.float32)
                keys = _load_rows(all_keys + group * all_strides[0], own * all_strides[1], there, c + channels, C)
                product += tl.sum(queries * keys.to(tl.float32), axis=1)
            tl.store(products + first_pair, product, mask=there)


# ---------------------------------------------------------------------------------------------------------------
# Sums over channels, over neighbors, and over those who chose a token
# ---------------------------------------------------------------------------------------------------------------


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
    own = _offset(row, N, rows_strides)
    chosen = _chosen_offset(index, index_strides, row, slot, there, N, x_strides)
    total = tl.zeros((BP,), tl.float32)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        a = _load_rows(rows, own, there, channels, C).to(tl.float32)
        b = _load_rows(x, chosen, there, channels, C).to(tl.float32)
        part = (a - b) * (a - b) if SQUARED else a * b
        if weight is not None:
            part *= _load_rows(weight, slot * C, there, channels, C).to(tl.float32)
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
        own = _load_rows(rows, _offset(row, N, rows_strides), there, channels, C).to(tl.float32)
    total = tl.zeros((BN, BC), tl.float32)
    for k in range(K):
        chosen = _chosen_offset(index, index_strides, row, k, there, N, x_strides)
        part = _load_rows(x, chosen, there, channels, C).to(tl.float32)
        if rows is not None:
            part = 2.0 * (own - part)
        if scale is not None:
            part *= tl.load(scale + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        if weight is not None:
            part *= tl.load(weight + k * C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
        total += part
    there_too = there[:, None] & (channels < C)[None, :]
    tl.store(output + row.to(tl.int64)[:, None] * C + channels[None, :], total, mask=there_too)


@triton.jit
def _passed_back(
    rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C: tl.constexpr
):
    """What pairs add to the tokens they chose: row x scale of the pair x weight of the slot; with x, 2 (neighbor - row) x scale."""
    row, slot = pair // K, pair % K
    part = _load_rows(rows, _offset(row, N, rows_strides), there, channels, C).to(tl.float32)
    if x is not None:
        chosen = _chosen_offset(index, index_strides, row, slot, there, N, x_strides)
        part = 2.0 * (_load_rows(x, chosen, there, channels, C).to(tl.float32) - part)
    if scale is not None:
        part *= tl.load(scale + pair, mask=there, other=0.0).to(tl.float32)[:, None]
    if weight is not None:
        part *= _load_rows(weight, slot * C, there, channels, C).to(tl.float32)
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
    pairs,
    N,
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Adds what each pair passes back to the row of output (groups, M, C), float32, of the token that it chose."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    there = pair < pairs
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    part = _passed_back(rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C)
    # The output lies without gaps: a group every M * C elements.
    token = _chosen_offset(index, index_strides, pair // K, pair % K, there, N, (M, 1))
    there_too = there[:, None] & (channels < C)[None, :]
    tl.atomic_add(output + token[:, None] * C + channels[None, :], part, mask=there_too, sem="relaxed")


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
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """For one token the sum of what the pairs that chose it pass back, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    end = tl.load(starts + token + 1)
    total = tl.zeros((BP, BC), tl.float32)
    for first in range(tl.load(starts + token), end, BP):
        number = first + tl.arange(0, BP)
        there = number < end
        pair = tl.load(pairs + number, mask=there, other=0).to(tl.int32)
        total += _passed_back(
            rows, rows_strides, x, x_strides, index, index_strides, scale, weight, pair, there, channels, N, K, C
        )
    tl.store(output + token * C + channels, tl.sum(total, axis=0), mask=channels < C)


@triton.jit
def _slot_weight_grad_kernel(
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
    for first in range(begin, begin + rows_per_part, BN):
        row = first + tl.arange(0, BN)
        there = row < count
        chosen = _chosen_offset(index, index_strides, row, k, there, N, values_strides)
        product = _load_rows(values, chosen, there, channels, C).to(tl.float32)
        product *= _load_rows(grad, _offset(row, N, grad_strides), there, channels, C).to(tl.float32)
        if scores is not None:
            product *= tl.load(scores + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        total += product
    tl.store(partial + (tl.program_id(0) * K + k) * C + channels, tl.sum(total, axis=0), mask=channels < C)


# ---------------------------------------------------------------------------------------------------------------
# The standard convolution over slots, an implicit matrix product: (rows, K * C) x (K * C, D), whose left operand is loaded by index
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scaled(values, chosen, scores, row, k, there, channels, K: tl.constexpr, C: tl.constexpr):
    """Neighbors times their scores, in the dtype of the values."""
    x = _load_rows(values, chosen, there, channels, C)
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
    blocks = tl.cdiv(D, BD)  # those of the same rows run side by side, as they load the same neighbors
    row = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    there = row < count
    out = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    total = tl.zeros((BN, BD), tl.float32)
    for step in range(K * CHANNEL_BLOCKS):
        k = step // CHANNEL_BLOCKS
        channels = (step % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
        chosen = _chosen_offset(index, index_strides, row, k, there, N, values_strides)
        x = _load_scaled(values, chosen, scores, row, k, there, channels, K, C)
        w = _load_rows(weight + k * C, out * (K * C), out < D, channels, C)  # (BD, BC)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    there_too = there[:, None] & (out < D)[None, :]
    tl.store(output + row.to(tl.int64)[:, None] * D + out[None, :], total, mask=there_too)


@triton.jit
def _convolution_weight_grad_kernel(
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
    """For one part of the rows, BD output channels and BC channels of one slot: grad^T x neighbors; the parts are added up later."""
    CHANNEL_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    k = tl.program_id(1) // CHANNEL_BLOCKS
    channels = (tl.program_id(1) % CHANNEL_BLOCKS) * BC + tl.arange(0, BC)
    out = tl.program_id(2) * BD + tl.arange(0, BD)
    begin = tl.program_id(0) * rows_per_part
    total = tl.zeros((BD, BC), tl.float32)
    for first in range(begin, begin + rows_per_part, BN):
        row = first + tl.arange(0, BN)
        there = row < count
        chosen = _chosen_offset(index, index_strides, row, k, there, N, values_strides)
        x = _load_scaled(values, chosen, scores, row, k, there, channels, K, C)
        g = tl.load(
            grad + _offset(row, N, grad_strides)[:, None] + out[None, :], mask=there[:, None] & (out < D)[None, :], other=0.0
        )
        total = tl.dot(g.T, x, total, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * D + out)[:, None] * (K * C) + (k * C + channels)[None, :]
    tl.store(partial + place, total, mask=(out < D)[:, None] & (channels < C)[None, :])


@triton.jit
def _convolution_rows_grad_kernel(
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
    """What reaches the neighbors in one slot of BN rows, grad x weight of the slot: times the neighbors it is the gradient of
    their scores, times the scores that of the neighbors."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    k = tl.program_id(1)
    chosen = _chosen_offset(index, index_strides, row, k, there, N, values_strides)
    token = _chosen_offset(index, index_strides, row, k, there, N, (M, 1))
    to_score = tl.zeros((BN,), tl.float32)
    for c in range(0, C, BC):
        channels = c + tl.arange(0, BC)
        to_slot = tl.zeros((BN, BC), tl.float32)
        for d in range(0, D, BD):
            out = d + tl.arange(0, BD)
            g = tl.load(
                grad + _offset(row, N, grad_strides)[:, None] + out[None, :],
                mask=there[:, None] & (out < D)[None, :],
                other=0.0,
            )
            w = _load_rows(weight + k * C, out * (K * C), out < D, channels, C)  # (BD, BC)
            to_slot = tl.dot(g, w, to_slot, input_precision=PRECISION)
        there_too = there[:, None] & (channels < C)[None, :]
        if scores is not None:
            x = _load_rows(values, chosen, there, channels, C).to(tl.float32)
            to_score += tl.sum(to_slot * x, axis=1)
            to_slot *= tl.load(scores + row * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        if grad_values is not None:
            tl.atomic_add(grad_values + token[:, None] * C + channels[None, :], to_slot, mask=there_too, sem="relaxed")
        if grad_pairs is not None:
            pair = row.to(tl.int64) * K + k
            tl.store(grad_pairs + pair[:, None] * C + channels[None, :], to_slot, mask=there_too)
    if scores is not None:
        tl.store(grad_scores + row * K + k, to_score, mask=there)


# ---------------------------------------------------------------------------------------------------------------
# What is covered
# ---------------------------------------------------------------------------------------------------------------


def _covered(K: int, *tensors: Tensor) -> bool:
    """On the device, not empty, each group within 32 bits."""
    for x in tensors:
        extent = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        if not (x.is_cuda or INTERPRETED) or x.numel() == 0 or extent > MOST_ELEMENTS:
            return False
    return 1 <= K <= MOST_NEIGHBORS


def covers_search(query: Tensor, key: Tensor, K: int) -> bool:
    (B, N, _), M = query.shape, key.shape[1]
    return (
        query.dtype == key.dtype
        and query.dtype in DTYPES
        and max(B * N * K, B * M) <= MOST_ELEMENTS
        and _covered(K, query, key)
    )


def covers_pairs(query: Tensor, key: Tensor, index: Tensor) -> bool:
    return (
        query.dtype == key.dtype
        and query.dtype in DTYPES
        and max(index.numel(), len(key) * key.shape[1]) <= MOST_ELEMENTS
        and _covered(index.shape[2], query, key, index)
    )


def covers_aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None) -> bool:
    return (
        values.dtype == weight.dtype
        and values.dtype in DTYPES
        and (scores is None or scores.dtype in DTYPES)
        and max(index.numel(), len(values) * values.shape[1], weight.numel()) <= MOST_ELEMENTS
        and _covered(index.shape[2], values, index, weight)
    )


def covers_weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> bool:
    return (
        values.dtype in DTYPES
        and weights.dtype in DTYPES
        and max(index.numel(), len(values) * values.shape[1]) <= MOST_ELEMENTS
        and _covered(index.shape[2], values, index, weights)
    )


# ---------------------------------------------------------------------------------------------------------------
# Launching. Tile sizes are fixed by dtype and shape, as tuning by trial would wait for the device in the middle of a step.
# ---------------------------------------------------------------------------------------------------------------


def _launch(kernel, grid: tuple[int, ...], *arguments, device: torch.device, **options) -> None:
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*arguments, **options, **COMPILATION)


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor (groups, rows, channels) whose channels lie side by side, and its strides of group and row."""
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    return x, x.stride()[:2]


def _block(size: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(size), most))


def _precision(dtype: torch.dtype) -> str:
    """Of products in the convolution: float32 as for any matrix product of PyTorch, TF32 only where the user allows it."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _search(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None, scored: bool
) -> tuple[Tensor, Tensor]:
    (B, N, C), forced, device = query.shape, int(self_index is not None), query.device
    index = query.new_empty((B, N, K), dtype=torch.long)
    if K == forced:
        index.copy_(self_index[:, None])
        return index, pair_scores(query, key, index, False) if scored else query.new_empty(0, dtype=torch.float32)
    products = query.new_empty((B, N, K), dtype=torch.float32) if scored else None
    all_keys, all_strides = _rows(key)
    if candidates is not None:
        candidates = candidates.sort().values  # so that the first column of equal scores is the smallest row of key
        key = all_keys.index_select(1, candidates)
    (query, query_strides), (key, key_strides), M = (
        _rows(query),
        _rows(key),
        candidates.shape[0] if candidates is not None else key.shape[1],
    )
    center = terms = None
    if metric != "matmul":
        if metric == "euclidean":
            center = key.mean(dim=1, dtype=torch.float32)  # so that little cancels in q.k - |k|^2 / 2
        terms = key.new_empty((B, M), dtype=torch.float32)
        _launch(
            _key_terms_kernel,
            (triton.cdiv(B * M, 32),),
            *(key, key_strides, center, terms, B * M, M),
            device=device,
            C=C,
            BN=32,
            BC=_block(C, 64),
            num_warps=4,
        )
    KP = max(2, triton.next_power_of_2(K - forced))
    BN = 64 if KP <= 32 else 32
    # Less a center, numbers of 16 bits are float32 too. Products of float32 do without tensor cores, and their operands share
    # the registers with their sums.
    if query.dtype == torch.float32 or center is not None:
        tiles = {"BM": 32, "BC": 64 if C <= 64 else 32, "num_warps": 8}
    else:
        tiles = {"BM": 64, "BC": _block(C, 128), "num_warps": 4 if C <= 64 else 8}
    _launch(
        _search_kernel,
        (B * triton.cdiv(N, BN),),
        *(query, query_strides, key, key_strides, all_keys, all_strides, center, terms, candidates, self_index),
        *(index, products, N, M),
        device=device,
        K=K,
        C=C,
        KP=KP,
        BN=BN,
        **tiles,
    )
    return index, query.new_empty(0, dtype=torch.float32) if products is None else products


def _incoming(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Who chose each token: the numbers of the pairs, one token's after the other's, and where each token's begin."""
    groups = len(index)
    offset = torch.arange(groups, dtype=torch.int32, device=index.device).mul_(tokens).view(-1, 1, 1)
    chosen, pairs = (index.int() + offset).flatten().sort(stable=True)
    every = torch.arange(groups * tokens + 1, dtype=torch.int32, device=index.device)
    return pairs, torch.searchsorted(chosen, every)


def _dot_pairs(rows: Tensor, x: Tensor, index: Tensor, weight: Tensor | None = None, squared_distance: bool = False) -> Tensor:
    """For each pair the sum over channels of row x neighbor (x weight of the slot), or the squared distance: (G, N, K), float32."""
    (G, N, K), C = index.shape, x.shape[2]
    output = x.new_empty((G, N, K), dtype=torch.float32)
    pairs = 64
    _launch(
        _pair_kernel,
        (triton.cdiv(G * N * K, pairs),),
        *(*_rows(rows), *_rows(x), *_rows(index), weight, output, G * N * K, N),
        device=x.device,
        K=K,
        C=C,
        SQUARED=squared_distance,
        BP=pairs,
        BC=_block(C, 64),
        num_warps=4,
    )
    return output


def _sum_neighbors(
    x: Tensor, index: Tensor, scale: Tensor | None, weight: Tensor | None = None, minus: Tensor | None = None
) -> Tensor:
    """Sum over slots of neighbors times scale (G, N, K) and weight (K, C), or of 2 (minus - neighbors) times scale: (G, N, C)."""
    (G, N, K), C = index.shape, x.shape[2]
    output = x.new_empty((G, N, C))
    BN, BC = 32, _block(C, 64)
    _launch(
        _gather_sum_kernel,
        (triton.cdiv(G * N, BN), triton.cdiv(C, BC)),
        *(*((None, None) if minus is None else _rows(minus)), *_rows(x), *_rows(index)),
        *(None if scale is None else scale.contiguous(), weight, output, G * N, N),
        device=x.device,
        K=K,
        C=C,
        BN=BN,
        BC=BC,
        num_warps=4,
    )
    return output


def _spread(
    rows: Tensor, index: Tensor, scale: Tensor | None, like: Tensor, weight: Tensor | None = None, minus: bool = False
) -> Tensor:
    """Sum over the pairs that chose a token of row times scale (G, N, K) and weight (K, C), or, with `minus`, of
    2 (token of `like` - row) times scale: (G, N, C) -> as `like` (G, M, C)."""
    (G, N, K), (_, M, C) = index.shape, like.shape
    scale = None if scale is None else scale.contiguous()
    given = (*_rows(rows), *(_rows(like) if minus else (None, None)), *_rows(index), scale, weight)
    BC = _block(C, 64)
    if torch.are_deterministic_algorithms_enabled():
        output = like.new_empty((G, M, C))
        _launch(
            _spread_sorted_kernel,
            (G * M, triton.cdiv(C, BC)),
            *(*given, *_incoming(index, M), output, N),
            device=like.device,
            K=K,
            C=C,
            BP=16,
            BC=BC,
            num_warps=2,
        )
        return output
    output = like.new_zeros((G, M, C), dtype=torch.float32)
    _launch(
        _spread_atomic_kernel,
        (triton.cdiv(G * N * K, 32), triton.cdiv(C, BC)),
        *(*given, output, G * N * K, N, M),
        device=like.device,
        K=K,
        C=C,
        BP=32,
        BC=BC,
        num_warps=4,
    )
    return output.to(like.dtype)


# ---------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------


def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    return _search(query, key, K, metric, candidates, self_index, scored=False)[0]


def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _search(query, key, K, "matmul", candidates, self_index, scored=True)


def pair_scores(query: Tensor, key: Tensor, index: Tensor, squared_distance: bool) -> Tensor:
    return _dot_pairs(query, key, index, squared_distance=squared_distance)


def pair_scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, squared_distance: bool
) -> tuple[Tensor, Tensor]:
    grad_query = _sum_neighbors(key, index, grad, minus=query if squared_distance else None)
    return grad_query, _spread(query, index, grad, key, minus=squared_distance)


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return _sum_neighbors(values, index, weights)


def weighted_sum_backward(grad: Tensor, values: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _spread(grad, index, weights, values), _dot_pairs(grad, values, index).to(weights.dtype)


def aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    weight = weight.contiguous()
    if depthwise:
        return _sum_neighbors(values, index, scores, weight)
    (G, N, K), C, D = index.shape, values.shape[2], weight.shape[0]
    output = values.new_empty((G, N, D))
    tiles = _convolution_tiles(values.dtype, C, D)
    _launch(
        _convolution_kernel,
        (triton.cdiv(G * N, tiles["BN"]) * triton.cdiv(D, tiles["BD"]),),
        *(*_rows(values), *_rows(index), None if scores is None else scores.contiguous(), weight, output, G * N, N, D),
        device=values.device,
        K=K,
        C=C,
        PRECISION=_precision(values.dtype),
        **tiles,
    )
    return output


def aggregate_backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    scores = None if scores is None else scores.contiguous()
    grad_values, grad_scores = values.new_empty(0), values.new_empty(0, dtype=torch.float32)
    grad_weight = _slot_weight_grad(grad, values, index, weight, scores, depthwise)
    if depthwise:
        if need_values:
            grad_values = _spread(grad, index, scores, values, weight)
        if scores is not None:
            grad_scores = _dot_pairs(grad, values, index, weight)
    elif need_values or scores is not None:
        grad_values, grad_scores = _convolution_rows_grad(grad, values, index, weight, scores, need_values)
    return grad_values, grad_weight, grad_scores


def _convolution_tiles(dtype: torch.dtype, C: int, D: int) -> dict[str, int]:
    if dtype == torch.float32:  # products without tensor cores: operands and sums share the registers
        return {"BN": 64, "BD": _block(D, 64), "BC": _block(C, 32), "num_warps": 8, "num_stages": 2}
    return {"BN": 128, "BD": _block(D, 128), "BC": _block(C, 64), "num_warps": 8, "num_stages": 3}


def _slot_weight_grad(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool
) -> Tensor:
    """Gradient of the weights in two stages: parts of the rows, of which there are as many as fill a GPU, then their sum."""
    (G, N, K), C = index.shape, values.shape[2]
    given = (*_rows(grad), *_rows(values), *_rows(index), scores)
    if depthwise:
        D, BC = 1, _block(C, 64)
        tiles = {"BN": 32, "BC": BC, "num_warps": 4}
        blocks = (K, triton.cdiv(C, BC))
    else:
        D = weight.shape[0]
        tiles = _convolution_tiles(values.dtype, C, D) | {"BN": 32 if values.dtype == torch.float32 else 64}
        blocks = (K * triton.cdiv(C, tiles["BC"]), triton.cdiv(D, tiles["BD"]))
    parts = max(1, min(triton.cdiv(1024, blocks[0] * blocks[1]), triton.cdiv(G * N, 8 * tiles["BN"])))
    rows_per_part = triton.cdiv(triton.cdiv(G * N, parts), tiles["BN"]) * tiles["BN"]
    partial = values.new_empty((parts, *weight.shape), dtype=torch.float32)
    if depthwise:
        kernel, sizes, extra = _slot_weight_grad_kernel, (G * N, N, rows_per_part), {}
    else:
        kernel, sizes, extra = (
            _convolution_weight_grad_kernel,
            (G * N, N, D, rows_per_part),
            {"PRECISION": _precision(values.dtype)},
        )
    _launch(kernel, (parts, *blocks), *given, partial, *sizes, device=values.device, K=K, C=C, **extra, **tiles)
    return partial.sum(0).to(weight.dtype)


def _convolution_rows_grad(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the values, if wanted, and of the scores, if there are any."""
    (G, N, K), (_, M, C), D = index.shape, values.shape, weight.shape[0]
    grad_scores = values.new_empty(0 if scores is None else (G, N, K), dtype=torch.float32)
    in_order = need_values and torch.are_deterministic_algorithms_enabled()
    grad_values = values.new_empty(0)
    if need_values:
        grad_values = values.new_empty((G, M, C)) if in_order else values.new_zeros((G, M, C), dtype=torch.float32)
    tiles = _convolution_tiles(values.dtype, C, D)
    tiles |= {"BN": 64, "BD": min(tiles["BD"], 32 if values.dtype == torch.float32 else 64)}  # a product runs over BD here
    # In order, what passes back is written for some groups at a time, then added up by token.
    step = max(1, ORDERED_ELEMENTS // (N * K * C)) if in_order else G
    for start in range(0, G, step):
        part = slice(start, min(start + step, G))
        groups = part.stop - part.start
        pairs = values.new_empty((groups, N * K, C), dtype=torch.float32) if in_order else None
        _launch(
            _convolution_rows_grad_kernel,
            (triton.cdiv(groups * N, tiles["BN"]), K),
            *(*_rows(grad[part]), *_rows(values[part]), *_rows(index[part]), None if scores is None else scores[part], weight),
            *(None if scores is None else grad_scores[part], grad_values if need_values and not in_order else None, pairs),
            *(groups * N, N, M, D),
            device=values.device,
            K=K,
            C=C,
            PRECISION=_precision(values.dtype),
            **tiles,
        )
        if in_order:
            grad_values[part] = _spread(pairs, index[part].reshape(groups, N * K, 1), None, values[part])
    return grad_values.to(values.dtype), grad_scores
