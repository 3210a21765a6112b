"""Select the K tokens that each token is mixed with: a `NeighborConfig` applied to grids of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class ConstantTables(nn.Module):
    """Base of modules with constant tensors: buffers that follow the module to its device and are in no checkpoint.

    They are made on the CPU whatever the default device, and set again by every `_apply`: so they survive `to_empty` and a
    model built on the meta device (as for FSDP), which leave other buffers without values.
    """

    def __init__(self):
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def set_tables(self, make: Callable[[], dict[str, Tensor | None]], device=None) -> None:
        """Make tables and register them by their names; None stands for a table that this module does not need."""
        # Made in a pass under inference_mode, they must still serve a backward pass.
        with torch.device("cpu"), torch.inference_mode(False):
            for name, table in make().items():
                if table is not None:
                    self._constants[name] = table
                self.register_buffer(name, None if table is None else table.to(device), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, table in self._constants.items():
            now = self._buffers[name]
            self._buffers[name] = table.to(now.device, now.dtype)
        return self


class NeighborSelection(ConstantTables):
    """Select K neighbors of each token by the rules of a `NeighborConfig`, on grids of tokens.

    Tables that depend on the shape of a grid only are made once per shape: in the constructor where the grid is known, else
    in the first forward pass (a compiled one makes them every time).

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
        self.self_first = self_first
        self.padding = padding
        self.class_tokens = class_tokens
        if grid is not None:
            self._tables(grid, device=None)

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
        tables = self._tables(grid, device)
        own, candidates, index = tables["inner"], tables.get("candidates"), tables.get("nearest")
        if cfg.sampling == "random" and self.training:
            candidates = random_candidates(math.prod(grid), cfg.num_samples, self.class_tokens, device)
            index = None
        if cfg.similarity_type == "Loc":
            if index is None:
                index = location_neighbors(self._centered(tables["locations"], grid), cfg.K, own, candidates)
            return {"index": index}
        return {"candidates": candidates, "self_index": own if self.self_first or candidates is not None else None}

    def drop_padding(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Drop the ring of padding: (B, M, C) -> (B, N, C)."""
        return tokens.index_select(1, self._tables(grid, tokens.device)["inner"]) if self.padding else tokens

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
        return coordinates(self._tables(grid, x.device)["locations"], grid, x.dtype, self.class_tokens)

    def _centered(self, locations: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Locations in half pixels from the center of the grid, where class tokens are: integers, so distances are exact."""
        offsets = [2 * locations[:, axis] - (side - 1) for axis, side in enumerate(grid)]
        return F.pad(torch.stack(offsets, dim=1), (0, 0, self.class_tokens, 0))

    def _tables(self, grid: tuple[int, ...], device) -> dict[str, Tensor]:
        """Constant tables of this shape of grid, by name."""
        suffix = "".join(f"_{side}" for side in grid)
        if f"locations{suffix}" not in self._buffers:
            if torch.compiler.is_compiling():  # a graph that changed its module could not be recomputed by checkpointing
                return {name: table.to(device) for name, table in self._make_tables(grid).items()}
            self.set_tables(lambda: {name + suffix: table for name, table in self._make_tables(grid).items()}, device)
        return {name.removesuffix(suffix): table for name, table in self._buffers.items() if name.endswith(suffix)}

    def _make_tables(self, grid: tuple[int, ...]) -> dict[str, Tensor]:
        cfg, pad, class_tokens = self.neighbors, self.padding, self.class_tokens
        cfg.check_candidates(grid, axes=len(grid), class_tokens=class_tokens)
        locations = grid_locations(grid)
        inner = raster_index(grid, [torch.arange(pad, side - pad) for side in grid]) + class_tokens
        tables = {"locations": locations, "inner": torch.cat([torch.arange(class_tokens), inner])}
        if cfg.sampling == "spatial":
            tables["candidates"] = spatial_candidates(grid, cfg.num_samples, cfg.sample_padding, class_tokens)
        elif cfg.sampling == "random":  # for evaluation; training draws others
            tables["candidates"] = random_candidates(math.prod(grid), cfg.num_samples, class_tokens, fixed=True)
        if cfg.similarity_type == "Loc":
            centered = self._centered(locations, grid)
            tables["nearest"] = location_neighbors(centered, cfg.K, tables["inner"], tables.get("candidates"))
        return tables
