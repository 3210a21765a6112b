"""The plain form in the words of the tests: `kernels/reference.py`, and beside it what it does not have."""

from torch.nn import functional as F

from kernels import reference
from kernels.reference import gather
from options.neighbors import canonical_metric


def scores(query, key, metric):
    """(B, N, M), larger is nearer; products are divided by sqrt(C)."""
    metric = canonical_metric(metric)
    return reference.all_scores(query, key, metric) / (query.shape[-1] ** 0.5 if metric == "matmul" else 1)


def neighbors(query, key, K, metric, candidates=None, self_index=None):
    """index (B, N, K), nearest first."""
    return reference.find_neighbors(query, key, K, canonical_metric(metric), candidates, self_index)


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
