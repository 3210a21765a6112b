"""Attention through regions of a grid, or through clusters: Swin, BiFormer, block-sparse top-k, PaCa, Context Cluster.

Regions are squares of patches (stretches of a sequence). Class tokens attend to all, and, where tokens choose regions, are
attended by all.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import Bias, MultiHeadMixer, TokenLayout, attend, check_at_least, is_plain, mixing_matrix
from mixers.linear import LinearMixer
from mixers.tables import GridTables, PerGrid
from neighbors import find_neighbors, neighbor_scores, neighbor_weights, weighted_sum
from options.checks import check_value_convolution, region_sides


def region_tables(
    height: int, width: int, class_tokens: int, *, region_size: int, top_regions: int = 1, value_convolution: int = 0
) -> dict[str, Tensor]:
    """Make `regions` (R, s), the patches of each region; `order` (P,), the place of each patch in them; `region_of` (P,).

    Raises ValueError if regions of this side do not divide the grid, there are fewer than top_regions, or a convolution of
    this side does not fit the grid.
    """
    layout = TokenLayout(height, width, class_tokens)
    check_value_convolution(value_convolution, layout.grid)
    height, width = region_sides(region_size, (layout.height, layout.width))
    patches = torch.arange(layout.num_patches).view(layout.height // height, height, layout.width // width, width)
    regions = patches.transpose(1, 2).reshape(-1, height * width)
    if not 1 <= top_regions <= len(regions):
        raise ValueError(f"top_regions={top_regions} must be 1 to {len(regions)}, the number of regions")
    order = regions.flatten().argsort()
    return {"regions": regions, "order": order, "region_of": order // regions.shape[1]}


def by_region(x: Tensor, regions: Tensor, class_tokens: int) -> Tensor:
    """Cut patches into regions by the table `regions` (R, s): (B, H, N, d) of all tokens -> (B, H, R, s, d)."""
    return x[:, :, class_tokens:].index_select(2, regions.flatten()).unflatten(2, regions.shape)


class RegionMixer(MultiHeadMixer):
    """Base of mixers in which tokens choose the `top_regions` best of R regions, squares of side `region_size`.

    Raises ValueError if regions do not divide the grid, or there are fewer than top_regions.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        region_size: int,
        top_regions: int,
        attention_dropout: float = 0.0,
        bias: Bias = True,
        **checked: int,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        tables = partial(region_tables, region_size=region_size, top_regions=top_regions, **checked)
        self.tables = PerGrid(partial(GridTables, tables), layout.sides)
        self.top_regions = top_regions


