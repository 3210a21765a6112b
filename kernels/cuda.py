"""The operators of `neighbors.py` as Triton kernels: searching, scoring and aggregating without anything of size N x M.

One function per operator, with its signature; before a call, `covers_search`, `covers_pairs`, `covers_aggregate`,
`covers_weighted_sum` or `covers_max` tells if the kernels support the tensors: on CUDA (or, under TRITON_INTERPRET=1, on
a CPU), in float32, bfloat16 or float16, K at most 64. Tensors may have any strides. Sums are in float32. The search ranks
float32 inputs by products of full float32 precision; NaN ranks above infinity, and of equal scores the smallest key wins.

Sums over the pairs that chose a token are atomic additions in any order, or, under `torch.use_deterministic_algorithms`, run
through the pairs sorted by token. Nothing here waits for the device.
"""

import functools

import torch
from torch import Tensor

from kernels.triton_attention import neighbor_attention as neighbor_attention
from kernels.triton_attention import neighbor_attention_backward as neighbor_attention_backward
from kernels.triton_common import INTERPRETED
from kernels.triton_convolution import convolution, convolution_rows_grad, convolution_weight_grad
from kernels.triton_search import search
from kernels.triton_sums import depthwise_weight_grad, dot_pairs, max_rows, spread, sum_neighbors

MOST_NEIGHBORS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ELEMENTS = 2**31 - 2**16  # range of 32 bits, less a tile


def _covered(K: int, *tensors: Tensor) -> bool:
    """Return True for tensors on the device, not empty, with each group within 32 bits."""
    for x in tensors:
        if not (x.is_cuda or INTERPRETED) or x.numel() == 0 or _extent(x.shape[1:], x.stride()[1:]) > MOST_ELEMENTS:
            return False
    return 1 <= K <= MOST_NEIGHBORS


@functools.lru_cache(1024)
def _extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


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


def covers_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, K: int) -> bool:
    images, heads, N, _ = query.shape
    return (
        query.dtype in DTYPES
        and key.dtype == query.dtype
        and value.dtype in DTYPES
        and value.shape[3] == query.shape[3]
        and (weight is None or (weight.dtype in DTYPES and weight.is_contiguous()))
        and images * heads * max(N * K, key.shape[2]) <= MOST_ELEMENTS
        and _covered(K, query, key, value)
    )


def covers_max(values: Tensor, index: Tensor) -> bool:
    return (
        values.dtype in DTYPES
        and max(index.numel(), len(values) * values.shape[1]) <= MOST_ELEMENTS
        and _covered(index.shape[2], values, index)
    )


def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    return search(query, key, K, metric, candidates, self_index, scored=False)[0]


def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return search(query, key, K, "matmul", candidates, self_index, scored=True)


def pair_scores(query: Tensor, key: Tensor, index: Tensor, squared_distance: bool) -> Tensor:
    return dot_pairs(query, key, index, squared_distance=squared_distance)


def pair_scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, squared_distance: bool
) -> tuple[Tensor, Tensor]:
    grad_query = sum_neighbors(key, index, grad, minus=query if squared_distance else None)
    return grad_query, spread(query, index, grad, key, minus=squared_distance)


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return sum_neighbors(values, index, weights)


def weighted_sum_backward(grad: Tensor, values: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return spread(grad, index, weights, values), dot_pairs(grad, values, index).to(weights.dtype)


def aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    weight, scores = weight.contiguous(), None if scores is None else scores.contiguous()
    return sum_neighbors(values, index, scores, weight) if depthwise else convolution(values, index, weight, scores)


def aggregate_backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight, scores = weight.contiguous(), None if scores is None else scores.contiguous()
    if not depthwise:
        grad_weight = convolution_weight_grad(grad, values, index, weight, scores)
        grad_values, grad_scores = convolution_rows_grad(grad, values, index, weight, scores, need_values)
        return grad_values, grad_weight, grad_scores
    grad_values = spread(grad, index, scores, values, weight) if need_values else values.new_empty(0)
    grad_scores = values.new_empty(0, dtype=torch.float32) if scores is None else dot_pairs(grad, values, index, weight)
    return grad_values, depthwise_weight_grad(grad, values, index, scores).to(weight.dtype), grad_scores


def max_neighbors(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return max_rows(values, index)
