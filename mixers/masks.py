"""Rules by which tokens attend to others by location.

Tokens are numbered along the sequence, on a grid in raster order. A rule takes numbers i and j, tensors that broadcast, and
returns True where i attends to j; so it serves a whole mask as well as a few rows of it.
"""

from torch import Tensor


def is_near(i: Tensor, j: Tensor, *, reach: int) -> Tensor:
    """At most `reach` apart on the sequence."""
    return (i - j).abs() <= reach


def is_strided(i: Tensor, j: Tensor, *, context: int) -> Tensor:
    """A multiple of `context` away, and not within half of it."""
    return ((i - j) % context == 0) & ~is_near(i, j, reach=context // 2)


def in_row(i: Tensor, j: Tensor, *, width: int, reach: int) -> Tensor:
    """In the same row of the grid, at most `reach` apart."""
    return (i // width == j // width) & is_near(i, j, reach=reach)


def in_column(i: Tensor, j: Tensor, *, width: int, reach: int) -> Tensor:
    """In the same column of the grid, at most `reach` apart, and another token."""
    return (i % width == j % width) & is_near(i // width, j // width, reach=reach) & (i != j)


def in_square(i: Tensor, j: Tensor, *, width: int, reach: int) -> Tensor:
    """At most `reach` rows and at most `reach` columns apart."""
    return is_near(i // width, j // width, reach=reach) & is_near(i % width, j % width, reach=reach)


def in_neighborhood(i: Tensor, j: Tensor, *, grid: tuple[int, int], kernel_size: int, dilation: int) -> Tensor:
    """In the sliding window of token i along both sides (Hassani et al., CVPR 2023).

    Along a side of one token, as of a sequence without a grid, the window is one.
    """
    inside = True
    for own, other, side in zip((i // grid[1], i % grid[1]), (j // grid[1], j % grid[1]), grid, strict=True):
        if side == 1:
            continue
        steps = other // dilation - window_start(own, side, kernel_size, dilation)
        inside = inside & (own % dilation == other % dilation) & (steps >= 0) & (steps < kernel_size)
    return inside


def window_start(position: Tensor, side: int, kernel_size: int, dilation: int) -> Tensor:
    """Start of the window of a token along one side, among the tokens that are a multiple of `dilation` from it."""
    length = (side - 1 - position % dilation) // dilation + 1
    return (position // dilation - kernel_size // 2).clamp(min=0).minimum(length - kernel_size)
