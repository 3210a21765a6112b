"""Graph convolutions: concatenate each token with its aggregated neighbors (ViG, EdgeConv, GraphSAGE, GreedyViG).

    index = select K neighbors                    # the same select as ConvNN
    taken = max over them of x_j - x_i            # or their mean, or EdgeConv's maximum of a linear
    out   = linear of every head on [x_i, taken]  # aggregate

A maximum is not a weighted sum of values, so these layers have no mixing matrix.
"""

from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import Bias, ImageMixer, MultiHeadMixer, TokenLayout, both_biases, check_at_least, check_one_of
from mixers.selection import NeighborSelection, select_tokens
from mixers.tables import GridTables, PerGrid
from neighbors import max_neighbors, neighbor_scores, weighted_sum
from options.checks import dilate
from options.layers import GRAPH_AGGREGATIONS
from options.neighbors import NeighborConfig, NeighborFields, as_neighbors


class GraphAggregation(nn.Module):
    """Concatenate each token with its aggregated neighbors: x (B, N, C_in), index (B, P, K) -> (B, N, C_out).

    The index is for the last P tokens. Class tokens, before them, take from all N tokens: few patches are not enough to
    classify by.

    Args:
        kind: `max`, [x_i, max_j (x_j - x_i)] (max-relative, ViG); `mean`, [x_i, mean_j x_j] (GraphSAGE, arXiv 1706.02216);
            both through one linear per head. `edge`, max_j ReLU(relative(x_j - x_i) + own(x_i)) (EdgeConv, arXiv 1801.07829,
            eq. 8).
        num_heads: groups of features with a linear each; `edge` has one for all.

    Raises ValueError for an unknown kind, or heads that do not divide the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int, kind: str, bias: bool = True):
        super().__init__()
        check_one_of(GRAPH_AGGREGATIONS, graph_aggregation=kind)
        if num_heads < 1 or in_channels % num_heads or out_channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {in_channels} and {out_channels} channels")
        self.kind, self.num_heads = kind, num_heads
        if kind == "edge":
            self.own = nn.Linear(in_channels, out_channels, bias=bias)
            self.relative = nn.Linear(in_channels, out_channels, bias=False)
        else:
            self.update = nn.Conv1d(2 * in_channels, out_channels, 1, groups=num_heads, bias=bias)
            nn.init.xavier_uniform_(self.update.weight)  # as other projections of features

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        # ReLU grows with its argument, so the maximum of `edge` goes inside: nothing is computed for every pair.
        values = self.relative(x) if self.kind == "edge" else x
        if self.kind == "mean":
            taken = weighted_sum(values, index, x.new_full((), 1 / index.shape[2]).expand(index.shape))
        else:
            taken = max_neighbors(values, index)
        class_tokens = x.shape[1] - index.shape[1]
        if class_tokens:
            of_all = values.mean(dim=1, keepdim=True) if self.kind == "mean" else values.amax(dim=1, keepdim=True)
            taken = torch.cat([of_all.expand(-1, class_tokens, -1).to(taken.dtype), taken], dim=1)
        if self.kind == "edge":
            return F.relu(taken - values + self.own(x))
        return self.join(x, taken - x if self.kind == "max" else taken)

    def join(self, x: Tensor, taken: Tensor) -> Tensor:
        """Apply the linear of every head to its features and their aggregate: (B, N, C_in) each -> (B, N, C_out)."""
        heads = [part.unflatten(2, (self.num_heads, -1)) for part in (x, taken.to(x.dtype))]  # (B, N, H, C_in / H)
        return self.update(torch.cat(heads, dim=3).flatten(2).transpose(1, 2)).transpose(1, 2)


class GraphMixer(MultiHeadMixer):
    """The graph convolution of ViG (Han et al., arXiv 2206.00272, eq. 4 to 6): GELU(GraphConv(x W_in)) W_out.

    All heads share one graph. Dilated, a token has every `dilation`-th of its K * dilation nearest neighbors, itself first.
    Class tokens, absent from the paper, are candidates like all tokens and take from all.

    Args:
        neighbors: rules of the search, or its fields by keyword; the paper compares features of length one (cosine).
        aggregation: see `GraphAggregation`.

    Raises ValueError if K * dilation, the samples or the heads do not fit.
    """

    takes_layout = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        neighbors: NeighborConfig | None = None,
        *,
        layout: TokenLayout | None = None,
        aggregation: str = "max",
        dilation: int = 1,
        bias: Bias = True,
        **fields: Unpack[NeighborFields],
    ):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        neighbors = as_neighbors(neighbors, fields)
        self.select = select_tokens(dilate(neighbors, dilation), layout, self_first=True)
        self.dilation = dilation
        coordinates = self.select.axes * (neighbors.aggregation_type == "Loc_Col")
        before, _ = both_biases(bias)
        self.input = nn.Linear(d_model + coordinates, d_model, bias=before)
        self.graph = GraphAggregation(d_model, d_model, num_heads, aggregation, before)

    def make_projection(self, d_model: int, bias: bool) -> None:
        """Leave `input` to the constructor: its width depends on the grid."""

    def project(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
        return (self.input(self.select.append_coordinates(x, layout.grid)),)

    def mix(self, x: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, None]:
        features = self.select.search_features(x.detach(), layout.grid)
        index = self.select(features, features, layout.grid)[:, layout.class_tokens :, :: self.dilation]
        return self.split_heads(F.gelu(self.graph(x, index))), None


class AxialGraphMixer(MultiHeadMixer):
    """The graph convolution of GreedyViG (Munir et al., arXiv 2405.06849): neighbors along the axes that are near enough.

    Candidates are every `dilation`-th patch of a token's row and column; neighbors are the candidates at a distance below the
    mean minus the standard deviation of all such distances of the image, so that K differs from token to token. All
    candidates are computed, (H + W) / dilation per token. The class token is a candidate of all patches, under the same
    threshold, and sees every token.

    Raises ValueError for a dilation below 1, or heads that do not divide d_model.
    """

    takes_layout = True

    def __init__(self, d_model: int, num_heads: int, *, layout: TokenLayout, dilation: int = 1, bias: Bias = True):
        super().__init__(d_model, num_heads, layout=layout, bias=bias)
        check_at_least(1, dilation=dilation)
        self.graph = GraphAggregation(d_model, d_model, num_heads, "max", both_biases(bias)[0])
        self.tables = PerGrid(partial(GridTables, partial(axial_candidates, dilation)), layout.sides)

    def make_projection(self, d_model: int, bias: bool) -> None:
        self.input = nn.Linear(d_model, d_model, bias=bias)

    def project(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, ...]:
        return (self.input(x),)

    def mix(self, x: Tensor, output_matrix: bool, layout: TokenLayout) -> tuple[Tensor, None]:
        return self.split_heads(F.gelu(self.graph(x, self.near_candidates(x.detach(), layout)))), None

    def near_candidates(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """(B, P, A), the candidates of every patch, with the patch itself in place of candidates that are too far."""
        candidates = self.tables.at(layout.sides, x.device).candidates
        own = candidates[:, :1]  # (P, 1)
        index = candidates.expand(x.shape[0], -1, -1)
        distance = self.distances(x, index)
        others = (candidates != own).to(distance.dtype)  # (P, A)
        count = others.sum().clamp(min=1)
        mean = (distance * others).sum(dim=(1, 2), keepdim=True) / count
        deviation = (((distance - mean) ** 2 * others).sum(dim=(1, 2), keepdim=True) / count).sqrt()
        return torch.where(distance < mean - deviation, index, own)

    def distances(self, x: Tensor, index: Tensor) -> Tensor:
        """(B, P, A), distances of the patches to their candidates, by products: a fraction of the time of differences."""
        x = x - x.mean(dim=1, keepdim=True)  # distances do not change, and a common offset would cost their digits
        products = neighbor_scores(x[:, -index.shape[1] :], x, index, "matmul") * x.shape[2] ** 0.5
        lengths = x.to(products.dtype).square().sum(dim=2)  # (B, N)
        others = lengths.gather(1, index.flatten(1)).view(index.shape)
        return (lengths[:, -index.shape[1] :, None] + others - 2 * products).clamp(min=0).sqrt()


def axial_candidates(dilation: int, *sides: int) -> dict[str, Tensor]:
    """Make `candidates` (P, A): the patch, the class tokens, then patches a multiple of `dilation` away in its row or column.

    Short rows are padded with the patch itself.
    """
    layout, rows = TokenLayout(*sides), []
    for i in range(layout.num_patches):
        y, x = divmod(i, layout.width)
        row = [y * layout.width + other for other in range(x % dilation, layout.width, dilation) if other != x]
        column = [other * layout.width + x for other in range(y % dilation, layout.height, dilation) if other != y]
        rows.append([i, *row, *column])
    width = max(map(len, rows))
    patches = torch.tensor([row + row[:1] * (width - len(row)) for row in rows]) + layout.class_tokens
    classes = torch.arange(layout.class_tokens).expand(len(rows), -1)
    return {"candidates": torch.cat([patches[:, :1], classes, patches[:, 1:]], dim=1)}


class GraphConv2d(ImageMixer):
    """The graph convolution of ViG (Han et al., arXiv 2206.00272) on an image: (B, C_in, H, W) -> (B, C_out, H, W).

    GELU(GraphConv(x W_in)) W_out, as in `GraphMixer`.

    Args:
        neighbors: rules of the search, or its fields by keyword; the token itself is always slot 0.
        aggregation: see `GraphAggregation`.
        shuffle_pattern, shuffle_scale, image_size: as in `ConvNN2d`.

    Raises ValueError if K, the samples, the shuffle or the heads do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int,
        neighbors: NeighborConfig | None = None,
        *,
        aggregation: str = "max",
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 2,
        image_size: int | tuple[int, ...] | None = None,
        **fields: Unpack[NeighborFields],
    ):
        super().__init__(in_channels, out_channels, shuffle_pattern, shuffle_scale)
        neighbors = as_neighbors(neighbors, fields)
        grid = self.token_grid(image_size)
        self.select = NeighborSelection(neighbors, axes=self.axes, self_first=True, grid=grid)
        inputs, D = self.token_channels
        self.input = nn.Linear(inputs + self.axes * (neighbors.aggregation_type == "Loc_Col"), D)
        self.graph = GraphAggregation(D, D, num_heads, aggregation)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.fold(x)  # (B, N, C)
        tokens = self.input(self.select.append_coordinates(tokens, grid))  # (B, N, D)
        features = self.select.search_features(tokens.detach(), grid)
        index = self.select(features, features, grid)  # (B, N, K)
        return self.unfold(self.proj(F.gelu(self.graph(tokens, index))), grid)
