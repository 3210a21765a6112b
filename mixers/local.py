"""Local attention, by location, on (B, N, d_model): sliding window, sparse, masked, neighborhood, gated positional.

A sparsity pattern is a list of tilings: tiles of patches with queries that share a short list of keys. A tile is a small
dense attention under a mask, so time and memory grow with N x window. On short sequences, where tiles would save little, one
dense attention under one mask runs instead, with equal results. Class tokens attend to all and are attended by all.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import backend
from mixers.base import Bias, MultiHeadMixer, TokenLayout, attend, check_at_least, check_one_of, scaled_products
from mixers.block_masks import BLOCK, BlockSparsePattern
from mixers.tables import ConstantTables, GridTables, PerGrid
from mixers.tilings import NONE, Tiling, mask_tilings, neighborhood_tilings, sparse_tilings, window_tilings
from options.layers import MASK_TYPES

TILES_PAY = 6  # gathering for tiles pays off with so many times fewer scores than a dense attention (measured on a CPU)
LONG = 1000  # patches; from here on no mask of all pairs is made


class Tiles(ConstantTables):
    """A tiling as index tables: queries of patches and keys of tokens into tiles, and outputs back in order.

    With `first`, every tile has the class tokens as keys too.
    """

    def __init__(self, tiling: Tiling, num_patches: int, class_tokens: int, first: bool):
        super().__init__()
        self.set_tables(partial(self._make_tables, tiling, num_patches, class_tokens, first))

    @staticmethod
    def _make_tables(tiling: Tiling, num_patches: int, class_tokens: int, first: bool) -> dict[str, Tensor]:
        queries, keys, sees = tiling
        real = queries.flatten() != NONE
        order = torch.empty(num_patches, dtype=torch.long)
        order[queries.flatten()[real]] = real.nonzero().flatten()
        i, j = queries[:, :, None], keys[:, None]
        allowed = (j != NONE) & sees(i, j)
        keys = keys.clamp(min=0) + class_tokens
        if first and class_tokens:
            keys = torch.cat([torch.arange(class_tokens).expand(len(keys), -1), keys], dim=1)
            allowed = F.pad(allowed, (class_tokens, 0), value=True)
        allowed |= i == NONE  # these rows are never read; a softmax over nothing would be NaN
        return {"queries": queries.clamp(min=0), "keys": keys, "allowed": allowed, "order": order}

    def in_order(self, tiles: Tensor) -> Tensor:
        """(G, T, q, d) -> (G, P, d)."""
        return tiles.flatten(1, 2).index_select(1, self.order)


def take_tiles(rows: Tensor, table: Tensor) -> Tensor:
    """Gather rows (G, N, d) by a table of tiles (T, q): (G, T, q, d)."""
    return rows.index_select(1, table.flatten()).unflatten(1, table.shape)


class SparsityPattern(ConstantTables):
    """Attention between the pairs of patches in any of the tilings; class tokens see all and are seen by all.

    Args:
        tilings: disjoint in the pairs they allow; without any, every patch sees every other.
        layout: layout of the tokens.
    """

    def __init__(self, tilings: list[Tiling], layout: TokenLayout):
        super().__init__()
        self.sees = [tiling.sees for tiling in tilings]
        self.layout = layout
        P = layout.num_patches
        cost = sum(tiling.queries.numel() * tiling.keys.shape[1] for tiling in tilings)
        sees_all = not tilings or (cost >= P * P and self.sees_all())
        self.is_dense = sees_all or (P < LONG and TILES_PAY * cost > P * P)
        if self.is_dense:
            self.set_tables(lambda: {"mask": None if sees_all else self.make_mask(torch.device("cpu"))})
        else:
            self.tiles = nn.ModuleList(Tiles(t, P, layout.class_tokens, n == 0) for n, t in enumerate(tilings))

        self.blocks = None if sees_all or layout.num_tokens <= BLOCK else BlockSparsePattern(self.allows, layout.num_tokens)

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """Return True where token i attends to token j, for numbers that broadcast."""
        c = self.layout.class_tokens
        allowed = (i < c) | (j < c) | (not self.sees)
        for sees in self.sees:
            allowed = allowed | sees(i - c, j - c)
        return allowed

    def sees_all(self) -> bool:
        """Return True if every token attends to every other, looking at a few rows at a time."""
        tokens = torch.arange(self.layout.num_tokens, device="cpu")
        return all(bool(self.allows(i, tokens).all()) for i in tokens[:, None].split(64))

    def make_mask(self, device: torch.device) -> Tensor:
        """(N, N), True where the row attends to the column."""
        tokens = torch.arange(self.layout.num_tokens, device=device)
        return self.allows(tokens[:, None], tokens)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, output_matrix: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, N, d) each -> mixed values (B, H, N, d), and with output_matrix the matrix (B, H, N, N)."""
        if self.blocks is not None and not (output_matrix or dropout) and self.blocks.covers(query):
            found = backend.attempt(self.blocks, query, key, value)
            if found is not None:
                return found, None
        plain = backend.chosen() == "reference"  # materializes all scores
        if self.is_dense or output_matrix or plain:
            mask = self.mask if self.is_dense else self.make_mask(query.device)
            out, matrix = attend(query, key, value, mask=mask, dropout=dropout, output_matrix=output_matrix or plain)
            return out, matrix if output_matrix else None
        c, heads = self.layout.class_tokens, query.shape[:2]
        flat = query[:, :, c:].flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        out = self.attend_tiles(*flat, dropout).unflatten(0, heads)
        if c:
            out = torch.cat([attend(query[:, :, :c], key, value, dropout=dropout)[0], out], dim=2)
        return out, None

    def attend_tiles(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """query (G, P, d) of the patches, key and value (G, N, d) of all tokens -> (G, P, d)."""
        inside = [
            (take_tiles(query, part.queries), take_tiles(key, part.keys), take_tiles(value, part.keys)) for part in self.tiles
        ]
        if len(self.tiles) == 1:
            return self.tiles[0].in_order(attend(*inside[0], mask=self.tiles[0].allowed, dropout=dropout)[0])
        # One softmax over the keys of all tilings.
        scores = []
        for tiles, (q, k, _) in zip(self.tiles, inside, strict=True):
            score = scaled_products(q, k).masked_fill(~tiles.allowed, -math.inf)
            scores.append(tiles.in_order(score))  # (G, P, k)
        weights = F.dropout(torch.cat(scores, dim=2).softmax(dim=2), dropout)
        parts = weights.split([score.shape[2] for score in scores], dim=2)
        out = 0
        for tiles, part, (_, _, v) in zip(self.tiles, parts, inside, strict=True):
            out = out + tiles.in_order(take_tiles(part, tiles.queries).to(v.dtype) @ v)
        return out


def make_pattern(tilings: Callable[[int, int], list[Tiling]], height: int, width: int, class_tokens: int) -> SparsityPattern:
    """Make the pattern of a grid; `tilings` makes the tilings from its height and width."""
    return SparsityPattern(tilings(height, width), TokenLayout(height, width, class_tokens))


class PatternAttention(MultiHeadMixer):
    """Attention under a `SparsityPattern` of tilings, for every grid."""

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        tilings: Callable[[int, int], list[Tiling]],
        *,
        layout: TokenLayout,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.patterns = PerGrid(partial(make_pattern, tilings), layout.sides)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        pattern = self.patterns.at(layout.sides, query.device)
        return pattern(query, key, value, dropout=self.dropout, output_matrix=output_matrix)


class MultiHeadLocalAttention(PatternAttention):
    """Sliding-window attention (Beltagy et al., arXiv 2004.05150): tokens i and j attend if |i - j| <= window_size.

    Rotary positions (Su et al., arXiv 2104.09864) on queries and keys: feature pairs (n, n + d/2) are rotated by
    i / 10000^(2n/d), where i is the number of the token in the sequence; an odd last feature stays.

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
        bias: Bias = True,
    ):
        check_at_least(0, window_size=window_size)
        tilings = partial(window_tilings, window_size)
        super().__init__(d_model, num_heads, tilings, layout=layout, attention_dropout=attention_dropout, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        query, key, value = super().project(x)
        positions = torch.arange(x.shape[1], device=x.device)
        return rotate(query, positions), rotate(key, positions), value


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary embeddings (arXiv 2104.09864) of integer positions (N,) to x (B, H, N, d)."""
    half = x.shape[-1] // 2
    # Computed from integers at every call, so that a model in float64 rotates in float64.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device).to(dtype) / half)
    angles = positions[:, None].to(dtype) * frequencies  # (N, d / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], dim=-1)


class MultiHeadSparseAttention(PatternAttention):
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
        bias: Bias = True,
    ):
        check_one_of(("all", "local", "strided"), mode=mode)
        check_at_least(1, context=context)
        tilings = partial(sparse_tilings, mode, context)
        super().__init__(d_model, num_heads, tilings, layout=layout, attention_dropout=attention_dropout, bias=bias)


