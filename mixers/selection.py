"""Which K tokens each token is mixed with: a `NeighborConfig` applied to grids of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.topk import Choice, choose
from neighbors import (
    coordinates,
    find_neighbors,
    find_scored_neighbors,
    grid_places,
    join_coordinates,
    location_neighbors,
    neighbor_scores,
    random_candidates,
    raster_index,
    spatial_candidates,
)
from options.neighbors import NeighborConfig


class ConstantTables(nn.Module):
    """A module with constant tensors, which follow it to its device as buffers, and are in no checkpoint.

    They are made on the CPU whatever the default device, and set again after everything that goes through `_apply`: so they
    survive `to_empty` and a model built on the meta device (as for FSDP), which leave other buffers without values.
    """

    def __init__(self):
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def set_tables(self, make: Callable[[], dict[str, Tensor | None]], device=None) -> None:
        """Make tables and register them by their names; None is a table that this module has no need of."""
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


class GridTables(ConstantTables):
    """Constant tables that depend on the shape of a grid only, made once per shape: what `_make_tables` returns.

    In the constructor where the grid is known, else in the first forward pass (a compiled one makes them every time).
    """

    def _tables(self, grid: tuple[int, ...], device) -> dict[str, Tensor]:
        """Constant tables of this shape of grid, by name."""
        suffix = "".join(f"_{side}" for side in grid)
        if f"places{suffix}" not in self._buffers:
            if torch.compiler.is_compiling():  # a graph that changed its module could not be recomputed by checkpointing
                return {name: table.to(device) for name, table in self._make_tables(grid).items()}
            self.set_tables(lambda: {name + suffix: table for name, table in self._make_tables(grid).items()}, device)
        return {name.removesuffix(suffix): table for name, table in self._buffers.items() if name.endswith(suffix)}

    def _make_tables(self, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Tables by name, one of which is `places`."""
        raise NotImplementedError


class NeighborSelection(GridTables):
    """Which K tokens each token is mixed with: a `NeighborConfig` applied to grids of tokens.

    Args:
        neighbors: the rules.
        axes: sides of a grid, 1 or 2.
        self_first: slot 0 is the token itself in `all` mode too (it always is among samples).
        padding: width of the ring around the tokens that are asked for.
        class_tokens: tokens before those of the grid; they are always candidates, at its center.
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
        """query (B, N, C), key (B, M, C), both `search_features` -> index (B, N, K).

        With `scored` also the differentiable scores of the neighbors (B, N, K).
        """
        index, among = self._search_space(key, grid)
        K, metric = self.neighbors.K, self.neighbors.metric
        if index is None:
            find = find_scored_neighbors if scored else find_neighbors
            return find(query, key, K, metric, **among)
        index = index.expand(query.shape[0], -1, -1)
        return (index, neighbor_scores(query, key, index, metric)) if scored else index

    def choose(self, query: Tensor, key: Tensor, grid: tuple[int, ...], topk: str, temperature: float) -> Choice:
        """What `forward` finds, so that the choice is learned: by content, with `topk` straight_through or gumbel."""
        _, among = self._search_space(key, grid)
        return choose(query, key, self.neighbors.K, self.neighbors.metric, topk=topk, temperature=temperature, **among)

    def _search_space(self, key: Tensor, grid: tuple[int, ...]) -> tuple[Tensor | None, dict]:
        """The neighbors (N, K) if location decides, else what the search is told: candidates and the tokens themselves."""
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

    def drop_padding(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The tokens inside the ring of padding: (B, M, C) -> (B, N, C)."""
        return tokens.index_select(1, self._tables(grid, tokens.device)["inner"]) if self.padding else tokens

    def search_features(self, features: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What the search compares: features (B, M, C), under Loc_Col joined with coordinates (B, M, C + axes)."""
        if self.neighbors.similarity_type != "Loc_Col":
            return features
        return join_coordinates(features, self._coordinates(features, grid), self.neighbors.lambda_param)

    def append_coordinates(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What is aggregated: values (B, M, C), under aggregation_type Loc_Col with coordinates appended (B, M, C + axes)."""
        if self.neighbors.aggregation_type != "Loc_Col":
            return values
        return torch.cat([values, self._coordinates(values, grid).expand(values.shape[0], -1, -1)], dim=2)

    def _coordinates(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return coordinates(self._tables(grid, x.device)["places"], grid, x.dtype, self.class_tokens)

    def _centered(self, places: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Places in half pixels from the center of the grid, where class tokens are: whole numbers, so distances are exact."""
        offsets = [2 * places[:, axis] - (side - 1) for axis, side in enumerate(grid)]
        return F.pad(torch.stack(offsets, dim=1), (0, 0, self.class_tokens, 0))

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
