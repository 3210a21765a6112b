"""Attention to the K keys of largest product: what follows the search, and its way back, in as few launches as can be.

Forward, one launch: softmax, and the sum of the values. Backward, a launch for the rows (gradients of the weights, of their
scores, and of the query), one for the tokens that pairs chose (key and value), and one for a convolution over the slots.
query, key, value and grad are (images, heads, rows, C); index and numbers per pair (images x heads, N, K), without gaps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_common as common
from kernels.reference import slots_of
from kernels.triton_common import block, cdiv, chosen_offset, load_rows, new_rows, row_offset, rows_of, strides_of
from kernels.triton_search import search
from kernels.triton_sums import depthwise_weight_grad, spread


@triton.jit
def _load_slot(x, chosen, there, channels, weight, k, K: tl.constexpr, C: tl.constexpr):
    """Rows that a slot chose, times its weights (C, K)."""
    part = load_rows(x, chosen, there, channels, C).to(tl.float32)
    if weight is not None:
        part *= tl.load(weight + channels * K + k, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    return part


@triton.jit
def _mix_kernel(
    value,
    value_strides,
    index,
    index_strides,
    products,
    weight,
    weights,
    output,
    output_strides,
    count,
    N,
    divisor,
    K: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """The softmax of the K products / divisor of each row, and the sum of the values that it weights."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    slot = tl.arange(0, KP)
    place = row.to(tl.int64)[:, None] * K + slot[None, :]
    kept = there[:, None] & (slot < K)[None, :]
    score = tl.load(products + place, mask=kept, other=float("-inf")) / divisor
    share = tl.exp(score - tl.max(score, axis=1)[:, None])
    share /= tl.sum(share, axis=1)[:, None]
    tl.store(weights + place, share, mask=kept)
    total = tl.zeros((BN, BC), tl.float32)
    for k in range(K):
        chosen = chosen_offset(index, index_strides, row, k, there, N, value_strides)
        part = _load_slot(value, chosen, there, channels, weight, k, K, C)
        total += part * tl.sum(tl.where(slot[None, :] == k, share, 0.0), axis=1)[:, None]
    there_too = there[:, None] & (channels < C)[None, :]
    tl.store(output + row_offset(row, N, output_strides)[:, None] + channels[None, :], total, mask=there_too)


