import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kernels.chunked
import kernels.cpu
from kernels import reference
from kernels.reference import gather
from neighbors import (
    aggregate,
    attend_to_neighbors,
    coordinates,
    find_neighbors,
    find_scored_neighbors,
    gather_neighbors,
    grid_locations,
    join_coordinates,
    location_neighbors,
    max_neighbors,
    neighbor_scores,
    neighbor_weights,
    random_candidates,
    spatial_candidates,
    weighted_sum,
)
from options.neighbors import METRIC_ALIASES, NeighborConfig
from runs.measure import peak_memory
from tests.helpers.naive import aggregate as naive_aggregate
from tests.helpers.naive import neighbors as naive_neighbors
from tests.helpers.naive import pairs, scores, window

CPU = torch.device("cpu")
KINDS = ("cosine", "euclidean", "matmul")


@st.composite
def problems(draw):
    """Random tokens in float64: query (B, N, C), key (B, M, C), K."""
    B, N, M, C = (draw(st.integers(1, n)) for n in (3, 9, 9, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    query, key = (torch.randn(B, n, C, dtype=torch.float64, generator=generator) for n in (N, M))
    return query, key, draw(st.integers(1, M))


@pytest.fixture(params=[None, 7], ids=["one chunk", "chunks of 7 elements"])
def chunks(request, monkeypatch):
    """Both as one chunk and cut into the smallest pieces."""
    for module in (kernels.chunked, kernels.cpu) if request.param else ():
        monkeypatch.setattr(module, "CHUNK", request.param)
        monkeypatch.setattr(module, "GATHERED", 4 * request.param)


def assert_same_neighbors(found, expected, query, key, metric):
    """Equal scores slot by slot (equal indices would be too much: ties), and no neighbor twice."""
    full = scores(query, key, metric)
    # One channel ranks cosines of exactly 1 and -1 only: all are ties but for rounding.
    torch.testing.assert_close(full.gather(2, found), full.gather(2, expected), atol=1e-9, rtol=1e-9)
    assert all(len(set(row.tolist())) == len(row) for row in found.flatten(0, 1))


def test_the_plain_form_is_what_it_says_by_loops():
    """`kernels/reference.py`, which all else is compared with, against Python's own arithmetic."""

    def dot(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True))

    query, key, values = (torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 6, 6))
    weight, candidates, own = torch.randn(5, 2 * 3, dtype=torch.float64), torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2, 0, 4])
    rank = {
        "matmul": dot,
        "cosine": lambda q, k: dot(q, k) / math.hypot(*q) / math.hypot(*k),
        "euclidean": lambda q, k: -math.dist(q, k),
    }
    for metric, score in rank.items():
        found = reference.find_neighbors(query, key, 3, metric, candidates, own)
        for b, i in itertools.product(range(2), range(4)):
            best = sorted(
                (j for j in candidates.tolist() if j != own[i]), key=lambda j: -score(query[b, i].tolist(), key[b, j].tolist())
            )
            assert found[b, i].tolist() == [own[i].item(), *best[:2]]
    index, products = reference.find_scored_neighbors(query, key, 2, None, None)
    squares = reference.pair_scores(query, key, index, True)
    out = reference.aggregate(values, index, weight, products, False)
    summed = reference.weighted_sum(values, index, products)
    for b, i in itertools.product(range(2), range(4)):
        chosen = index[b, i].tolist()
        dots = [dot(query[b, i].tolist(), key[b, j].tolist()) for j in chosen]
        assert products[b, i].tolist() == pytest.approx(dots)
        assert squares[b, i].tolist() == pytest.approx(
            [math.dist(query[b, i].tolist(), key[b, j].tolist()) ** 2 for j in chosen]
        )
        row = [dot * value for dot, j in zip(dots, chosen, strict=True) for value in values[b, j].tolist()]
        assert out[b, i].tolist() == pytest.approx([dot(w, row) for w in weight.tolist()])
        assert summed[b, i].tolist() == pytest.approx([row[c] + row[3 + c] for c in range(3)])


