"""The kernels of `kernels/cuda.py` under Triton's interpreter; `test_cuda.py` runs this file with TRITON_INTERPRET=1.

Compared with the plain form (full score matrix, sort, gather) in float64 and, for gradients, its autograd. bfloat16 is not
among the types, as the interpreter computes it wrongly.
"""

import itertools
import math
import os

import pytest
import torch
import triton

from kernels import attention, cuda, triton_convolution
from kernels.reference import gather
from tests.helpers.naive import aggregate as naive_aggregate
from tests.helpers.naive import scores

if triton.__version__.startswith("3.6."):
    # Its interpreter makes an int of an array of one element, which NumPy refuses since 2.5; later ones squeeze it.
    _patch_tensor = triton.runtime.interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    triton.runtime.interpreter._patch_lang_tensor = patch_tensor

torch.set_default_device(os.environ.get("CONVNN_TEST_DEVICE", "cpu"))  # cuda: not interpreted, where there is a GPU
METRICS = ("cosine", "euclidean", "matmul")
# B, N, M, C, K, type, with scores: N ragged, rows in one part and in several, more queries than keys and fewer, channels in
# one block and in several.
SIZES = [
    ((2, 37, 9, 12, 9), torch.float32, True),
    ((1, 300, 5, 24, 1), torch.float32, False),
    ((1, 5, 12, 70, 4), torch.float32, True),
    ((1, 9, 30, 20, 16), torch.float16, True),
    ((1, 3, 6, 5, 32), torch.float16, False),
]
# And two forms: each size in both, with sums in one order for the one and in the other for the other, so that every pair of
# form, order and type occurs.
CASES = pytest.mark.parametrize(
    "size, dtype, scored, form, in_order",
    [(*case, form, (number + form) % 2 == 1) for number, case in enumerate(SIZES) for form in (0, 1)],
    ids=str,
    indirect=["in_order"],
)


@pytest.fixture
def in_order(request):
    """Sums over the pairs that chose a token in either way."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def strided(x):
    """The same numbers with gaps between groups and rows, filled with NaN."""
    B, N, C = x.shape
    wide = x.new_full((B, N + 1, 2, C), torch.nan if x.is_floating_point() else -1)
    wide[:, :N, 1] = x
    return wide[:, :N, 1]


def ranked(full, K, candidates=None, self_index=None):
    """Row by row the K candidates of largest score, NaN first, of equal ones the smallest; before them the own token."""
    B, N, M = full.shape
    index = torch.empty(B, N, K, dtype=torch.long)
    for b, i in itertools.product(range(B), range(N)):
        row, own = full[b, i].tolist(), [] if self_index is None else [int(self_index[i])]
        others = [j for j in (range(M) if candidates is None else candidates.tolist()) if j not in own]
        others.sort(key=lambda j: (not math.isnan(row[j]), -row[j] if not math.isnan(row[j]) else 0, j))
        index[b, i] = torch.tensor((own + others)[:K])
    return index


def assert_same_neighbors(found, full, K, candidates=None, self_index=None):
    """All indices are equal but where two scores are within rounding of each other; no neighbor comes twice."""
    expected = ranked(full, K, candidates, self_index)
    assert found.dtype == torch.long and found.shape == expected.shape
    apart = (full.gather(2, found) - full.gather(2, expected)).abs() > 1e-5 * full.abs().max()
    assert not apart[found != expected].any() and (found != expected).float().mean() < 0.01
    assert all(len(set(row)) == K for row in found.flatten(0, 1).tolist())


def assert_close(found, expected, dtype=torch.float32):
    """1e-5 in float32, half precision's rounding of inputs and outputs in float16, of the size of the largest number."""
    assert found.dtype == dtype and found.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    atol = tolerance * max(1, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=atol)


