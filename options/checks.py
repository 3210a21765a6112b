"""Checks of arguments that layers and configs share. Each raises ValueError with the value and what is allowed."""

import dataclasses
import math

from options.layers import CONVOLUTION_TYPES, TOPKS
from options.neighbors import NeighborConfig, as_sides


def shuffle_factors(pattern: str, scale: int, axes: int) -> tuple[int, int]:
    """Return the factors by which a shuffle pattern multiplies the input and output channels of a mixer."""
    factor = scale**axes
    return (factor if pattern in ("B", "BA") else 1), (factor if pattern in ("A", "BA") else 1)


def sequence_grid(grid: tuple[int, int]) -> tuple[int, ...]:
    """Return the sides of a grid of tokens, or the length of a single row or column."""
    return tuple(side for side in grid if side > 1) or (1,)


def closest_divisor(number: int, wanted: int) -> int:
    """Return the largest divisor of a number that is at most `wanted`, or 1."""
    return next((part for part in range(min(number, wanted), 1, -1) if number % part == 0), 1)


def check_heads(d_model: int, num_heads: int) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide d_model={d_model}; use a divisor of {d_model}, such as "
            f"{closest_divisor(d_model, num_heads)}"
        )


def check_patches(patch_size: int, image_size: tuple[int, int]) -> None:
    if any(side % patch_size for side in image_size):
        raise ValueError(
            f"patch_size={patch_size} does not divide the {as_sides(image_size)} image; "
            f"use a divisor, such as {closest_divisor(math.gcd(*image_size), patch_size)}, or another resize"
        )


def check_dropout(attention_dropout: float) -> None:
    if not 0 <= attention_dropout < 1:
        raise ValueError(f"attention_dropout={attention_dropout} must be at least 0 and below 1")


def check_slots(convolution_type: str, aggregation_type: str) -> None:
    """Raise ValueError for an unknown convolution over the slots, or one that does not fit the values."""
    if convolution_type not in CONVOLUTION_TYPES:
        raise ValueError(f"convolution_type={convolution_type!r} is not one of {', '.join(CONVOLUTION_TYPES)}")
    if aggregation_type == "Loc_Col" and convolution_type == "depthwise":
        raise ValueError(
            "aggregation_type=Loc_Col appends coordinates to the values, so it needs "
            "convolution_type=standard or depthwise-separable, not depthwise"
        )


def check_temperature(score_temperature: float) -> None:
    if not score_temperature > 0:
        raise ValueError(f"score_temperature={score_temperature} must be above 0")


def check_topk(topk: str, similarity_type: str = "Col", softmax_topk_val: bool = True) -> None:
    """Raise ValueError for an unknown top-k, or a learned one that gets no gradient under these options."""
    if topk not in TOPKS:
        raise ValueError(f"topk={topk!r} is not one of {', '.join(TOPKS)}")
    if topk == "hard":
        return
    if similarity_type == "Loc":
        raise ValueError(
            f"topk={topk} learns to select by content, and similarity_type=Loc selects by location; "
            "use Col or Loc_Col, or topk=hard"
        )
    if not softmax_topk_val:
        raise ValueError(f"topk={topk} needs the softmax of the scores; use softmax_topk_val=True, or topk=hard")


def dilate(neighbors: NeighborConfig, dilation: int) -> NeighborConfig:
    """Return a config with K * dilation neighbors, to take every `dilation`-th. Raises ValueError for too few candidates."""
    if dilation < 1:
        raise ValueError(f"dilation={dilation} must be at least 1")
    try:
        return dataclasses.replace(neighbors, K=neighbors.K * dilation)
    except ValueError as error:
        raise ValueError(f"dilation={dilation} with K={neighbors.K}: {error}") from None


def region_sides(region_size: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a region of patches: square, or one-dimensional in a grid with a single row or column.

    Raises ValueError if regions do not divide the grid.
    """
    if region_size < 1:
        raise ValueError(f"region_size={region_size} must be at least 1")
    sides = tuple(min(region_size, side) if 1 in grid else region_size for side in grid)
    if any(side % part for side, part in zip(grid, sides, strict=True)):
        raise ValueError(
            f"region_size={region_size} does not divide the {as_sides(grid)} grid of patches; use a divisor, such as "
            f"{closest_divisor(math.gcd(*(side for side in grid if side > 1)) or 1, region_size)}"
        )
    return sides


def check_value_convolution(kernel_size: int, grid: tuple[int, ...]) -> None:
    """Raise ValueError for an even kernel, or for a kernel with taps that never meet the grid; 0 means no convolution."""
    if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
        raise ValueError(f"value_convolution={kernel_size} must be odd, or 0 for none")
    most = 2 * min(grid) - 1
    if kernel_size > most:
        raise ValueError(
            f"value_convolution={kernel_size} reaches over the whole {as_sides(grid)} grid of patches; it can be at most {most}"
        )


def check_window(
    kernel_size: int, dilation: int, grid: tuple[int, ...], names: tuple[str, str] = ("kernel_size", "dilation")
) -> None:
    """Raise ValueError, with the names of the two options, if the grid does not hold a neighborhood of this size."""
    window, step = names
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{window}={kernel_size} must be odd for a neighborhood")
    if dilation < 1:
        raise ValueError(f"{step}={dilation} must be at least 1")
    if kernel_size * dilation > min(grid):
        raise ValueError(
            f"{window}={kernel_size} with {step}={dilation} spans {kernel_size * dilation} patches and the grid has "
            f"{as_sides(grid)}; their product can be at most {min(grid)}"
        )


def branch_widths(d_model: int, num_heads: int, branch_ratio: float) -> tuple[int, int]:
    """Return the features of the ConvNN branch and of the other. Raises ValueError if the heads do not divide them."""
    check_heads(d_model, num_heads)
    width = math.floor(d_model * branch_ratio + 0.5)  # a half goes to the first branch
    if not 0 < width < d_model or width % num_heads:
        parts = d_model // num_heads
        share = min(max(round(branch_ratio * parts), 1), parts - 1) / parts
        remedy = f"branch_ratio={share:g}" if share else "fewer heads"
        raise ValueError(
            f"branch_ratio={branch_ratio} splits d_model={d_model} into {width} + {d_model - width} features, and both need "
            f"a positive multiple of num_heads={num_heads}; use {remedy}"
        )
    return width, d_model - width
