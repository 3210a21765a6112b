"""Which token attends to which by location: rules for pairs of tokens, and masks (N, N) made of them.

Tokens are numbered along the sequence, those of a grid in raster order. A rule takes numbers i and j, tensors that
broadcast, and says of every pair whether i attends to j; so it serves a whole mask as well as a few rows of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------


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
    """Whether token j is in the sliding window of token i, along both sides (Hassani et al., CVPR 2023).

    A side of one token, of a sequence without a grid, has a window of one.
    """
    inside = True
    for own, other, side in zip((i // grid[1], i % grid[1]), (j // grid[1], j % grid[1]), grid, strict=True):
        if side == 1:
            continue
        steps = other // dilation - window_start(own, side, kernel_size, dilation)
        inside = inside & (own % dilation == other % dilation) & (steps >= 0) & (steps < kernel_size)
    return inside


def window_start(position: Tensor, side: int, kernel_size: int, dilation: int) -> Tensor:
    """Where the window of a token starts along one side, among the tokens that are a multiple of `dilation` from it."""
    length = (side - 1 - position % dilation) // dilation + 1
    return (position // dilation - kernel_size // 2).clamp(min=0).minimum(length - kernel_size)


# ---------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------


def window_reach(num_neighbors: int) -> int:
    """How far a window of so many tokens, the one in the middle included, goes to either side."""
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors={num_neighbors} must be at least 1")
    return (num_neighbors - 1) // 2


def check_grid(expansion_step: int, height: int, width: int) -> None:
    if expansion_step < 0:
        raise ValueError(f"expansion_step={expansion_step} must be at least 0")
    if height < 1 or width < 1:
        raise ValueError(f"a grid of {height} x {width} tokens has none")


def every_pair(tokens: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(tokens)
    return i[:, None], i[None]


def generate_1d_attention_mask(num_neighbors: int, N: int) -> Tensor:
    """Window on a sequence: (N, N), True where |i - j| <= (num_neighbors - 1) / 2. It is cut off at both ends.

    Raises ValueError for fewer than one neighbor (the token itself) or one token.
    """
    check_grid(0, 1, N)
    return is_near(*every_pair(N), reach=window_reach(num_neighbors))


def generate_2d_attention_mask_cardinal(expansion_step: int, height: int, width: int) -> Tensor:
    """Cross on a grid: (N, N), True for tokens at most `expansion_step` above, below, left or right, and the token itself.

    1 + 4 * expansion_step tokens; it is cut off at the border. Raises ValueError for a negative step or an empty grid.
    """
    check_grid(expansion_step, height, width)
    i, j = every_pair(height * width)
    return in_row(i, j, width=width, reach=expansion_step) | in_column(i, j, width=width, reach=expansion_step)


def generate_2d_attention_mask_all_neighbors(expansion_step: int, height: int, width: int) -> Tensor:
    """Square on a grid: (N, N), True for tokens at most `expansion_step` rows and as many columns away.

    (2 * expansion_step + 1)^2 tokens; it is cut off at the border. Raises ValueError for a negative step or an empty grid.
    """
    check_grid(expansion_step, height, width)
    return in_square(*every_pair(height * width), width=width, reach=expansion_step)