def problem(size, dtype):
    """query (B, N, C), key (B, M, C), index (B, N, K) with many pairs on the first token, numbers per pair (B, N, K)."""
    B, N, M, C, K = size
    index = torch.randint(M, (B, N, K))
    index[:, ::2, 0] = 0
    return torch.randn(B, N, C).to(dtype), torch.randn(B, M, C).to(dtype), index, torch.randn(B, N, K)


def gradients(function, grad, *inputs):
    """Of a plain function in float64."""
    inputs = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    output = function(*inputs)
    found = torch.autograd.grad(output, [x for x in inputs if x is not None], grad.double())
    return output.detach(), *found


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_search(metric, dtype):
    B, N, M, C, K = 1, 20, 97, 12, 9
    query, key = torch.randn(B, N, C).to(dtype), torch.randn(B, M, C).to(dtype)
    found = cuda.find_neighbors(strided(query), strided(key), K, metric, None, None)
    assert_same_neighbors(found, scores(query.double(), key.double(), metric), K)


@pytest.mark.parametrize("K, C", [(1, 33), (4, 5), (16, 80), (32, 16), (64, 16)])
def test_search_of_any_number_in_any_number_of_channels(K, C):
    query, key = torch.randn(1, 40 if K < 9 else 5, C), torch.randn(1, 70, C)
    index, products = cuda.find_scored_neighbors(query, key, K, None, None)
    full = query.double() @ key.double().mT
    assert_same_neighbors(index, full, K)
    assert_close(products, full.gather(2, index))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("some", [False, True], ids=["all", "candidates"])
def test_search_with_the_own_token_first(metric, some):
    query, key, K = torch.randn(2, 40, 8), torch.randn(2, 70, 8), 4
    self_index = torch.randperm(70)[:40]
    candidates = torch.randperm(70)[:35] if some else None  # of which some are own tokens, in no order
    full = scores(query.double(), key.double(), metric)
    found = cuda.find_neighbors(query, key, K, metric, candidates, self_index)
    assert_same_neighbors(found, full, K, candidates, self_index)
    if metric == "matmul":
        index, products = cuda.find_scored_neighbors(query, key, K, candidates, self_index)
        assert torch.equal(index, found)
        assert_close(products, (query.double() @ key.double().mT).gather(2, index))


def test_search_for_the_own_token_alone():
    query, key, self_index = torch.randn(2, 6, 3), torch.randn(2, 9, 3), torch.arange(6) + 2
    index, products = cuda.find_scored_neighbors(query, key, 1, None, self_index)
    assert torch.equal(index, self_index.view(1, 6, 1).expand(2, 6, 1))
    assert_close(products, (query.double() * key.double()[:, 2:8]).sum(2, keepdim=True))
    assert torch.equal(cuda.find_neighbors(query, key, 1, "cosine", None, self_index), index)


@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_scores_the_smallest_index_wins(metric):
    """Rows from a few that whole numbers hold exactly: the same products in any order of summation."""
    key = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, 4.0], [0.0, 5.0], [-0.0, 0.0]])[torch.randint(5, (1, 80))]
    query = torch.tensor([[1.0, 0.0], [0.0, -0.0], [2.0, 1.0]])[torch.randint(3, (1, 20))]
    if metric == "euclidean":  # whose center must be exact too
        key = torch.cat([key, -key], dim=1)
    # The order in whole numbers: cosine has lengths of 5 and 0 here, a distance its square.
    full = query @ key.mT if metric != "euclidean" else -(query[:, :, None] - key[:, None]).square().sum(-1)
    for candidates in (None, torch.randperm(key.shape[1])[:50]):
        found = cuda.find_neighbors(query, key, 7, metric, candidates, None)
        if metric == "euclidean" and candidates is not None:
            continue  # whose center is not
        assert torch.equal(found, ranked(full, 7, candidates))
    own = torch.arange(20) * 3
    assert torch.equal(cuda.find_neighbors(query, key, 7, metric, None, own), ranked(full, 7, None, own))


