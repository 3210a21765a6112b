"""Select and aggregate, the two steps of every mixer, as pure functions on tensors.

    index  = find_neighbors(query, key, K, metric)       # (B, N, K): for token i its K nearest, nearest first
    scores = neighbor_scores(query, key, index, metric)  # (B, N, K): differentiable scores of the selected pairs
    output = aggregate(values, index, weight, scores)    # (B, N, D): a convolution over the K slots

Tokens are rows: query (B, N, C), key and values (B, M, C). An index refers to rows of key. With several heads, B is
batch x heads. No (B, N, K, C) tensor and no (B, N, M) matrix is materialized. The operators in `kernels/` work in
chunks, and their backward passes gather neighbors again.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import attention, backend, operators, reference
from kernels.reference import accumulator
from options.neighbors import canonical_metric
from utils import hash_int32

DISTANCES = 2**20  # between positions, computed at a time


def _kernels():
    """Return the module that computes: `operators`, or the plain form where only PyTorch's own operators may run."""
    return reference if backend.is_plain() else operators


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the inputs of a matrix product as autocast would; autocast does not look into custom operators."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _searched(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Cast the inputs of the search: on CUDA as autocast would, with float32 sums, as flash attention does.

    Elsewhere autocast changes nothing, and float32 keeps its order: bfloat16 ties often.
    """
    return _autocast(query, key) if query.is_cuda else (query, key)


def _check_candidates(key: Tensor, K: int, candidates: Tensor | None) -> None:
    available = key.shape[1] if candidates is None else candidates.shape[0]
    if not 1 <= K <= available:
        raise ValueError(f"K={K} must be 1 to {available}, the number of candidates")


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------


def find_neighbors(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
) -> Tensor:
    """Find the K nearest keys of each query, nearest first, as row numbers of key: LongTensor (B, N, K).

    query (B, N, C), key (B, M, C); metric: cosine, euclidean or matmul, or an alias of them; candidates (S,): only
    these keys count; self_index (N,): the row of key that is the query's own token, then always slot 0, the other
    K - 1 coming from the remaining keys. Scores are computed in float32 at least, whatever autocast says: bfloat16
    ties often. Distances are compared by products of centered tokens: in float32 the order of neighbors that are nearer than
    about a thousandth of the spread of all tokens is left to rounding. The result carries no gradient.

    Raises ValueError for an unknown metric and for a K without enough candidates.
    """
    metric = canonical_metric(metric)
    _check_candidates(key, K, candidates)
    query, key = _searched(query.detach(), key.detach())
    return _kernels().find_neighbors(query, key, K, metric, candidates, self_index)


def find_scored_neighbors(
    query: Tensor,
    key: Tensor,
    K: int,
    metric: str,
    *,
    candidates: Tensor | None = None,
    self_index: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`find_neighbors` and the `neighbor_scores` of its result, (B, N, K) each; products are computed once for both.

    With `index` (N, K), the neighbors are given, by location for example, and only scored. The scores are differentiable,
    and in float32 at least, also under autocast. Rows shorter than 1e-6 get a smaller cosine, in the search too. Raises
    ValueError as `find_neighbors`.
    """
    metric = canonical_metric(metric)
    if index is None and metric == "euclidean":  # the search compares distances in another form
        index = find_neighbors(query, key, K, metric, candidates=candidates, self_index=self_index)
    if index is not None:
        index = index.expand(query.shape[0], -1, -1)
        return index, neighbor_scores(query, key, index, metric)
    _check_candidates(key, K, candidates)
    if metric == "cosine":
        query, key = _unit(query), _unit(key)
    query, key = _searched(query, key)
    index, scores = _kernels().find_scored_neighbors(query, key, K, candidates, self_index)
    return index, scores / math.sqrt(query.shape[-1]) if metric == "matmul" else scores


