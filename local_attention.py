"""Attention chosen by place, on (B, N, d_model): local (sliding window), sparse (local and strided) and neighborhood.

A mixer here says which patches see which, as tilings: tiles of patches whose queries share a short list of keys. A tile
is a small dense attention under a mask, so time and memory grow with N x window. On short sequences, where tiles would
save little, one dense attention under one mask runs instead, with equal results. Class tokens attend to all and are
attended by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from layers1d import MultiHeadMixer, TokenLayout, attend
from options import check_window

NONE = -1  # fills up tiles that are shorter than others
TILES_PAY = 6  # times fewer scores than a dense attention computes: then gathering for tiles pays off (measured on a CPU)


class Tiling(NamedTuple):
    """Patches cut into T tiles of at most q; the patches of a tile see no others than its at most k keys."""

    queries: Tensor  # (T, q) patches, every one in one place; NONE fills up
    keys: Tensor  # (T, k) patches; NONE fills up
    sees: Callable[[Tensor, Tensor], Tensor]  # (i, j): whether patch i attends to patch j, element by element


def pad_tiles(tiles: Iterable[Iterable[int]]) -> Tensor:
    return pad_sequence([torch.tensor(list(tile)) for tile in tiles], batch_first=True, padding_value=NONE)


def window_tiling(length: int, reach: int) -> Tiling:
    """Blocks of a sequence, whose patches see what is at most `reach` away."""
    size = max(reach, 16)
    queries = [range(start, min(start + size, length)) for start in range(0, length, size)]
    keys = [range(max(tile[0] - reach, 0), min(tile[-1] + reach + 1, length)) for tile in queries]
    return Tiling(pad_tiles(queries), pad_tiles(keys), partial(is_near, reach=reach))


def is_near(i: Tensor, j: Tensor, *, reach: int) -> Tensor:
    return (i - j).abs() <= reach


def is_strided(i: Tensor, j: Tensor, *, context: int) -> Tensor:
    """A multiple of `context` away, and not within half of it."""
    return ((i - j) % context == 0) & ~is_near(i, j, reach=context // 2)


class Tiles(nn.Module):
    """A tiling as index tables: queries of patches and keys of tokens into tiles, and what comes out back in order.

    With `class_tokens`, every tile has them as keys too.
    """

    def __init__(self, tiling: Tiling, num_patches: int, class_tokens: int, first: bool):
        super().__init__()
        queries, keys, sees = tiling
        real = queries.flatten() != NONE
        places = torch.empty(num_patches, dtype=torch.long)
        places[queries.flatten()[real]] = real.nonzero().flatten()
        i, j = queries[:, :, None], keys[:, None]
        allowed = (j != NONE) & sees(i, j)
        keys = keys.clamp(min=0) + class_tokens
        if first and class_tokens:  # of several tilings, one brings the class tokens in
            keys = torch.cat([torch.arange(class_tokens).expand(len(keys), -1), keys], dim=1)
            allowed = F.pad(allowed, (class_tokens, 0), value=True)
        allowed |= i == NONE  # rows that nobody reads; a softmax over nothing would be NaN
        tables = {"queries": queries.clamp(min=0), "keys": keys, "allowed": allowed, "places": places}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def of_queries(self, rows: Tensor) -> Tensor:
        """(G, P, d) of the patches -> (G, T, q, d)."""
        return rows.index_select(1, self.queries.flatten()).unflatten(1, self.queries.shape)

    def of_keys(self, rows: Tensor) -> Tensor:
        """(G, N, d) of all tokens -> (G, T, k, d)."""
        return rows.index_select(1, self.keys.flatten()).unflatten(1, self.keys.shape)

    def in_order(self, tiles: Tensor) -> Tensor:
        """(G, T, q, d) -> (G, P, d)."""
        return tiles.flatten(1, 2).index_select(1, self.places)


class PlacedAttention(MultiHeadMixer):
    """Attention between the patches that one of the tilings allows; class tokens see all and are seen by all.

    Args:
        tilings: disjoint in the pairs they allow; without any, every patch sees every other.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        tilings: list[Tiling],
        *,
        layout: TokenLayout,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.sees = [tiling.sees for tiling in tilings]
        P = layout.num_patches
        cost = sum(tiling.queries.numel() * tiling.keys.shape[1] for tiling in tilings)
        self.is_dense = not tilings or TILES_PAY * cost > P * P
        if self.is_dense:
            self.register_buffer("mask", self.make_mask(torch.device("cpu")) if tilings else None, persistent=False)
        else:
            self.tiles = nn.ModuleList(Tiles(t, P, layout.class_tokens, n == 0) for n, t in enumerate(tilings))

    def make_mask(self, device: torch.device) -> Tensor:
        """(N, N), True where the row attends to the column."""
        i = torch.arange(self.layout.num_patches, device=device)
        allowed = torch.stack([sees(i[:, None], i) for sees in self.sees]).any(dim=0)
        c = self.layout.class_tokens
        return F.pad(allowed, (c, 0, c, 0), value=True)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool) -> tuple[Tensor, Tensor | None]:
        if self.is_dense or output_matrix:
            mask = self.mask if self.is_dense else self.make_mask(query.device)
            return attend(query, key, value, mask=mask, dropout=self.dropout, output_matrix=output_matrix)
        c, heads = self.layout.class_tokens, query.shape[:2]
        out = self.mix_tiles(query[:, :, c:].flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)).unflatten(0, heads)
        if c:
            out = torch.cat([attend(query[:, :, :c], key, value, dropout=self.dropout)[0], out], dim=2)
        return out, None

    def mix_tiles(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (G, P, d) of the patches, key and value (G, N, d) of all tokens -> (G, P, d)."""
        inside = [(tiles.of_queries(query), tiles.of_keys(key), tiles.of_keys(value)) for tiles in self.tiles]
        if len(self.tiles) == 1:
            return self.tiles[0].in_order(attend(*inside[0], mask=self.tiles[0].allowed, dropout=self.dropout)[0])
        # One softmax over the keys of all tilings.
        scores = []
        for tiles, (q, k, _) in zip(self.tiles, inside, strict=True):
            score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~tiles.allowed, -math.inf)
            scores.append(tiles.in_order(score))  # (G, P, k)
        weights = F.dropout(torch.cat(scores, dim=2).softmax(dim=2), self.dropout)
        parts = weights.split([score.shape[2] for score in scores], dim=2)
        out = 0
        for tiles, part, (_, _, v) in zip(self.tiles, parts, inside, strict=True):
            out = out + tiles.in_order(tiles.of_queries(part).to(v.dtype) @ v)
        return out


class MultiHeadLocalAttention(PlacedAttention):
    """Sliding-window attention (Beltagy et al., arXiv 2004.05150): tokens i and j attend if |i - j| <= window_size.

    Rotary positions (Su et al., arXiv 2104.09864) on queries and keys: feature pairs (n, n + d/2) are rotated by
    i / 10000^(2n/d), i the number of the token in the sequence; an odd last feature stays.

    Raises ValueError for a negative window_size.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        window_size: int,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        if window_size < 0:
            raise ValueError(f"window_size={window_size} must be at least 0")
        tiling = window_tiling(layout.num_patches, window_size)
        super().__init__(d_model, num_heads, [tiling], layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.register_buffer("positions", torch.arange(layout.num_tokens), persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = super().project(x)
        return rotate(query, self.positions), rotate(key, self.positions), value


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of whole-number positions (N,) on x (B, H, N, d)."""
    half = x.shape[-1] // 2
    # From whole numbers at every call, so that a model in float64 rotates in float64.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device).to(dtype) / half)
    angles = positions[:, None].to(dtype) * frequencies  # (N, d / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], dim=-1)


class MultiHeadSparseAttention(PlacedAttention):
    """Sparse attention (Child et al., arXiv 1904.10509), bidirectional.

    Args:
        mode: `local`, |i - j| <= context / 2; `strided`, that or (i - j) mod context = 0; `all`.
        context: the stride, and twice the reach to either side.

    Raises ValueError for an unknown mode or a context below 1.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        mode: str,
        context: int,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        if mode not in ("all", "local", "strided"):
            raise ValueError(f"mode={mode!r} is not one of all, local, strided")
        if context < 1:
            raise ValueError(f"context={context} must be at least 1")
        P = layout.num_patches
        local = window_tiling(P, context // 2)
        classes = pad_tiles(range(start, P, context) for start in range(min(context, P)))
        strided = Tiling(classes, classes, partial(is_strided, context=context))
        tilings = {"all": [], "local": [local], "strided": [local, strided]}[mode]
        super().__init__(d_model, num_heads, tilings, layout=layout, attention_dropout=attention_dropout, bias=bias)


class NeighborhoodAttention(PlacedAttention):
    """Neighborhood attention (Hassani et al., CVPR 2023; dilated: arXiv 2209.15001), without relative position biases.

    Every patch attends to the kernel_size x kernel_size patches around it, `dilation` apart; at the border the window
    slides inside the grid. A window as large as the grid is `MultiHeadAttention`.

    Raises ValueError if kernel_size is even, or times dilation more than a side of the grid.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        kernel_size: int,
        dilation: int = 1,
        attention_dropout: float = 0.0,
        bias: bool = True,
    ):
        check_window(kernel_size, dilation, (layout.height, layout.width))
        tiling = neighborhood_tiling(layout.height, layout.width, kernel_size, dilation)
        super().__init__(d_model, num_heads, [tiling], layout=layout, attention_dropout=attention_dropout, bias=bias)


def window_start(position: Tensor, side: int, kernel_size: int, dilation: int) -> Tensor:
    """Where the window of a patch starts along one side, among the patches that are a multiple of `dilation` from it."""
    length = (side - 1 - position % dilation) // dilation + 1
    return (position // dilation - kernel_size // 2).clamp(min=0).minimum(length - kernel_size)


def in_neighborhood(i: Tensor, j: Tensor, *, grid: tuple[int, int], kernel_size: int, dilation: int) -> Tensor:
    """Whether patch j is in the window of patch i, along both sides."""
    inside = True
    for own, other, side in zip((i // grid[1], i % grid[1]), (j // grid[1], j % grid[1]), grid, strict=True):
        steps = other // dilation - window_start(own, side, kernel_size, dilation)
        inside = inside & (own % dilation == other % dilation) & (steps >= 0) & (steps < kernel_size)
    return inside


def neighborhood_tiling(height: int, width: int, kernel_size: int, dilation: int) -> Tiling:
    """Rectangles of patches `dilation` apart; each patch sees kernel_size^2 that are as far apart from it."""

    def along(side: int) -> tuple[Tensor, Tensor]:
        """(T, q) and (T, k) positions along one side."""
        starts = window_start(torch.arange(side), side, kernel_size, dilation).tolist()
        queries, keys = [], []
        for offset in range(dilation):
            positions = range(offset, side, dilation)
            for start in range(0, len(positions), kernel_size):
                tile = positions[start : start + kernel_size]
                queries.append(tile)
                keys.append(positions[starts[tile[0]] : starts[tile[-1]] + kernel_size])
        return pad_tiles(queries), pad_tiles(keys)

    def product(rows: Tensor, columns: Tensor) -> Tensor:
        """Positions along both sides -> patches, (Ty * Tx, ny * nx)."""
        rows, columns = rows[:, None, :, None], columns[None, :, None, :]
        patches = torch.where((rows == NONE) | (columns == NONE), NONE, rows * width + columns)
        return patches.flatten(2).flatten(0, 1)

    queries, keys = (product(*sides) for sides in zip(along(height), along(width), strict=True))
    sees = partial(in_neighborhood, grid=(height, width), kernel_size=kernel_size, dilation=dilation)
    return Tiling(queries, keys, sees)