def test_zeros_of_both_signs_are_equal():
    """A cosine that is too small for float32 and below zero, before one that is zero."""
    key = torch.tensor([[[1.0, 100.0], [0.0, 100.0]]])
    query = torch.tensor([[[-1e-45, 0.0]]])
    assert cuda.find_neighbors(query, key, 2, "cosine", None, None).flatten().tolist() == [0, 1]


def test_infinities_and_nan_keep_their_place():
    key = torch.randn(1, 90, 1)
    key[0, [7, 40, 80]], key[0, [3, 66]], key[0, [11, 70]] = torch.inf, -torch.inf, torch.nan
    query = torch.tensor([1.0, -2.0, 0.5, torch.nan]).view(1, 4, 1)
    index, products = cuda.find_scored_neighbors(query, key, 9, None, None)
    full = query @ key.mT
    assert torch.equal(index, ranked(full, 9))
    assert torch.equal(index[0, 0, :5], torch.tensor([11, 70, 7, 40, 80]))
    torch.testing.assert_close(products, full.gather(2, index), equal_nan=True, rtol=0, atol=0)
    # With fewer numbers than neighbors even minus infinity is chosen, and never the own token twice.
    key = torch.full((1, 10, 1), -torch.inf)
    found, products = cuda.find_scored_neighbors(query[:, :1], key, 10, None, torch.tensor([4]))
    assert found.flatten().tolist() == [4, 0, 1, 2, 3, 5, 6, 7, 8, 9] and products.eq(-torch.inf).all()


def test_euclidean_search_far_from_the_origin():
    """Whole and half numbers around 1,000: without a center the products would cancel to noise."""
    x = (torch.randn(1, 60, 8) * 4).round() / 8 + 1000
    full = -(x[:, :, None] - x[:, None]).double().square().sum(-1)
    for dtype in (torch.float32, torch.float16):
        rows = x.to(dtype)
        full = -(rows[:, :, None].double() - rows[:, None].double()).square().sum(-1)
        found = cuda.find_neighbors(rows, rows, 6, "euclidean", None, None)
        torch.testing.assert_close(full.gather(2, found), full.gather(2, ranked(full, 6)), rtol=0, atol=1e-3)


# --- pair scores and weighted sums ----------------------------------------------------------------------------------


@CASES
def test_pair_scores(size, dtype, scored, form, in_order):
    query, key, index, grad = problem(size, dtype)
    squared = form == 1  # distances, else products

    def plain(query, key):
        rows = gather(key, index)
        return (query[:, :, None] - rows).square().sum(-1) if squared else (query[:, :, None] * rows).sum(-1)

    expected, to_query, to_key = gradients(plain, grad, query, key)
    given = strided(query), strided(key), strided(index), squared
    assert_close(cuda.pair_scores(*given), expected)
    found = cuda.pair_scores_backward(grad, *given)
    assert_close(found[0], to_query, dtype)
    assert_close(found[1], to_key, dtype)


@pytest.mark.parametrize("size, dtype, scored", SIZES, ids=str)
def test_max_neighbors(size, dtype, scored):
    _, values, index, _ = problem(size, dtype)
    expected, slot = gather(values.double(), index).max(dim=2)
    largest, winner = cuda.max_neighbors(strided(values), strided(index))
    assert largest.dtype == dtype and winner.dtype == torch.int32 and torch.equal(largest.double(), expected)
    assert torch.equal(winner.long(), index.gather(2, slot)) or torch.equal(values.double().gather(1, winner.long()), expected)


@CASES
def test_weighted_sum(size, dtype, scored, form, in_order):
    grad, values, index, weights = problem(size, dtype)
    expected, to_values, to_weights = gradients(
        lambda values, weights: (gather(values, index) * weights[..., None]).sum(2), grad, values, weights
    )
    assert_close(cuda.weighted_sum(strided(values), strided(index), weights), expected, dtype)
    found = cuda.weighted_sum_backward(strided(grad), strided(values), strided(index), weights)
    assert_close(found[0], to_values, dtype)
    assert_close(found[1], to_weights)


