"""Naive forms of the mixers, to measure against: `benchmark.py --against naive` and `benchmark.py targets`.

As published: all scores at once with a graph, `topk`, the values expanded K-fold before they are aggregated
(`kernels/reference.py`). Local attention is attention over all pairs under a mask.
"""

from torch import Tensor, nn

from kernels.backend import use
from layers1d import MultiHeadKvtAttention
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


def has_naive_form(layer: nn.Module) -> bool:
    """Tell if the plain form computes the same in another way: the layer chooses pairs of tokens, and nothing at random."""
    parts = list(layer.modules())
    if any(getattr(part, "attention_dropout", 0) or (isinstance(part, nn.Dropout) and part.p) for part in parts):
        return False
    selections = [part for part in parts if isinstance(part, NeighborSelection)]
    if any(selection.neighbors.sampling == "random" for selection in selections) or getattr(layer, "is_convolution", False):
        return False
    return bool(selections) or any(isinstance(part, (MultiHeadKvtAttention, SparsityPattern)) for part in parts)
