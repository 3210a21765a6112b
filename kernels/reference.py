"""The plain form of every operator: the full matrix of scores, topk, gather. Slow, large, and easy to believe.

Signatures and results as in `operators.py`. It consists of PyTorch's differentiable operators only, so autograd goes through
it any number of times: tests compare with it, benchmarks measure against it, and it runs where the graph must hold plain
operators (export, `torch.func`, gradients of gradients).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def slots_of(weight: Tensor) -> Tensor:
    """Return the weights of a depthwise convolution, (C, 1, K), slot by slot, (K, C)."""
    return weight.squeeze(1).t().contiguous()


def all_scores(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """(B, N, C), (B, M, C) -> (B, N, M): cosine, minus the Euclidean distance, or the dot product; larger is nearer."""
    dtype = accumulator(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    if metric == "cosine":
        return F.normalize(query, dim=2, eps=1e-12) @ F.normalize(key, dim=2, eps=1e-12).mT
    if metric == "euclidean":
        if torch.compiler.is_exporting():  # ONNX has no cdist
            return -(query[:, :, None] - key[:, None]).square().sum(dim=3).sqrt()
        return -torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist")
    return query @ key.mT


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x (B, M, C) by index (B, N, K): (B, N, K, C). As published, from K copies of x."""
    copies = x[:, :, None].expand(-1, -1, index.shape[2], -1).contiguous()  # (B, M, K, C)
    return copies.gather(1, index[..., None].expand(-1, -1, -1, x.shape[2]))


def largest(scores: Tensor, K: int) -> Tensor:
    """Columns of the K largest of each row, largest first, of equal ones the smallest first: (B, N, M) -> (B, N, K).

    Not by `topk`, which leaves the order of equal scores open.
    """
    if not torch.compiler.is_exporting():
        return scores.sort(dim=2, descending=True, stable=True).indices[:, :, :K]
    # ONNX has no stable sort. From the K-th largest score follows which columns are among the K, and their ranks from pairs.
    M, least = scores.shape[2], scores.topk(K, dim=2).values[:, :, -1:]
    above, equal = scores > least, scores == least
    chosen = above | (equal & (equal.long().cumsum(2) <= K - above.long().sum(2, keepdim=True)))
    columns = torch.arange(M, device=scores.device)
    columns = -(torch.where(chosen, -columns, -columns - M).topk(K, dim=2).values) % M  # in rising order
    values = scores.gather(2, columns)
    own, other = values[..., None], values[:, :, None]  # (B, N, K, 1), (B, N, 1, K)
    earlier = torch.ones(K, K, dtype=torch.bool, device=scores.device).tril(-1)
    rank = ((other > own) | ((other == own) & earlier)).long().sum(3)
    return torch.zeros_like(columns).scatter(2, rank, columns)


def nearest(scores: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None) -> Tensor:
    """Index (B, N, K) of the K best scores (B, N, M) among the candidates; with self_index the token itself first."""
    N, M = scores.shape[1:]
    if candidates is not None:
        allowed = torch.zeros(M, dtype=torch.bool, device=scores.device).index_fill(0, candidates, True)
        scores = scores.masked_fill(~allowed, -torch.inf)
    if self_index is None:
        return largest(scores, K)
    own = self_index[:, None] == torch.arange(M, device=scores.device)  # (N, M)
    others = largest(scores.masked_fill(own, -torch.inf), K - 1)
    return torch.cat([self_index.view(1, N, 1).expand(scores.shape[0], -1, -1), others], dim=2)


def find_neighbors(
    query: Tensor, key: Tensor, K: int, metric: str, candidates: Tensor | None, self_index: Tensor | None
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        if metric == "cosine":  # the length of the query does not change an order; equal keys have equal scores
            key, metric = F.normalize(key.to(accumulator(key.dtype)), dim=2, eps=1e-12), "matmul"
        return nearest(all_scores(query, key, metric), K, candidates, self_index)


def find_scored_neighbors(
    query: Tensor, key: Tensor, K: int, candidates: Tensor | None, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        products = all_scores(query, key, "matmul")
        index = nearest(products.detach(), K, candidates, self_index)
        return index, products.gather(2, index)


def pair_scores(query: Tensor, key: Tensor, index: Tensor, squared_distance: bool) -> Tensor:
    dtype = accumulator(query.dtype)
    own, other = query.to(dtype)[:, :, None], gather(key.to(dtype), index)
    return (own - other).square().sum(dim=3) if squared_distance else (own * other).sum(dim=3)


def aggregate(values: Tensor, index: Tensor, weight: Tensor, scores: Tensor | None, depthwise: bool) -> Tensor:
    slots = gather(values, index)  # (B, N, K, C)
    if scores is not None:
        slots = (slots * scores[..., None]).to(values.dtype)
    return (slots * weight).sum(dim=2) if depthwise else F.linear(slots.flatten(2), weight)


def weighted_sum(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    dtype = accumulator(values.dtype)
    return (gather(values.to(dtype), index) * weights.to(dtype)[..., None]).sum(dim=2).to(values.dtype)


def max_neighbors(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    largest, slot = gather(values, index).max(dim=2)  # (B, N, C) each
    return largest, index.gather(2, slot).int()
