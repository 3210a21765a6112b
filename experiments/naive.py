"""Naive forms of the mixers, to measure against: `benchmark.py --against naive` and `benchmark.py targets`.

As published: all scores at once with a graph, `topk`, the values expanded K-fold before they are aggregated
(`kernels/reference.py`). Local attention is attention over all pairs under a mask. `Published` is ConvNN on images in the
order and with the operators of the published code: it ranks by `topk` and gathers from an expanded view.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.backend import use
from layers1d import MultiHeadKvtAttention
from layers2d import ConvNN2d
from mixers.local import SparsityPattern
from mixers.selection import NeighborSelection


class Naive(nn.Module):
    """A layer computed by the plain forms of all operators, with the same parameters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with use("reference"):
            return self.layer(x)


class Published(nn.Module):
    """A `ConvNN2d` in the published form (arXiv 2511.14137), with the same parameters: (B, C, H, W) -> (B, D, H, W).

    The matrix of all cosines and its graph, `topk`, each channel gathered from a K-fold view, `conv1d` with a stride of K.
    Raises ValueError for a layer that does not select by cosine.
    """

    def __init__(self, layer: ConvNN2d):
        super().__init__()
        rules = layer.select.neighbors
        if (rules.metric, rules.similarity_type, rules.aggregation_type, layer.padding) != ("cosine", "Col", "Col", 0):
            raise ValueError(f"{rules}, padding={layer.padding}: the published form has magnitude_type=cosine, no padding")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, image = self.layer, self.layer.unshuffle(x)
        tokens, grid, K = image.flatten(2), tuple(image.shape[2:]), layer.conv.stride[0]  # (B, C, N)
        candidates = layer.select.search_space(grid, x.device)["candidates"]
        directions = F.normalize(tokens, dim=1)
        keys = directions if candidates is None else directions[:, :, candidates]
        scores = directions.mT @ keys  # (B, N, N) or (B, N, S)
        own = torch.arange(tokens.shape[2], device=x.device)[:, None]
        if candidates is None:
            index = scores.masked_fill(own == own.mT, torch.inf).topk(K, dim=2).indices
        else:
            others = candidates[scores.masked_fill(own == candidates, -torch.inf).topk(K - 1, dim=2).indices]
            index = torch.cat([own.expand(len(x), -1, -1), others], dim=2)
        shape = *tokens.shape, K
        slots = tokens[..., None].expand(shape).gather(2, index[:, None].expand(shape))  # (B, C, N, K)
        return layer.shuffle(layer.conv(slots.flatten(2)).unflatten(2, grid))


def has_naive_form(layer: nn.Module) -> bool:
    """Tell if the plain form computes the same in another way: the layer chooses pairs of tokens, and nothing at random."""
    parts = list(layer.modules())
    if any(getattr(part, "attention_dropout", 0) or (isinstance(part, nn.Dropout) and part.p) for part in parts):
        return False
    selections = [part for part in parts if isinstance(part, NeighborSelection)]
    if any(selection.neighbors.sampling == "random" for selection in selections) or getattr(layer, "is_convolution", False):
        return False
    return bool(selections) or any(isinstance(part, (MultiHeadKvtAttention, SparsityPattern)) for part in parts)
