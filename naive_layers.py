"""What the mixers cost when they are written down plainly, to measure against: `benchmark.py --against naive`.

As published: all scores at once and with a graph, `topk`, the values expanded K-fold before they are gathered, `conv1d` over
the slots. Attention by place is attention over all pairs under a mask. A naive form has the parameters of the layer
it is made of, and computes the same.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers1d import MultiHeadConvNNAttention, MultiHeadKvtAttention
from layers2d import ConvNN2d, ConvNNAttention2d
from place_attention import PlacedAttention


def all_scores(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """(B, N, C), (B, M, C) -> (B, N, M), larger is nearer."""
    if metric == "cosine":
        query, key = F.normalize(query, dim=2), F.normalize(key, dim=2)
    elif metric == "euclidean":
        return -torch.cdist(query, key)
    return query @ key.mT


def convolve_neighbors(conv: nn.Module, values: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """values (B, M, C), index (B, N, K) -> (B, N, D) by a convolution of kernel K and stride K."""
    B, N, K = index.shape
    C = values.shape[2]
    expanded = values.mT.unsqueeze(3).expand(-1, -1, -1, K).contiguous()  # (B, C, M, K)
    slots = expanded.gather(2, index[:, None].expand(-1, C, -1, -1))  # (B, C, N, K)
    if weights is not None:
        slots = slots * weights[:, None]
    return conv(slots.reshape(B, C, N * K)).mT


def _attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ConvNN attention between projected tokens (B, N, C)."""
    metric, K = layer.select.neighbors.metric, layer.select.neighbors.K
    scores = all_scores(query, key, metric) / (math.sqrt(query.shape[2]) if metric == "matmul" else 1)
    weights, index = scores.topk(K, dim=2)
    if layer.softmax_topk_val:
        weights = weights.softmax(dim=2)
    elif metric == "euclidean":
        weights = 1 / (1e-8 - weights)
    return convolve_neighbors(layer.conv, value, index, weights)


def convnn2d(layer: ConvNN2d, x: Tensor) -> Tensor:
    tokens, grid = layer.fold(x)
    scores = all_scores(tokens, tokens, layer.select.neighbors.metric)
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=x.device)
    index = scores.masked_fill(own, math.inf).topk(layer.select.neighbors.K, dim=2).indices
    return layer.unfold(convolve_neighbors(layer.conv, tokens, index), grid)


def convnn_attention2d(layer: ConvNNAttention2d, x: Tensor) -> Tensor:
    tokens, grid = layer.fold(x)
    return layer.unfold(layer.proj(_attention(layer, *layer.qkv(tokens).chunk(3, dim=2))), grid)


def convnn_attention(layer: MultiHeadConvNNAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _attention(layer, *(part.flatten(0, 1) for part in (query, key, value)))
    return out.unflatten(0, query.shape[:2])


def kvt_attention(layer: MultiHeadKvtAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[3])
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(3, scores.topk(layer.K, dim=3).indices, True)
    return scores.masked_fill(~chosen, -math.inf).softmax(dim=3) @ value


def placed_attention(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mask (N, N): the pairs that attend."""
    scores = query @ key.mT / math.sqrt(query.shape[3])
    return scores.masked_fill(~mask, -math.inf).softmax(dim=3) @ value


IMAGES = {ConvNN2d: convnn2d, ConvNNAttention2d: convnn_attention2d}
SEQUENCES = {
    MultiHeadConvNNAttention: convnn_attention,
    MultiHeadKvtAttention: kvt_attention,
    PlacedAttention: placed_attention,
}


class Naive(nn.Module):
    """The naive form of a layer, with the layer's own parameters, on their device."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        kind = next(kind for kind in (*IMAGES, *SEQUENCES) if isinstance(layer, kind))
        given = layer.pattern.make_mask(layer.proj.weight.device) if kind is PlacedAttention else layer
        self.compute = partial((IMAGES | SEQUENCES)[kind], given)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, tuple(IMAGES)):
            return self.compute(x)
        out = self.compute(*self.layer.project(x))
        return self.layer.proj(out.transpose(1, 2).flatten(2))


def has_naive_form(layer: nn.Module) -> bool:
    """Whether there is one: without dropout, and for ConvNN layers of all tokens compared by their features alone."""
    if getattr(layer, "attention_dropout", 0) or (isinstance(layer, ConvNNAttention2d) and layer.dropout.p):
        return False
    if isinstance(layer, (MultiHeadKvtAttention, PlacedAttention)):
        return True
    if not isinstance(layer, (*IMAGES, *SEQUENCES)) or getattr(layer, "padding", 0):
        return False
    neighbors = layer.select.neighbors
    return (neighbors.sampling, neighbors.similarity_type, neighbors.aggregation_type) == ("all", "Col", "Col")
