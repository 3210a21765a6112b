"""Every operator on any device, in chunks of bounded memory: no (B, N, M) matrix and no (B, N, K, C) tensor is materialized.

Signatures and results as in `operators.py`; sums are in float32 at least.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.reference import accumulator

# Elements that a chunk of scores may hold: 4 MB of float32, which a GPU keeps in its cache and computes in one go.
CHUNK = 2**20
GATHERED = 2**23  # elements of a chunk of gathered rows: more, since the matrix products that follow must be large


def blocks(B: int, N: int, M: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a (B, N, M) matrix of at most `chunk` elements: as many whole images as fit, or some rows of one."""
    images = max(1, min(B, chunk // (N * M)))
    rows = max(1, min(N, chunk // M))
    for b in range(0, B, images):
        for n in range(0, N, rows):
            yield slice(b, min(b + images, B)), slice(n, min(n + rows, N))


def flat_index(index: Tensor, tokens: int) -> Tensor:
    """index (G, N, K) into groups of rows -> (G * N, K) into all the rows, one group after the other."""
    G, N, K = index.shape
    return (index + torch.arange(G, device=index.device).mul_(tokens).view(G, 1, 1)).reshape(G * N, K)


def rows_per_chunk(width: int, elements: int) -> int:
    """Rows of `width` elements that a chunk of `elements` may hold."""
    return max(1, elements // width)


def gathered(x: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Neighbors in chunks: x (G, M, C), index (G, N, K) -> (rows of (G x N), flat index, gathered (rows, K, C))."""
    K, C = index.shape[2], x.shape[2]
    flat, index = x.reshape(-1, C), flat_index(index, x.shape[1])
    step = rows_per_chunk(K * C, GATHERED)
    for start in range(0, len(index), step):
        rows = slice(start, min(start + step, len(index)))
        chosen = index[rows].flatten()
        yield rows, chosen, flat[chosen].view(-1, K, C)


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------


def center(keys: Tensor) -> Tensor:
    """Mean of the keys (B, M, C), rounded to a power of two near their spread: (B, 1, C).

    Less such a center, numbers that are whole, or of few digits, stay so, and equal distances are equal in every backend.
    """
    mean = keys.mean(dim=1, keepdim=True)
    spread = (keys - mean).abs().amax(dim=(1, 2), keepdim=True).clamp_min_(torch.finfo(keys.dtype).tiny)
    step = spread / torch.frexp(spread).mantissa  # exact
    return (mean / step).round_() * step


def ordered(scores: Tensor) -> Tensor:
    """float32 as int32 in the same order: both zeros equal, NaN as infinity, and -inf above the least finite number."""
    most = torch.finfo(torch.float32).max
    # Masked scores are the least finite number, and even a score of -inf must come before them.
    bits = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-0.999 * most).add_(0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def largest(scores: Tensor, K: int) -> Tensor:
    """Columns of the K largest of each row, largest first, of equal ones the smallest first: (b, n, M) -> (b, n, K)."""
    M = scores.shape[2]
    if K == 1:
        return scores.max(dim=2, keepdim=True).indices  # documented to be the first of equal ones
    if scores.device.type != "cpu":
        return largest_exactly(scores, K)
    # topk leaves the order of equal scores open. Where the K + 1 largest of a row fall, none of them are equal.
    values, columns = scores.topk(min(K + 1, M), dim=2)
    tied = ~(values[:, :, :-1] > values[:, :, 1:]).all(dim=2)
    columns = columns[:, :, :K]
    if tied.any():
        columns[tied] = largest_exactly(scores[tied][None], K)[0]
    return columns


def largest_exactly(scores: Tensor, K: int) -> Tensor:
    """`largest` without a look at the scores, which would wait for the device."""
    if scores.dtype != torch.float32:
        return scores.sort(dim=2, descending=True, stable=True).indices[:, :, :K]
    M = scores.shape[2]
    inverted = torch.arange(M - 1, -1, -1, device=scores.device)
    found = ordered(scores).long().mul_(2**31).add_(inverted).topk(K, dim=2).values
    return M - 1 - found.bitwise_and_(2**31 - 1)


def search(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    candidates: Tensor | None,
    self_index: Tensor | None,
    *,
    scored: bool,
    chunk: int,
    largest: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Neighbors (B, N, K), and if `scored` their products with the query (B, N, K), by chunks of the matrix of scores."""
    B, N, _ = query.shape
    dtype = accumulator(query.dtype)
    index = torch.empty(B, N, K, dtype=torch.long, device=query.device)
    products = query.new_empty((B, N, K) if scored else 0, dtype=dtype)
    forced = 0
    if self_index is not None:
        index[:, :, 0] = self_index
        forced = 1
    if K == forced and not scored:
        return index, products
    all_keys = key
    if candidates is not None:
        candidates = candidates.sort().values  # of equal scores, the first column is then the smallest index
        key = key.index_select(1, candidates)
    M = key.shape[1]
    keys = offset = None
    with torch.autocast(query.device.type, enabled=False):
        for b, n in blocks(B, N, M, chunk):
            if n.start == 0:
                keys, queries, offset = key[b].to(dtype), query[b].to(dtype), None
                if metric == "cosine":  # the length of the query does not change an order
                    keys = F.normalize(keys, dim=2, eps=1e-12)
                elif metric == "euclidean":  # -|q - k|^2 / 2 without |q|^2; centered, so that little cancels
                    middle = center(keys)
                    keys, queries = keys - middle, queries - middle
                    offset = keys.square().sum(dim=2).mul_(-0.5)[:, None]  # (b, 1, M)
            part = queries[:, n]
            scores = torch.bmm(part, keys.mT) if offset is None else torch.baddbmm(offset, part, keys.mT)
            if scored and forced:
                products[b, n, 0] = (part * all_keys[b].index_select(1, self_index[n]).to(dtype)).sum(2)
            if K == forced:
                continue
            if forced:
                own, least = self_index[n, None], torch.finfo(dtype).min
                if candidates is None:
                    scores.scatter_(2, own.expand(len(scores), -1, 1), least)
                else:
                    scores.masked_fill_(own == candidates, least)
            nearest = largest(scores, K - forced)
            index[b, n, forced:] = nearest if candidates is None else candidates[nearest]
            if scored:
                products[b, n, forced:] = scores.gather(2, nearest)
    return index, products


def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    return search(query, key, K, metric, candidates, self_index, scored=False, chunk=CHUNK, largest=largest)[0]


def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return search(query, key, K, "matmul", candidates, self_index, scored=True, chunk=CHUNK, largest=largest)


# ---------------------------------------------------------------------------------------------------------------
# Sums over neighbors; `cpu.py` has faster forms of some, which the operators take as keywords
# ---------------------------------------------------------------------------------------------------------------


def dot_rows(rows: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """rows_i . x_j(i,k): rows (G, N, C), x (G, M, C), index (G, N, K) -> (G, N, K)."""
    dtype = accumulator(x.dtype)
    own = rows.to(dtype).reshape(-1, x.shape[2])
    output = own.new_empty(len(own), index.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        for part, _, neighbors in gathered(x, index):
            output[part] = torch.bmm(neighbors.to(dtype), own[part, :, None]).squeeze(2)
    return output.view(index.shape)


def squared_distances(query: Tensor, key: Tensor, index: Tensor, gathered: Callable) -> Tensor:
    """|q_i - k_j(i,k)|^2 as a sum of squares, which cannot cancel."""
    dtype = accumulator(query.dtype)
    scores = query.new_empty(index.shape, dtype=dtype)
    flat, queries = scores.view(-1, index.shape[2]), query.reshape(-1, 1, query.shape[2])
    for rows, _, keys in gathered(key, index):
        flat[rows] = (queries[rows].to(dtype) - keys.to(dtype)).square().sum(-1)
    return scores


def squared_distances_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, gathered: Callable
) -> tuple[Tensor, Tensor]:
    C, dtype = query.shape[2], accumulator(query.dtype)
    grad_query = query.new_empty(query.shape, dtype=dtype)
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    queries, slopes = query.reshape(-1, 1, C), grad.reshape(-1, index.shape[2], 1)
    for rows, chosen, keys in gathered(key, index):
        to_query = (queries[rows].to(dtype) - keys.to(dtype)) * (2 * slopes[rows])
        grad_query.view(-1, C)[rows] = to_query.sum(1)
        grad_key.view(-1, C).index_add_(0, chosen, to_query.view(-1, C), alpha=-1)
    return grad_query.to(query.dtype), grad_key.to(key.dtype)


def weighted_rows(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights_ik x_j(i,k): x (G, M, C), index and weights (G, N, K) -> (G, N, C)."""
    (G, _, C), (_, N, K), dtype = x.shape, index.shape, accumulator(x.dtype)
    weights = weights.reshape(-1, K).to(dtype)
    output = x.new_empty(G * N, C, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for rows, _, neighbors in gathered(x, index):
            output[rows] = torch.bmm(weights[rows, None], neighbors.to(dtype)).squeeze(1)
    return output.view(G, N, C)


def scatter_rows(rows: Tensor, index: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Add rows to the M tokens they chose, sum over (i, k) with j(i,k) = j of weights_ik rows_i: (G, N, C) -> (G, M, C)."""
    (G, N, C), K, dtype = rows.shape, index.shape[2], accumulator(rows.dtype)
    flat, weights = rows.to(dtype).reshape(-1, C), weights.reshape(-1, K).to(dtype)
    output, chosen = flat.new_zeros(G * tokens, C), flat_index(index, tokens)
    step = rows_per_chunk(K * C, GATHERED)
    for start in range(0, G * N, step):
        part = slice(start, start + step)
        output.index_add_(0, chosen[part].flatten(), (weights[part, :, None] * flat[part, None]).view(-1, C))
    return output.view(G, tokens, C)


def pair_scores(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    squared_distance: bool,
    *,
    dot_rows: Callable = dot_rows,
    gathered: Callable = gathered,
) -> Tensor:
    return squared_distances(query, key, index, gathered) if squared_distance else dot_rows(query, key, index)


def pair_scores_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    index: Tensor,
    squared_distance: bool,
    *,
    weighted_rows: Callable = weighted_rows,
    scatter_rows: Callable = scatter_rows,
    gathered: Callable = gathered,
) -> tuple[Tensor, Tensor]:
    if squared_distance:
        return squared_distances_backward(grad, query, key, index, gathered)
    grad_query = weighted_rows(key, index, grad)
    return grad_query.to(query.dtype), scatter_rows(query, index, grad, key.shape[1]).to(key.dtype)


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor, *, weighted_rows: Callable = weighted_rows) -> Tensor:
    return weighted_rows(values, index, weights).to(values.dtype)


def weighted_sum_backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    scatter_rows: Callable = scatter_rows,
    dot_rows: Callable = dot_rows,
) -> tuple[Tensor, Tensor]:
    grad_values = scatter_rows(grad, index, weights, values.shape[1])
    return grad_values.to(values.dtype), dot_rows(grad, values, index).to(weights.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Aggregate
# ---------------------------------------------------------------------------------------------------------------


def _scaled(neighbors: Tensor, scores: Tensor | None, rows: slice) -> Tensor:
    """Gathered values times their scores: (rows, K, C), in the dtype of the values."""
    if scores is None:
        return neighbors
    return (neighbors * scores.reshape(-1, scores.shape[2], 1)[rows]).to(neighbors.dtype)


def aggregate(
    values: Tensor,
    index: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    depthwise: bool,
    gathered: Callable = gathered,
) -> Tensor:
    B, N, _ = index.shape
    output = values.new_empty(B * N, weight.shape[1] if depthwise else weight.shape[0])
    for rows, _, neighbors in gathered(values, index):
        mixed = _scaled(neighbors, scores, rows)
        output[rows] = (mixed * weight).sum(1) if depthwise else mixed.flatten(1) @ weight.t()
    return output.view(B, N, output.shape[1])


def aggregate_backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    depthwise: bool,
    need_values: bool,
    gathered: Callable = gathered,
) -> tuple[Tensor, Tensor, Tensor]:
    C, K, dtype = values.shape[2], index.shape[2], accumulator(values.dtype)
    grad = grad.reshape(-1, grad.shape[2])
    grad_values = values.new_zeros(values.shape if need_values else 0, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    grad_scores = values.new_empty(0 if scores is None else scores.shape, dtype=dtype)
    for rows, chosen, neighbors in gathered(values, index):
        mixed = _scaled(neighbors, scores, rows)
        if depthwise:
            grad_weight += (mixed * grad[rows, None]).sum(0, dtype=dtype)
        else:
            grad_weight += grad[rows].t() @ mixed.flatten(1)
        if scores is None and not need_values:
            continue
        to_mixed = grad[rows, None] * weight if depthwise else (grad[rows] @ weight).view(-1, K, C)
        if scores is not None:
            grad_scores.view(-1, K)[rows] = (to_mixed * neighbors).sum(-1, dtype=dtype)
            to_mixed = to_mixed * scores.reshape(-1, K, 1)[rows]
        if need_values:
            grad_values.view(-1, C).index_add_(0, chosen, to_mixed.reshape(-1, C).to(dtype))
    return grad_values.to(values.dtype), grad_weight.to(weight.dtype), grad_scores


def max_neighbors(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Slot by slot, so that no more than one neighbor of a row is gathered at a time."""
    (B, N, K), (M, C) = index.shape, values.shape[1:]
    flat, rows = values.reshape(-1, C), flat_index(index, M)  # (B * N, K)
    tokens = index.reshape(-1, K).int()
    largest, winner = values.new_empty(B * N, C), values.new_empty(B * N, C, dtype=torch.int32)
    small = torch.uint8 if K <= 256 else torch.int32  # less to move than tokens
    for part in range(0, B * N, rows_per_chunk(C, CHUNK)):
        part = slice(part, part + rows_per_chunk(C, CHUNK))
        best = flat.index_select(0, rows[part, 0])
        slot = torch.zeros(best.shape, dtype=small, device=best.device)
        other = torch.empty_like(best)
        for k in range(1, K):
            torch.index_select(flat, 0, rows[part, k], out=other)
            slot.masked_fill_(other > best, k)
            torch.maximum(best, other, out=best)
        largest[part], winner[part] = best, tokens[part].gather(1, slot.long())
    return largest.view(B, N, C), winner.view(B, N, C)


def max_neighbors_backward(grad: Tensor, values: Tensor, winner: Tensor) -> Tensor:
    grad_values = values.new_zeros(values.shape, dtype=accumulator(values.dtype))
    return grad_values.scatter_add_(1, winner.long(), grad.to(grad_values.dtype)).to(values.dtype)
