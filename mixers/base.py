"""Base classes of the mixers: the layout of tokens, projections and heads, softmax attention, images as tokens.

A mixer on (B, N, d_model) is a `MultiHeadMixer` with a `mix` of the values of its heads, or a `TokenMixer` without heads.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from options.checks import check_dropout, check_heads, sequence_grid, shuffle_factors
from options.layers import SHUFFLE_PATTERNS


def check_at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_one_of(names: Iterable[str], **arguments: str) -> None:
    for name, value in arguments.items():
        if value not in names:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(names)}")


@dataclass(frozen=True)
class TokenLayout:
    """Layout of the N tokens of a sequence: class tokens first, then a grid of patches in raster order.

    Register tokens (arXiv 2309.16588), which have no place in the grid, count as class tokens. A single row or column of
    patches is a sequence without a grid.
    """

    height: int
    width: int
    class_tokens: int = 0

    def __post_init__(self):
        if self.height < 1 or self.width < 1 or self.class_tokens < 0:
            raise ValueError(f"{self} needs at least one patch, and no fewer than 0 class tokens")

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.class_tokens + self.num_patches

    @property
    def sides(self) -> tuple[int, int, int]:
        """Height, width and class tokens."""
        return self.height, self.width, self.class_tokens

    @property
    def grid(self) -> tuple[int, ...]:
        """Sides of the grid: (height, width), or (length,) for a sequence."""
        return sequence_grid((self.height, self.width))


def as_image(x: Tensor, layout: TokenLayout) -> Tensor:
    """Arrange the patches of tokens (B, N, d) on their grid: (B, d, height, width)."""
    return x[:, layout.class_tokens :].mT.unflatten(2, (layout.height, layout.width))


def join_tokens(first: Tensor, image: Tensor, layout: TokenLayout) -> Tensor:
    """Put `first` (B, 1, d) for every class token before the patches of (B, d, height, width): (B, N, d)."""
    return torch.cat([first.expand(-1, layout.class_tokens, -1).to(image.dtype), image.flatten(2).mT], dim=1)


@torch.compiler.assume_constant_result
def accepts_layout(module: nn.Module) -> bool:
    """Return True if the forward pass of a block or mixer has an argument `layout`, or takes any by name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.name == "layout" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def layout_argument(module: nn.Module, layout: TokenLayout | None) -> dict[str, TokenLayout]:
    """Collect the keyword arguments that tell a block or mixer the layout of its tokens; None: it knows."""
    return {} if layout is None or not accepts_layout(module) else {"layout": layout}


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "forward")


@torch.compiler.assume_constant_result
def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if calling the module only applies the function of `kind` to its weight.

    Then an operator may read the weight instead. It may not for modules with hooks or parametrizations, pruned, wrapped,
    quantized or replaced ones.
    """
    return type(module) is kind and not any(vars(module).get(name) for name in HOOKS)


def scaled_products(query: Tensor, key: Tensor) -> Tensor:
    """Return q k^T / sqrt(d): (..., N, d) and (..., M, d) -> (..., N, M).

    The query is scaled first, as in PyTorch's attention: unscaled products may be too large for float16.
    """
    return (query / math.sqrt(query.shape[-1])) @ key.mT


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0, output_matrix: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention among the pairs that `mask` (N, M) allows: (B, H, N, d), and with output_matrix the softmax."""
    if not output_matrix:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = scaled_products(query, key)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    matrix = scores.softmax(dim=-1)
    return F.dropout(matrix, dropout).to(value.dtype) @ value, matrix


Bias = bool | tuple[bool, bool]  # of all projections, or of (the ones before mixing, the one after)


def both_biases(bias: Bias) -> tuple[bool, bool]:
    return bias if isinstance(bias, tuple) else (bias, bias)


