"""Every operator on a CPU, where caches are small, fresh memory is slow, and rows are best read where they lie.

Sums over neighbors run as embedding bags: `F.embedding_bag` adds rows of a table by index and weight without gathering them
first, backward too, over the pairs sorted by key. Where K is a good part of all tokens, matrix products over all of them cost
less still. Everything else goes through `chunked.py`, with its gathered rows in one buffer.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import chunked
from kernels.chunked import blocks, flat_index, rows_per_chunk
from kernels.reference import accumulator

CHUNK = 2**18  # elements of a chunk of scores: a megabyte of float32, about a core's cache
GATHERED = 2**20  # elements of a chunk of gathered rows
COLUMN_BITS = 20  # of a key, which a double holds beside the 32 bits of a score
DENSE = 20  # tokens per neighbor, up to which products over all tokens cost less than work on each of K neighbors (measured)


def _dense_pays(index: Tensor, tokens: int) -> bool:
    return tokens <= DENSE * index.shape[2]


def gathered(x: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`chunked.gathered`, with the rows of all chunks in one buffer: fresh memory costs more than the sums."""
    K, C = index.shape[2], x.shape[2]
    flat, index = x.reshape(-1, C), flat_index(index, x.shape[1])
    step = rows_per_chunk(K * C, GATHERED)
    buffer = x.new_empty(min(step, len(index)) * K, C)
    for start in range(0, len(index), step):
        rows = slice(start, min(start + step, len(index)))
        chosen = index[rows].flatten()
        yield rows, chosen, torch.index_select(flat, 0, chosen, out=buffer[: len(chosen)]).view(-1, K, C)


