"""The K nearest keys of each query: tiles of keys stream past a tile of queries, and nothing of size N x M is written."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import chunked
from kernels import triton_common as common
from kernels.triton_common import block, cdiv, group_offset, load_rows, row_offset, rows_of
from kernels.triton_sums import dot_pairs


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
    rows = load_rows(x, offset, there, channels, C)
    if center is not None:
        rows = rows.to(tl.float32) - tl.load(center + channels, mask=channels < C, other=0.0)[None, :]
    return rows


@triton.jit
def _key_terms_kernel(key, strides, center, terms, rows, M, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Compute one number per key: a factor of its products, 1 / |key|, or with a center, of each group, a summand,
    -|key - center|^2 / 2."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < rows
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        x = load_rows(key, row_offset(row, M, strides), there, channels, C).to(tl.float32)
        if center is not None:
            x -= load_rows(center, (row // M) * C, there, channels, C)
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
    blocks = tl.cdiv(N, BN)  # blocks of one group run side by side, so that its keys stay in the cache
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    there = row < N
    own_offset = group_offset(group, query_strides) + row * query_strides[1]
    key += group_offset(group, key_strides)
    if center is not None:
        center += group * C
    if terms is not None:
        terms += group * M
    if self_index is not None:
        own = tl.load(self_index + row, mask=there, other=0)
    FORCED: tl.constexpr = 0 if self_index is None else 1
    EMPTY: tl.constexpr = -(2**31)  # below the form of every score
    UNBEATEN: tl.constexpr = 2**63 - 1
    SPARE: tl.constexpr = KP - (K - FORCED)  # slots that hold an unbeaten value; exactly the others change
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
                queries = load_rows(query, own_offset, there, c + channels, C).to(tl.float32)
                keys = load_rows(all_keys + group_offset(group, all_strides), own * all_strides[1], there, c + channels, C)
                product += tl.sum(queries * keys.to(tl.float32), axis=1)
            tl.store(products + first_pair, product, mask=there)


def search(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None, scored: bool
) -> tuple[Tensor, Tensor]:
    """index (B, N, K) and, if scored, the products of query and key (B, N, K), float32; else an empty tensor.

    By products among all keys, query and key may be (images, heads, N, C); then B is images x heads.
    """
    (*groups, N, C), forced, device = query.shape, int(self_index is not None), query.device
    B = math.prod(groups)
    index = query.new_empty((B, N, K), dtype=torch.long)
    products = query.new_empty((B, N, K) if scored else 0, dtype=torch.float32)
    if forced:
        self_index = self_index.contiguous()
    if K == forced:
        index.copy_(self_index[:, None])
        return index, dot_pairs(query, key, index) if scored else products
    all_keys, all_strides = rows_of(key)
    if candidates is not None:
        candidates = candidates.sort().values  # so that the first column of equal scores is the smallest row of key
        key = all_keys.index_select(1, candidates)
    (query, query_strides), (key, key_strides), M = rows_of(query), rows_of(key), key.shape[-2]
    center = terms = None
    if metric != "matmul":
        if metric == "euclidean":
            center = chunked.center(key.float()).squeeze(1)  # so that little cancels in q.k - |k|^2 / 2
        terms = key.new_empty((B, M), dtype=torch.float32)
        common.launch(
            _key_terms_kernel,
            (cdiv(B * M, 32),),
            *(key, key_strides, center, terms, B * M, M),
            device=device,
            C=C,
            BN=32,
            BC=block(C, 64),
            num_warps=4,
        )
    KP = block(K - forced, 64, 2)
    BN = 64 if KP <= 32 else 32
    # Less a center, numbers of 16 bits are float32 too. Products of float32 do without tensor cores, and their operands share
    # the registers with their sums.
    if query.dtype == torch.float32 or center is not None:
        BC = block(C, 64) if C <= 64 and center is None else 16 if C > 64 and forced else 32  # Triton 3.6 spills with 32
        tiles = {"BM": 32, "BC": BC, "num_warps": 8}
    else:
        tiles = {"BM": 64, "BC": block(C, 128), "num_warps": 4 if C <= 64 else 8}
    common.launch(
        _search_kernel,
        (B * cdiv(N, BN),),
        *(query, query_strides, key, key_strides, all_keys, all_strides, center, terms, candidates, self_index),
        *(index, products if scored else None, N, M),
        device=device,
        K=K,
        C=C,
        KP=KP,
        BN=BN,
        **tiles,
    )
    return index, products
