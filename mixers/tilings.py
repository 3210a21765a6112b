"""Tilings: sparse patterns of patches as tiles with queries that share a short list of keys.

A tile is a small dense attention under a mask, so attention by location costs N x window instead of N x N. The tables are made
on the CPU whatever the default device.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixers.masks import in_column, in_neighborhood, in_row, in_square, is_near, is_strided, window_start
from options.checks import check_window, sequence_grid

NONE = -1  # pads short tiles


class Tiling(NamedTuple):
    """Patches cut into T tiles of at most q; the patches of a tile see only its keys, at most k."""

    queries: Tensor  # (T, q) patches, each exactly once, padded with NONE
    keys: Tensor  # (T, k) patches, padded with NONE
    sees: Callable[[Tensor, Tensor], Tensor]  # (i, j): whether patch i attends to patch j, element by element


def pad_tiles(tiles: Iterable[Iterable[int]]) -> Tensor:
    return pad_sequence([torch.tensor(list(tile), device="cpu") for tile in tiles], batch_first=True, padding_value=NONE)


def windows(length: int, reach: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut into blocks of `size` positions (T, q), with all positions at most `reach` away from any of them (T, k)."""
    queries = [range(start, min(start + size, length)) for start in range(0, length, size)]
    keys = [range(max(block[0] - reach, 0), min(block[-1] + reach + 1, length)) for block in queries]
    return pad_tiles(queries), pad_tiles(keys)


def window_tiling(length: int, reach: int) -> Tiling:
    """Tile a sequence into blocks; patches see others at most `reach` away."""
    return Tiling(*windows(length, reach, max(reach, 16)), partial(is_near, reach=reach))


def window_tilings(reach: int, height: int, width: int) -> list[Tiling]:
    return [window_tiling(height * width, reach)]


def product(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Combine positions along both sides, (Ty, ny) and (Tx, nx), to patches of the grid, (Ty * Tx, ny * nx)."""
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    patches = torch.where((rows == NONE) | (columns == NONE), NONE, rows * width + columns)
    return patches.flatten(2).flatten(0, 1)


def strided_tiling(length: int, context: int) -> Tiling:
    """Tile a sequence into classes of positions that are a multiple of `context` apart."""
    classes = pad_tiles(range(start, length, context) for start in range(min(context, length)))
    return Tiling(classes, classes, partial(is_strided, context=context))


def sparse_tilings(mode: str, context: int, height: int, width: int) -> list[Tiling]:
    """Tile the pairs of a mode of `MultiHeadSparseAttention`; without a tiling, every patch sees every other."""
    length = height * width
    local = [window_tiling(length, context // 2)]
    return {"all": [], "local": local, "strided": [*local, strided_tiling(length, context)]}[mode]


def mask_tilings(mask_type: str, reach: int, height: int, width: int) -> list[Tiling]:
    """Tile the pairs that a mask of this type and expansion step allows; without a tiling, every patch sees every other."""
    if mask_type == "full":
        return []
    if mask_type == "1d_cardinal":
        return [window_tiling(height * width, 2 * reach)]  # as many neighbors as the cross has, 4 * reach
    if mask_type == "1d_all_neighbors":
        return [window_tiling(height * width, ((2 * reach + 1) ** 2 - 1) // 2)]  # as many as the square has
    rule = {"width": width, "reach": reach}
    size = max(reach, 16) if mask_type == "2d_cardinal" else max(reach, 4)
    rows, columns = windows(height, reach, size), windows(width, reach, size)
    if mask_type == "2d_all_neighbors":
        queries, keys = (product(*sides, width) for sides in zip(rows, columns, strict=True))
        return [Tiling(queries, keys, partial(in_square, **rule))]
    each_row, each_column = (torch.arange(side, device="cpu")[:, None] for side in (height, width))
    return [
        Tiling(*(product(each_row, part, width) for part in columns), partial(in_row, **rule)),
        Tiling(*(product(part, each_column, width) for part in rows), partial(in_column, **rule)),
    ]


def tile_size(length: int, kernel_size: int) -> int:
    """Choose the length of a tile along a side: about a kernel, with tiles as equal as possible and the fewest scores."""
    counts = max(1, length // kernel_size), math.ceil(length / kernel_size)
    sizes = [math.ceil(length / count) for count in counts]
    return min(sizes, key=lambda size: math.ceil(length / size) * size * (size + kernel_size - 1))


def neighborhood_tiling(height: int, width: int, kernel_size: int, dilation: int) -> Tiling:
    """Tile a grid into rectangles of patches `dilation` apart; each patch sees kernel_size^2 at the same spacing."""

    def along(side: int) -> tuple[Tensor, Tensor]:
        """(T, q) and (T, k) positions along one side."""
        if side == 1:
            return pad_tiles([[0]]), pad_tiles([[0]])
        starts = window_start(torch.arange(side, device="cpu"), side, kernel_size, dilation).tolist()
        queries, keys = [], []
        for offset in range(dilation):
            positions = range(offset, side, dilation)
            size = tile_size(len(positions), kernel_size)
            for start in range(0, len(positions), size):
                tile = positions[start : start + size]
                queries.append(tile)
                keys.append(positions[starts[tile[0]] : starts[tile[-1]] + kernel_size])
        return pad_tiles(queries), pad_tiles(keys)

    queries, keys = (product(*sides, width) for sides in zip(along(height), along(width), strict=True))
    sees = partial(in_neighborhood, grid=(height, width), kernel_size=kernel_size, dilation=dilation)
    return Tiling(queries, keys, sees)


def neighborhood_tilings(
    kernel_size: int, dilation: int, height: int, width: int, names: tuple[str, str] = ("kernel_size", "dilation")
) -> list[Tiling]:
    """Tile a grid for neighborhood attention. Raises ValueError if its window does not fit the grid."""
    check_window(kernel_size, dilation, sequence_grid((height, width)), names=names)
    return [neighborhood_tiling(height, width, kernel_size, dilation)]