class TokenMixer(nn.Module):
    """Base of mixers of tokens, (B, N, d_model) -> (B, N, d_model), that override `mix_tokens`.

    With `takes_layout`, `mix_tokens` gets the layout of the tokens as its last argument, and the mixer runs on every grid,
    unless `per_token` names a parameter with as many rows or columns as there are tokens.

    Args:
        num_heads: heads of the mixing matrix.
        layout: layout of the tokens, for mixers that need it; `forward` takes another. Without, tokens are a sequence.

    Raises ValueError without a layout where `per_token` needs one.
    """

    takes_layout = False
    per_token = ""

    def __init__(self, num_heads: int, layout: TokenLayout | None = None):
        super().__init__()
        if layout is None and self.per_token:
            raise ValueError(f"{type(self).__name__} has parameters for every token; give layout=TokenLayout(height, width)")
        self.num_heads = num_heads
        self.layout = layout

    def forward(
        self, x: Tensor, output_attentions: bool = False, layout: TokenLayout | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x (B, N, d_model) -> the same; with output_attentions also the mixing matrix (B, H, N, N), None for convolutions.

        layout: layout of the N tokens; None: as at construction, or a sequence. Raises ValueError if it does not fit.
        """
        layout = layout or self.layout
        if self.layout is not None and layout != self.layout and not self.runs_on_any_layout:
            raise ValueError(f"tokens of {layout} were given, and the layer was made for {self.layout}")
        if self.layout is not None and x.shape[1] != layout.num_tokens:
            raise ValueError(f"{x.shape[1]} tokens were given, and the layer was made for {layout}")
        given = (layout or TokenLayout(1, x.shape[1]),) if self.takes_layout else ()
        out, matrix = self.mix_tokens(x, output_attentions, *given)
        return (out, matrix) if output_attentions else out

    def mix_tokens(self, x: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, N, d_model) -> mixed tokens (B, N, d_model), and with output_matrix the matrix (B, H, N, N)."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialize parameters in the mixer's own way, after the model has initialized its linears."""

    @property
    def runs_on_any_layout(self) -> bool:
        return self.layout is None or (self.takes_layout and not self.per_token)


class MultiHeadMixer(TokenMixer):
    """Base of mixers with projections and heads.

    A mixer overrides `mix`, and, for other projections, `make_projection` and `project`. With `takes_layout`, `project` and
    `mix` get the layout of the tokens as their last argument.

    Args:
        num_heads: heads of d_model / num_heads features each.
        layout: layout of the tokens, for mixers that need it; `forward` takes another. Without, tokens are a sequence.
        attention_dropout: probability of dropping a weight of a pair of tokens.
        bias: of all projections, or (of the ones before mixing, of the one after).

    Raises ValueError if num_heads does not divide d_model, or attention_dropout is not in [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout | None = None,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(num_heads, layout)
        check_heads(d_model, num_heads)
        check_dropout(attention_dropout)
        self.head_dim = d_model // num_heads
        self.attention_dropout = attention_dropout
        before, after = both_biases(bias)
        self.make_projection(d_model, before)
        self.proj = nn.Linear(d_model, d_model, bias=after)

    def mix_tokens(self, x: Tensor, output_matrix: bool, *layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        out, matrix = self.mix(*self.project(x, *layout), output_matrix, *layout)  # (B, H, N, d)
        return self.proj(out.transpose(1, 2).flatten(2)), matrix

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        """(B, N, d_model) -> inputs of `mix`, here query, key and value of every head: (B, H, N, d) each."""
        return tuple(self.split_heads(part) for part in self.project_features(x))

    def project_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, d_model) -> query, key and value of all heads, (B, N, d_model) each."""
        return self.qkv(x).chunk(3, dim=2)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, d_model) -> (B, H, N, d)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        """(B, H, N, d) each -> mixed values (B, H, N, d), and with output_matrix the matrix (B, H, N, N)."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Probability of dropping a weight: 0 in evaluation."""
        return self.attention_dropout if self.training else 0.0