class MultiHeadMaskedAttention(PatternAttention):
    """Attention under a local mask; the class token attends to all and is attended by all.

    Args:
        mask_type: `2d_cardinal`, patches at most `expansion_step` above, below, left or right; `2d_all_neighbors`, patches
            in a square; `1d_cardinal` and `1d_all_neighbors`, as many neighbors in a window on the sequence; `full`, all.

    Raises ValueError for an unknown mask_type or a negative expansion_step.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        mask_type: str,
        expansion_step: int,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        check_one_of(MASK_TYPES, mask_type=mask_type)
        check_at_least(0, expansion_step=expansion_step)
        tilings = partial(mask_tilings, mask_type, expansion_step)
        super().__init__(d_model, num_heads, tilings, layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.mask_type, self.expansion_step = mask_type, expansion_step


def local_mask(mask_type: str, expansion_step: int, height: int, width: int) -> Tensor:
    """(N, N), True where `MultiHeadMaskedAttention` lets the row attend to the column, on a grid without class tokens."""
    layout = TokenLayout(height, width)
    return SparsityPattern(mask_tilings(mask_type, expansion_step, height, width), layout).make_mask(torch.device("cpu"))


class NeighborhoodAttention(PatternAttention):
    """Neighborhood attention (Hassani et al., CVPR 2023; dilated: arXiv 2209.15001), without relative position biases.

    Every patch attends to the kernel_size x kernel_size patches around it, `dilation` apart; at the border the window
    slides inside the grid; on a sequence without a grid it has kernel_size tokens. A window as large as the grid is
    `MultiHeadAttention`.

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
        bias: Bias = True,
    ):
        tilings = partial(neighborhood_tilings, kernel_size, dilation)
        super().__init__(d_model, num_heads, tilings, layout=layout, attention_dropout=attention_dropout, bias=bias)