# --- select ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRIC_ALIASES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend is that of the whole test
@given(problem=problems())
def test_search_is_topk_of_the_full_matrix(backend, metric, problem):
    query, key, K = problem
    found = find_neighbors(query, key, K, metric)
    assert found.dtype == torch.long and found.shape == (*query.shape[:2], K)
    assert_same_neighbors(found, naive_neighbors(query, key, K, metric), query, key, metric)


@pytest.mark.parametrize("metric", KINDS)
def test_search_in_chunks(metric, chunks):
    query, key = torch.randn(3, 11, 4).double(), torch.randn(3, 13, 4).double()
    own = torch.randperm(13)[:11]
    for candidates in (None, torch.randperm(13)[:6]):
        for self_index in (None, own):
            found = find_neighbors(query, key, 5, metric, candidates=candidates, self_index=self_index)
            expected = naive_neighbors(query, key, 5, metric, candidates, self_index)
            assert torch.equal(found, expected)  # random floats have no ties


@pytest.mark.parametrize("metric", KINDS)
def test_self_is_slot_0_whatever_the_ties(metric):
    key = torch.ones(2, 20, 3)  # every token ties with every other
    for candidates in (None, torch.tensor([3, 1, 7, 4])):
        found = find_neighbors(key, key, 4, metric, candidates=candidates, self_index=torch.arange(20))
        assert torch.equal(found[:, :, 0], torch.arange(20).expand(2, -1))
        assert all(len(set(row.tolist())) == 4 for row in found.flatten(0, 1))
        if candidates is not None:
            assert torch.isin(found[:, :, 1:], candidates).all()


def test_search_of_self_alone_and_of_everything():
    x = torch.randn(2, 6, 3)
    own = torch.arange(6)
    assert torch.equal(find_neighbors(x, x, 1, "cosine", self_index=own), own.view(1, 6, 1).expand(2, 6, 1))
    everything = find_neighbors(x, x, 6, "matmul", self_index=own)
    assert torch.equal(everything.sort().values, own.expand(2, 6, 6))


def test_euclidean_search_far_from_the_origin():
    """|q|^2 - 2 q.k + |k|^2 in float32 cancels to noise here; centering keeps the order."""
    x = torch.rand(1, 50, 3) + 1000
    expected = naive_neighbors(x.double(), x.double(), 5, "euclidean")
    found = find_neighbors(x, x, 5, "euclidean")
    assert (found == expected).float().mean() > 0.95