# --- the convolution over slots -------------------------------------------------------------------------------------


@CASES
def test_aggregate(size, dtype, scored, form, in_order, monkeypatch):
    monkeypatch.setattr(triton_convolution, "ORDERED_ELEMENTS", 1)  # one group at a time
    (C, K), depthwise = size[3:], form == 0
    _, values, index, pair_scores = problem(size, dtype)
    D = C if depthwise else 20
    slots = (torch.randn(D, 1 if depthwise else C, K) / math.sqrt(K * C)).to(dtype)  # as nn.Conv1d holds it
    weight = slots.view(C, K).t() if depthwise else slots.transpose(1, 2).reshape(D, K * C)
    grad = torch.randn(*index.shape[:2], D).to(dtype)
    pair_scores = pair_scores if scored else None
    expected, to_values, to_slots, *to_scores = gradients(
        lambda values, slots, weights: naive_aggregate(values, index, slots, weights, C if depthwise else 1),
        *(grad, values, slots, pair_scores),
    )
    given = strided(values), strided(index), weight, pair_scores, depthwise
    assert_close(cuda.aggregate(*given), expected, dtype)
    for need_values in (True, False) if K >= 16 else (True,):
        found = cuda.aggregate_backward(strided(grad), *given, need_values)
        to_weight = to_slots.view(C, K).t() if depthwise else to_slots.transpose(1, 2).reshape(D, K * C)
        assert_close(found[1], to_weight, dtype)
        if need_values:
            assert_close(found[0], to_values, dtype)
        if scored:
            assert_close(found[2], to_scores[0])
        assert (found[0].numel() == 0) == (not need_values) and (found[2].numel() == 0) == (not scored)


@pytest.mark.parametrize(
    "size, dtype, weighted, in_order",
    [
        ((2, 19, 9, 12, 9), torch.float32, True, False),
        ((1, 9, 20, 20, 16), torch.float16, True, True),
        ((1, 5, 12, 70, 4), torch.float32, False, False),
    ],
    ids=str,
    indirect=["in_order"],
)
def test_neighbor_attention(size, dtype, weighted, in_order):
    """Forward and backward of the one operator on heads that lie side by side, with a convolution over the slots or without."""
    B, N, M, C, K = size
    H, divisor = 2, 3.0
    query, key, value, grad = (torch.randn(B, rows, H, C).to(dtype).transpose(1, 2) for rows in (N, M, M, N))
    weight = torch.randn(C, 1, K).to(dtype) if weighted else None
    output, index, weights = cuda.neighbor_attention(query, key, value, weight, K, divisor)
    full = (query.double() @ key.double().mT).flatten(0, 1)
    assert_same_neighbors(index, full, K)

    def plain(query, key, value, weight=None):
        return attention.mixed_pairs(query, key, value, weight, index, divisor)

    expected, *slopes = gradients(plain, grad, query, key, value, weight)
    assert_close(output, expected, dtype)
    assert_close(weights, (full.gather(2, index) / divisor).softmax(2))
    found = cuda.neighbor_attention_backward(grad, query, key, value, weight, index, weights, divisor)
    for one, other in zip(found, slopes, strict=weighted):
        assert_close(one, other if other.ndim == 4 else other.squeeze(1).t(), dtype)
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *found[:3]))


def test_sums_in_order_do_not_change():
    """The same pairs in another order of groups give the same numbers, bit for bit, and so do two calls."""
    torch.use_deterministic_algorithms(True)
    grad, values, index, weights = problem((3, 20, 4, 6, 4), torch.float32)
    found = cuda.weighted_sum_backward(grad, values, index, weights)[0]
    assert torch.equal(found, cuda.weighted_sum_backward(grad, values, index, weights)[0])
    assert torch.equal(
        found.flip(0), cuda.weighted_sum_backward(grad.flip(0), values.flip(0), index.flip(0), weights.flip(0))[0]
    )
    torch.use_deterministic_algorithms(False)