def pairs_by_key(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs (g, i, k) by the token they chose: their numbers (G * N * K,), and each token's first (G * M + 1,)."""
    flat = flat_index(index, tokens).flatten()
    pairs = flat.int().sort(stable=True).indices
    return pairs, F.pad(torch.bincount(flat, minlength=len(index) * tokens).cumsum(0), (1, 0))


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------


def largest(scores: Tensor, K: int) -> Tensor:
    """Return the columns of the K largest of each row, largest first, of equal ones the smallest column first.

    (b, n, M) -> (b, n, K). The CPU's topk sorts short rows; K times the largest is faster. Keys are doubles from 1 to 2 whose
    bits hold the score in its order-preserving form and, below it, the inverted column: no two of a row are equal.
    """
    M = scores.shape[2]
    if scores.dtype != torch.float32 or not 1 < K <= 16 or not 32 <= M < min(64 * K, 512):
        return chunked.largest(scores, K)
    keys = chunked.ordered(scores).long().bitwise_left_shift_(COLUMN_BITS)
    keys = keys.add_(torch.arange(M - 1, -1, -1) + (0x3FF8 << 48)).view(torch.float64)
    found = keys.new_empty(K, *scores.shape[:2], 1)
    columns = torch.empty(found.shape, dtype=torch.long)
    for k in range(K):
        torch.amax(keys, dim=2, keepdim=True, out=found[k])
        torch.bitwise_and(found[k].view(torch.int64), 2**COLUMN_BITS - 1, out=columns[k])
        keys.scatter_(2, torch.sub(M - 1, columns[k], out=columns[k]), 0)
    return columns.squeeze(3).permute(1, 2, 0)


def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    return chunked.search(query, key, K, metric, candidates, self_index, scored=False, chunk=CHUNK, largest=largest)[0]


def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return chunked.search(query, key, K, "matmul", candidates, self_index, scored=True, chunk=CHUNK, largest=largest)


# ---------------------------------------------------------------------------------------------------------------
# Sums over neighbors
# ---------------------------------------------------------------------------------------------------------------


def dot_rows(rows: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`chunked.dot_rows`, by a product over all tokens or by bags."""
    (_, M, C), K, dtype = x.shape, index.shape[2], accumulator(x.dtype)
    if _dense_pays(index, M):
        dots = rows.new_empty(index.shape, dtype=dtype)
        with torch.autocast("cpu", enabled=False):
            for b, n in blocks(*index.shape[:2], M, CHUNK):
                dots[b, n] = torch.bmm(rows[b, n].to(dtype), x[b].mT.to(dtype)).gather(2, index[b, n])
        return dots
    own = rows.to(dtype).reshape(-1, C)
    chosen, bags = flat_index(index, M).flatten(), torch.arange(len(own))
    # F.embedding_bag's gradient with respect to its weights.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        own, x.to(dtype).reshape(-1, C), chosen, bags * K, bags.repeat_interleave(K), 0
    )
    return dots.view(index.shape)


def weighted_rows(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`chunked.weighted_rows`, by bags."""
    (G, M, C), (_, N, K), dtype = x.shape, index.shape, accumulator(x.dtype)
    weights = weights.reshape(-1, K).to(dtype)
    flat = x.to(dtype).reshape(-1, C)
    return F.embedding_bag(flat_index(index, M), flat, mode="sum", per_sample_weights=weights).view(G, N, C)


def scatter_rows(rows: Tensor, index: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """`chunked.scatter_rows`, by a product with a matrix of all pairs or by bags of the pairs of each token."""
    (G, N, C), K, dtype = rows.shape, index.shape[2], accumulator(rows.dtype)
    if _dense_pays(index, tokens):
        output = rows.new_zeros(G, tokens, C, dtype=dtype)
        with torch.autocast("cpu", enabled=False):
            for b, n in blocks(G, N, tokens, CHUNK):
                matrix = output.new_zeros(b.stop - b.start, n.stop - n.start, tokens)
                matrix.scatter_add_(2, index[b, n], weights[b, n].to(dtype))
                output[b] += torch.bmm(matrix.mT, rows[b, n].to(dtype))
        return output
    flat, weights = rows.to(dtype).reshape(-1, C), weights.reshape(-1, K).to(dtype)
    pairs, starts = pairs_by_key(index, tokens)
    factors = weights.flatten()[pairs]
    bags = F.embedding_bag(pairs // K, flat, starts, mode="sum", per_sample_weights=factors, include_last_offset=True)
    return bags.view(G, tokens, C)


pair_scores = partial(chunked.pair_scores, dot_rows=dot_rows, gathered=gathered)
pair_scores_backward = partial(
    chunked.pair_scores_backward, weighted_rows=weighted_rows, scatter_rows=scatter_rows, gathered=gathered
)
weighted_sum = partial(chunked.weighted_sum, weighted_rows=weighted_rows)
weighted_sum_backward = partial(chunked.weighted_sum_backward, scatter_rows=scatter_rows, dot_rows=dot_rows)


# ---------------------------------------------------------------------------------------------------------------
# Aggregate
# ---------------------------------------------------------------------------------------------------------------


def _bag_width(values: Tensor, index: Tensor) -> int:
    """Number of channels to sum by bags at a time, so that the K-fold rows of one image fit a chunk; 0: gather rows instead."""
    rows = max(values.shape[1], index.shape[1]) * index.shape[2]
    width = min(values.shape[2], GATHERED // max(rows, 1))
    return width if width >= 16 or width == values.shape[2] else 0


def aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    width = _bag_width(values, index) if depthwise else 0
    if not width:
        return chunked.aggregate(values, index, weight, scores, depthwise, gathered)
    parts = [_depthwise_bags(v, index, w, scores) for v, w in zip(values.split(width, 2), weight.split(width, 1), strict=True)]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def aggregate_backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = _bag_width(values, index) if depthwise else 0
    if not width:
        return chunked.aggregate_backward(grad, values, index, weight, scores, depthwise, need_values, gathered)
    parts = zip(grad.split(width, 2), values.split(width, 2), weight.split(width, 1), strict=True)
    by_key = pairs_by_key(index, values.shape[1]) if need_values else None
    with torch.autocast("cpu", enabled=False):
        found = [_depthwise_bags_backward(g, v, index, w, scores, by_key) for g, v, w in parts]
    to_values, to_weight, to_scores = zip(*found, strict=True)
    grad_values = torch.cat(to_values, dim=2) if need_values else to_values[0]
    return grad_values.to(values.dtype), torch.cat(to_weight, dim=1).to(weight.dtype), sum(to_scores[1:], to_scores[0])


def _depthwise_bags(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None) -> Tensor:
    """Depthwise `aggregate` as sums over the rows of a table: every value times the weights of every slot."""
    (G, M, C), (_, N, K), dtype = values.shape, index.shape, accumulator(values.dtype)
    output = values.new_empty(G, N, C, dtype=dtype)
    weight, slots, groups = weight.to(dtype), torch.arange(K), rows_per_chunk(M * K * C, GATHERED)
    table = values.new_empty(min(groups, G), M, K, C, dtype=dtype)
    for start in range(0, G, groups):
        part = slice(start, min(start + groups, G))
        rows = torch.mul(values[part, :, None].to(dtype), weight, out=table[: part.stop - start])
        bags = flat_index(index[part] * K + slots, M * K)
        factors = None if scores is None else scores[part].reshape(-1, K).to(dtype)
        output[part] = F.embedding_bag(bags, rows.view(-1, C), mode="sum", per_sample_weights=factors).view(-1, N, C)
    return output.to(values.dtype)


def _depthwise_bags_backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    by_key: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values, of the weights (K, C) and of the scores, in the dtype that sums are in.

    by_key: `pairs_by_key` of the index; None: no gradient of the values is needed.
    """
    (G, M, C), (_, N, K), dtype = values.shape, index.shape, accumulator(values.dtype)
    factors = torch.ones(index.shape, dtype=dtype) if scores is None else scores.to(dtype)
    grad, flat, weight = grad.to(dtype), values.to(dtype).reshape(-1, C), weight.to(dtype)
    grad_values = values.new_empty((G, M, C) if by_key else 0, dtype=dtype)
    grad_weight, grad_scores = torch.zeros_like(weight), factors.new_empty(0 if scores is None else scores.shape)
    chosen, groups = flat_index(index, M).view(G, N * K), rows_per_chunk(N * K * C, GATHERED)
    buffer = flat.new_empty(min(groups, G) * N, K, C)
    for start in range(0, G, groups):
        part = slice(start, min(start + groups, G))
        own, product = grad[part].reshape(-1, 1, C), buffer[: (part.stop - start) * N]
        torch.index_select(flat, 0, chosen[part].flatten(), out=product.view(-1, C))
        product.mul_(own)
        grad_weight += torch.bmm(factors[part].reshape(-1, K).t()[:, None], product.transpose(0, 1)).squeeze(1)
        if scores is not None:
            grad_scores[part] = product.mul_(weight).sum(2).view(-1, N, K)
        if by_key:
            torch.mul(own, weight, out=product)  # passed back by each slot, before its score
            first = start * N * K
            pairs, starts = by_key[0][first : part.stop * N * K], by_key[1][start * M : part.stop * M + 1]
            grad_values[part] = F.embedding_bag(
                pairs - first,
                product.view(-1, C),
                starts - first,
                mode="sum",
                per_sample_weights=factors.flatten()[pairs],
                include_last_offset=True,
            ).view(-1, M, C)
    return grad_values, grad_weight, grad_scores