def test_search_ignores_autocast_and_keeps_the_order_of_float32():
    x = torch.randn(2, 40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {metric: find_neighbors(x, x, 5, metric) for metric in KINDS}
        rounded = {metric: naive_neighbors(x.bfloat16().double(), x.bfloat16().double(), 5, metric) for metric in KINDS}
    for metric in KINDS:
        assert torch.equal(found[metric], naive_neighbors(x.double(), x.double(), 5, metric))
        assert not torch.equal(found[metric], rounded[metric])  # the order of bfloat16 is another


def test_search_has_no_gradient():
    x = torch.randn(1, 5, 3, requires_grad=True)
    assert not find_neighbors(x, x, 2, "matmul").requires_grad


@pytest.mark.parametrize(
    ("K", "metric", "candidates", "message"),
    [(6, "cosine", None, "1 to 5"), (0, "cosine", None, "1 to 5"), (3, "cosine", [0, 1], "1 to 2"), (2, "cos", None, "matmul")],
)
def test_search_errors_name_what_is_allowed(K, metric, candidates, message):
    x = torch.randn(1, 5, 3)
    with pytest.raises(ValueError, match=message):
        find_neighbors(x, x, K, metric, candidates=None if candidates is None else torch.tensor(candidates))


def test_search_memory_against_the_full_matrix():
    """Less than 1/8 of the score matrix: B = 16, N = 1024, C = 64."""
    x = torch.randn(16, 1024, 64)

    def full():
        return torch.bmm(x, x.mT).topk(9).indices

    def chunked():
        return find_neighbors(x, x, 9, "matmul")

    assert peak_memory(full, CPU) >= 16 * 1024 * 1024 * 4  # the measure sees what it should
    assert peak_memory(chunked, CPU) < 16 * 1024 * 1024 * 4 / 8


# --- places and candidates ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple), st.integers(1, 9))
def test_location_neighbors_equal_a_slow_sort(grid, K):
    tokens = math.prod(grid)
    K = min(K, tokens)
    places = grid_locations(grid)
    found = location_neighbors(places, K, torch.arange(tokens))
    assert found.tolist() == [window(grid, i, K) for i in range(tokens)]


def test_location_neighbors_among_candidates_are_nearest_first():
    places = grid_locations((4, 5))
    candidates = torch.tensor([19, 0, 7, 2])
    found = location_neighbors(places, 3, torch.arange(20), candidates)
    for i, row in enumerate(found.tolist()):
        distance = {j: ((places[i] - places[j]) ** 2).sum().item() for j in candidates.tolist() if j != i}
        assert row == [i, *sorted(distance, key=lambda j: (distance[j], j))[:2]]


@st.composite
def sampled_grids(draw):
    """(height, width, padding, s) with room for s x s candidates within the padding."""
    padding, s = draw(st.integers(0, 3)), draw(st.integers(1, 8))
    sides = st.integers(2 * padding + s, 2 * padding + s + 6)
    return draw(sides), draw(sides), padding, s


@given(sampled_grids())
def test_spatial_candidates_are_the_formula(grid):
    height, width, padding, s = grid

    def positions(side):
        if s == 1:
            return [(side - 1) // 2]
        return [math.floor(padding + i * (side - 1 - 2 * padding) / (s - 1) + 1e-9) for i in range(s)]

    expected = [r * width + c for r in positions(height) for c in positions(width)]
    found = spatial_candidates((height, width), s, padding)
    assert found.tolist() == expected and len(set(expected)) == s * s
    assert spatial_candidates((height, width), s, padding, class_tokens=1).tolist() == [0, *(j + 1 for j in expected)]


def test_random_candidates():
    drawn = [random_candidates(30, 8) for _ in range(20)]
    assert all(len(set(d.tolist())) == 8 and 0 <= d.min() and d.max() < 30 for d in drawn)
    assert len({tuple(d.tolist()) for d in drawn}) > 1
    fixed = random_candidates(1000, 100, fixed=True)
    assert torch.equal(fixed, random_candidates(1000, 100, fixed=True)) and len(fixed.unique()) == 100
    assert 400 < fixed.float().mean() < 600  # spread over the tokens
    assert random_candidates(30, 8, class_tokens=1)[0] == 0


def test_coordinates():
    expected = [[0, 0], [-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    assert coordinates(grid_locations((2, 3)), (2, 3), torch.float64, class_tokens=1).tolist() == expected
    assert coordinates(grid_locations((1,)), (1,), torch.float64).tolist() == [[0]]


def test_joined_features_are_scaled_per_image():
    features = torch.randn(3, 12, 4).double() * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    places = coordinates(grid_locations((3, 4)), (3, 4), torch.float64)
    joined = join_coordinates(features, places, 0.3)
    for image in range(3):
        alone = join_coordinates(features[image : image + 1], places, 0.3)
        torch.testing.assert_close(joined[image : image + 1], alone, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(joined[image, :, :4], 0.3 * features[image] / features[image].std())
        torch.testing.assert_close(joined[image, :, 4:], 0.7 * places)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_features_that_are_all_the_same_leave_neighbors_to_coordinates(value, dtype):
    """One channel of a blank image: its standard deviation is 0, or what rounding leaves of 0."""
    grid = (8, 8)
    features = torch.full((2, 64, 1), value, dtype=dtype).requires_grad_()
    joined = join_coordinates(features, coordinates(grid_locations(grid), grid, dtype), 0.5)
    torch.testing.assert_close(joined[..., 0], torch.zeros(2, 64, dtype=dtype), atol=0, rtol=0)
    assert torch.autograd.grad(joined.square().sum(), features)[0].abs().max() == 0
    index = find_neighbors(joined, joined, 5, "euclidean", self_index=torch.arange(64))
    places = grid_locations(grid).double()
    inner = [row * 8 + column for row in range(1, 7) for column in range(1, 7)]  # with four neighbors at one pixel
    assert ((places[index[:, inner, 1:]] - places[inner, None]).norm(dim=3) == 1).all()


# --- score and aggregate: forward and gradients ---------------------------------------------------------------------


def assert_same_gradients(ours, theirs, inputs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), metric=st.sampled_from(KINDS))
def test_scores_of_pairs(backend, problem, metric):
    query, key, K = problem
    inputs = query.requires_grad_(), key.requires_grad_()
    index = torch.randint(0, key.shape[1], (*query.shape[:2], K))
    assert_same_gradients(neighbor_scores(query, key, index, metric), pairs(query, key, index, metric), inputs)


def test_scores_name_the_metrics():
    x = torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match="cosine, similarity"):
        neighbor_scores(x, x, torch.zeros(1, 3, 1, dtype=torch.long), "cos")


def test_weights():
    query, key = torch.randn(2, 4, 3).double(), torch.randn(2, 6, 3).double()
    index = find_neighbors(query, key, 3, "matmul")
    chosen = pairs(query, key, index, "euclidean")
    torch.testing.assert_close(
        neighbor_weights(neighbor_scores(query, key, index, "euclidean"), "euclidean"), chosen.softmax(-1)
    )
    torch.testing.assert_close(
        neighbor_weights(neighbor_scores(query, key, index, "euclidean"), "euclidean", softmax=False), 1 / (1e-8 - chosen)
    )
    matmul = pairs(query, key, index, "matmul")
    torch.testing.assert_close(neighbor_weights(neighbor_scores(query, key, index, "matmul"), "matmul", softmax=False), matmul)


def test_cosine_with_a_token_of_zeros_has_a_bounded_gradient():
    x = torch.randn(1, 4, 3)
    x[0, 1] = 0
    x.requires_grad_()
    index = find_neighbors(x, x, 4, "cosine")
    (gradient,) = torch.autograd.grad(neighbor_weights(neighbor_scores(x, x, index, "cosine"), "cosine").square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e7


@pytest.mark.parametrize("softmax", [True, False])
def test_distance_of_zero_has_a_finite_gradient(softmax):
    x = torch.zeros(1, 4, 3, requires_grad=True)
    index = find_neighbors(x, x, 4, "euclidean")
    weights = neighbor_weights(neighbor_scores(x, x, index, "euclidean"), "euclidean", softmax=softmax)
    (gradient,) = torch.autograd.grad(weights.sum(), x)
    assert weights.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
@given(problem=problems(), D=st.integers(1, 4))
def test_aggregate_is_a_convolution_over_slots(weighted, depthwise, problem, D):
    query, values, K = problem
    B, N, _ = query.shape
    C = values.shape[2]
    index = torch.randint(0, values.shape[1], (B, N, K))
    weight = torch.randn(C, 1, K).double() if depthwise else torch.randn(D, C, K).double()
    inputs = [values, weight] + [torch.randn(B, N, K).double()] * weighted
    for x in inputs:
        x.requires_grad_()
    factors = inputs[2] if weighted else None
    ours = aggregate(values, index, weight, factors, depthwise=depthwise)
    assert_same_gradients(ours, naive_aggregate(values, index, weight, factors, C if depthwise else 1), inputs)
    assert torch.equal(gather_neighbors(values, index), gather(values, index))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_weighted_sum(backend, problem):
    query, values, K = problem
    index = torch.randint(0, values.shape[1], (*query.shape[:2], K))
    weights = torch.randn(index.shape).double().requires_grad_()
    theirs = (gather(values.requires_grad_(), index) * weights[..., None]).sum(2)
    assert_same_gradients(weighted_sum(values, index, weights), theirs, (values, weights))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_max_neighbors(backend, problem):
    query, values, K = problem
    index = torch.randint(0, values.shape[1], (*query.shape[:2], K))
    theirs = gather(values.requires_grad_(), index).max(dim=2).values  # in two slots one token: any of them passes it on
    assert_same_gradients(max_neighbors(values, index), theirs, (values,))
    twice = []  # gradients of the gradient
    for largest in (max_neighbors(values, index), gather(values, index).amax(2)):
        (gradient,) = torch.autograd.grad(largest.square().sum(), values, create_graph=True)
        twice.append(torch.autograd.grad(gradient.square().sum(), values)[0])
    torch.testing.assert_close(*twice)


def test_of_equal_values_the_first_slot_has_the_gradient(backend):
    values = torch.ones(1, 3, 2, requires_grad=True)
    max_neighbors(values, torch.tensor([[[2, 0], [1, 2]]])).sum().backward()
    assert values.grad[0].tolist() == [[0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("depthwise", [False, True])
def test_aggregate_and_scores_in_chunks(chunks, backend, depthwise):
    values, query = (torch.randn(2, 9, 3).double().requires_grad_() for _ in range(2))
    weight = torch.randn(3, 1 if depthwise else 3, 4).double().requires_grad_()
    index = find_neighbors(query, values, 4, "cosine")
    ours = aggregate(
        values, index, weight, neighbor_weights(neighbor_scores(query, values, index, "cosine"), "cosine"), depthwise=depthwise
    )
    factors = pairs(query, values, index, "cosine").softmax(-1)
    theirs = naive_aggregate(values, index, weight, factors, 3 if depthwise else 1)
    assert_same_gradients(ours, theirs, (values, query, weight))
    ones, factors = torch.ones(3, 1, 4).double(), torch.rand(2, 9, 4).double().requires_grad_()
    theirs = naive_aggregate(values, index, ones, factors, 3)
    assert_same_gradients(weighted_sum(values, index, factors), theirs, (values, factors))
    assert_same_gradients(max_neighbors(values, index), gather(values, index).amax(2), (values,))


def test_aggregate_under_autocast_is_bfloat16_with_float32_weights():
    values, weight = torch.randn(2, 9, 8), torch.randn(5, 8, 4)
    index = find_neighbors(values, values, 4, "cosine")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = neighbor_weights(neighbor_scores(values, values, index, "cosine"), "cosine")
        out = aggregate(values, index, weight, factors)
    assert factors.dtype == torch.float32 and out.dtype == torch.bfloat16
    exact = naive_aggregate(values, index, weight, pairs(values, values, index, "cosine").softmax(-1))
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)


def test_scores_and_sums_under_autocast(backend):
    """Inputs are rounded to bfloat16, scores are not."""
    query, key, index = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.randint(0, 40, (2, 40, 4))
    weights = torch.rand(2, 40, 4, requires_grad=True)
    query.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, out = neighbor_scores(query, key, index, "matmul"), weighted_sum(key, index, weights)
        gradient, slope = (
            torch.autograd.grad(scores.square().sum(), query)[0],
            torch.autograd.grad(out.float().sum(), weights)[0],
        )
    rounded = query.detach().bfloat16().float().requires_grad_()
    exact = pairs(rounded, key.bfloat16().float(), index, "matmul")
    assert scores.dtype == torch.float32 and out.dtype == torch.bfloat16
    torch.testing.assert_close(scores, exact, atol=1e-5, rtol=1e-5)
    (expected,) = torch.autograd.grad(exact.square().sum(), rounded)
    torch.testing.assert_close(gradient, expected, atol=1e-2, rtol=1e-2)  # rounded once, on its way out of the operator
    theirs = (gather(key, index) * weights[..., None]).sum(2)
    torch.testing.assert_close(out.float(), theirs, atol=0.05, rtol=0.05)
    torch.testing.assert_close(slope, torch.autograd.grad(theirs.sum(), weights)[0], atol=0.05, rtol=0.05)


def test_weights_of_any_strides(backend):
    values, index = torch.randn(2, 9, 3), torch.randint(0, 9, (2, 4, 9)).transpose(1, 2)
    weights = torch.rand(2, 4, 9).transpose(1, 2)
    expected = weighted_sum(values, index.contiguous(), weights.contiguous())
    torch.testing.assert_close(weighted_sum(values, index, weights), expected)
    torch.testing.assert_close(expected, (gather(values, index) * weights[..., None]).sum(2))


@pytest.mark.parametrize("depthwise", [False, True])
def test_an_empty_batch(depthwise, backend):
    weight = torch.randn(3, 1, 4) if depthwise else torch.randn(5, 3, 4)
    out = aggregate(torch.randn(0, 9, 3), torch.zeros(0, 9, 4, dtype=torch.long), weight, depthwise=depthwise)
    assert out.shape == (0, 9, 3 if depthwise else 5)


@pytest.mark.parametrize("tokens", [2**14, 2**10])
def test_depthwise_sums_of_a_large_image_take_little_memory(tokens):
    """Not even for one image is anything K times as large as its values made; the values of 2^10 tokens have 64 channels."""
    K, C = 9, 2**16 * 16 // tokens
    values, index = torch.randn(1, tokens, C, requires_grad=True), torch.randint(0, tokens, (1, tokens, K))
    scores, weight = torch.rand(1, tokens, K, requires_grad=True), torch.randn(C, 1, K, requires_grad=True)

    def run():
        return torch.autograd.grad(aggregate(values, index, weight, scores, depthwise=True).sum(), [values, scores, weight])

    assert peak_memory(run, CPU) < 0.8 * K * values.nbytes
    for ours, theirs in zip(run(), bags_of_one(values, index, weight, scores), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def bags_of_one(values, index, weight, scores):
    """Gradients by the plain form, slot by slot."""
    out = 0
    for k in range(index.shape[2]):
        out = out + values[0, index[0, :, k]] * scores[0, :, k, None] * weight[:, 0, k]
    return torch.autograd.grad(out.sum(), [values, scores, weight])


@pytest.mark.parametrize("K", [2, 5, 16])
@pytest.mark.parametrize("M", [31, 40, 127])
def test_largest_are_those_of_topk(M, K):
    """Rows for which topk is slow, with ties, zeros of both signs, denormals, infinities and NaN among them."""
    scores = torch.randn(3, 50, M)
    scores[0, :, ::3] = scores[0, :, :1]
    scores[1, :20, 5], scores[1, 10:, 7], scores[1, :, 9] = torch.inf, torch.nan, -torch.inf
    scores[2, :10], scores[2, 10:20], scores[2, 20:30, ::2] = 0.0, -torch.inf, -0.0
    scores[2, 30:, ::2] *= 1e-40
    found, expected = kernels.cpu.largest(scores.clone(), K), scores.topk(K, dim=2).indices
    assert all(len(set(row.tolist())) == K for row in found.flatten(0, 1))
    chosen, best = scores.gather(2, found), scores.gather(2, expected)
    assert torch.equal(chosen[[0, 2]], best[[0, 2]])
    # of +inf and NaN either may come first, but no other number before them
    assert torch.equal(chosen[1].isfinite(), best[1].isfinite())
    assert torch.equal(chosen[1][chosen[1].isfinite()], best[1][best[1].isfinite()])


def test_a_token_out_of_all_bounds_does_not_repeat_neighbors():
    x = torch.randn(1, 64, 8)
    x[0, 0], x[0, 1] = 1e20, -1e20
    for metric in ("euclidean", "matmul", "cosine"):
        found = find_neighbors(x, x, 5, metric)
        assert all(len(set(row.tolist())) == 5 for row in found[0])


@pytest.mark.parametrize("depthwise", [False, True])
def test_operators_follow_the_rules_of_torch_library(depthwise):
    x = torch.randn(2, 5, 3, requires_grad=True)
    index = find_neighbors(x, x, 2, "cosine")
    factors = torch.rand(2, 5, 2, requires_grad=True)
    weight = torch.randn(2, 3) if depthwise else torch.randn(4, 6)
    torch.library.opcheck(torch.ops.convnn.find_neighbors, (x.detach(), x.detach(), 2, "cosine", None, torch.arange(5)))
    # The last of the usual checks adds up all outputs, which indices and scores cannot be.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    search = (x, x, 2, torch.tensor([4, 0, 2]), torch.arange(5))
    torch.library.opcheck(torch.ops.convnn.find_scored_neighbors, search, test_utils=checks)
    torch.library.opcheck(torch.ops.convnn.pair_scores, (x, x, index, True))
    torch.library.opcheck(torch.ops.convnn.weighted_sum, (x, index, factors))
    torch.library.opcheck(torch.ops.convnn.max_neighbors, (x, index), test_utils=checks)
    torch.library.opcheck(torch.ops.convnn.aggregate, (x, index, weight.requires_grad_(), factors, depthwise))


@pytest.mark.parametrize("metric", ["matmul", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_attention_to_neighbors_is_its_steps(metric, weighted, backend):
    query, key, value = (torch.randn(2, n, 2, 4).double().transpose(1, 2).requires_grad_() for n in (5, 7, 7))
    weight = torch.randn(4, 1, 3).double().requires_grad_() if weighted else None
    inputs = [query, key, value, weight] if weighted else [query, key, value]

    def in_steps():
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        index, scores = find_scored_neighbors(q, k, 3, metric)
        weights = neighbor_weights(scores, metric, temperature=0.7)
        mixed = aggregate(v, index, weight, weights, depthwise=True) if weighted else weighted_sum(v, index, weights)
        return mixed.unflatten(0, (2, 2))

    def at_once():
        return attend_to_neighbors(query, key, value, 3, metric, weight, temperature=0.7)

    def slopes(function):
        return torch.cat([x.flatten() for x in torch.autograd.grad(function().square().sum(), inputs, create_graph=True)])

    assert_same_gradients(at_once(), in_steps(), inputs)
    assert_same_gradients(slopes(at_once), slopes(in_steps), inputs)
    with pytest.raises(ValueError, match="K=8 must be 1 to 7"):
        attend_to_neighbors(query, key, value, 8, metric)


def test_attention_to_neighbors_compiles_in_one_graph():
    query, key, value = (torch.randn(2, 7, 2, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    weight = torch.randn(4, 1, 3, requires_grad=True)

    def attend(*tensors):
        return attend_to_neighbors(*tensors[:3], 3, "cosine", *tensors[3:])

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for inputs in ((query, key, value), (query, key, value, weight)):
        assert_same_gradients(compiled(*inputs), attend(*inputs), inputs, 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_attention_to_neighbors_follows_the_rules_of_torch_library(weighted):
    query, key, value = (torch.randn(2, n, 2, 4).transpose(1, 2).requires_grad_() for n in (5, 7, 7))
    weight = torch.randn(4, 1, 3, requires_grad=True) if weighted else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.convnn.neighbor_attention, (query, key, value, weight, 3, 2.0), test_utils=checks)


@pytest.mark.parametrize("metric", ["matmul", "cosine", "euclidean"])
@pytest.mark.parametrize("options", ["all", "forced", "candidates", "both"])
def test_scores_of_the_search_are_those_of_the_pairs(metric, options, backend, chunks):
    query, key = (torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    more = {}
    if options in ("candidates", "both"):
        more["candidates"] = torch.tensor([6, 1, 2, 5])
    if options in ("forced", "both"):
        more["self_index"] = torch.arange(7)
    index, found = find_scored_neighbors(query, key, 3, metric, **more)
    assert torch.equal(index, find_neighbors(query, key, 3, metric, **more))
    assert_same_gradients(found, pairs(query, key, index, metric), (query, key))


def test_flops_against_a_hand_count():
    B, N, M, C, D, K = 2, 5, 7, 3, 4, 3
    query, key = torch.randn(B, N, C, requires_grad=True), torch.randn(B, M, C, requires_grad=True)
    weight = torch.randn(D, C, K, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        index = find_neighbors(query, key, K, "matmul")
        out = aggregate(key, index, weight, neighbor_weights(neighbor_scores(query, key, index, "matmul"), "matmul"))
    search, pair, mix = 2 * B * N * M * C, 2 * B * N * K * C, 2 * B * N * K * C * D
    assert counter.get_total_flops() == search + pair + mix
    with FlopCounterMode(display=False) as summing:
        weighted_sum(key, index, torch.rand(B, N, K, requires_grad=True)).sum().backward()
    assert summing.get_total_flops() == 3 * pair
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pair + 2 * mix


# --- NeighborConfig -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "K=0 must be at least 1"),
        ({"K": "9"}, "whole number"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"sample_padding": -1}, "sample_padding=-1"),
        ({"lambda_param": 1.5}, "lambda_param=1.5"),
        ({"magnitude_type": "cos"}, "did you mean"),
        ({"sampling_type": "grid"}, "all, random, spatial"),
        ({"similarity_type": "loc"}, "Loc_Col"),
        ({"aggregation_type": "Loc"}, "Col, Loc_Col"),
        ({"K": 9, "sampling_type": "random", "num_samples": 7}, "K=9 .* 7 candidates"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborConfig(**options)


def test_config_aliases_and_no_sampling():
    assert NeighborConfig(magnitude_type="similarity").metric == "cosine"
    assert NeighborConfig(magnitude_type="distance").metric == "euclidean"
    assert NeighborConfig(sampling_type="random").sampling == "all"