class ValueMixer(MultiHeadMixer):
    """Base of mixers whose weights do not depend on the tokens: only values are projected, and `mix` gets nothing else."""

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.value = nn.Linear(d_model, d_model, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        return (self.split_heads(self.value(x)),)


def mixing_matrix(index: Tensor, weights: Tensor, heads: int, num_keys: int | None = None) -> Tensor:
    """Scatter the weights of the K neighbors (B * H, N, K) to (B, H, N, num_keys); num_keys is N if not given."""
    BH, N, _ = index.shape
    return weights.new_zeros(BH, N, num_keys or N).scatter(2, index, weights).unflatten(0, (-1, heads))


class PixelUnshuffle(nn.PixelUnshuffle):
    """Move blocks of `scale` tokens along every side into channels: (B, C, *sides) -> (B, C * scale^axes, *sides / scale).

    On images as PyTorch's, which leaves a batch of no images as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        axes = x.ndim - 2
        for axis in range(1 + axes, 1, -1):
            x = x.unflatten(axis, (-1, self.downscale_factor))  # (B, C, H / scale, scale, W / scale, scale) in the end
        return x.permute(0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)).flatten(1, 1 + axes)


class PixelShuffle(nn.PixelShuffle):
    """The inverse of `PixelUnshuffle`: (B, C * scale^axes, *sides) -> (B, C, *sides * scale)."""

    def forward(self, x: Tensor) -> Tensor:
        axes = x.ndim - 2
        x = x.unflatten(1, (-1, *[self.upscale_factor] * axes))  # (B, C, scale, scale, H, W)
        x = x.permute(0, 1, *(side for axis in range(2, 2 + axes) for side in (axis + axes, axis)))
        for axis in range(2, 2 + axes):
            x = x.flatten(axis, axis + 1)
        return x


class ImageMixer(nn.Module):
    """Base of mixers on images: shuffle patterns, and the fold of (B, C, *sides) into tokens (B, N, C) and back."""

    axes = 2

    def __init__(self, in_channels: int, out_channels: int, shuffle_pattern: str, shuffle_scale: int):
        super().__init__()
        check_one_of(SHUFFLE_PATTERNS, shuffle_pattern=shuffle_pattern)
        check_at_least(0 if shuffle_pattern == "NA" else 1, shuffle_scale=shuffle_scale)
        before, after = shuffle_factors(shuffle_pattern, shuffle_scale, self.axes)
        self.shuffle_scale = shuffle_scale
        self.token_channels = in_channels * before, out_channels * after
        self.unshuffle = PixelUnshuffle(shuffle_scale) if "B" in shuffle_pattern else nn.Identity()
        self.shuffle = PixelShuffle(shuffle_scale) if shuffle_pattern in ("A", "BA") else nn.Identity()

    def token_grid(self, image_size: int | tuple[int, ...] | None, padding: int = 0) -> tuple[int, ...] | None:
        """Sides of the grid of tokens of an input of this size. Raises ValueError if the scale does not divide them."""
        if image_size is None:
            return None
        sides = (image_size,) * self.axes if isinstance(image_size, int) else tuple(image_size)
        scale = 1 if isinstance(self.unshuffle, nn.Identity) else self.shuffle_scale
        if any(side % scale for side in sides):
            raise ValueError(f"shuffle_scale={scale} does not divide the {' x '.join(map(str, sides))} input")
        return tuple(side // scale + 2 * padding for side in sides)

    def fold(self, x: Tensor, padding: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        """(B, C, *sides) -> unshuffled tokens (B, N, C) inside a ring of zeros, and the sides of their grid."""
        self.token_grid(tuple(x.shape[2:]))
        x = F.pad(self.unshuffle(x), (padding, padding) * self.axes)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def unfold(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens (B, N, C) -> (B, C, *grid), shuffled."""
        return self.shuffle(tokens.transpose(1, 2).unflatten(2, grid))
