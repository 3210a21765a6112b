"""The plain form of what neighbors.py does: full score matrix, topk, gather, conv1d. Slow, large, and easy to believe."""

import torch
from torch.nn import functional as F


def scores(query, key, metric):
    """(B, N, M), larger is nearer."""
    if metric in ("cosine", "similarity"):
        return F.cosine_similarity(query[:, :, None], key[:, None], dim=-1, eps=1e-12)
    if metric in ("euclidean", "distance"):
        return -(query[:, :, None] - key[:, None]).norm(dim=-1)
    return torch.einsum("bnc,bmc->bnm", query, key) / query.shape[-1] ** 0.5


def neighbors(query, key, K, metric, candidates=None, self_index=None):
    """index (B, N, K), nearest first."""
    full = scores(query, key, metric)
    if candidates is not None:
        allowed = torch.zeros(key.shape[1], dtype=torch.bool)
        allowed[candidates] = True
        full = full.masked_fill(~allowed, -torch.inf)
    if self_index is not None:
        full[:, torch.arange(len(self_index)), self_index] = torch.inf
    return full.topk(K, dim=-1).indices


def gather(x, index):
    """(B, M, C), (B, N, K) -> (B, N, K, C)."""
    return torch.stack([x[b, index[b]] for b in range(len(x))])


def aggregate(values, index, weight, weights=None, groups=1):
    """nn.Conv1d over the slots, as the layers name it: kernel K, stride K."""
    B, N, K = index.shape
    slots = gather(values, index)
    if weights is not None:
        slots = slots * weights[..., None].to(slots.dtype)
    rows = slots.permute(0, 3, 1, 2).reshape(B, -1, N * K)  # (B, C, N * K)
    return F.conv1d(rows, weight, stride=K, groups=groups).transpose(1, 2)


def pairs(query, key, index, metric):
    """Scores of the chosen pairs from the full matrix."""
    return scores(query, key, metric).gather(2, index)


def window(grid, row, K):
    """K nearest tokens of one token in whole pixels, ties in raster order, then in raster order: pure Python."""
    places = [()]
    for side in grid:
        places = [(*place, i) for place in places for i in range(side)]
    own = places[row]
    distance = [sum((a - b) ** 2 for a, b in zip(own, place, strict=True)) for place in places]
    return sorted(sorted(range(len(places)), key=lambda j: (distance[j], j))[:K])