def gather_neighbors(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x (B, M, C) by index (B, N, K): (B, N, K, C). `aggregate` never materializes them."""
    B, N, K = index.shape
    return x.gather(1, index.reshape(B, N * K, 1).expand(-1, -1, x.shape[2])).view(B, N, K, x.shape[2])


def neighbor_scores(query: Tensor, key: Tensor, index: Tensor, metric: str) -> Tensor:
    """Score the chosen pairs only, with gradient: query (B, N, C), key (B, M, C), index (B, N, K) -> (B, N, K).

    matmul: q . k / sqrt(C); cosine: q . k / (|q| |k|); euclidean: -|q - k|. In float32 at least. The gradient of a
    distance of 0 is 0.
    """
    metric = canonical_metric(metric)
    if metric == "cosine":
        query, key = _unit(query), _unit(key)
    query, key = _autocast(query, key)
    product = _kernels().pair_scores(query, key, index, metric == "euclidean")
    if metric == "matmul":
        return product / math.sqrt(query.shape[-1])
    if metric == "cosine":
        return product
    apart = product > 0
    return -torch.where(apart, torch.where(apart, product, 1).sqrt(), 0)


def all_pair_scores(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """Score all pairs, with gradient, as `find_scored_neighbors` does: (B, N, C), (B, M, C) -> (B, N, M).

    In float32 at least. No other function here keeps a number for every pair.
    """
    metric = canonical_metric(metric)
    if metric == "cosine":
        query, key = _unit(query), _unit(key)
    query, key = _searched(query, key)
    with torch.autocast(query.device.type, enabled=False):
        scores = reference.all_scores(query, key, "euclidean" if metric == "euclidean" else "matmul")
    return scores / math.sqrt(query.shape[-1]) if metric == "matmul" else scores


def _unit(x: Tensor) -> Tensor:
    """Normalize rows to length one, in float32 at least; eps bounds the gradient of a row of zeros."""
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1, eps=1e-6)


def neighbor_weights(scores: Tensor, metric: str, *, softmax: bool = True, temperature: float = 1.0) -> Tensor:
    """Turn the scores of the slots into the weights of their values: (B, N, K) -> (B, N, K).

    The softmax over the K scores / temperature, or else the raw score: q . k / sqrt(C), the cosine, or 1 / (distance + 1e-8).
    """
    if softmax:
        return (scores if temperature == 1 else scores / temperature).softmax(dim=-1)
    return (1e-8 - scores).reciprocal() if canonical_metric(metric) == "euclidean" else scores


# ---------------------------------------------------------------------------------------------------------------
# Aggregate
# ---------------------------------------------------------------------------------------------------------------


def aggregate(
    values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None = None, *, depthwise: bool = False
) -> Tensor:
    """Convolve over the K slots: sum over k of W_k (score_ik value_j(i,k)), without bias.

    values (B, M, C); index (B, N, K); weight as `nn.Conv1d` holds it: (D, C, K), or depthwise (C, 1, K);
    scores (B, N, K) or None for plain values. Returns (B, N, D), depthwise (B, N, C).
    """
    C, K = values.shape[2], index.shape[2]
    # The slots of a gathered row lie one after the other: (D, C, K) -> (D, K * C), depthwise (C, 1, K) -> (K, C).
    weight = weight.view(C, K).t() if depthwise else weight.transpose(1, 2).reshape(-1, K * C)
    values, weight = _autocast(values, weight)
    return _kernels().aggregate(values, index, weight.contiguous(), scores, depthwise)


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum the values of the neighbors times their weights: values (B, M, C), index and weights (B, N, K) -> (B, N, C).

    Equal to `aggregate` with depthwise weights of one.
    """
    (values,) = _autocast(values)
    return _kernels().weighted_sum(values, index, weights)


def attend_to_neighbors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    K: int,
    metric: str,
    weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Find, weight by the softmax and aggregate K neighbors of each query, head by head, in one operator.

    query (B, H, N, C), key and value (B, H, M, C), of any strides; metric: cosine or matmul; weight (C, 1, K) of a depthwise
    convolution over the slots, None: of one. Returns (B, H, N, C). Equal to `find_scored_neighbors`, `neighbor_weights`
    and `aggregate` or `weighted_sum` on the heads. Raises ValueError for a K above M.
    """
    if not 1 <= K <= key.shape[2]:
        raise ValueError(f"K={K} must be 1 to {key.shape[2]}, the number of candidates")
    divisor = temperature
    if canonical_metric(metric) == "cosine":
        query, key = _unit(query), _unit(key)
    else:
        divisor *= math.sqrt(query.shape[-1])
    query, key = _searched(query, key)
    if weight is None:
        (value,) = _autocast(value)
    else:
        value, weight = _autocast(value, weight)
    return attention.neighbor_attention(query, key, value, weight, K, divisor)


def max_neighbors(values: Tensor, index: Tensor) -> Tensor:
    """Take the largest value of the neighbors, channel by channel: values (B, M, C), index (B, N, K) -> (B, N, C).

    The gradient goes to the neighbor with that value, among equal ones to the first slot.
    """
    return _kernels().max_neighbors(values, index)[0]


# ---------------------------------------------------------------------------------------------------------------
# Locations and candidates. A grid is a tuple of sides: (height, width), or (length,) for a sequence without a grid;
# its tokens are numbered in raster order, after `class_tokens` tokens that have no coordinates.
# ---------------------------------------------------------------------------------------------------------------


def grid_locations(grid: tuple[int, ...], device=None) -> Tensor:
    """(N, axes), the location of each token of the grid in whole pixels."""
    sides = [torch.arange(side, device=device) for side in grid]
    return torch.cartesian_prod(*sides).view(-1, len(grid))


def coordinates(locations: Tensor, grid: tuple[int, ...], dtype: torch.dtype, class_tokens: int = 0) -> Tensor:
    """(class_tokens + N, axes), locations from -1 to 1 along each side; a side of one, and class tokens, are at 0."""
    axes = [(2 * locations[:, a] - (side - 1)).to(dtype) / max(side - 1, 1) for a, side in enumerate(grid)]
    return F.pad(torch.stack(axes, dim=1), (0, 0, class_tokens, 0))


def join_coordinates(features: Tensor, coordinates: Tensor, lambda_param: float) -> Tensor:
    """Join lambda * features / std and (1 - lambda) * coordinates: (B, N, C), (N, axes) -> (B, N, C + axes).

    The standard deviation is taken per image (and head), a constant for the gradient. Features that differ by rounding only
    count as 0, and coordinates alone decide.
    """
    B, N, C = features.shape
    wide = features.detach().to(accumulator(features.dtype))
    std = wide.std(dim=(1, 2), keepdim=True, correction=min(1, N * C - 1))
    std = std.masked_fill(std <= 1e-6 * wide.abs().amax(dim=(1, 2), keepdim=True), math.inf)
    features = (lambda_param * features / std).to(features.dtype)
    return torch.cat([features, ((1 - lambda_param) * coordinates).expand(B, -1, -1)], dim=2)


def raster_index(grid: tuple[int, ...], positions: list[Tensor]) -> Tensor:
    """Return the numbers of the tokens at every combination of the given positions along each side."""
    index = torch.zeros(1, dtype=torch.long, device=positions[0].device)
    for side, along in zip(grid, positions, strict=True):
        index = (index[:, None] * side + along).flatten()
    return index


def spatial_candidates(grid: tuple[int, ...], num_samples: int, padding: int = 0, class_tokens: int = 0, device=None) -> Tensor:
    """(S,), evenly spaced tokens, `num_samples` along each side, and every class token."""
    s, i = num_samples, torch.arange(num_samples, device=device)
    along = [padding + i * (side - 1 - 2 * padding) // (s - 1) if s > 1 else i + (side - 1) // 2 for side in grid]
    return torch.cat([torch.arange(class_tokens, device=device), raster_index(grid, along) + class_tokens])


def random_candidates(tokens: int, num_samples: int, class_tokens: int = 0, device=None, fixed: bool = False) -> Tensor:
    """(S,), random tokens and every class token; with `fixed` the same ones every time, for evaluation.

    Neither uses a `torch.Generator`, which would break a compiled graph: random tokens come from the device's global
    generator, fixed ones are ordered by a hash of the token's number.
    """
    if fixed:
        hashes = hash_int32(torch.arange(1, tokens + 1, dtype=torch.int32, device=device))
        order = (hashes.long() & 0xFFFFFFFF).argsort()  # as unsigned numbers
    else:
        order = torch.randperm(tokens, device=device)
    return torch.cat([torch.arange(class_tokens, device=device), order[:num_samples] + class_tokens])


def location_neighbors(locations: Tensor, K: int, self_index: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Find the K nearest tokens by Euclidean distance in whole pixels, ties in raster order: (N, K).

    locations (M, axes); self_index (N,), the tokens to find neighbors of. Among all tokens, neighbors come in raster
    order, so that slot k is tap k of a convolution; among candidates, the token itself comes first, then the
    nearest ones.
    """
    M = locations.shape[0]
    keys = torch.arange(M, device=locations.device) if candidates is None else candidates
    rows = max(1, DISTANCES // (keys.numel() * locations.shape[1]))
    found = []
    for own in self_index.split(rows):
        distance = (locations[own][:, None] - locations[keys]).square().sum(-1)  # (n, S)
        rank = distance * M + keys  # whole numbers: a tie goes to the token that comes first
        if candidates is None:
            found.append(keys[rank.topk(K, largest=False).indices].sort().values)
        else:
            rank = rank.masked_fill(keys == own[:, None], torch.iinfo(rank.dtype).max)
            others = keys[rank.topk(K - 1, largest=False).indices]
            found.append(torch.cat([own[:, None], others], dim=1))
    return torch.cat(found)
