import math

import pytest
import torch

from experiments.measures import (
    distance_shares,
    gini,
    head_overlap,
    join_heads,
    mean_distance,
    mirrored,
    neighbor_distances,
    overlap,
    random_index,
    skewness,
    softmax_mass,
    times_chosen,
)
from mixers.selection import NeighborSelection
from neighbors import find_neighbors, grid_locations, location_neighbors
from options.neighbors import NeighborConfig


@pytest.mark.parametrize("M", [2, 5, 65])
def test_gini_and_skewness_in_closed_form(M):
    equal, one = torch.full((M,), 7.0), torch.zeros(M)
    one[M // 2] = 9
    assert float(gini(equal)) == 0 and float(skewness(equal)) == 0
    assert float(gini(one)) == pytest.approx((M - 1) / M)
    assert float(skewness(one)) == pytest.approx((M - 2) / math.sqrt(M - 1), abs=1e-5)
    straight = torch.arange(1.0, M + 1)[torch.randperm(M)]  # 1, ..., M in any order
    assert float(gini(straight)) == pytest.approx((M - 1) / (3 * M))
    assert float(skewness(straight)) == pytest.approx(0, abs=1e-5)
    both = torch.stack([equal, one])
    assert gini(both).tolist() == [float(gini(equal)), float(gini(one))]


def test_gini_is_the_mean_difference():
    counts = torch.rand(20)
    expected = (counts[:, None] - counts).abs().mean() / (2 * counts.mean())
    torch.testing.assert_close(gini(counts), expected)


def test_times_chosen():
    index = torch.tensor([[[0, 2], [2, -1], [2, 3]]])
    assert times_chosen(index, 5).tolist() == [[1, 0, 3, 1, 0]]
    assert times_chosen(torch.zeros(4, 1, dtype=torch.long), 4).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize(("class_tokens", "padding"), [(0, 0), (1, 0), (0, 1)])
def test_distances_of_a_window(class_tokens, padding):
    """By location, the 9 nearest of a token inside are itself, four at 1 and four at the root of 2."""
    inside = 7, 5
    grid = tuple(side + 2 * padding for side in inside)
    config = NeighborConfig(K=9, similarity_type="Loc")
    select = NeighborSelection(config, axes=2, self_first=False, padding=padding, class_tokens=0, grid=grid)
    tokens = torch.randn(1, math.prod(grid), 3)
    index = select(tokens, tokens, grid)[0] + class_tokens
    if class_tokens:
        index = torch.cat([torch.zeros(1, 9, dtype=torch.long), index])
        index[2, 0] = 0
    distances = neighbor_distances(index, grid, padding, class_tokens)
    assert distances.shape == index.shape
    middle = distances[class_tokens + 3 * 5 + 2]
    assert middle.sort().values.tolist() == pytest.approx([0, 1, 1, 1, 1, *[math.sqrt(2)] * 4])
    assert mean_distance(middle) == pytest.approx((4 + 4 * math.sqrt(2)) / 9)
    assert mean_distance(middle, (middle > 1.2).float()) == pytest.approx(math.sqrt(2))
    assert distance_shares(middle, 4).tolist() == pytest.approx([1 / 9, 8 / 9, 0, 0])
    if padding:  # a ring around the image completes every window
        assert mean_distance(distances) == pytest.approx((4 + 4 * math.sqrt(2)) / 9)
    if class_tokens:
        assert distances[0].isnan().all() and distances[2].isnan().tolist() == [True] + [False] * 8
        assert float(distance_shares(distances, 4).sum()) == pytest.approx(1)


def test_distances_are_those_between_places():
    index = torch.randint(0, 24, (2, 3, 24, 4))
    places = grid_locations((4, 6)).float()
    expected = torch.cdist(places, places).expand(2, 3, -1, -1).gather(3, index)
    torch.testing.assert_close(neighbor_distances(index, (4, 6)), expected)
    index[0, 0, 0, 0] = -1
    assert neighbor_distances(index, (4, 6)).isnan().sum() == 1


def test_overlap():
    one = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, -1]])
    other = torch.tensor([[2, 1, 0], [5, 9, 8], [-1, 7, 6]])
    assert overlap(one, other).tolist() == pytest.approx([1, 1 / 3, 1])
    assert overlap(one, one[:, :1]).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    chance = overlap(random_index((2000, 9), 65), random_index((2000, 9), 65, seed=1)).mean()
    assert float(chance) == pytest.approx(9 / 65, abs=0.01)  # of 2,000 tokens: a standard deviation is 0.0025


