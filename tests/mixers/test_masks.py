"""Local masks against masks that are written out pair by pair."""

import itertools

import pytest
import torch

from mixers.local import local_mask

GRIDS = list(itertools.product(range(1, 6), range(1, 6)))


def slow_mask(height, width, sees):
    places = [(row, column) for row in range(height) for column in range(width)]
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (row, column) in enumerate(places):
        for j, (y, x) in enumerate(places):
            mask[i, j] = sees(abs(y - row), abs(x - column))
    return mask


@pytest.mark.parametrize("N", range(1, 12))
def test_1d(N):
    for step in range(N):
        for name, num_neighbors in (("1d_cardinal", 1 + 4 * step), ("1d_all_neighbors", (2 * step + 1) ** 2)):
            reach = (num_neighbors - 1) // 2
            expected = slow_mask(1, N, lambda dy, dx, reach=reach: dx <= reach)
            assert torch.equal(local_mask(name, step, 1, N), expected)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_2d(height, width):
    for step in range(7):
        cross = slow_mask(height, width, lambda dy, dx, step=step: min(dy, dx) == 0 and max(dy, dx) <= step)
        square = slow_mask(height, width, lambda dy, dx, step=step: max(dy, dx) <= step)
        assert torch.equal(local_mask("2d_cardinal", step, height, width), cross)
        assert torch.equal(local_mask("2d_all_neighbors", step, height, width), square)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_neighbors_in_the_middle_of_a_large_grid(step):
    middle = 10 * 21 + 10
    cross = local_mask("2d_cardinal", step, 21, 21)
    square = local_mask("2d_all_neighbors", step, 21, 21)
    assert cross.dtype == square.dtype == torch.bool
    assert (cross[middle].sum(), square[middle].sum()) == (1 + 4 * step, (2 * step + 1) ** 2)
    for name, count in (("1d_cardinal", 1 + 4 * step), ("1d_all_neighbors", (2 * step + 1) ** 2)):
        assert local_mask(name, step, 21, 21)[middle].sum() == count