class BiLevelRoutingAttention(RegionMixer):
    """Bi-level routing attention (BiFormer, Zhu et al., arXiv 2303.08810, section 3.2).

    A region is routed to the `top_regions` regions with the largest products of their mean key and its mean query, all heads
    together; its patches attend to the patches of these regions. With all regions, or with one, it is `MultiHeadAttention`.
    Keys and values are copied `top_regions` times, not once for every query.

    Args:
        value_convolution: side of the depthwise convolution of the values on the grid that is added to the patches (the
            paper's local context enhancement, 5), without bias; 0: none. The mixing matrix leaves it out.

    Raises ValueError as `RegionMixer`, and for a value_convolution that is even but not 0, or that reaches over the grid.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        region_size: int,
        top_regions: int,
        value_convolution: int = 0,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(
            d_model,
            num_heads,
            layout=layout,
            region_size=region_size,
            top_regions=top_regions,
            attention_dropout=attention_dropout,
            bias=bias,
            value_convolution=value_convolution,
        )
        self.conv = None
        if value_convolution:
            kernel = [value_convolution if side > 1 else 1 for side in (layout.height, layout.width)]
            self.conv = nn.Conv2d(d_model, d_model, kernel, padding="same", groups=d_model, bias=False)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        out, matrix = self.mix_regions(query, key, value, output_matrix, layout)
        return (out if self.conv is None else out + self.convolve(value, layout)), matrix

    def convolve(self, value: Tensor, layout: TokenLayout) -> Tensor:
        """Convolve the values of the patches, with zeros for class tokens: (B, H, N, d) -> the same."""
        c = layout.class_tokens
        image = value[:, :, c:].mT.flatten(1, 2).unflatten(2, (layout.height, layout.width))  # (B, H * d, h, w)
        return F.pad(self.conv(image).flatten(2).unflatten(1, (self.num_heads, -1)).mT, (0, 0, c, 0))

    def mix_regions(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        c, tables = layout.class_tokens, self.tables.at(layout.sides, query.device)
        queries, keys, values = (by_region(part, tables.regions, c) for part in (query, key, value))  # (B, H, R, s, d)
        means = [part.detach().mean(dim=3).transpose(1, 2).flatten(2) for part in (queries, keys)]  # (B, R, H * d)
        routes = find_neighbors(*means, self.top_regions, "matmul")  # (B, R, k)
        if output_matrix:
            return attend(
                query, key, value, mask=mask_of(routes, tables.region_of, c), dropout=self.dropout, output_matrix=True
            )
        keys, values = (
            self.routed(part, whole[:, :, :c], routes) for part, whole in ((keys, key), (values, value))
        )  # (B, H, R, c + k * s, d)
        out = attend(*(part.flatten(1, 2) for part in (queries, keys, values)), dropout=self.dropout)[0]  # (B, H * R, s, d)
        out = out.unflatten(1, (self.num_heads, -1)).flatten(2, 3).index_select(2, tables.order)
        if c:
            out = torch.cat([attend(query[:, :, :c], key, value, dropout=self.dropout)[0], out], dim=2)
        return out, None

    def routed(self, regions: Tensor, classes: Tensor, routes: Tensor) -> Tensor:
        """Join class tokens and the regions that each region is routed to: (B, H, R, s, d) -> (B, H, R, c + k * s, d)."""
        _, H, R, s, d = regions.shape
        chosen = routes.flatten(1)[:, None, :, None].expand(-1, H, -1, s * d)
        found = regions.flatten(3).gather(2, chosen).unflatten(3, (s, d)).unflatten(2, (R, -1)).flatten(3, 4)
        return torch.cat([classes[:, :, None].expand(-1, -1, R, -1, -1), found], dim=3)


def mask_of(routes: Tensor, region_of: Tensor, class_tokens: int) -> Tensor:
    """Routes of each region (B, R, k), region of each patch (P,) -> (B, 1, N, N), True where the row attends to the column."""
    B, R, _ = routes.shape
    allowed = torch.zeros(B, R, R, dtype=torch.bool, device=routes.device).scatter(2, routes, True)
    allowed = allowed.index_select(1, region_of).index_select(2, region_of)
    return F.pad(allowed, (class_tokens, 0, class_tokens, 0), value=True)[:, None]


class BlockTopKAttention(RegionMixer):
    """The selection of native sparse attention (NSA, Yuan et al., arXiv 2502.11089, section 3.3.2), both ways and on a grid.

    In every head, a token chooses the `top_regions` regions with the largest products of their mean key (the compressed block)
    and its query, and attends to their patches. With all regions it is `MultiHeadAttention`. The paper adds attention to the
    compressed blocks and a sliding window, by gates; here they are separate mixers.
    """

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, output_matrix: bool, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        c, heads = layout.class_tokens, query.shape[:2]
        regions = self.tables.at(layout.sides, query.device).regions
        blocks = by_region(key.detach(), regions, c).mean(dim=3).flatten(0, 1)  # (B * H, R, d)
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        chosen = find_neighbors(query[:, c:], blocks, self.top_regions, "matmul")  # (B * H, P, k)
        index = regions[chosen].flatten(2) + c  # (B * H, P, k * s)
        classes = torch.arange(c, device=index.device).expand(*index.shape[:2], -1)
        index = torch.cat([classes, index], dim=2)
        weights = neighbor_weights(neighbor_scores(query[:, c:], key, index, "matmul"), "matmul")
        out = weighted_sum(value, index, F.dropout(weights, self.dropout)).unflatten(0, heads)
        matrix = mixing_matrix(index, weights, self.num_heads, key.shape[1]) if output_matrix else None
        if c:
            of_classes, whole = attend(
                *(part.unflatten(0, heads) for part in (query[:, :c], key, value)),
                dropout=self.dropout,
                output_matrix=output_matrix,
            )
            out = torch.cat([of_classes, out], dim=2)
            matrix = torch.cat([whole, matrix], dim=2) if output_matrix else None
        return out, matrix


class ShiftedWindowAttention(LinearMixer):
    """Attention within windows (Swin, Liu et al., arXiv 2103.14030, section 3.2): squares of `region_size` patches a side.

    Odd blocks shift the windows by half a side, round the border; there, patches see only those of their own corner. A learned
    bias for each offset and head is added to the scores. Class tokens attend to all, and every window attends to them, without
    a bias. One window over the whole grid is not shifted.

    Args:
        block: number of the block, from 0.

    Raises ValueError if windows do not divide the grid.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        layout: TokenLayout,
        region_size: int,
        block: int = 0,
        attention_dropout: float = 0.0,
        bias: Bias = True,
    ):
        super().__init__(d_model, num_heads, layout=layout, attention_dropout=attention_dropout, bias=bias)
        tables = partial(window_tables, region_size, block % 2 == 1)
        self.tables = PerGrid(partial(GridTables, tables), layout.sides)
        self.offsets = nn.Parameter(torch.empty((2 * region_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.offsets, std=0.02)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, layout: TokenLayout) -> Tensor:
        c, tables = layout.class_tokens, self.tables.at(layout.sides, query.device)
        windows = [by_region(part, tables.regions, c) for part in (query, key, value)]  # (B, H, R, s, d) each
        keys, values = (
            torch.cat([part[:, :, None, :c].expand(-1, -1, windows[0].shape[2], -1, -1), window], dim=3)
            for part, window in zip((key, value), windows[1:], strict=True)
        )  # (B, H, R, c + s, d)
        bias = self.offsets[tables.offset].movedim(2, 0)[:, None]  # (H, 1, s, s)
        bias = F.pad(bias.masked_fill(~tables.sees, -math.inf), (c, 0)).flatten(0, 1)  # (H * R, s, c + s)
        queries, keys, values = (part.flatten(1, 2) for part in (windows[0], keys, values))
        out = attend(queries, keys, values, mask=bias.to(query.dtype), dropout=dropout)[0]  # (B, H * R, s, d)
        out = out.unflatten(1, (self.num_heads, -1)).flatten(2, 3).index_select(2, tables.order)
        return torch.cat([attend(query[:, :, :c], key, value, dropout=dropout)[0], out], dim=2) if c else out


def window_tables(region_size: int, shifted: bool, height: int, width: int, class_tokens: int) -> dict[str, Tensor]:
    """Make tables of the windows of a grid.

    `regions` (R, s), the patches of each window; `order` (P,), the place of each patch in them; `sees` (R, s, s), True for
    pairs in one piece of the image; `offset` (s, s), the row of each pair in a table of (2 region_size - 1)^2 offsets.
    """
    sides = region_sides(region_size, (height, width))
    shift = [part // 2 if shifted and part < side else 0 for part, side in zip(sides, (height, width), strict=True)]
    patches = torch.arange(height * width).view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    regions = patches.unfold(0, sides[0], sides[0]).unfold(1, sides[1], sides[1]).reshape(-1, math.prod(sides))
    # Of a window at the border, a part has come round from the other side.
    rows, columns = regions // width, regions % width
    piece = 2 * (rows < shift[0]) + (columns < shift[1])
    place = torch.cartesian_prod(*map(torch.arange, sides)).view(-1, 2)
    offset = place[:, None] - place + region_size - 1  # (s, s, 2)
    return {
        "regions": regions,
        "order": regions.flatten().argsort(),
        "sees": piece[:, :, None] == piece[:, None],
        "offset": offset[..., 0] * (2 * region_size - 1) + offset[..., 1],
    }


class PatchToClusterAttention(MultiHeadMixer):
    """Patch-to-cluster attention (PaCa, Grainger et al., arXiv 2203.11987): queries of tokens, keys and values of clusters.

    A cluster is a mean of the tokens, weighted by a softmax over them that a linear predicts from their features. With one
    cluster per token it is `MultiHeadAttention`. Time and memory are linear in the tokens.

    Raises ValueError for fewer than one cluster.
    """

    def __init__(self, d_model: int, num_heads: int, *, num_clusters: int, attention_dropout: float = 0.0, bias: Bias = True):
        super().__init__(d_model, num_heads, attention_dropout=attention_dropout, bias=bias)
        check_at_least(1, num_clusters=num_clusters)
        self.cluster = nn.Linear(d_model, num_clusters, bias=False)  # a softmax over tokens does not see a bias

    def assign(self, x: Tensor) -> Tensor:
        """(B, N, d_model) -> (B, M, N), the weight of each token in each cluster."""
        return self.cluster(x).softmax(dim=1).mT

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        assignment = self.assign(x)
        clusters = assignment.to(x.dtype) @ x  # (B, M, d_model)
        N, d_model = x.shape[1:]
        if is_plain(self.qkv, nn.Linear):  # the parts of it that are needed
            weights = self.qkv.weight.split([d_model, 2 * d_model])
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split([d_model, 2 * d_model])
            query, pairs = F.linear(x, weights[0], biases[0]), F.linear(clusters, weights[1], biases[1])
        else:
            projected = self.qkv(torch.cat([x, clusters], dim=1))
            query, pairs = projected[:, :N, :d_model], projected[:, N:, d_model:]
        return *(self.split_heads(part) for part in (query, *pairs.chunk(2, dim=2))), assignment

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, output_matrix: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, matrix = attend(query, key, value, dropout=self.dropout, output_matrix=output_matrix)
        return out, matrix @ assignment[:, None].to(matrix.dtype) if output_matrix else None


class ContextClusterMixer(MultiHeadMixer):
    """Context Cluster (Ma et al., arXiv 2303.01494, eq. 1 and 2): tokens exchange values with the nearest center.

    Centers are the means of the regions of the grid. A token of cosine s to its center has weight w = sigmoid(scale s + shift).
    A center collects g = (v_c + sum of w v) / (1 + sum of w) over the tokens that are nearest to it; each of them gets w g.
    Time and memory are linear in tokens x regions.

    Raises ValueError if regions of this side do not divide the grid.
    """

    takes_layout = True

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout, region_size: int, bias: Bias = True):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        self.tables = PerGrid(partial(GridTables, partial(region_tables, region_size=region_size)), layout.sides)
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.features_values = nn.Linear(d_model, 2 * d_model, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        return tuple(self.split_heads(part) for part in self.features_values(x).chunk(2, dim=2))

    def mix(self, features: Tensor, values: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        regions = self.tables.at(layout.sides, features.device).regions

        def average(x: Tensor) -> Tensor:
            """Average over the regions: (B, H, N, d) of all tokens -> (B, H, R, d)."""
            return by_region(x, regions, layout.class_tokens).mean(dim=3)

        centers, center_values = average(features), average(values)  # (B, H, R, d)
        cosines = F.normalize(centers, dim=3, eps=1e-6) @ F.normalize(features, dim=3, eps=1e-6).mT  # (B, H, R, N)
        nearest = torch.zeros_like(cosines).scatter(2, cosines.argmax(dim=2, keepdim=True), 1.0)
        weights = (self.scale * cosines + self.shift).sigmoid() * nearest
        share = 1 / (1 + weights.sum(dim=3, keepdim=True))  # (B, H, R, 1)
        weights = weights.to(values.dtype)
        share = share.to(values.dtype)  # before the sum, which may be too large for float16
        out = weights.mT @ (center_values * share + (weights * share) @ values)
        if not output_matrix:
            return out, None
        means = average(torch.eye(values.shape[2], device=values.device, dtype=weights.dtype)[None, None])
        return out, weights.mT @ ((means + weights) * share)