def test_overlap_of_heads():
    same = random_index((2, 1, 10, 3), 20).expand(-1, 4, -1, -1)
    assert head_overlap(same).tolist() == [[1.0] * 10] * 2
    apart = torch.arange(4).view(1, 4, 1, 1).expand(2, 4, 10, 1)
    assert not head_overlap(apart).any()
    half = apart.clone()
    half[:, 1] = half[:, 0]  # 2 of the 12 pairs in order
    torch.testing.assert_close(head_overlap(half), torch.full((2, 10), 2 / 12))


def test_heads_are_joined_by_their_weights():
    index = torch.tensor([[[[0, 1]], [[1, 2]]]])
    weights = torch.tensor([[[[0.6, 0.4]], [[0.3, 0.7]]]])
    assert join_heads(index, weights, 4).tolist() == [[[1, 2]]]  # 0.6, 0.7, 0.7
    assert join_heads(index[:, :1], weights[:, :1] * 0, 4).tolist() == [[[-1, -1]]]


@pytest.mark.parametrize(("class_tokens", "padding"), [(0, 0), (1, 0), (0, 1)])
def test_the_index_of_a_mirrored_image_is_that_of_the_image(class_tokens, padding):
    grid = 4 + 2 * padding, 6 + 2 * padding
    keys = torch.randn(2, *grid, 5)
    first = torch.randn(2, class_tokens, 5)
    inner = slice(padding, grid[0] - padding), slice(padding, grid[1] - padding)

    def index_of(image):
        tokens = torch.cat([first, image.flatten(1, 2)], dim=1)
        own = torch.cat([first, image[:, inner[0], inner[1]].flatten(1, 2)], dim=1)
        return find_neighbors(own, tokens, 3, "euclidean")

    index = index_of(keys)
    assert torch.equal(mirrored(index_of(keys.flip(2)), grid, padding, class_tokens), index)
    assert not torch.equal(index_of(keys.flip(2)), index)


@pytest.mark.parametrize("metric", ["matmul", "cosine", "euclidean"])
def test_softmax_mass(metric):
    query, key = torch.randn(2, 7, 4), torch.randn(2, 9, 4)
    everyone = find_neighbors(query, key, 9, metric)
    torch.testing.assert_close(softmax_mass(query, key, everyone, metric), torch.ones(2, 7))
    scores = {
        "matmul": query @ key.mT / 2,
        "cosine": torch.nn.functional.cosine_similarity(query[:, :, None], key[:, None], dim=-1),
        "euclidean": -torch.cdist(query, key),
    }[metric]
    largest = scores.softmax(dim=-1).topk(3).values.sum(dim=-1)
    torch.testing.assert_close(softmax_mass(query, key, everyone[:, :, :3], metric), largest)
    cold = softmax_mass(query, key, everyone[:, :, :1], metric, temperature=0.1)
    torch.testing.assert_close(cold, (scores / 0.1).softmax(dim=-1).amax(dim=-1))
    torch.testing.assert_close(softmax_mass(query * 0, key, everyone[:, :, :3], "matmul"), torch.full((2, 7), 3 / 9))


def test_what_is_chosen_by_chance():
    index = random_index((3, 50, 9), 65)
    assert index.shape == (3, 50, 9) and all(len(set(row)) == 9 for row in index.flatten(0, 1).tolist())
    counts = times_chosen(random_index((4000, 9), 20), 20) / 4000
    assert counts.tolist() == pytest.approx([9 / 20] * 20, abs=0.05)  # six standard deviations


def test_a_convolution_chooses_near_tokens():
    index = location_neighbors(2 * grid_locations((8, 8)), 9, torch.arange(64))
    assert (
        mean_distance(neighbor_distances(index, (8, 8)))
        < 1.3
        < mean_distance(neighbor_distances(random_index((64, 9), 64), (8, 8)))
    )
