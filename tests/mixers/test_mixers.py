"""The mixers of layers1d.py on (B, N, d_model), each against a plain form of it."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layers1d import (
    BranchingAttention,
    BranchingConv,
    MultiHeadAttention,
    MultiHeadConv1d,
    MultiHeadConv1dAttention,
    MultiHeadConvNN,
    MultiHeadConvNNAttention,
    MultiHeadKvtAttention,
)
from mixers.base import TokenLayout
from neighbors import random_candidates
from options.neighbors import NeighborConfig
from tests.helpers.naive import aggregate, pairs, scores

LAYOUTS = [TokenLayout(3, 4, 1), TokenLayout(3, 3), TokenLayout(1, 11), TokenLayout(1, 10, 2)]
SAMPLING = [("all", -1), ("random", 6), ("spatial", 2)]


def split(x, heads):
    """(B, N, D) -> list of (B, N, D / heads), one head after the other."""
    return x.chunk(heads, dim=2)


def grads(out, inputs, direction):
    return torch.autograd.grad(out, inputs, direction, materialize_grads=True)


def assert_same(ours, theirs, inputs, tolerance=1e-9):
    """Equal outputs, and equal gradients of all inputs."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(ours)
    for a, b in zip(grads(ours, inputs, direction), grads(theirs, inputs, direction), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def tokens(layout, d_model=12, batch=2):
    return torch.randn(batch, layout.num_tokens, d_model).double().requires_grad_()


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_torch_multihead_attention(heads, bias):
    layer = MultiHeadAttention(12, heads, bias=bias).double()
    reference = nn.MultiheadAttention(12, heads, bias=bias, batch_first=True, dtype=torch.float64)
    names = {"qkv.": "in_proj_", "proj.": "out_proj."}
    weights = {names[name[: name.index(".") + 1]] + name.split(".")[1]: value for name, value in layer.state_dict().items()}
    reference.load_state_dict(weights)
    x = torch.randn(2, 7, 12).double().requires_grad_()
    expected, matrix = reference(x, x, x, average_attn_weights=False)
    assert_same(layer(x), expected, [x])
    out, ours = layer(x, output_attentions=True)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(ours, matrix, atol=1e-9, rtol=0)


DROPPING = {
    "attention": lambda p: MultiHeadAttention(8, 2, attention_dropout=p),
    "ConvNN attention": lambda p: MultiHeadConvNNAttention(
        8, 2, NeighborConfig(K=4), layout=TokenLayout(3, 3), attention_dropout=p
    ),
    "KVT": lambda p: MultiHeadKvtAttention(8, 2, 4, attention_dropout=p),
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_drops_weights_in_training_only(name, asked):
    layer, x = DROPPING[name](0.5), torch.randn(2, 9, 8)

    def out(x):
        return layer(x, output_attentions=True)[0] if asked else layer(x)

    assert (out(x) != out(x)).any(dim=2).float().mean() > 0.8  # a token may have the same weights dropped twice
    mean = out(x.repeat(2000, 1, 1)).unflatten(0, (2000, 2)).mean(0)  # each image of a batch has draws of its own
    layer.eval()
    assert torch.equal(out(x), out(x))
    torch.testing.assert_close(mean, out(x), atol=0.08, rtol=0)


# --- ConvNN attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_convnn_attention_with_all_neighbors_is_attention(heads, layout):
    attention = MultiHeadAttention(12, heads).double()
    cfg = NeighborConfig(K=layout.num_tokens, magnitude_type="matmul")
    layer = MultiHeadConvNNAttention(12, heads, cfg, layout=layout).double()
    assert layer.load_state_dict(attention.state_dict(), strict=False).missing_keys == ["conv.weight"]
    x = tokens(layout)
    assert_same(layer(x), attention(x), [x])
    ours, theirs = (m(x, output_attentions=True)[1] for m in (layer, attention))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def plain_places(layout):
    """(N, axes) positions from -1 to 1, class tokens at 0: one axis for a sequence."""
    sides = [side for side in (layout.height, layout.width) if side > 1]
    along = [[2 * i / (side - 1) - 1 for i in range(side)] for side in sides]
    places = [[0.0] * len(sides)] * layout.class_tokens + [list(place) for place in itertools.product(*along)]
    return torch.tensor(places, dtype=torch.float64)


def plain_candidates(layout, sampling, samples):
    c, sides = layout.class_tokens, [side for side in (layout.height, layout.width) if side > 1]
    if sampling == "all":
        return list(range(layout.num_tokens))
    if sampling == "random":
        return random_candidates(layout.num_patches, samples, c, fixed=True).tolist()
    along = [[i * (side - 1) // (samples - 1) for i in range(samples)] for side in sides]
    numbers = {place: i for i, place in enumerate(itertools.product(*(range(side) for side in sides)))}
    return list(range(c)) + [c + numbers[place] for place in itertools.product(*along)]


def plain_index(query, key, cfg, layout):
    """(B, N, K) neighbors of one head, token by token."""
    sampled = plain_candidates(layout, cfg.sampling, cfg.num_samples)
    if cfg.similarity_type == "Loc":
        sides = torch.tensor([side for side in (layout.height, layout.width) if side > 1])
        pixels = plain_places(layout) * (sides - 1) / 2
        rank = (pixels[:, None] - pixels).square().sum(-1).expand(len(query), -1, -1).clone()
        rank += 1e-9 * torch.arange(layout.num_tokens)  # ties in raster order
    else:
        rank = -scores(query, key, cfg.metric)
    index = []
    for image in rank:
        rows = []
        for i, row in enumerate(image.tolist()):
            near = sorted(sampled, key=lambda j, row=row: row[j])
            if cfg.sampling != "all":
                near = [i, *(j for j in near if j != i)]
            rows.append(sorted(near[: cfg.K]) if cfg.similarity_type == "Loc" and cfg.sampling == "all" else near[: cfg.K])
        index.append(rows)
    return torch.tensor(index)


def plain_convnn(qkv, layer, cfg, layout, convolution_type, softmax):
    """Head by head: choose, weigh, convolve over the slots, project."""
    out, matrices = [], []
    places = plain_places(layout).expand(len(qkv[0]), -1, -1)
    for query, key, value in zip(*(split(part, layer.num_heads) for part in qkv), strict=True):
        if cfg.similarity_type == "Loc_Col":
            query, key = (
                torch.cat(
                    [cfg.lambda_param * t / t.detach().std(dim=(1, 2), keepdim=True), (1 - cfg.lambda_param) * places], dim=2
                )
                for t in (query, key)
            )
        index = plain_index(query, key, cfg, layout)
        weights = pairs(query, key, index, cfg.metric)
        if softmax:
            weights = weights.softmax(-1)
        elif cfg.metric == "euclidean":
            weights = 1 / (1e-8 - weights)
        if cfg.aggregation_type == "Loc_Col":
            value = torch.cat([value, places], dim=2)
        if convolution_type == "standard":
            mixed = aggregate(value, index, layer.conv.weight, weights)
        else:
            conv = layer.conv if convolution_type == "depthwise" else layer.conv[0]
            mixed = aggregate(value, index, conv.weight, weights, groups=value.shape[2])
        if convolution_type == "depthwise-separable":
            mixed = F.linear(mixed, layer.conv[1].weight[:, :, 0])
        out.append(mixed)
        matrices.append(torch.zeros(len(value), *[layout.num_tokens] * 2).double().scatter(2, index, weights))
    return layer.proj(torch.cat(out, dim=2)), torch.stack(matrices, dim=1)


@pytest.mark.parametrize("kind", [MultiHeadConvNNAttention, MultiHeadConvNN])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
@pytest.mark.parametrize(("sampling", "samples"), SAMPLING)
def test_convnn_against_the_plain_form(kind, layout, similarity, sampling, samples, backend):
    """Every rule of choice; the rest is a cover: each metric, convolution and weighting meets some of the rules."""
    number = LAYOUTS.index(layout) + ["Col", "Loc", "Loc_Col"].index(similarity)
    metric = ["matmul", "cosine", "euclidean"][number % 3]
    convolution_type = ["standard", "depthwise", "depthwise-separable"][number // 2 % 3]
    softmax = number % 4 != 3
    cfg = NeighborConfig(
        K=2 if sampling == "spatial" else 4,
        sampling_type=sampling,
        num_samples=samples,
        magnitude_type=metric,
        similarity_type=similarity,
        aggregation_type="Loc_Col" if convolution_type == "standard" else "Col",
        lambda_param=0.7,
    )
    layer = kind(12, 3, cfg, layout=layout, convolution_type=convolution_type, softmax_topk_val=softmax).double().eval()
    for name, parameter in layer.conv.named_parameters():  # as slots are told apart by their weights only
        if convolution_type != "standard" and "1." not in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        nn.init.normal_(parameter)
    x = tokens(layout)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    if kind is MultiHeadConvNNAttention:
        qkv = F.linear(x, weight, bias).chunk(3, dim=2)
    else:  # along the sequence
        N = layout.num_tokens
        parts = zip(weight.split(N), bias.split(N), strict=True)
        qkv = [torch.einsum("mn,bnd->bmd", w, x) + b[:, None] for w, b in parts]
    expected, matrix = plain_convnn(qkv, layer, cfg, layout, convolution_type, softmax)
    assert_same(layer(x), expected, [x, *layer.parameters()])
    out, ours = layer(x, output_attentions=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours, matrix)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "matmul"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("convolution_type", ["standard", "depthwise", "depthwise-separable"])
def test_convnn_weights_against_the_plain_form(convolution_type, softmax, metric):
    layout, cfg = TokenLayout(3, 3, 1), NeighborConfig(K=4, magnitude_type=metric)
    layer = MultiHeadConvNNAttention(8, 2, cfg, layout=layout, convolution_type=convolution_type, softmax_topk_val=softmax)
    layer = layer.double()
    x = tokens(layout, 8)
    expected, _ = plain_convnn(layer.qkv(x).chunk(3, dim=2), layer, cfg, layout, convolution_type, softmax)
    assert_same(layer(x), expected, [x, *layer.parameters()])


@pytest.mark.parametrize(("sampling", "samples"), SAMPLING)
def test_the_class_token_is_always_a_candidate(sampling, samples):
    """With a key that nobody can beat, it is a neighbor of all."""
    layout, cfg = (
        TokenLayout(4, 4, 1),
        NeighborConfig(K=3, sampling_type=sampling, num_samples=samples, magnitude_type="matmul"),
    )
    layer = MultiHeadConvNNAttention(4, 1, cfg, layout=layout)
    key = torch.rand(2, 17, 4)
    key[:, 0] = 9
    for training in (True, False):
        index = layer.select.train(training)(torch.rand(2, 17, 4), key, (4, 4))
        assert (index == 0).any(2).all()
        assert sampling == "all" or torch.equal(index[:, :, 0], torch.arange(17).expand(2, -1))


def test_random_candidates_vary_in_training_and_not_in_evaluation():
    cfg = NeighborConfig(K=4, sampling_type="random", num_samples=5)
    layer, x = MultiHeadConvNNAttention(8, 2, cfg, layout=TokenLayout(5, 5, 1)), torch.randn(2, 26, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


# --- k-NN attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_kvt_with_all_tokens_is_attention(heads, backend):
    attention, layer = MultiHeadAttention(12, heads).double(), MultiHeadKvtAttention(12, heads, 7).double()
    layer.load_state_dict(attention.state_dict())
    x = torch.randn(2, 7, 12).double().requires_grad_()
    assert_same(layer(x), attention(x), [x])


@pytest.mark.parametrize("K", [1, 3, 6])
def test_kvt_is_attention_under_a_mask_of_the_largest(K, backend):
    layer = MultiHeadKvtAttention(12, 3, K).double()
    x = torch.randn(2, 7, 12).double().requires_grad_()
    out, matrices = [], []
    for query, key, value in zip(*(split(part, 3) for part in layer.qkv(x).chunk(3, dim=2)), strict=True):
        score = query @ key.mT / 2
        lowest = score.sort(dim=2, descending=True).values[:, :, K - 1 : K]
        matrices.append(score.masked_fill(score < lowest, -torch.inf).softmax(2))
        out.append(matrices[-1] @ value)
    assert_same(layer(x), layer.proj(torch.cat(out, dim=2)), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x, output_attentions=True)[1], torch.stack(matrices, dim=1))


# --- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3, 4, 9])
@pytest.mark.parametrize("convolution_type", ["standard", "depthwise", "depthwise-separable"])
@pytest.mark.parametrize("kind", [MultiHeadConv1d, MultiHeadConv1dAttention])
def test_convolution_along_the_sequence_token_by_token(kind, convolution_type, kernel_size):
    layout = TokenLayout(2, 3, 1)
    layer = kind(6, 2, kernel_size, layout=layout, convolution_type=convolution_type).double()
    x = tokens(layout, 6)
    if kind is MultiHeadConv1d:
        value = torch.einsum("mn,bnd->bmd", layer.value.weight, x) + layer.value.bias[:, None]
    else:
        value = torch.einsum("ed,bnd->bne", layer.value.weight, x) + layer.value.bias
    if convolution_type == "standard":
        taps = layer.conv.weight  # (out, in, k)
    elif convolution_type == "depthwise":
        taps = torch.stack([torch.diag(tap) for tap in layer.conv.weight[:, 0].T], dim=2)
    else:
        taps = torch.einsum("oi,ik->oik", layer.conv[1].weight[:, :, 0], layer.conv[0].weight[:, 0])
    heads = []
    for head in split(value, 2):
        rows = []
        for i in range(7):
            reach = [(k, i + k - (kernel_size - 1) // 2) for k in range(kernel_size)]
            rows.append(sum(head[:, j] @ taps[:, :, k].T for k, j in reach if 0 <= j < 7))
        heads.append(torch.stack(rows, dim=1))
    assert_same(layer(x), layer.proj(torch.cat(heads, dim=2)), [x, *layer.parameters()])
    assert layer(x, output_attentions=True)[1] is None


# --- heads stay apart -----------------------------------------------------------------------------------------------


def one_of_each(layout):
    cfg = NeighborConfig(K=3, magnitude_type="matmul")
    yield MultiHeadAttention(12, 3), "qkv"
    yield MultiHeadConvNNAttention(12, 3, cfg, layout=layout, convolution_type="standard"), "qkv"
    yield MultiHeadConvNN(12, 3, cfg, layout=layout, convolution_type="standard"), "qkv"
    yield MultiHeadKvtAttention(12, 3, 4), "qkv"
    yield MultiHeadConv1d(12, 3, 3, layout=layout), "value"
    yield MultiHeadConv1dAttention(12, 3, 3, layout=layout), "value"


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("layout", [TokenLayout(2, 4, 1), TokenLayout(3, 4)], ids=["9 tokens", "12 tokens, 12 features"])
def test_a_head_changes_itself_only(number, layout):
    """Values of one head perturbed after the projection reach no other head before the output projection."""
    layer, name = list(one_of_each(layout))[number]
    layer = layer.double()
    along_sequence = isinstance(layer, (MultiHeadConvNN, MultiHeadConv1d))
    seen, head, N = [], None, layout.num_tokens

    def perturb(module, inputs, output):
        if head is None:
            return output
        output = output.clone()
        values = output.transpose(1, 2) if along_sequence else output  # the last third is the values: of N or of d_model
        if along_sequence:
            values[:, -N:, 4 * head : 4 * head + 4] += 1
        else:
            values[:, :, -12 + 4 * head :][:, :, :4] += 1
        return output

    getattr(layer, name).register_forward_hook(perturb)
    layer.proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = tokens(layout)
    layer(x)
    for head in range(3):
        layer(x)
        changed = (seen[-1] != seen[0]).any(dim=(0, 1))
        assert changed.tolist() == [i // 4 == head for i in range(12)]


# --- branches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_branches_mix_their_share_of_the_features(ratio):
    layout, cfg = TokenLayout(3, 3, 1), NeighborConfig(K=3, magnitude_type="matmul")
    x, width = tokens(layout, 16), int(16 * ratio)
    for layer in (
        BranchingAttention(16, 2, cfg, layout=layout, branch_ratio=ratio),
        BranchingConv(16, 2, cfg, 3, layout=layout, branch_ratio=ratio),
    ):
        layer = layer.double()
        convnn, (rest, other) = layer.first, (layer.second, layer.second(x[:, :, width:], output_attentions=True)[1])
        assert type(convnn) is MultiHeadConvNNAttention
        assert type(rest) is (MultiHeadAttention if type(layer) is BranchingAttention else MultiHeadConv1dAttention)
        expected = layer.proj(torch.cat([convnn(x[:, :, :width]), rest(x[:, :, width:])], dim=2))
        assert torch.equal(layer(x), expected)
        out, matrix = layer(x, output_attentions=True)
        torch.testing.assert_close(out, expected)
        first = convnn(x[:, :, :width], output_attentions=True)[1]
        torch.testing.assert_close(matrix, first if other is None else ratio * first + (1 - ratio) * other)
        assert matrix.shape == (2, 2, 10, 10)


# --- what does not fit ----------------------------------------------------------------------------------------------

GRID = TokenLayout(4, 4, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiHeadAttention(8, 3), "num_heads=3 does not divide d_model=8"),
        (lambda: MultiHeadAttention(8, 0), "num_heads=0"),
        (lambda: MultiHeadAttention(8, 2, attention_dropout=-0.5), "attention_dropout=-0.5 must be at least 0 and below 1"),
        (lambda: MultiHeadConvNNAttention(8, 2, NeighborConfig(K=18), layout=GRID), "K=18 .* 1 to 17"),
        (
            lambda: MultiHeadConvNNAttention(
                8, 2, NeighborConfig(K=6, sampling_type="spatial", num_samples=2), layout=TokenLayout(4, 4)
            ),
            "K=6 .* 1 to 4|K=6 .* 4 candidates",
        ),
        (
            lambda: MultiHeadConvNNAttention(8, 2, NeighborConfig(sampling_type="random", num_samples=17), layout=GRID),
            "num_samples=17",
        ),
        (
            lambda: MultiHeadConvNNAttention(8, 2, NeighborConfig(sampling_type="spatial", num_samples=5), layout=GRID),
            "at most 4",
        ),
        (
            lambda: MultiHeadConvNNAttention(8, 2, NeighborConfig(aggregation_type="Loc_Col"), layout=GRID),
            "standard or depthwise-separable",
        ),
        (lambda: MultiHeadConvNN(8, 2, NeighborConfig(), layout=GRID, convolution_type="dense"), "standard, depthwise"),
        (lambda: MultiHeadConv1d(8, 2, 3, layout=GRID, convolution_type="dense"), "standard, depthwise"),
        (lambda: MultiHeadConv1d(8, 2, 0, layout=GRID), "kernel_size=0"),
        (lambda: MultiHeadKvtAttention(8, 2, 0), "K=0"),
        (lambda: BranchingAttention(8, 2, NeighborConfig(), layout=GRID, branch_ratio=0.9), "branch_ratio=0.9"),
        (lambda: BranchingConv(12, 4, NeighborConfig(), 3, layout=GRID, branch_ratio=0.5), "6 \\+ 6 .* num_heads=4"),
        (lambda: BranchingConv(12, 4, NeighborConfig(), 3, layout=GRID, branch_ratio=0.0), "branch_ratio=0.0"),
        (lambda: TokenLayout(0, 4), "at least one patch"),
        (lambda: MultiHeadKvtAttention(8, 2, 9)(torch.randn(1, 8, 8)), "K=9 must be 1 to 8"),
        (lambda: MultiHeadConvNN(8, 2, NeighborConfig(), layout=GRID)(torch.randn(1, 16, 8)), "16 tokens .* width=4"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_k_may_count_the_class_token():
    cfg = NeighborConfig(K=5, sampling_type="spatial", num_samples=2)
    layer = MultiHeadConvNNAttention(8, 2, cfg, layout=GRID)
    assert layer(torch.randn(1, 17, 8)).isfinite().all()


def test_layout():
    layout = TokenLayout(3, 5, 2)
    assert (layout.num_patches, layout.num_tokens, layout.grid) == (15, 17, (3, 5))
    assert [TokenLayout(*sides).grid for sides in ((1, 5), (5, 1), (1, 1))] == [(5,), (5,), (1,)]
    assert math.prod(TokenLayout(1, 1).grid) == 1
