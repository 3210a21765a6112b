"""Select the K tokens that each token is mixed with: a `NeighborConfig` applied to grids of tokens."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.base import TokenLayout
from mixers.tables import GridTables, PerGrid
from neighbors import (
    coordinates,
    find_neighbors,
    grid_locations,
    join_coordinates,
    location_neighbors,
    random_candidates,
    raster_index,
    spatial_candidates,
)
from options.neighbors import NeighborConfig


class NeighborSelection(nn.Module):
    """Select K neighbors of each token by the rules of a `NeighborConfig`, on grids of tokens.

    Tables that depend on the shape of a grid only are made in the constructor where the grid is known, else in the first
    forward pass on it.

    Args:
        neighbors: the rules.
        axes: sides of a grid, 1 or 2.
        self_first: slot 0 is the token itself in `all` mode too (among samples it always is).
        padding: width of a ring of tokens around the grid that are candidates but select no neighbors.
        class_tokens: tokens before the grid; they are always candidates, at its center.
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
        self.axes = axes
        self.self_first = self_first
        self.padding = padding
        self.class_tokens = class_tokens
        tables = partial(selection_tables, neighbors, padding, class_tokens)
        self.tables = PerGrid(partial(GridTables, tables), grid)

    def extra_repr(self) -> str:
        return f"{self.neighbors}, padding={self.padding}"

    def forward(self, query: Tensor, key: Tensor, grid: tuple[int, ...]) -> Tensor:
        """query (B, N, C), key (B, M, C), both `search_features` -> index (B, N, K)."""
        space = self.search_space(grid, key.device)
        if "index" in space:
            return space["index"].expand(query.shape[0], -1, -1)
        return find_neighbors(query, key, self.neighbors.K, self.neighbors.metric, **space)

    def search_space(self, grid: tuple[int, ...], device) -> dict[str, Tensor | None]:
        """Arguments of a search by content, `candidates` and `self_index`, or, by location, its result `index` (N, K)."""
        cfg = self.neighbors
        tables = self.tables.at(grid, device)
        own, candidates, index = tables.inner, tables.candidates, tables.nearest
        if cfg.sampling == "random" and self.training:
            candidates = random_candidates(math.prod(grid), cfg.num_samples, self.class_tokens, device)
            index = None
        if cfg.similarity_type == "Loc":
            if index is None:
                index = location_neighbors(centered(tables.locations, grid, self.class_tokens), cfg.K, own, candidates)
            return {"index": index}
        return {"candidates": candidates, "self_index": own if self.self_first or candidates is not None else None}

    def drop_padding(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Drop the ring of padding: (B, M, C) -> (B, N, C)."""
        return tokens.index_select(1, self.tables.at(grid, tokens.device).inner) if self.padding else tokens

    def search_features(self, features: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Features to compare: (B, M, C), under similarity_type Loc_Col joined with coordinates (B, M, C + axes)."""
        if self.neighbors.similarity_type != "Loc_Col":
            return features
        return join_coordinates(features, self._coordinates(features, grid), self.neighbors.lambda_param)

    def append_coordinates(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Values to aggregate: (B, M, C), under aggregation_type Loc_Col with coordinates appended (B, M, C + axes)."""
        if self.neighbors.aggregation_type != "Loc_Col":
            return values
        return torch.cat([values, self._coordinates(values, grid).expand(values.shape[0], -1, -1)], dim=2)

    def _coordinates(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return coordinates(self.tables.at(grid, x.device).locations, grid, x.dtype, self.class_tokens)


def select_tokens(neighbors: NeighborConfig, layout: TokenLayout | None, *, self_first: bool) -> NeighborSelection:
    """Make the selection for tokens of a layout, or without for any sequence. Raises ValueError where it needs locations."""
    if layout is not None:
        grid, extra = layout.grid, layout.class_tokens
        return NeighborSelection(neighbors, axes=len(grid), self_first=self_first, class_tokens=extra, grid=grid)
    if neighbors.uses_location:
        raise ValueError(f"{neighbors} depends on locations; give layout=TokenLayout(height, width, class_tokens)")
    return NeighborSelection(neighbors, axes=1, self_first=self_first)


def selection_tables(neighbors: NeighborConfig, padding: int, class_tokens: int, *grid: int) -> dict[str, Tensor | None]:
    """Make the tables of a `NeighborSelection` on a grid. Raises ValueError if there are too few candidates."""
    neighbors.check_candidates(grid, axes=len(grid), class_tokens=class_tokens)
    locations = grid_locations(grid)
    inner = raster_index(grid, [torch.arange(padding, side - padding) for side in grid]) + class_tokens
    inner = torch.cat([torch.arange(class_tokens), inner])
    candidates = nearest = None
    if neighbors.sampling == "spatial":
        candidates = spatial_candidates(grid, neighbors.num_samples, neighbors.sample_padding, class_tokens)
    elif neighbors.sampling == "random":  # for evaluation; training draws others
        candidates = random_candidates(math.prod(grid), neighbors.num_samples, class_tokens, fixed=True)
    if neighbors.similarity_type == "Loc":
        nearest = location_neighbors(centered(locations, grid, class_tokens), neighbors.K, inner, candidates)
    return {"locations": locations, "inner": inner, "candidates": candidates, "nearest": nearest}


def centered(locations: Tensor, grid: tuple[int, ...], class_tokens: int) -> Tensor:
    """Locations in half pixels from the center of the grid, where class tokens are: integers, so distances are exact."""
    offsets = [2 * locations[:, axis] - (side - 1) for axis, side in enumerate(grid)]
    return F.pad(torch.stack(offsets, dim=1), (0, 0, class_tokens, 0))
