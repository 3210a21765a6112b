"""mixers/masks.py against masks that are written out pair by pair."""

import itertools

import pytest
import torch

from mixers.masks import (
    generate_1d_attention_mask,
    generate_2d_attention_mask_all_neighbors,
    generate_2d_attention_mask_cardinal,
)

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
    for num_neighbors in range(1, 2 * N + 3):
        reach = (num_neighbors - 1) // 2
        expected = slow_mask(1, N, lambda dy, dx, reach=reach: dx <= reach)
        assert torch.equal(generate_1d_attention_mask(num_neighbors, N), expected)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_2d(height, width):
    for step in range(7):
        cross = slow_mask(height, width, lambda dy, dx, step=step: min(dy, dx) == 0 and max(dy, dx) <= step)
        square = slow_mask(height, width, lambda dy, dx, step=step: max(dy, dx) <= step)
        assert torch.equal(generate_2d_attention_mask_cardinal(step, height, width), cross)
        assert torch.equal(generate_2d_attention_mask_all_neighbors(step, height, width), square)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_neighbors_in_the_middle_of_a_large_grid(step):
    middle = 10 * 21 + 10
    cross = generate_2d_attention_mask_cardinal(step, 21, 21)
    square = generate_2d_attention_mask_all_neighbors(step, 21, 21)
    assert cross.dtype == square.dtype == torch.bool
    assert (cross[middle].sum(), square[middle].sum()) == (1 + 4 * step, (2 * step + 1) ** 2)
    for count in (1 + 4 * step, (2 * step + 1) ** 2):
        assert generate_1d_attention_mask(count, 441)[middle].sum() == count


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: generate_1d_attention_mask(0, 4), "num_neighbors=0"),
        (lambda: generate_1d_attention_mask(3, 0), "1 x 0"),
        (lambda: generate_2d_attention_mask_cardinal(-1, 2, 2), "expansion_step=-1"),
        (lambda: generate_2d_attention_mask_all_neighbors(1, 0, 2), "0 x 2"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
