"""Select and aggregate, the two steps of every mixer here, as pure functions on tensors.

    index  = find_neighbors(query, key, K, metric)     # (B, N, K): for token i its K nearest, nearest first
    scores = neighbor_scores(query, key, index, metric)  # (B, N, K): carries the gradient of the choice
    output = aggregate(values, index, weight, scores)  # (B, N, D): a convolution over the K slots

Tokens are rows: query (B, N, C), key and values (B, M, C). An index counts rows of key. With several heads, B is
batch x heads. Nothing here is K times as large as its input: searching, scoring and aggregating gather their
neighbors in chunks that fit the cache, and the backward pass gathers them again. The chunked loops are custom
operators, so that `torch.compile` sees one node instead of an unrolled loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from options import METRICS, NeighborConfig

__all__ = [
    "METRICS",
    "NeighborConfig",
    "aggregate",
    "coordinates",
    "find_neighbors",
    "find_scored_neighbors",
    "gather_neighbors",
    "grid_places",
    "join_coordinates",
    "location_neighbors",
    "neighbor_scores",
    "neighbor_weights",
    "random_candidates",
    "raster_index",
    "spatial_candidates",
    "weighted_sum",
]


# ---------------------------------------------------------------------------------------------------------------
# Places and candidates. A grid is a tuple of sides: (height, width), or (length,) for a sequence without a grid;
# its tokens are numbered in raster order, after `class_tokens` tokens that have no place.
# ---------------------------------------------------------------------------------------------------------------


def grid_places(grid: tuple[int, ...], device=None) -> Tensor:
    """(N, axes) whole-pixel position of each token of the grid."""
    sides = [torch.arange(side, device=device) for side in grid]
    return torch.cartesian_prod(*sides).view(-1, len(grid))


def coordinates(places: Tensor, grid: tuple[int, ...], dtype: torch.dtype, class_tokens: int = 0) -> Tensor:
    """(class_tokens + N, axes) positions from -1 to 1 along each side; a side of one, and class tokens, are at 0."""
    axes = [(2 * places[:, a] - (side - 1)).to(dtype) / max(side - 1, 1) for a, side in enumerate(grid)]
    return F.pad(torch.stack(axes, dim=1), (0, 0, class_tokens, 0))


def join_coordinates(features: Tensor, places: Tensor, lambda_param: float) -> Tensor:
    """lambda * features / std joined with (1 - lambda) * coordinates: (B, N, C), (N, axes) -> (B, N, C + axes).

    The standard deviation is that of one image (and head), a constant for the gradient.
    """
    B, N, C = features.shape
    wide = features.detach().to(_accumulator(features.dtype))
    std = wide.std(dim=(1, 2), keepdim=True, correction=min(1, N * C - 1)).clamp_min(1e-12)
    features = (lambda_param * features / std).to(features.dtype)
    return torch.cat([features, ((1 - lambda_param) * places).expand(B, -1, -1)], dim=2)


def raster_index(grid: tuple[int, ...], positions: list[Tensor]) -> Tensor:
    """Numbers of the tokens at every combination of the given positions, one list of them per side."""
    index = torch.zeros(1, dtype=torch.long, device=positions[0].device)
    for side, along in zip(grid, positions, strict=True):
        index = (index[:, None] * side + along).flatten()
    return index


def spatial_candidates(grid: tuple[int, ...], num_samples: int, padding: int = 0, class_tokens: int = 0, device=None) -> Tensor:
    """(S,) evenly spaced tokens, `num_samples` along each side, and every class token."""
    s, i = num_samples, torch.arange(num_samples, device=device)
    along = [padding + i * (side - 1 - 2 * padding) // (s - 1) if s > 1 else i + (side - 1) // 2 for side in grid]
    return torch.cat([torch.arange(class_tokens, device=device), raster_index(grid, along) + class_tokens])


def random_candidates(tokens: int, num_samples: int, class_tokens: int = 0, device=None, fixed: bool = False) -> Tensor:
    """(S,) random tokens and every class token; with `fixed` the same ones every time, for evaluation.

    Neither kind holds a `torch.Generator`, which would break a compiled graph: drawn ones come from the device's
    global generator, fixed ones are the order of a hash of the token's number (the finalizer of MurmurHash3).
    """
    if fixed:
        h = torch.arange(1, tokens + 1, device=device)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        order = (h ^ (h >> 16)).argsort()
    else:
        order = torch.randperm(tokens, device=device)
    return torch.cat([torch.arange(class_tokens, device=device), order[:num_samples] + class_tokens])


def location_neighbors(places: Tensor, K: int, self_index: Tensor, candidates: Tensor | None = None) -> Tensor:
    """K nearest tokens by Euclidean distance in whole pixels, ties in raster order: (N, K).

    places (M, axes); self_index (N,) says which of them are asked for. Among all tokens, neighbors come in raster
    order, so that slot k is tap k of a convolution; among candidates, the token itself comes first, then the
    nearest ones.
    """
    M = places.shape[0]
    keys = torch.arange(M, device=places.device) if candidates is None else candidates
    rows = max(1, _chunk(places) // (keys.numel() * places.shape[1]))
    found = []
    for own in self_index.split(rows):
        distance = (places[own][:, None] - places[keys]).square().sum(-1)  # (n, S)
        rank = distance * M + keys  # whole numbers: a tie goes to the token that comes first
        if candidates is None:
            found.append(keys[rank.topk(K, largest=False).indices].sort().values)
        else:
            rank = rank.masked_fill(keys == own[:, None], torch.iinfo(rank.dtype).max)
            others = keys[rank.topk(K - 1, largest=False).indices]
            found.append(torch.cat([own[:, None], others], dim=1))
    return torch.cat(found)


# ---------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------


def _chunk(x: Tensor) -> int:
    """Elements that a chunk of scores may hold: a megabyte on a CPU, whose cache is small, four on a GPU."""
    return 2**18 if x.device.type == "cpu" else 2**20


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do to the inputs of a matrix product; it does not look into custom operators."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _blocks(x: Tensor, B: int, N: int, M: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a (B, N, M) matrix that a chunk can hold: as many whole images as fit, or some rows of one."""
    images = max(1, min(B, _chunk(x) // (N * M)))
    rows = max(1, min(N, _chunk(x) // M))
    for b in range(0, B, images):
        for n in range(0, N, rows):
            yield slice(b, min(b + images, B)), slice(n, min(n + rows, N))


def _flat_index(index: Tensor, tokens: int) -> Tensor:
    """index (G, N, K) into groups of rows -> (G * N, K) into all the rows, one group after the other."""
    G, N, K = index.shape
    return (index + torch.arange(G, device=index.device).mul_(tokens).view(G, 1, 1)).reshape(G * N, K)


def _gathered(x: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Neighbors in chunks: x (G, M, C), index (G, N, K) -> (rows of (G x N), flat index, gathered (rows, K, C)).

    On a CPU the gathered rows of all chunks lie in one buffer: fresh memory costs more than what is done with it.
    """
    K, C = index.shape[2], x.shape[2]
    flat, index = x.reshape(-1, C), _flat_index(index, x.shape[1])
    step = _rows_per_chunk(x, K * C)
    buffer = x.new_empty(min(step, len(index)) * K, C)
    for start in range(0, len(index), step):
        rows = slice(start, min(start + step, len(index)))
        chosen = index[rows].flatten()
        gathered = torch.index_select(flat, 0, chosen, out=buffer[: len(chosen)]) if x.device.type == "cpu" else flat[chosen]
        yield rows, chosen, gathered.view(-1, K, C)


def _rows_per_chunk(x: Tensor, width: int) -> int:
    """Rows of `width` elements that a chunk may hold: more than of scores, as a GPU needs the products that follow large."""
    return max(1, _gathered_chunk(x) // width)


def _gathered_chunk(x: Tensor) -> int:
    """Elements that a chunk of gathered rows may hold."""
    return _chunk(x) * (4 if x.device.type == "cpu" else 8)


def _has_bags(x: Tensor) -> bool:
    """Whether sums over neighbors are best left to the kernels of embedding bags, which on a CPU read rows where they lie."""
    return x.device.type == "cpu"


def _dense_pays(index: Tensor, tokens: int) -> bool:
    """Whether products over all tokens, of which K count, cost less than what is done for each of K neighbors (measured)."""
    return tokens <= 20 * index.shape[2]


def _incoming(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Who chose each token: the numbers of the pairs (g, i, k), one token's after the other's (G * N * K,), and where each
    token's begin (G * M + 1,)."""
    flat = _flat_index(index, tokens).flatten()
    pairs = flat.int().sort(stable=True).indices
    return pairs, F.pad(torch.bincount(flat, minlength=len(index) * tokens).cumsum(0), (1, 0))


# ---------------------------------------------------------------------------------------------------------------
# Sums over neighbors, in float32 at least.
# ---------------------------------------------------------------------------------------------------------------


def _weighted_rows(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights_ik x_j(i,k): x (G, M, C), index and weights (G, N, K) -> (G, N, C)."""
    (G, M, C), (_, N, K), dtype = x.shape, index.shape, _accumulator(x.dtype)
    weights = weights.reshape(-1, K).to(dtype)
    if _has_bags(x):
        flat = x.to(dtype).reshape(-1, C)
        return F.embedding_bag(_flat_index(index, M), flat, mode="sum", per_sample_weights=weights).view(G, N, C)
    output = x.new_empty(G * N, C, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for rows, _, gathered in _gathered(x, index):
            output[rows] = torch.bmm(weights[rows, None], gathered.to(dtype)).squeeze(1)
    return output.view(G, N, C)


def _dot_rows(rows: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """rows_i . x_j(i,k): rows (G, N, C), x (G, M, C), index (G, N, K) -> (G, N, K)."""
    (_, M, C), K, dtype = x.shape, index.shape[2], _accumulator(x.dtype)
    if _dense_pays(index, M):
        dots = rows.new_empty(index.shape, dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            for b, n in _blocks(x, *index.shape[:2], M):
                dots[b, n] = torch.bmm(rows[b, n].to(dtype), x[b].mT.to(dtype)).gather(2, index[b, n])
        return dots
    own = rows.to(dtype).reshape(-1, C)
    if _has_bags(x):
        chosen, bags = _flat_index(index, M).flatten(), torch.arange(len(own))
        # What F.embedding_bag computes as the gradient of its weights.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            own, x.to(dtype).reshape(-1, C), chosen, bags * K, bags.repeat_interleave(K), 0
        )
        return dots.view(index.shape)
    output = own.new_empty(len(own), K)
    with torch.autocast(x.device.type, enabled=False):
        for part, _, gathered in _gathered(x, index):
            output[part] = torch.bmm(gathered.to(dtype), own[part, :, None]).squeeze(2)
    return output.view(index.shape)


def _spread_rows(rows: Tensor, index: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """What flows back to each of M tokens, sum over (i, k) with j(i,k) = j of weights_ik rows_i: (G, N, C) -> (G, M, C)."""
    (G, N, C), K, dtype = rows.shape, index.shape[2], _accumulator(rows.dtype)
    if _dense_pays(index, tokens):
        output = rows.new_zeros(G, tokens, C, dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for b, n in _blocks(rows, G, N, tokens):
                matrix = output.new_zeros(b.stop - b.start, n.stop - n.start, tokens)
                matrix.scatter_add_(2, index[b, n], weights[b, n].to(dtype))
                output[b] += torch.bmm(matrix.mT, rows[b, n].to(dtype))
        return output
    flat, weights = rows.to(dtype).reshape(-1, C), weights.reshape(-1, K).to(dtype)
    if _has_bags(rows):
        pairs, starts = _incoming(index, tokens)
        factors = weights.flatten()[pairs]
        bags = F.embedding_bag(pairs // K, flat, starts, mode="sum", per_sample_weights=factors, include_last_offset=True)
        return bags.view(G, tokens, C)
    output, chosen, step = flat.new_zeros(G * tokens, C), _flat_index(index, tokens), _rows_per_chunk(rows, K * C)
    for start in range(0, G * N, step):
        part = slice(start, start + step)
        output.index_add_(0, chosen[part].flatten(), (weights[part, :, None] * flat[part, None]).view(-1, C))
    return output.view(G, tokens, C)


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------


def _plain_name(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not one of {', '.join(METRICS)}")
    return METRICS[metric]


def _check_candidates(key: Tensor, K: int, candidates: Tensor | None) -> None:
    available = key.shape[1] if candidates is None else candidates.shape[0]
    if not 1 <= K <= available:
        raise ValueError(f"K={K} must be 1 to {available}, the number of candidates")


def find_neighbors(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
) -> Tensor:
    """For each query its K nearest keys, nearest first, as row numbers of key: LongTensor (B, N, K).

    query (B, N, C), key (B, M, C); metric: cosine, euclidean or matmul, or an alias of them; candidates (S,): only
    these keys count; self_index (N,): the row of key that is the query's own token, then always slot 0, the other
    K - 1 coming from the remaining keys. Scores are computed in float32 at least, whatever autocast says: bfloat16
    ties often. Nothing here carries a gradient.

    Raises ValueError for an unknown metric and for a K without enough candidates.
    """
    metric = _plain_name(metric)
    _check_candidates(key, K, candidates)
    return torch.ops.convnn.find_neighbors(query.detach(), key.detach(), K, metric, candidates, self_index)


def find_scored_neighbors(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`find_neighbors` and `neighbor_scores` of what it finds, (B, N, K) each; matmul and cosine are computed once for both.

    The scores carry a gradient. Under autocast too they are in float32 at least. Cosines of rows shorter than 1e-6 count
    for less, in the search too. Raises ValueError as `find_neighbors`.
    """
    metric = _plain_name(metric)
    if metric == "euclidean":  # which the search compares in another form
        index = find_neighbors(query, key, K, metric, candidates=candidates, self_index=self_index)
        return index, neighbor_scores(query, key, index, metric)
    _check_candidates(key, K, candidates)
    if metric == "cosine":
        query, key = _unit(query), _unit(key)
    index, scores = torch.ops.convnn.find_scored_neighbors(query, key, K, candidates, self_index)
    return index, scores / math.sqrt(query.shape[-1]) if metric == "matmul" else scores


def _largest(scores: Tensor, K: int) -> Tensor:
    """Places of the K largest of each row, largest first: (b, n, M) -> (b, n, K)."""
    M = scores.shape[2]
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or not 1 < K <= 16 or not 32 <= M < 64 * K:
        return scores.topk(K, dim=2).indices
    # For such rows the CPU's topk sorts. Faster: K times the largest, as doubles whose last bits, which a float32 leaves
    # empty, hold the place. A larger score has the larger double; of equal scores each has one of its own.
    # Numbers that are not finite would lose their place: they become the largest ones, and the least but for masked ones.
    most = torch.finfo(torch.float32).max
    keys = scores.nan_to_num(nan=most, posinf=most, neginf=-0.999 * most).double()
    keys.view(torch.int64).bitwise_or_(torch.arange(M))
    largest = keys.new_empty(K, *scores.shape[:2], 1)
    places = torch.empty(largest.shape, dtype=torch.long)
    for k in range(K):
        torch.amax(keys, dim=2, keepdim=True, out=largest[k])
        torch.bitwise_and(largest[k].view(torch.int64), 2**29 - 1, out=places[k])
        keys.scatter_(2, places[k], -math.inf)
    return places.squeeze(3).permute(1, 2, 0)


def _search(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None, scored: bool
) -> tuple[Tensor, Tensor]:
    """Neighbors, and if `scored` the products (B, N, K) of query and key, by chunks of the matrix of scores."""
    B, N, _ = query.shape
    dtype = _accumulator(query.dtype)
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
        key = key.index_select(1, candidates)
    M = key.shape[1]
    keys = offset = None
    with torch.autocast(query.device.type, enabled=False):
        for b, n in _blocks(query, B, N, M):
            if n.start == 0:
                keys, queries, offset = key[b].to(dtype), query[b].to(dtype), None
                if metric == "cosine":  # the length of the query does not change an order
                    keys = F.normalize(keys, dim=2, eps=1e-12)
                elif metric == "euclidean":  # -|q - k|^2 / 2 without |q|^2; centered, so that little cancels
                    center = keys.mean(dim=1, keepdim=True)
                    keys, queries = keys - center, queries - center
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
            nearest = _largest(scores, K - forced)
            index[b, n, forced:] = nearest if candidates is None else candidates[nearest]
            if scored:
                products[b, n, forced:] = scores.gather(2, nearest)
    return index, products


@torch.library.custom_op("convnn::find_neighbors", mutates_args=())
def _find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    return _search(query, key, K, metric, candidates, self_index, scored=False)[0]


@_find_neighbors.register_fake
def _(query, key, K, metric, candidates, self_index):
    return query.new_empty((*query.shape[:2], K), dtype=torch.long)


def _search_flops(query, key, K, candidates, self_index) -> int:
    B, N, C = query
    return 0 if K == (self_index is not None) else 2 * B * N * (candidates or key[1:])[0] * C


@register_flop_formula(torch.ops.convnn.find_neighbors)
def _(query, key, K, metric, candidates, self_index, **_kwargs) -> int:
    return _search_flops(query, key, K, candidates, self_index)


@torch.library.custom_op("convnn::find_scored_neighbors", mutates_args=())
def _find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _search(query, key, K, "matmul", candidates, self_index, scored=True)


@_find_scored_neighbors.register_fake
def _(query, key, K, candidates, self_index):
    shape = *query.shape[:2], K
    return query.new_empty(shape, dtype=torch.long), query.new_empty(shape, dtype=_accumulator(query.dtype))


def _save_search(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.mark_non_differentiable(output[0])


def _search_gradient(ctx, _, grad):
    return *torch.ops.convnn.pair_scores_backward(grad, *ctx.saved_tensors, False), None, None, None


_find_scored_neighbors.register_autograd(_search_gradient, setup_context=_save_search)


@register_flop_formula(torch.ops.convnn.find_scored_neighbors)
def _(query, key, K, candidates, self_index, **_kwargs) -> int:
    return _search_flops(query, key, K, candidates, self_index)


# ---------------------------------------------------------------------------------------------------------------
# Gather and score
# ---------------------------------------------------------------------------------------------------------------


def gather_neighbors(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, M, C) by index (B, N, K): (B, N, K, C), K times as large as x; `aggregate` does without it."""
    B, N, K = index.shape
    return x.gather(1, index.reshape(B, N * K, 1).expand(-1, -1, x.shape[2])).view(B, N, K, -1)


def neighbor_scores(query: Tensor, key: Tensor, index: Tensor, metric: str) -> Tensor:
    """Scores of the chosen pairs only, with gradient: query (B, N, C), key (B, M, C), index (B, N, K) -> (B, N, K).

    matmul: q . k / sqrt(C); cosine: q . k / (|q| |k|); euclidean: -|q - k|. In float32 at least. The gradient of a
    distance of 0 is 0.
    """
    metric = _plain_name(metric)
    if metric == "cosine":
        query, key = _unit(query), _unit(key)
    query, key = _autocast(query, key)
    product = torch.ops.convnn.pair_scores(query, key, index, metric == "euclidean")
    if metric == "matmul":
        return product / math.sqrt(query.shape[-1])
    if metric == "cosine":
        return product
    apart = product > 0
    return -torch.where(apart, torch.where(apart, product, 1).sqrt(), 0)


def _unit(x: Tensor) -> Tensor:
    """Rows of length one, in float32 at least; eps bounds the gradient of a row of zeros."""
    return F.normalize(x.to(_accumulator(x.dtype)), dim=-1, eps=1e-6)


def neighbor_weights(scores: Tensor, metric: str, *, softmax: bool = True) -> Tensor:
    """What the value of each slot is multiplied by, from the scores of the slots (B, N, K): the same.

    softmax over the K scores, or else the raw score: q . k / sqrt(C), the cosine, or 1 / (distance + 1e-8).
    """
    if softmax:
        return scores.softmax(dim=-1)
    return (1e-8 - scores).reciprocal() if _plain_name(metric) == "euclidean" else scores


@torch.library.custom_op("convnn::pair_scores", mutates_args=())
def _pair_scores(query: Tensor, key: Tensor, index: Tensor, squared_distance: bool) -> Tensor:
    if not squared_distance:
        return _dot_rows(query, key, index)
    dtype = _accumulator(query.dtype)
    scores = query.new_empty(index.shape, dtype=dtype)
    flat, queries = scores.view(-1, index.shape[2]), query.reshape(-1, 1, query.shape[2])
    for rows, _, keys in _gathered(key, index):
        flat[rows] = (queries[rows].to(dtype) - keys.to(dtype)).square().sum(-1)
    return scores


@_pair_scores.register_fake
def _(query, key, index, squared_distance):
    return query.new_empty(index.shape, dtype=_accumulator(query.dtype))


@torch.library.custom_op("convnn::pair_scores_backward", mutates_args=())
def _pair_scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, index: Tensor, squared_distance: bool
) -> tuple[Tensor, Tensor]:
    C, dtype = query.shape[2], _accumulator(query.dtype)
    if not squared_distance:
        grad_query = _weighted_rows(key, index, grad)
        grad_key = _spread_rows(query, index, grad, key.shape[1])
        return grad_query.to(query.dtype), grad_key.to(key.dtype)
    grad_query = query.new_empty(query.shape, dtype=dtype)
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    queries, slopes = query.reshape(-1, 1, C), grad.reshape(-1, index.shape[2], 1)
    for rows, chosen, keys in _gathered(key, index):
        to_query = (queries[rows].to(dtype) - keys.to(dtype)) * (2 * slopes[rows])
        grad_query.view(-1, C)[rows] = to_query.sum(1)
        grad_key.view(-1, C).index_add_(0, chosen, to_query.view(-1, C), alpha=-1)
    return grad_query.to(query.dtype), grad_key.to(key.dtype)


@_pair_scores_backward.register_fake
def _(grad, query, key, index, squared_distance):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_pair(ctx, inputs, output):
    query, key, index, ctx.squared_distance = inputs
    ctx.save_for_backward(query, key, index)


def _pair_gradient(ctx, grad):
    return *torch.ops.convnn.pair_scores_backward(grad, *ctx.saved_tensors, ctx.squared_distance), None, None


_pair_scores.register_autograd(_pair_gradient, setup_context=_save_pair)


@register_flop_formula(torch.ops.convnn.pair_scores)
def _(query, key, index, squared_distance, **_kwargs) -> int:
    return 2 * math.prod(index) * query[2]


@register_flop_formula(torch.ops.convnn.pair_scores_backward)
def _(grad, query, key, index, squared_distance, **_kwargs) -> int:
    return 4 * math.prod(index) * query[2]


# ---------------------------------------------------------------------------------------------------------------
# Aggregate
# ---------------------------------------------------------------------------------------------------------------


def aggregate(
    values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None = None, *, depthwise: bool = False
) -> Tensor:
    """Convolution over the K slots: sum over k of W_k (score_ik value_j(i,k)), without bias.

    values (B, M, C); index (B, N, K); weight as `nn.Conv1d` holds it: (D, C, K), or depthwise (C, 1, K);
    scores (B, N, K) or None for plain values. Returns (B, N, D), depthwise (B, N, C).
    """
    C, K = values.shape[2], index.shape[2]
    # The slots of a gathered row lie one after the other: (D, C, K) -> (D, K * C), depthwise (C, 1, K) -> (K, C).
    weight = weight.view(C, K).t() if depthwise else weight.transpose(1, 2).reshape(-1, K * C)
    values, weight = _autocast(values, weight)
    return torch.ops.convnn.aggregate(values, index, weight.contiguous(), scores, depthwise)


def _scaled(gathered: Tensor, scores: Tensor | None, rows: slice) -> Tensor:
    """Gathered values times their scores: (rows, K, C), in the dtype of the values."""
    if scores is None:
        return gathered
    return (gathered * scores.reshape(-1, scores.shape[2], 1)[rows]).to(gathered.dtype)


def _bag_width(values: Tensor, index: Tensor) -> int:
    """Channels for which the K-fold rows of one image fit into a chunk, for sums by bags; 0: rows are better gathered."""
    rows = max(values.shape[1], index.shape[1]) * index.shape[2]
    width = min(values.shape[2], _gathered_chunk(values) // max(rows, 1))
    return width if _has_bags(values) and (width >= 16 or width == values.shape[2]) else 0


def _depthwise_bags(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None) -> Tensor:
    """Depthwise `aggregate` as sums over the rows of a table: every value times the weights of every slot."""
    (G, M, C), (_, N, K), dtype = values.shape, index.shape, _accumulator(values.dtype)
    output = values.new_empty(G, N, C, dtype=dtype)
    weight, slots, groups = weight.to(dtype), torch.arange(K), _rows_per_chunk(values, M * K * C)
    table = values.new_empty(min(groups, G), M, K, C, dtype=dtype)
    for start in range(0, G, groups):
        part = slice(start, min(start + groups, G))
        rows = torch.mul(values[part, :, None].to(dtype), weight, out=table[: part.stop - start])
        bags = _flat_index(index[part] * K + slots, M * K)
        factors = None if scores is None else scores[part].reshape(-1, K).to(dtype)
        output[part] = F.embedding_bag(bags, rows.view(-1, C), mode="sum", per_sample_weights=factors).view(-1, N, C)
    return output.to(values.dtype)


def _depthwise_bags_backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    incoming: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values, of the weights (K, C) and of the scores, in the dtype that sums are in.

    incoming: what `_incoming` says of the index; None: no gradient of the values is wanted.
    """
    (G, M, C), (_, N, K), dtype = values.shape, index.shape, _accumulator(values.dtype)
    factors = torch.ones(index.shape, dtype=dtype) if scores is None else scores.to(dtype)
    grad, flat, weight = grad.to(dtype), values.to(dtype).reshape(-1, C), weight.to(dtype)
    grad_values = values.new_empty((G, M, C) if incoming else 0, dtype=dtype)
    grad_weight, grad_scores = torch.zeros_like(weight), factors.new_empty(0 if scores is None else scores.shape)
    chosen, groups = _flat_index(index, M).view(G, N * K), _rows_per_chunk(values, N * K * C)
    buffer = flat.new_empty(min(groups, G) * N, K, C)
    for start in range(0, G, groups):
        part = slice(start, min(start + groups, G))
        own, product = grad[part].reshape(-1, 1, C), buffer[: (part.stop - start) * N]
        torch.index_select(flat, 0, chosen[part].flatten(), out=product.view(-1, C))
        product.mul_(own)
        grad_weight += torch.bmm(factors[part].reshape(-1, K).t()[:, None], product.transpose(0, 1)).squeeze(1)
        if scores is not None:
            grad_scores[part] = product.mul_(weight).sum(2).view(-1, N, K)
        if incoming:
            torch.mul(own, weight, out=product)  # what each slot passes back, but for its score
            first = start * N * K
            pairs, starts = incoming[0][first : part.stop * N * K], incoming[1][start * M : part.stop * M + 1]
            grad_values[part] = F.embedding_bag(
                pairs - first,
                product.view(-1, C),
                starts - first,
                mode="sum",
                per_sample_weights=factors.flatten()[pairs],
                include_last_offset=True,
            ).view(-1, M, C)
    return grad_values, grad_weight, grad_scores


@torch.library.custom_op("convnn::aggregate", mutates_args=())
def _aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    B, N, _ = index.shape
    if depthwise and (width := _bag_width(values, index)):
        parts = [
            _depthwise_bags(v, index, w, scores) for v, w in zip(values.split(width, 2), weight.split(width, 1), strict=True)
        ]
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    output = values.new_empty(B * N, weight.shape[1] if depthwise else weight.shape[0])
    for rows, _, gathered in _gathered(values, index):
        mixed = _scaled(gathered, scores, rows)
        output[rows] = (mixed * weight).sum(1) if depthwise else mixed.flatten(1) @ weight.t()
    return output.view(B, N, output.shape[1])


@_aggregate.register_fake
def _(values, index, weight, scores, depthwise):
    return values.new_empty((*index.shape[:2], weight.shape[1 if depthwise else 0]))


@torch.library.custom_op("convnn::aggregate_backward", mutates_args=())
def _aggregate_backward(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    C, K, dtype = values.shape[2], index.shape[2], _accumulator(values.dtype)
    if depthwise and (width := _bag_width(values, index)):
        parts = zip(grad.split(width, 2), values.split(width, 2), weight.split(width, 1), strict=True)
        incoming = _incoming(index, values.shape[1]) if need_values else None
        with torch.autocast("cpu", enabled=False):
            found = [_depthwise_bags_backward(g, v, index, w, scores, incoming) for g, v, w in parts]
        to_values, to_weight, to_scores = zip(*found, strict=True)
        grad_values = torch.cat(to_values, dim=2) if need_values else to_values[0]
        return grad_values.to(values.dtype), torch.cat(to_weight, dim=1).to(weight.dtype), sum(to_scores[1:], to_scores[0])
    grad = grad.reshape(-1, grad.shape[2])
    grad_values = values.new_zeros(values.shape if need_values else 0, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    grad_scores = values.new_empty(0 if scores is None else scores.shape, dtype=dtype)
    for rows, chosen, gathered in _gathered(values, index):
        mixed = _scaled(gathered, scores, rows)
        if depthwise:
            grad_weight += (mixed * grad[rows, None]).sum(0, dtype=dtype)
        else:
            grad_weight += grad[rows].t() @ mixed.flatten(1)
        if scores is None and not need_values:
            continue
        to_mixed = grad[rows, None] * weight if depthwise else (grad[rows] @ weight).view(-1, K, C)
        if scores is not None:
            grad_scores.view(-1, K)[rows] = (to_mixed * gathered).sum(-1, dtype=dtype)
            to_mixed = to_mixed * scores.reshape(-1, K, 1)[rows]
        if need_values:
            grad_values.view(-1, C).index_add_(0, chosen, to_mixed.reshape(-1, C).to(dtype))
    return grad_values.to(values.dtype), grad_weight.to(weight.dtype), grad_scores


@_aggregate_backward.register_fake
def _(grad, values, index, weight, scores, depthwise, need_values):
    return (
        values.new_empty(values.shape if need_values else 0),
        weight.new_empty(weight.shape),
        values.new_empty(0 if scores is None else scores.shape, dtype=_accumulator(values.dtype)),
    )


def _save_aggregate(ctx, inputs, output):
    values, index, weight, scores, ctx.depthwise = inputs
    ctx.save_for_backward(values, index, weight, scores)


def _aggregate_gradient(ctx, grad):
    saved, need_values = ctx.saved_tensors, ctx.needs_input_grad[0]  # read once: activation checkpointing allows no more
    scores = saved[3]
    to_values, to_weight, to_scores = torch.ops.convnn.aggregate_backward(grad, *saved, ctx.depthwise, need_values)
    to_scores = None if scores is None else to_scores.to(scores.dtype)
    return to_values if need_values else None, None, to_weight, to_scores, None


_aggregate.register_autograd(_aggregate_gradient, setup_context=_save_aggregate)


@register_flop_formula(torch.ops.convnn.aggregate)
def _(values, index, weight, scores, depthwise, **_kwargs) -> int:
    return 2 * index[0] * index[1] * math.prod(weight)


@register_flop_formula(torch.ops.convnn.aggregate_backward)
def _(grad, values, index, weight, scores, depthwise, need_values, **_kwargs) -> int:
    return 2 * index[0] * index[1] * math.prod(weight) * (1 + (need_values or scores is not None))


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum of the values of the neighbors times their weights: values (B, M, C), index and weights (B, N, K) -> (B, N, C).

    What `aggregate` computes with depthwise weights of one.
    """
    (values,) = _autocast(values)
    return torch.ops.convnn.weighted_sum(values, index, weights)


@torch.library.custom_op("convnn::weighted_sum", mutates_args=())
def _weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return _weighted_rows(values, index, weights).to(values.dtype)


@_weighted_sum.register_fake
def _(values, index, weights):
    return values.new_empty((*index.shape[:2], values.shape[2]))


@torch.library.custom_op("convnn::weighted_sum_backward", mutates_args=())
def _weighted_sum_backward(grad: Tensor, values: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad_values = _spread_rows(grad, index, weights, values.shape[1])
    return grad_values.to(values.dtype), _dot_rows(grad, values, index).to(weights.dtype)


@_weighted_sum_backward.register_fake
def _(grad, values, index, weights):
    return values.new_empty(values.shape), weights.new_empty(weights.shape)


def _save_weighted_sum(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weighted_sum_gradient(ctx, grad):
    values, index, weights = ctx.saved_tensors
    to_values, to_weights = torch.ops.convnn.weighted_sum_backward(grad, values, index, weights)
    return to_values, None, to_weights


_weighted_sum.register_autograd(_weighted_sum_gradient, setup_context=_save_weighted_sum)


@register_flop_formula(torch.ops.convnn.weighted_sum)
def _(values, index, weights, **_kwargs) -> int:
    return 2 * math.prod(index) * values[2]


@register_flop_formula(torch.ops.convnn.weighted_sum_backward)
def _(grad, values, index, weights, **_kwargs) -> int:
    return 4 * math.prod(index) * values[2]