@triton.jit
def _mix_rows_grad_kernel(
    grad,
    grad_strides,
    key,
    key_strides,
    value,
    value_strides,
    index,
    index_strides,
    weights,
    weight,
    to_scores,
    output,
    output_strides,
    count,
    N,
    divisor,
    K: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of the products of each row, written and summed over its keys, which is the gradient of the query."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < count
    slot = tl.arange(0, KP)
    place = row.to(tl.int64)[:, None] * K + slot[None, :]
    kept = there[:, None] & (slot < K)[None, :]
    slope = tl.zeros((BN, KP), tl.float32)  # of the weights
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        own = load_rows(grad, row_offset(row, N, grad_strides), there, channels, C).to(tl.float32)
        for k in range(K):
            chosen = chosen_offset(index, index_strides, row, k, there, N, value_strides)
            dot = tl.sum(own * _load_slot(value, chosen, there, channels, weight, k, K, C), axis=1)
            slope += tl.where(slot[None, :] == k, dot[:, None], 0.0)
    share = tl.load(weights + place, mask=kept, other=0.0)
    slope = share * (slope - tl.sum(share * slope, axis=1)[:, None]) / divisor
    tl.store(to_scores + place, slope, mask=kept)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        total = tl.zeros((BN, BC), tl.float32)
        for k in range(K):
            chosen = chosen_offset(index, index_strides, row, k, there, N, key_strides)
            part = load_rows(key, chosen, there, channels, C).to(tl.float32)
            total += part * tl.sum(tl.where(slot[None, :] == k, slope, 0.0), axis=1)[:, None]
        there_too = there[:, None] & (channels < C)[None, :]
        tl.store(output + row_offset(row, N, output_strides)[:, None] + channels[None, :], total, mask=there_too)


@triton.jit
def _mix_tokens_grad_kernel(
    query,
    query_strides,
    grad,
    grad_strides,
    index,
    index_strides,
    to_scores,
    weights,
    weight,
    grad_key,
    key_strides,
    grad_value,
    value_strides,
    pairs,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Add the terms of each pair to the gradients, float32, of the key and the value that it chose."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    there = pair < pairs
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    there_too = there[:, None] & (channels < C)[None, :]
    row, slot = pair // K, pair % K
    part = load_rows(query, row_offset(row, N, query_strides), there, channels, C).to(tl.float32)
    part *= tl.load(to_scores + pair, mask=there, other=0.0)[:, None]
    token = chosen_offset(index, index_strides, row, slot, there, N, key_strides)
    tl.atomic_add(grad_key + token[:, None] + channels[None, :], part, mask=there_too, sem="relaxed")
    part = load_rows(grad, row_offset(row, N, grad_strides), there, channels, C).to(tl.float32)
    part *= tl.load(weights + pair, mask=there, other=0.0)[:, None]
    if weight is not None:
        place = channels[None, :] * K + slot[:, None]
        part *= tl.load(weight + place, mask=there_too, other=0.0).to(tl.float32)
    token = chosen_offset(index, index_strides, row, slot, there, N, value_strides)
    tl.atomic_add(grad_value + token[:, None] + channels[None, :], part, mask=there_too, sem="relaxed")


def _sizes(N: int, K: int, C: int) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """Return the strides of an index (groups, N, K), and the constants of a kernel over rows."""
    return (N * K, K, 0, 1), {"K": K, "C": C, "KP": block(K, 64, 2), "BN": 32, "BC": block(C, 64), "num_warps": 4}


def neighbor_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, K: int, divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, index and weights; weight (C, 1, K), without gaps: of a depthwise convolution over the slots."""
    index, products = search(query, key, K, "matmul", None, None, scored=True)
    (G, N, _), C = index.shape, value.shape[3]
    output, weights = new_rows(value, N), torch.empty_like(products)
    pair_strides, sizes = _sizes(N, K, C)
    common.launch(
        _mix_kernel,
        (cdiv(G * N, sizes["BN"]), cdiv(C, sizes["BC"])),
        *(*rows_of(value), index, pair_strides, products, weight, weights, output, strides_of(output), G * N, N, divisor),
        device=value.device,
        **sizes,
    )
    return output, index, weights


def neighbor_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    index: Tensor,
    weights: Tensor,
    divisor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, slot by slot, weight: (K, C), empty if there is none."""
    (G, N, K), M, C = index.shape, key.shape[2], value.shape[3]
    to_weight = value.new_empty(0)
    if weight is not None:
        to_weight = depthwise_weight_grad(grad, value, index, weights).to(weight.dtype)
    to_scores, to_query = torch.empty_like(weights), new_rows(query, N)
    (grad, grad_strides), (query, query_strides) = rows_of(grad), rows_of(query)
    pair_strides, sizes = _sizes(N, K, C)
    common.launch(
        _mix_rows_grad_kernel,
        (cdiv(G * N, sizes["BN"]),),
        *(grad, grad_strides, *rows_of(key), *rows_of(value), index, pair_strides, weights, weight),
        *(to_scores, to_query, strides_of(to_query), G * N, N, divisor),
        device=value.device,
        **sizes,
    )
    if torch.are_deterministic_algorithms_enabled():
        to_value = spread(grad, index, weights, value, None if weight is None else slots_of(weight))
        return to_query, spread(query, index, to_scores, key), to_value, to_weight
    to_key, to_value = new_rows(key, M, torch.float32, zero=True), new_rows(value, M, torch.float32, zero=True)
    common.launch(
        _mix_tokens_grad_kernel,
        (cdiv(G * N * K, 32), cdiv(C, sizes["BC"])),
        *(query, query_strides, grad, grad_strides, index, pair_strides, to_scores, weights, weight),
        *(to_key, strides_of(to_key), to_value, strides_of(to_value), G * N * K, N),
        device=value.device,
        K=K,
        C=C,
        BP=32,
        BC=sizes["BC"],
        num_warps=4,
    )
    return to_query, to_key.to(key.dtype), to_value.to(value.dtype), to_weight
