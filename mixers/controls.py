"""Controls: mixers that do not mix, or mix without looking at the tokens. A comparison without them says little.

Weights are constants, so the mixing matrix has a closed form. `Pooling2d` is for images.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import Bias, TokenLayout, TokenMixer, ValueMixer, as_image, join_tokens


class Identity(TokenMixer):
    """Return the tokens: no mixing, no parameters. (B, N, d_model) -> the same."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__(num_heads)

    def mix_tokens(self, x: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        return x, None


class Pointwise(ValueMixer):
    """Value and output projection of each token by itself, without mixing."""

    def mix(self, value: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        return value, None


class MeanMixing(ValueMixer):
    """Mean of the values of all tokens, the same for every token."""

    def mix(self, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        B, H, N, _ = value.shape
        matrix = value.new_full((), 1 / N).expand(B, H, N, N) if output_matrix else None
        return value.mean(dim=2, keepdim=True).expand_as(value), matrix


class RandomMixing(ValueMixer):
    """Values times a fixed random matrix with rows that add up to one (RandFormer, Yu et al., arXiv 2210.13452, section 3.1).

    `random_matrix` (N, N), the softmax of uniform numbers, is drawn at construction and saved with the model. Heads share it.
    """

    per_token = "random_matrix"

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout, bias: Bias = True):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        self.register_buffer("random_matrix", torch.rand(layout.num_tokens, layout.num_tokens).softmax(dim=1))

    def mix(self, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        matrix = self.random_matrix.expand(*value.shape[:2], -1, -1) if output_matrix else None
        return self.random_matrix @ value, matrix


class Pooling(TokenMixer):
    """Average of the 3 x 3 patches around a patch, minus the patch (PoolFormer, Yu et al., arXiv 2111.11418, eq. 4).

    Averages leave out the outside of the grid. Class tokens get the mean of all tokens, minus themselves; patches do not see
    them. No parameters.
    """

    takes_layout = True

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout):
        super().__init__(num_heads, layout)

    def mix_tokens(self, x: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        if not output_matrix:
            return pool_tokens(x, layout), None
        B, N, _ = x.shape
        matrix = pool_tokens(torch.eye(N, dtype=x.dtype, device=x.device)[None], layout)
        return pool_tokens(x, layout), matrix.expand(B, self.num_heads, N, N)


def pool_tokens(x: Tensor, layout: TokenLayout) -> Tensor:
    """Average over the 3 x 3 patches around each patch, minus the token: (B, N, d) -> the same."""
    return join_tokens(x.mean(dim=1, keepdim=True), average(as_image(x, layout)), layout) - x


def average(image: Tensor) -> Tensor:
    """Average over the 3 x 3 pixels around each that are inside the image: (B, C, H, W) -> the same."""
    return F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)


class Pooling2d(nn.Module):
    """Average of the 3 x 3 pixels around a pixel, minus the pixel (PoolFormer, arXiv 2111.11418), then a 1 x 1 convolution:
    (B, C_in, H, W) -> (B, C_out, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(average(x) - x)
