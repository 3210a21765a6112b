"""Token mixers on images, (B, C_in, H, W) -> (B, C_out, H, W).

ConvNN, in the steps that `ConvNN2d` takes:

1. Every pixel is a token: (B, C, H, W) becomes (B, N, C). A pixel-unshuffle before (pattern B) makes fewer, wider
   tokens; a ring of zeros (`padding`) can join them.
2. Each token finds the K tokens most similar to it, itself first: `find_neighbors`, an index (B, N, K).
3. A convolution runs over those K slots instead of over a window of places: `aggregate`, with the weights
   (out, in, K) of an `nn.Conv1d`.
4. The tokens become an image again; a pixel-shuffle after (pattern A) undoes the unshuffle.

Chosen by place (`similarity_type="Loc"`), the K slots are a window and ConvNN is `nn.Conv2d`. Chosen between projected
queries and keys, with values weighed by the softmax of their scores, it is attention in which each token attends to
its K best: `ConvNNAttention2d`. The steps are those on a sequence, where they are written: `layers1d.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers1d import Attention1d, ConvNN1d, ConvNNAttention1d


class ConvNN2d(ConvNN1d):
    """Convolutional nearest neighbors (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    Arguments and errors are those of `ConvNN1d`. With `similarity_type="Loc"`, `padding=p` and K = (2p + 1)^2, p = 1
    or 2, it is `nn.Conv2d(kernel_size=2p + 1, padding=p)`, whose weight is `conv.weight` unflattened.
    """

    axes = 2


class ConvNNAttention2d(ConvNNAttention1d):
    """ConvNN attention (arXiv 2511.14137) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    Arguments and errors are those of `ConvNNAttention1d`. With K = N, matmul, softmax and depthwise weights of one it
    is `Attention2d` with one head.
    """

    axes = 2


class Attention2d(Attention1d):
    """Multi-head self-attention over the pixels of an image: (B, C_in, H, W) -> (B, C_out, H, W).

    Arguments and errors are those of `Attention1d`.
    """

    axes = 2


class Branching2d(nn.Module):
    """Two mixers side by side: both see the whole input, ReLU after each, channels concatenated.

    (B, C_in, H, W) -> (B, C_first + C_second, H, W).
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.first(x)), F.relu(self.second(x))], dim=1)
