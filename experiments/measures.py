"""Measures of a choice of neighbors: an index (..., N, K) into M keys, in which a negative number is no neighbor.

Pure functions on tensors: distances of neighbors, how unevenly keys are chosen, overlaps of two indices.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.mixing import ABSENT
from neighbors import grid_locations


def neighbor_distances(index: Tensor, grid: tuple[int, int], padding: int = 0, class_tokens: int = 0) -> Tensor:
    """Return Euclidean distances of neighbors from their tokens, in tokens: (..., N, K), NaN from and to class tokens.

    Keys are the class tokens, then a grid in raster order; queries are the tokens inside the ring of padding.
    """
    nowhere = torch.full((class_tokens, 2), torch.nan)
    places = grid_locations(grid).float()
    inner = ((places >= padding) & (places < torch.tensor(grid) - padding)).all(dim=1)
    keys, own = torch.cat([nowhere, places]), torch.cat([nowhere, places[inner]])
    distances = (keys[index.clamp_min(0)] - own[:, None]).square().sum(dim=-1).sqrt()
    return distances.masked_fill(index < 0, torch.nan)


def mean_distance(distances: Tensor, weights: Tensor | None = None) -> float:
    """Return the mean of the distances that are not NaN, weighted by the absolute weights (of the same shape), if given."""
    weights = torch.ones_like(distances) if weights is None else weights.abs()
    weights = weights.masked_fill(distances.isnan(), 0)
    return float((distances.nan_to_num() * weights).sum() / weights.sum())


def distance_shares(distances: Tensor, bins: int) -> Tensor:
    """Return the shares (bins,) of the distances in [0, 1), [1, 2), ..., the last bin open; NaN counts nowhere."""
    known = distances[~distances.isnan()].long().clamp_max(bins - 1)
    return torch.bincount(known, minlength=bins) / max(1, len(known))


def times_chosen(index: Tensor, num_keys: int) -> Tensor:
    """Count the tokens that chose each key: (..., N, K) -> (..., M)."""
    flat = index.flatten(-2)
    counts = torch.zeros(*flat.shape[:-1], num_keys + 1)
    flat = torch.where(flat < 0, num_keys, flat)
    return counts.scatter_add(-1, flat, torch.ones_like(flat, dtype=counts.dtype))[..., :-1]


def gini(counts: Tensor) -> Tensor:
    """Return the Gini coefficient along the last axis: 0 where all M are equal, (M - 1) / M where one has all."""
    M = counts.shape[-1]
    rank = 2 * torch.arange(1, M + 1) - M - 1
    return (counts.sort(dim=-1).values * rank).sum(dim=-1) / (M * counts.sum(dim=-1))


def skewness(counts: Tensor) -> Tensor:
    """Return the third standardized moment along the last axis (Radovanovic et al., JMLR 11, 2010); 0 where all are equal."""
    apart = counts - counts.mean(dim=-1, keepdim=True)
    variance = apart.square().mean(dim=-1)
    return torch.where(variance > 0, apart.pow(3).mean(dim=-1) / variance.clamp_min(1e-30).pow(1.5), 0)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the share (..., N) of each token's neighbors in one index (..., N, K) that another one (..., N, L) has too."""
    common = ((one[..., :, None] == other[..., None, :]).any(dim=-1) & (one >= 0)).sum(dim=-1)
    return common / (one >= 0).sum(dim=-1)


def head_overlap(index: Tensor) -> Tensor:
    """Return the mean overlap of two different heads, of at least two: (B, H, N, K) -> (B, N)."""
    pairs = itertools.permutations(index.unbind(1), 2)
    return torch.stack([overlap(*pair) for pair in pairs]).mean(dim=0)


def join_heads(index: Tensor, weights: Tensor, num_keys: int) -> Tensor:
    """Return the K keys of each token with the largest weights summed over heads: (B, H, N, K) -> (B, N, K)."""
    B, _, N, K = index.shape
    total = torch.zeros(B, N, num_keys + 1)
    for of_head, weight in zip(index.unbind(1), weights.unbind(1), strict=True):
        total.scatter_add_(-1, torch.where(of_head < 0, num_keys, of_head), weight.abs().float())
    strongest = total[..., :-1].topk(K)
    return strongest.indices.masked_fill(strongest.values == 0, ABSENT)


def mirrored(index: Tensor, grid: tuple[int, int], padding: int = 0, class_tokens: int = 0) -> Tensor:
    """Return the index of a mirrored image in terms of the tokens of the image: left and right are exchanged."""

    def mirror(rows: int, columns: int) -> Tensor:
        cells = torch.arange(rows * columns).view(rows, columns).flip(1).flatten() + class_tokens
        return torch.cat([torch.arange(class_tokens), cells])

    keys = mirror(*grid)
    own = mirror(*(side - 2 * padding for side in grid))
    return torch.where(index < 0, index, keys[index.clamp_min(0)])[..., own, :]


def softmax_mass(query: Tensor, key: Tensor, index: Tensor, metric: str, temperature: float = 1.0) -> Tensor:
    """Return the share of the softmax over all keys that K neighbors hold: (B, N, C), (B, M, C), (B, N, K) -> (B, N).

    metric: matmul, cosine or euclidean, as `neighbor_scores`; scores are divided by the temperature.
    """
    if metric == "cosine":
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    mass = []
    for q, k, chosen in zip(query, key, index, strict=True):  # one matrix at a time
        scores = -torch.cdist(q, k) if metric == "euclidean" else q @ k.mT
        if metric == "matmul":
            scores = scores / math.sqrt(q.shape[-1])
        mass.append((scores / temperature).softmax(dim=-1).gather(-1, chosen).sum(dim=-1))
    return torch.stack(mass)


def random_index(shape: tuple[int, ...], num_keys: int, seed: int = 0) -> Tensor:
    """Draw K different keys for every token, in the given shape (..., N, K)."""
    *tokens, K = shape
    return torch.rand(*tokens, num_keys, generator=torch.Generator().manual_seed(seed)).topk(K).indices