class GatedPositionalSelfAttention(MultiHeadMixer):
    """Gated positional self-attention (GPSA; d'Ascoli et al., arXiv 2103.10697, section 3), which starts as a convolution.

    Each head mixes by (1 - sigmoid(gate)) softmax(q k^T / sqrt(d)) + sigmoid(gate) softmax(pos_proj(r)), where r_ij is
    (dx, dy, dx^2 + dy^2), the step from patch i to patch j. At first every head attends around one offset of a kernel with as
    many taps as there are heads, and values are the tokens themselves. The row and the column of a class token are by
    content only; the positional softmax runs over the patches.

    The two positional scores of a pair, along x and along y, add up, so their softmax is the product of a softmax over the
    columns and another over the rows: (w, w) and (h, h) instead of (N, N), with equal results.

    Args:
        locality_strength: sharpness of the initial attention around the offsets (alpha in the paper).
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        locality_strength: float = 1.0,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        self.locality_strength = locality_strength
        self.pos_proj = nn.Linear(3, num_heads)
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.tables = PerGrid(partial(GridTables, relative_positions), (layout.height, layout.width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The convolutional initialization of the paper; queries, keys and the output projection stay as they are."""
        d_model = self.proj.in_features
        nn.init.eye_(self.qkv.weight[2 * d_model :])
        if self.qkv.bias is not None:
            nn.init.zeros_(self.qkv.bias[2 * d_model :])
        offsets = kernel_offsets(self.num_heads)
        # -|r - offset|^2, up to a constant that the softmax cancels
        weight = torch.cat([2 * offsets, -torch.ones(self.num_heads, 1)], dim=1)
        self.pos_proj.weight.copy_(self.locality_strength * weight)
        nn.init.zeros_(self.pos_proj.bias)
        nn.init.ones_(self.gate)

    def positions(self, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The positional softmax along y, (H, h, h), and along x, (H, w, w)."""
        tables = self.tables.at((layout.height, layout.width), self.gate.device)
        with torch.autocast(self.gate.device.type, enabled=False):  # squares of distances are too long for half precision
            scores = [self.pos_proj(along.to(self.gate.dtype)) for along in (tables.along_y, tables.along_x)]
        return tuple(score.softmax(dim=1).permute(2, 0, 1) for score in scores)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        c, grid = layout.class_tokens, (layout.height, layout.width)
        rows, columns = self.positions(layout)
        gate = self.gate.sigmoid()[:, None, None]
        if output_matrix or self.dropout:  # both need the weights of pairs
            content = scaled_products(query, key).softmax(dim=-1)
            location = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3).flatten(1, 2)  # (H, P, P)
            patches = content[:, :, c:] * (1 - gate) + F.pad(gate * location, (c, 0))
            matrix = torch.cat([content[:, :, :c], patches], dim=2)
            return F.dropout(matrix, self.dropout).to(value.dtype) @ value, matrix
        content, _ = attend(query, key, value)
        images = value[:, :, c:].unflatten(2, grid)  # (B, H, h, w, d)
        images = columns[:, None].to(value.dtype) @ images
        images = (rows.to(value.dtype) @ images.flatten(3)).flatten(2, 3).unflatten(2, (-1, self.head_dim))
        patches = content[:, :, c:] * (1 - gate) + images * gate
        return torch.cat([content[:, :, :c], patches.to(value.dtype)], dim=2), None


def relative_positions(height: int, width: int) -> dict[str, Tensor]:
    """Tables (dx, dy, dx^2 + dy^2) of pairs of columns, (w, w, 3), and of pairs of rows, (h, h, 3)."""
    dx, dy = (torch.arange(side) - torch.arange(side)[:, None] for side in (width, height))
    return {"along_x": torch.stack([dx, 0 * dx, dx**2], dim=2), "along_y": torch.stack([0 * dy, dy, dy**2], dim=2)}


def kernel_offsets(num_heads: int) -> Tensor:
    """(H, 2) offsets (x, y) from the center of the smallest square kernel with a tap for every head, in raster order.

    A kernel with an even side has its taps at half pixels. Fewer heads than taps get the taps nearest the center, opposite
    taps together.
    """
    side = math.isqrt(num_heads - 1) + 1
    taps = [(x - (side - 1) / 2, y - (side - 1) / 2) for y in range(side) for x in range(side)]

    def rank(tap: int) -> tuple[float, int]:
        return taps[tap][0] ** 2 + taps[tap][1] ** 2, min(tap, len(taps) - 1 - tap)

    chosen = sorted(sorted(range(len(taps)), key=rank)[:num_heads])
    return torch.tensor([taps[tap] for tap in chosen])
