"""Token mixers on sequences (B, C, N): ConvNN, ConvNN attention and attention.

The same classes serve images: `layers2d.py` sets `axes = 2` and swaps the shuffles. Each forward folds the
image into tokens (B, N, C), mixes them, and unfolds the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neighbors import (
    NeighborConfig,
    aggregate,
    coordinates,
    find_neighbors,
    grid_places,
    join_coordinates,
    location_neighbors,
    neighbor_weights,
    random_candidates,
    raster_index,
    spatial_candidates,
)
from options import CONVOLUTION_TYPES, SHUFFLE_PATTERNS, shuffle_factors


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
        grid: sides of the grid, ring included.
    """

    def __init__(
        self,
        neighbors: NeighborConfig,
        *,
        axes: int,
        self_first: bool,
        padding: int = 0,
        grid: tuple[int, ...] | None = None,
    ):
        super().__init__()
        neighbors.check_candidates(grid, axes=axes)
        self.neighbors = neighbors
        self.self_first = self_first
        self.padding = padding
        if grid is not None:
            self._tables(grid, device=None)

    def extra_repr(self) -> str:
        return f"{self.neighbors}, padding={self.padding}"

    def forward(self, query: Tensor, key: Tensor, grid: tuple[int, ...]) -> Tensor:
        """query (B, N, C), key (B, M, C), both joined with coordinates where asked for -> index (B, N, K)."""
        cfg = self.neighbors
        tables = self._tables(grid, key.device)
        own, candidates = tables["inner"], tables.get("candidates")
        if cfg.sampling == "random" and self.training:
            candidates = random_candidates(key.shape[1], cfg.num_samples, device=key.device)
        if cfg.similarity_type == "Loc":
            index = tables.get("nearest")
            if index is None or candidates is not tables.get("candidates"):
                index = location_neighbors(tables["places"], cfg.K, own, candidates)
            return index.expand(query.shape[0], -1, -1)
        if candidates is None and not self.self_first:
            own = None
        return find_neighbors(query, key, cfg.K, cfg.metric, candidates=candidates, self_index=own)

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
        return coordinates(self._tables(grid, x.device)["places"], grid, x.dtype)

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
        cfg, pad = self.neighbors, self.padding
        cfg.check_candidates(grid, axes=len(grid))
        places = grid_places(grid)
        inner = raster_index(grid, [torch.arange(pad, side - pad) for side in grid])
        tables = {"places": places, "inner": inner}
        if cfg.sampling == "spatial":
            tables["candidates"] = spatial_candidates(grid, cfg.num_samples, cfg.sample_padding)
        elif cfg.sampling == "random":  # those of evaluation; training draws its own
            tables["candidates"] = random_candidates(math.prod(grid), cfg.num_samples, fixed=True)
        if cfg.similarity_type == "Loc":
            tables["nearest"] = location_neighbors(places, cfg.K, tables["inner"], tables.get("candidates"))
        return tables


def make_slot_convolution(in_channels: int, out_channels: int, K: int, convolution_type: str) -> nn.Module:
    """The convolution over K slots of ConvNN attention, without bias; depthwise weights start at one.

    Raises ValueError for an unknown type, and for `depthwise` where input and output channels differ.
    """
    if convolution_type not in CONVOLUTION_TYPES:
        raise ValueError(f"convolution_type={convolution_type!r} is not one of {', '.join(CONVOLUTION_TYPES)}")
    if convolution_type == "standard":
        return nn.Conv1d(in_channels, out_channels, K, stride=K, bias=False)
    depthwise = nn.Conv1d(in_channels, in_channels, K, stride=K, groups=in_channels, bias=False)
    nn.init.ones_(depthwise.weight)
    if convolution_type == "depthwise-separable":
        return nn.Sequential(depthwise, nn.Conv1d(in_channels, out_channels, 1, bias=False))
    if in_channels != out_channels:
        raise ValueError(
            "aggregation_type='Loc_Col' appends coordinates to the values, so it needs "
            "convolution_type='standard' or 'depthwise-separable', not 'depthwise'"
        )
    return depthwise


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
        appended = self.axes * (neighbors.aggregation_type == "Loc_Col")
        self.conv = make_slot_convolution(D + appended, D, neighbors.K, convolution_type)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)  # (B, N, D) each
        query, key = self.select.compared(query, grid), self.select.compared(key, grid)
        index = self.select(query, key, grid)  # (B, N, K)
        weights = neighbor_weights(query, key, index, self.select.neighbors.metric, softmax=self.softmax_topk_val)
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
