"""Mixers without attention between tokens: MLP-Mixer, FNet, GFNet, XCiT and focal modulation.

They hold no (N, N) matrix of weights. The global filter and focal modulation mix patches on their grid; their class tokens,
which the papers do not have, read the patches and are not read by them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import Bias, MultiHeadMixer, TokenLayout, TokenMixer, as_image, both_biases, join_tokens


class MlpMixer(TokenMixer):
    """Token mixing of MLP-Mixer (Tolstikhin et al., arXiv 2105.01601): one MLP over the N tokens for every feature.

    (B, N, d_model) -> the same, with d_model / 2 hidden units as in the paper. A class token is one of the tokens.
    """

    per_token = "input.weight"

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout, bias: Bias = True):
        super().__init__(num_heads, layout)
        before, after = both_biases(bias)
        N, hidden = layout.num_tokens, max(d_model // 2, 1)
        self.input = nn.Linear(N, hidden, bias=before)
        self.proj = nn.Linear(hidden, N, bias=after)

    def mix_tokens(self, x: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        return self.proj(F.gelu(self.input(x.mT))).mT, None


class FourierMixer(TokenMixer):
    """FNet (Lee-Thorp et al., arXiv 2105.03824): real part of the Fourier transform along tokens and features.

    (B, N, d_model) -> the same, no parameters. The transform is orthonormal, so that tokens keep their scale. A class token is
    the first of the sequence.
    """

    def __init__(self, d_model: int, num_heads: int):
        super().__init__(num_heads)

    def mix_tokens(self, x: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        if not x.numel():  # MKL transforms no empty batch
            return x, None
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.fft.fft2(x.to(wide), norm="ortho").real.to(x.dtype), None


class GlobalFilterMixer(TokenMixer):
    """Global filter (GFNet, Rao et al., arXiv 2107.00645, eq. 5): a complex weight for every frequency and feature.

    (B, N, d_model) -> the same, by a Fourier transform over the grid, a product and the transform back. `filter` (d_model, h,
    w / 2 + 1, 2) holds real and imaginary parts, random at first with the scale that keeps that of the tokens (the paper's code
    starts at 0.02). A class token gets the mean of all tokens.
    """

    takes_layout = True
    per_token = "filter"

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout):
        super().__init__(num_heads, layout)
        self.filter = nn.Parameter(torch.randn(d_model, layout.height, layout.width // 2 + 1, 2) / math.sqrt(2))

    def mix_tokens(self, x: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, None]:
        if not x.numel():  # MKL transforms no empty batch
            return x, None
        wide = torch.promote_types(x.dtype, torch.float32)
        image = torch.fft.rfft2(as_image(x, layout).to(wide), norm="ortho")  # (B, d, h, w / 2 + 1)
        image = image * torch.view_as_complex(self.filter.to(wide))
        image = torch.fft.irfft2(image, s=(layout.height, layout.width), norm="ortho").to(x.dtype)
        return join_tokens(x.mean(dim=1, keepdim=True), image, layout), None


class CrossCovarianceAttention(MultiHeadMixer):
    """Cross-covariance attention (XCiT, El-Nouby et al., arXiv 2106.09681, eq. 2): attention between features, not tokens.

    Every feature of a head gets a mean of the values of its features, by the softmax of the cosines over all tokens, times a
    learned `temperature` of the head. Tokens meet in the cosines only; a class token is one of them. O(N d^2 / heads).
    `attention_dropout` drops weights of pairs of features.
    """

    def __init__(self, d_model: int, num_heads: int, *, attention_dropout: float = 0.0, bias: Bias = True):
        super().__init__(d_model, num_heads, attention_dropout=attention_dropout, bias=bias)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        query, key = F.normalize(query, dim=2), F.normalize(key, dim=2)  # (B, H, N, d): features of length one
        weights = (query.mT @ key * self.temperature).softmax(dim=-1)  # (B, H, d, d)
        return value @ F.dropout(weights, self.dropout).to(value.dtype).mT, None


class FocalModulation(TokenMixer):
    """Focal modulation (FocalNet, Yang et al., arXiv 2203.11926, eq. 4 to 7): queries times a context gathered around them.

    (B, N, d_model) -> the same. Contexts are a depthwise 3 x 3 convolution, a 5 x 5 convolution of that, and its mean over the
    grid; gates of every patch weigh the three. A class token has the mean only.
    """

    takes_layout = True
    kernels = (3, 5)

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout, bias: Bias = True):
        super().__init__(num_heads, layout)
        before, after = both_biases(bias)
        self.widths = d_model, d_model, len(self.kernels) + 1
        self.input = nn.Linear(d_model, sum(self.widths), bias=before)
        self.conv = nn.ModuleList(
            nn.Conv2d(d_model, d_model, side, padding="same", groups=d_model, bias=False) for side in self.kernels
        )
        self.modulator = nn.Linear(d_model, d_model, bias=before)
        self.proj = nn.Linear(d_model, d_model, bias=after)

    def mix_tokens(self, x: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, None]:
        query, context, gates = self.input(x).split(self.widths, dim=2)
        *local, everywhere = gates.split(1, dim=2)  # (B, N, 1) each
        image, total = as_image(context, layout), 0.0
        for conv, gate in zip(self.conv, local, strict=True):
            image = F.gelu(conv(image))
            total = total + gate * join_tokens(torch.zeros_like(x[:, :1]), image, layout)
        total = total + everywhere * F.gelu(image.mean(dim=(2, 3)))[:, None]
        return self.proj(query * self.modulator(total)), None
