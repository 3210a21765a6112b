"""Token mixers on sequences: ConvNN, ConvNN attention, attention, convolution, k-NN attention, and two of them side by side.

Those on (B, C, N) come first: `ConvNN1d`, `ConvNNAttention1d`, `Attention1d`. The same classes serve images:
`layers2d.py` sets `axes = 2` and swaps the shuffles. Each forward folds the image into tokens (B, N, C), mixes them, and
unfolds the result.

Those on (B, N, d_model), for transformers, are a `MultiHeadMixer` each: projections, heads and output projection are
written there once, and a mixer is its `mix`. A `TokenLayout` says what the N tokens are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neighbors import (
    NeighborConfig,
    aggregate,
    coordinates,
    find_neighbors,
    find_scored_neighbors,
    grid_places,
    join_coordinates,
    location_neighbors,
    neighbor_scores,
    neighbor_weights,
    random_candidates,
    raster_index,
    spatial_candidates,
    weighted_sum,
)
from options import SHUFFLE_PATTERNS, branch_widths, check_heads, check_slots, sequence_grid, shuffle_factors


class PixelUnshuffle1d(nn.Module):
    """Move blocks of `scale` neighboring tokens into channels: (B, C, N) -> (B, C * scale, N / scale)."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        B, C, N = x.shape
        if N % self.scale:
            raise ValueError(f"shuffle_scale={self.scale} does not divide the {N} tokens")
        return x.view(B, C, N // self.scale, self.scale).transpose(2, 3).reshape(B, C * self.scale, -1)


class PixelShuffle1d(nn.Module):
    """The inverse of `PixelUnshuffle1d`: (B, C * scale, N) -> (B, C, N * scale)."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        B, C, N = x.shape
        if C % self.scale:
            raise ValueError(f"shuffle_scale={self.scale} does not divide the {C} channels")
        return x.view(B, C // self.scale, self.scale, N).transpose(2, 3).reshape(B, C // self.scale, -1)


class NeighborSelection(nn.Module):
    """Which K tokens each token is mixed with: a `NeighborConfig` applied to grids of tokens.

    What depends on the shape of the grid only is made once per shape, in the constructor where `grid` is known, and
    kept as non-persistent buffers.

    Args:
        neighbors: the rules.
        axes: sides of a grid, 1 or 2.
        self_first: slot 0 is the token itself in `all` mode too (it always is among samples).
        padding: width of the ring around the tokens that are asked for.
        class_tokens: tokens before those of the grid; they are always candidates, and their place is its center.
        grid: sides of the grid, ring included.
    """

    def __init__(
        self,
        neighbors: NeighborConfig,
        *,
        axes: int,
        self_first: bool,
        padding: int = 0,
        class_tokens: int = 0,
        grid: tuple[int, ...] | None = None,
    ):
        super().__init__()
        neighbors.check_candidates(grid, axes=axes, class_tokens=class_tokens)
        self.neighbors = neighbors
        self.self_first = self_first
        self.padding = padding
        self.class_tokens = class_tokens
        if grid is not None:
            self._tables(grid, device=None)

    def extra_repr(self) -> str:
        return f"{self.neighbors}, padding={self.padding}"

    def forward(
        self, query: Tensor, key: Tensor, grid: tuple[int, ...], scored: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """query (B, N, C), key (B, M, C), both joined with coordinates where asked for -> index (B, N, K).

        With `scored` also the scores of the neighbors (B, N, K), which carry the gradient.
        """
        index, allowed = self._allowed(key, grid)
        K, metric = self.neighbors.K, self.neighbors.metric
        if index is None:
            find = find_scored_neighbors if scored else find_neighbors
            return find(query, key, K, metric, **allowed)
        index = index.expand(query.shape[0], -1, -1)
        return (index, neighbor_scores(query, key, index, metric)) if scored else index

    def _allowed(self, key: Tensor, grid: tuple[int, ...]) -> tuple[Tensor | None, dict]:
        """The neighbors (N, K) if place decides, else what the search is told: candidates and the tokens themselves."""
        cfg = self.neighbors
        tables = self._tables(grid, key.device)
        own, candidates = tables["inner"], tables.get("candidates")
        if cfg.sampling == "random" and self.training:
            candidates = random_candidates(math.prod(grid), cfg.num_samples, self.class_tokens, key.device)
        if cfg.similarity_type == "Loc":
            index = tables.get("nearest")
            if index is None or candidates is not tables.get("candidates"):
                index = location_neighbors(self._centered(tables["places"], grid), cfg.K, own, candidates)
            return index, {}
        if candidates is None and not self.self_first:
            own = None
        return None, {"candidates": candidates, "self_index": own}

    def inner(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The tokens inside the ring: (B, M, C) -> (B, N, C)."""
        return tokens.index_select(1, self._tables(grid, tokens.device)["inner"]) if self.padding else tokens

    def compared(self, features: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What is compared: the features (B, M, C), under Loc_Col joined with their coordinates (B, M, C + axes)."""
        if self.neighbors.similarity_type != "Loc_Col":
            return features
        return join_coordinates(features, self._coordinates(features, grid), self.neighbors.lambda_param)

    def mixed(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What is mixed: the values (B, M, C), under aggregation_type Loc_Col with their coordinates appended."""
        if self.neighbors.aggregation_type != "Loc_Col":
            return values
        return torch.cat([values, self._coordinates(values, grid).expand(values.shape[0], -1, -1)], dim=2)

    def _coordinates(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return coordinates(self._tables(grid, x.device)["places"], grid, x.dtype, self.class_tokens)

    def _centered(self, places: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Places in half pixels from the center of the grid, where class tokens are: whole numbers, so distances are exact."""
        offsets = [2 * places[:, axis] - (side - 1) for axis, side in enumerate(grid)]
        return F.pad(torch.stack(offsets, dim=1), (0, 0, self.class_tokens, 0))

    def _tables(self, grid: tuple[int, ...], device) -> dict[str, Tensor]:
        """Constant tables of this shape of grid, by name."""
        suffix = "".join(f"_{side}" for side in grid)
        if f"places{suffix}" not in self._buffers:
            with torch.inference_mode(False):  # made while evaluating, they must still serve a backward pass
                tables = {name: table.to(device) for name, table in self._make_tables(grid).items()}
            for name, table in tables.items():
                self.register_buffer(name + suffix, table, persistent=False)
        return {name.removesuffix(suffix): table for name, table in self._buffers.items() if name.endswith(suffix)}

    def _make_tables(self, grid: tuple[int, ...]) -> dict[str, Tensor]:
        cfg, pad, class_tokens = self.neighbors, self.padding, self.class_tokens
        cfg.check_candidates(grid, axes=len(grid), class_tokens=class_tokens)
        places = grid_places(grid)
        inner = raster_index(grid, [torch.arange(pad, side - pad) for side in grid]) + class_tokens
        tables = {"places": places, "inner": torch.cat([torch.arange(class_tokens), inner])}
        if cfg.sampling == "spatial":
            tables["candidates"] = spatial_candidates(grid, cfg.num_samples, cfg.sample_padding, class_tokens)
        elif cfg.sampling == "random":  # those of evaluation; training draws its own
            tables["candidates"] = random_candidates(math.prod(grid), cfg.num_samples, class_tokens, fixed=True)
        if cfg.similarity_type == "Loc":
            centered = self._centered(places, grid)
            tables["nearest"] = location_neighbors(centered, cfg.K, tables["inner"], tables.get("candidates"))
        return tables


def score_neighbors(
    select: NeighborSelection, query: Tensor, key: Tensor, grid: tuple[int, ...], *, softmax: bool
) -> tuple[Tensor, Tensor]:
    """Neighbors between projected queries and keys (B, N, C), and what their values are multiplied by: (B, N, K) each."""
    index, scores = select(select.compared(query, grid), select.compared(key, grid), grid, scored=True)
    return index, neighbor_weights(scores, select.neighbors.metric, softmax=softmax)


def make_convolution(in_channels: int, out_channels: int, kernel_size: int, convolution_type: str, **geometry) -> nn.Module:
    """A 1-D convolution without bias: standard, depthwise, or depthwise-separable (depthwise, then 1 x 1)."""
    if convolution_type == "standard":
        return nn.Conv1d(in_channels, out_channels, kernel_size, bias=False, **geometry)
    depthwise = nn.Conv1d(in_channels, in_channels, kernel_size, groups=in_channels, bias=False, **geometry)
    if convolution_type == "depthwise":
        return depthwise
    pointwise = nn.Conv1d(in_channels, out_channels, 1, bias=False)
    nn.init.xavier_uniform_(pointwise.weight)  # a projection of features, initialized as the others are
    return nn.Sequential(depthwise, pointwise)


def make_slot_convolution(channels: int, coordinates: int, neighbors: NeighborConfig, convolution_type: str) -> nn.Module:
    """The convolution over K slots of ConvNN attention, without bias; depthwise weights start at one.

    channels of the values, coordinates that aggregation_type Loc_Col appends to them -> channels.
    Raises ValueError for an unknown type, and for `depthwise` with coordinates appended.
    """
    check_slots(convolution_type, neighbors.aggregation_type)
    inputs = channels + coordinates * (neighbors.aggregation_type == "Loc_Col")
    conv = make_convolution(inputs, channels, neighbors.K, convolution_type, stride=neighbors.K)
    if convolution_type != "standard":
        nn.init.ones_((conv if convolution_type == "depthwise" else conv[0]).weight)
    return conv


def slot_convolution(conv: nn.Module, values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Apply what `make_slot_convolution` made: values (B, M, C), index and weights (B, N, K) -> (B, N, D)."""
    if isinstance(conv, nn.Sequential):
        depthwise, pointwise = conv
        mixed = aggregate(values, index, depthwise.weight, weights, depthwise=True)
        return F.linear(mixed, pointwise.weight.squeeze(-1))
    return aggregate(values, index, conv.weight, weights, depthwise=conv.groups > 1)


class _Shuffled(nn.Module):
    """What the mixers share: shuffle patterns, and the fold of (B, C, *grid) into tokens (B, N, C) and back."""

    axes = 1

    def __init__(self, in_channels: int, out_channels: int, shuffle_pattern: str, shuffle_scale: int):
        super().__init__()
        if shuffle_pattern not in SHUFFLE_PATTERNS:
            raise ValueError(f"shuffle_pattern={shuffle_pattern!r} is not one of {', '.join(SHUFFLE_PATTERNS)}")
        before, after = shuffle_factors(shuffle_pattern, shuffle_scale, self.axes)
        self.shuffle_scale = shuffle_scale
        self.token_channels = in_channels * before, out_channels * after
        unshuffle, shuffle = (PixelUnshuffle1d, PixelShuffle1d) if self.axes == 1 else (nn.PixelUnshuffle, nn.PixelShuffle)
        self.unshuffle = unshuffle(shuffle_scale) if "B" in shuffle_pattern else nn.Identity()
        self.shuffle = shuffle(shuffle_scale) if shuffle_pattern in ("A", "BA") else nn.Identity()

    def token_grid(self, image_size: int | tuple[int, ...] | None, padding: int = 0) -> tuple[int, ...] | None:
        """Sides of the grid of tokens that an input of this size becomes. Raises ValueError if the scale does not divide."""
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


class ConvNN1d(_Shuffled):
    """Convolutional nearest neighbors (arXiv 2511.14137) on a sequence: (B, C_in, N) -> (B, C_out, N).

    `conv` convolves over the K neighbors that each token finds by similarity. With `similarity_type="Loc"` and a
    ring of p zeros, K = (2p + 1)^axes neighbors are the window of a convolution, and a convolution is what runs.

    Args:
        neighbors: which tokens are neighbors; the token itself is always slot 0 (`Loc` among all: raster order).
        shuffle_pattern, shuffle_scale: B unshuffles before, A shuffles after, BA both, NA neither.
        padding: width of a ring of zero tokens that takes part in the search.
        image_size: size of the input if known, so that tables are made, and errors raised, at construction.

    Raises ValueError if K, the samples or the shuffle do not fit the tokens.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig,
        *,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        padding: int = 0,
        bias: bool = True,
        image_size: int | tuple[int, ...] | None = None,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        if padding < 0:
            raise ValueError(f"padding={padding} must be at least 0")
        self.padding = padding
        grid = self.token_grid(image_size, padding)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=True, padding=padding, grid=grid)
        inputs, outputs = self.token_channels
        inputs += self.axes * (neighbors.aggregation_type == "Loc_Col")
        self.conv = nn.Conv1d(inputs, outputs, neighbors.K, stride=neighbors.K, bias=bias)
        window = (2 * padding + 1) ** self.axes
        self.is_convolution = (
            neighbors.similarity_type == "Loc" and neighbors.sampling == "all" and neighbors.K == window and padding <= 2
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x, self.padding)  # (B, M, C), ring included
        values = self.select.mixed(tokens, grid)
        inner = tuple(side - 2 * self.padding for side in grid)
        if self.is_convolution:
            kernel = (2 * self.padding + 1,) * self.axes
            convolve = F.conv1d if self.axes == 1 else F.conv2d
            image = values.transpose(1, 2).unflatten(2, grid)
            return self.shuffle(convolve(image, self.conv.weight.unflatten(2, kernel), self.conv.bias))
        compared = self.select.compared(tokens.detach(), grid)
        index = self.select(self.select.inner(compared, grid), compared, grid)  # (B, N, K)
        out = aggregate(values, index, self.conv.weight)  # (B, N, D)
        return self.unfold(out if self.conv.bias is None else out + self.conv.bias.to(out.dtype), inner)


class ConvNNAttention1d(_Shuffled):
    """ConvNN attention (arXiv 2511.14137) on a sequence: (B, C_in, N) -> (B, C_out, N).

    Neighbors are found between projected queries and keys; the projected values of the K slots are multiplied by the
    softmax of their scores (or the raw scores) and convolved over the slots. One head.

    Args:
        neighbors: which tokens are neighbors; in `all` mode a token competes for its own slots like any other.
        convolution_type: over the slots, standard, depthwise or depthwise-separable, without bias.
        softmax_topk_val: weigh values by the softmax of the scores; False: by the raw scores.
        attention_dropout: probability of dropping a weight.
        shuffle_pattern, shuffle_scale, image_size: as in `ConvNN1d`.

    Raises ValueError if K, the samples, the shuffle or the convolution type do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        neighbors: NeighborConfig,
        *,
        convolution_type: str = "standard",
        softmax_topk_val: bool = True,
        attention_dropout: float = 0.0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        image_size: int | tuple[int, ...] | None = None,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        grid = self.token_grid(image_size)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=False, grid=grid)
        self.softmax_topk_val = softmax_topk_val
        inputs, D = self.token_channels
        self.qkv = nn.Linear(inputs, 3 * D)
        self.conv = make_slot_convolution(D, self.axes, neighbors, convolution_type)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)  # (B, N, D) each
        index, weights = score_neighbors(self.select, query, key, grid, softmax=self.softmax_topk_val)
        out = slot_convolution(self.conv, self.select.mixed(value, grid), index, self.dropout(weights))
        return self.unfold(self.proj(out), grid)


class Attention1d(_Shuffled):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762) on a sequence: (B, C_in, N) -> (B, C_out, N).

    Raises ValueError if num_heads does not divide the channels that attention runs on.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int,
        *,
        attention_dropout: float = 0.0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        inputs, D = self.token_channels
        if num_heads < 1 or D % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {D} channels that attention runs on")
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(inputs, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.unfold(self.proj(out.transpose(1, 2).flatten(2)), grid)


# ---------------------------------------------------------------------------------------------------------------
# Mixers on (B, N, d_model)
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLayout:
    """What the N tokens of a sequence are: class tokens first, then a grid of patches in raster order.

    A single row or column of patches is a sequence without a grid.
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
    def grid(self) -> tuple[int, ...]:
        """Sides of the grid: (height, width), or (length,) of a sequence."""
        return sequence_grid((self.height, self.width))


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0, output_matrix: bool = False
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d)) v among the pairs that `mask` (N, M) allows: (B, H, N, d), and the softmax if asked for."""
    if not output_matrix:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    matrix = scores.softmax(dim=-1)
    return F.dropout(matrix, dropout).to(value.dtype) @ value, matrix


class MultiHeadMixer(nn.Module):
    """What mixers of tokens (B, N, d_model) -> (B, N, d_model) share: projections, heads, and the mixing matrix.

    A mixer overrides `mix`, and `make_projection` and `project` where it projects otherwise.

    Args:
        num_heads: heads of d_model / num_heads features each; raises ValueError if that is not whole.
        layout: what the tokens are, where that matters to the mixer.
        attention_dropout: probability of dropping a weight of a pair of tokens.
        bias: of all projections.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout | None = None,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        check_heads(d_model, num_heads)
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.layout = layout
        self.attention_dropout = attention_dropout
        self.make_projection(d_model, bias)
        self.proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """x (B, N, d_model) -> the same; with output_attentions also the mixing matrix (B, H, N, N), None for convolutions."""
        if self.layout is not None and x.shape[1] != self.layout.num_tokens:
            raise ValueError(f"{x.shape[1]} tokens were given, and the layer was made for {self.layout}")
        out, matrix = self.mix(*self.project(x), output_attentions)  # (B, H, N, d)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, matrix) if output_attentions else out

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)

    def init_weights(self) -> None:
        """What a mixer initializes by itself, after the model has initialized its linears."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, d_model) -> what `mix` mixes, here query, key and value of every head: (B, H, N, d) each."""
        return tuple(self.split_heads(part) for part in self.qkv(x).chunk(3, dim=2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, d_model) -> (B, H, N, d)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        """(B, H, N, d) each -> mixed values (B, H, N, d), and the matrix (B, H, N, N) if asked for."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Probability of dropping a weight now."""
        return self.attention_dropout if self.training else 0.0


class MultiHeadAttention(MultiHeadMixer):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762): every token attends to all."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        return attend(query, key, value, dropout=self.dropout, output_matrix=output_matrix)


def mixing_matrix(index: Tensor, weights: Tensor, heads: int) -> Tensor:
    """Weights of the K neighbors (B * H, N, K) scattered to (B, H, N, N)."""
    BH, N, _ = index.shape
    return weights.new_zeros(BH, N, N).scatter(2, index, weights).unflatten(0, (-1, heads))


class MultiHeadConvNNAttention(MultiHeadMixer):
    """ConvNN attention (arXiv 2511.14137): per head K neighbors between queries and keys, then a convolution over them.

    The values of the K slots are multiplied by the softmax of their scores (or the raw scores); `conv`, shared by all
    heads, convolves over the slots. With K = N, matmul and depthwise weights of one it is `MultiHeadAttention`.

    Args:
        neighbors: which tokens are neighbors; class tokens are always candidates, and their place is the center.
        convolution_type: over the slots, standard, depthwise or depthwise-separable, without bias.
        softmax_topk_val: weigh values by the softmax of the scores; False: by the raw scores.

    Raises ValueError if K, the samples, the heads or the convolution type do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig,
        *,
        layout: TokenLayout,
        convolution_type: str = "depthwise",
        softmax_topk_val: bool = True,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        grid = layout.grid
        self.select = NeighborSelection(
            neighbors, axes=len(grid), self_first=False, class_tokens=layout.class_tokens, grid=grid
        )
        self.softmax_topk_val = softmax_topk_val
        self.conv = make_slot_convolution(self.head_dim, len(grid), neighbors, convolution_type)
        if convolution_type == "standard" and softmax_topk_val:
            # The K weights of a softmax add up to one. So that the output has the scale of one projected value, every slot
            # starts as a projection of its own (Xavier); a convolution's default is made for a sum over K unweighted values.
            bound = math.sqrt(6 / (self.conv.in_channels + self.head_dim))
            nn.init.uniform_(self.conv.weight, -bound, bound)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        heads, grid = query.shape[:2], self.layout.grid
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)  # (B * H, N, d)
        index, weights = score_neighbors(self.select, query, key, grid, softmax=self.softmax_topk_val)
        out = slot_convolution(self.conv, self.select.mixed(value, grid), index, F.dropout(weights, self.dropout))
        return out.unflatten(0, heads), mixing_matrix(index, weights, self.num_heads) if output_matrix else None


class MultiHeadConvNN(MultiHeadConvNNAttention):
    """ConvNN (arXiv 2511.14137) whose queries, keys and values are projected along the sequence, N -> N.

    Heads split the features. Arguments and errors are those of `MultiHeadConvNNAttention`.
    """

    def make_projection(self, d_model: int, bias: bool) -> None:
        N = self.layout.num_tokens
        self.qkv = nn.Linear(N, 3 * N, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.qkv(x.transpose(1, 2)).chunk(3, dim=2)  # (B, d_model, N) each
        return tuple(self.split_heads(part.transpose(1, 2)) for part in parts)


class MultiHeadKvtAttention(MultiHeadMixer):
    """k-NN attention (KVT, Wang et al., arXiv 2106.00515): softmax over the K largest scores of a query, the rest zero.

    With K = N it is `MultiHeadAttention`. Raises ValueError for a K that is more than there are tokens.
    """

    def __init__(self, d_model: int, num_heads: int, K: int, *, attention_dropout: float = 0.0, bias: bool = True):
        super().__init__(d_model, num_heads, attention_dropout=attention_dropout, bias=bias)
        if K < 1:
            raise ValueError(f"K={K} must be at least 1")
        self.K = K

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        heads = query.shape[:2]
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)  # (B * H, N, d)
        index, scores = find_scored_neighbors(query, key, self.K, "matmul")  # (B * H, N, K) each
        weights = neighbor_weights(scores, "matmul")
        out = weighted_sum(value, index, F.dropout(weights, self.dropout))
        return out.unflatten(0, heads), mixing_matrix(index, weights, self.num_heads) if output_matrix else None


class MultiHeadConv1dAttention(MultiHeadMixer):
    """Convolution along the sequence where attention would be: values projected, convolved head by head, projected.

    `conv`, shared by all heads, runs over the features of one head and the `kernel_size` tokens around each. The class token
    is the first of the sequence: what it sees grows by (kernel_size - 1) / 2 patches a layer, the first ones of the image.

    Args:
        convolution_type: standard, depthwise or depthwise-separable, without bias.

    Raises ValueError if the heads, the kernel or the convolution type do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        kernel_size: int,
        *,
        layout: TokenLayout,
        convolution_type: str = "standard",
        bias: bool = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        check_slots(convolution_type, "Col")
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} must be at least 1")
        self.reach = (kernel_size - 1) // 2, kernel_size // 2  # tokens before and after
        self.conv = make_convolution(self.head_dim, self.head_dim, kernel_size, convolution_type)

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.value = nn.Linear(d_model, d_model, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.split_heads(self.value(x)),)

    def mix(self, value: Tensor, output_matrix: bool) -> tuple[Tensor, None]:
        heads = value.shape[:2]
        out = self.conv(F.pad(value.flatten(0, 1).transpose(1, 2), self.reach))  # (B * H, d, N)
        return out.transpose(1, 2).unflatten(0, heads), None


class MultiHeadConv1d(MultiHeadConv1dAttention):
    """`MultiHeadConv1dAttention` with the values projected along the sequence, N -> N, instead of along the features."""

    def make_projection(self, d_model: int, bias: bool) -> None:
        N = self.layout.num_tokens
        self.value = nn.Linear(N, N, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.split_heads(self.value(x.transpose(1, 2)).transpose(1, 2)),)


class Branching1d(nn.Module):
    """Two mixers side by side: `first` mixes the first features, `second` the rest, and a linear joins them.

    (B, N, first + second) -> the same. The mixing matrix, if asked for, is the mean of the branches' matrices, head by
    head, weighed by their features; a convolution has none.
    """

    def __init__(self, first: nn.Module, second: nn.Module, widths: tuple[int, int], *, bias: bool = True):
        super().__init__()
        self.first = first
        self.second = second
        self.widths = widths
        self.proj = nn.Linear(sum(widths), sum(widths), bias=bias)

    def forward(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        parts = x.split(self.widths, dim=2)
        if not output_attentions:
            return self.proj(torch.cat([self.first(parts[0]), self.second(parts[1])], dim=2))
        (one, matrix), (two, other) = self.first(parts[0], True), self.second(parts[1], True)
        if other is not None:
            share = self.widths[0] / sum(self.widths)
            matrix = share * matrix + (1 - share) * other
        return self.proj(torch.cat([one, two], dim=2)), matrix


class BranchingAttention(Branching1d):
    """ConvNN attention on the first `branch_ratio` of the features beside attention on the rest, then a linear.

    Arguments are those of `MultiHeadConvNNAttention`; each branch has `num_heads` heads. Raises ValueError as it does,
    and if the heads do not divide both parts of the features.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig,
        *,
        layout: TokenLayout,
        branch_ratio: float = 0.5,
        convolution_type: str = "depthwise",
        softmax_topk_val: bool = True,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        widths = branch_widths(d_model, num_heads, branch_ratio)
        convnn = MultiHeadConvNNAttention(
            widths[0],
            num_heads,
            neighbors,
            layout=layout,
            convolution_type=convolution_type,
            softmax_topk_val=softmax_topk_val,
            attention_dropout=attention_dropout,
            bias=bias,
        )
        attention = MultiHeadAttention(widths[1], num_heads, attention_dropout=attention_dropout, bias=bias)
        super().__init__(convnn, attention, widths, bias=bias)


class BranchingConv(Branching1d):
    """ConvNN attention on the first `branch_ratio` of the features beside a convolution on the rest, then a linear.

    Arguments and errors are those of `BranchingAttention`, `kernel_size` that of `MultiHeadConv1dAttention`; without a
    `convolution_type` each branch has its own default, depthwise over the slots and standard along the sequence.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig,
        kernel_size: int,
        *,
        layout: TokenLayout,
        branch_ratio: float = 0.5,
        convolution_type: str | None = None,
        softmax_topk_val: bool = True,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        widths = branch_widths(d_model, num_heads, branch_ratio)
        convnn = MultiHeadConvNNAttention(
            widths[0],
            num_heads,
            neighbors,
            layout=layout,
            convolution_type=convolution_type or "depthwise",
            softmax_topk_val=softmax_topk_val,
            attention_dropout=attention_dropout,
            bias=bias,
        )
        conv = MultiHeadConv1dAttention(
            widths[1], num_heads, kernel_size, layout=layout, convolution_type=convolution_type or "standard", bias=bias
        )
        super().__init__(convnn, conv, widths, bias=bias)
