"""mixers/topk.py and --topk: the forward pass of K neighbors, the gradient of all candidates to their scores."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from allconvnet import AllConvNet
from layers1d import (
    BranchingAttention,
    ConvNNAttention1d,
    MultiHeadAttention,
    MultiHeadConvNN,
    MultiHeadConvNNAttention,
    MultiHeadKvtAttention,
)
from layers2d import ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.topk import find_learned_neighbors
from neighbors import coordinates, grid_locations
from options.allconvnet import AllConvNetConfig
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from vit import ViT

LAYOUT = TokenLayout(3, 4, class_tokens=1)
N = LAYOUT.num_tokens
LEARNED = ("straight_through", "gumbel")
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def tokens(images=2):
    return torch.randn(images, N, 12, dtype=torch.float64, requires_grad=True)


def twins(make, *kinds):
    """One layer in float64 for each kind of choice, with the same weights, drawn anew so that no slot is like another."""
    layers = [make(kind).double() for kind in kinds]
    for parameter in layers[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers


def gradients(layer, x, seed=7):
    """Of a loss that weighs every output otherwise, by name; of x under "x". And the output."""
    torch.manual_seed(seed)
    out = layer(x)
    names, tensors = zip(("x", x), *layer.named_parameters(), strict=True)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()).sum()
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return out.detach(), {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


def assert_same_gradients(found, expected, names=None):
    for name in names or expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def kvt(K, heads=3, **options):
    return lambda kind: MultiHeadKvtAttention(12, heads, K, topk=kind, **options)


def convnn(K, cls=MultiHeadConvNNAttention, convolution_type="depthwise", dropout=0.0, **options):
    neighbors = NeighborConfig(**{"K": K, "magnitude_type": "matmul"} | options)
    return lambda kind: cls(
        *(12, 3, neighbors), layout=LAYOUT, convolution_type=convolution_type, attention_dropout=dropout, topk=kind
    )


# --- the whole, against attention and the plain choice ----------------------------------------------------------------

OPTIONS = [
    {},
    {"magnitude_type": "cosine", "convolution_type": "standard"},
    {"magnitude_type": "distance", "convolution_type": "depthwise-separable"},
    {"similarity_type": "Loc_Col", "aggregation_type": "Loc_Col", "convolution_type": "standard"},
    {"sampling_type": "random", "num_samples": 6},
    {"sampling_type": "spatial", "num_samples": 3, "convolution_type": "standard"},
    {"cls": MultiHeadConvNN, "dropout": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("K", [1, 4])
def test_the_forward_pass_is_the_plain_one_bit_for_bit(K, options):
    plain, learned = twins(convnn(K, **options), "hard", "straight_through")
    x = tokens()
    expected, through_chosen = gradients(plain, x)
    found, through_all = gradients(learned, x)
    assert torch.equal(found, expected)
    assert not torch.allclose(through_all["qkv.weight"], through_chosen["qkv.weight"])
    plain.eval(), learned.eval()
    expected, through_chosen = gradients(plain, x)
    found, through_all = gradients(learned, x)
    assert torch.equal(found, expected)
    assert all(torch.equal(through_all[name], through_chosen[name]) for name in through_chosen)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("make", [kvt(1), kvt(4), convnn(1), convnn(4)], ids=["kvt 1", "kvt 4", "convnn 1", "convnn 4"])
def test_with_weights_of_one_queries_and_keys_have_the_gradient_of_attention(make, kind):
    (layer,) = twins(make, kind)
    if isinstance(layer, MultiHeadConvNNAttention):
        nn.init.ones_(layer.conv.weight)
    attention = MultiHeadAttention(12, 3).double()
    attention.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("conv")})
    x = tokens()
    out, found = gradients(layer, x)
    all_of_it, expected = gradients(attention, x)
    assert not torch.allclose(out, all_of_it)
    for name in ("qkv.weight", "qkv.bias"):
        torch.testing.assert_close(found[name][:24], expected[name][:24], **EXACT)
    assert not torch.allclose(found["qkv.weight"][24:], expected["qkv.weight"][24:])


@pytest.mark.parametrize("options", [*OPTIONS[:5], {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("K", [1, 4])
def test_values_and_the_filter_have_the_gradient_of_the_plain_choice(K, options):
    plain, learned = twins(convnn(K, **options), "hard", "straight_through")
    x = tokens()
    expected, found = gradients(plain, x)[1], gradients(learned, x)[1]
    for one in (expected, found):
        one["qkv.weight"], one["qkv.bias"] = one["qkv.weight"][24:], one["qkv.bias"][24:]
        del one["x"]  # queries and keys are made of it too
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("make", [kvt(N), convnn(N), convnn(N, convolution_type="standard", dropout=0.4)])
def test_of_all_tokens_it_is_the_plain_choice(make):
    plain, learned = twins(make, "hard", "straight_through")
    x = tokens()
    (expected, expected_gradients), (found, found_gradients) = gradients(plain, x), gradients(learned, x)
    assert torch.equal(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)


def test_all_of_all_tokens_drawn_are_the_plain_choice_where_slots_are_alike():
    plain, learned = twins(kvt(N), "hard", "gumbel")
    x = tokens()
    (expected, expected_gradients), (found, found_gradients) = gradients(plain, x), gradients(learned, x)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("make", [kvt(1), convnn(1)], ids=["kvt", "convnn"])
def test_one_neighbor_is_learned(make):
    """By the plain choice queries and keys get no gradient; the softmax of one score is one."""
    layers = twins(make, "hard", *LEARNED)
    largest = [gradients(layer, tokens())[1]["qkv.weight"][:24].abs().max() for layer in layers]
    assert largest[0] == 0 and min(largest[1:]) > 1e-3


# --- slot by slot, against the equation -------------------------------------------------------------------------------


def by_the_equation(layer, x, index, own, candidates):
    """Every sum written out: slots of constant weights, then those of P, in the last one all others too, of constants."""
    select, grid = layer.select, LAYOUT.grid
    query, key, value = (part.flatten(0, 1) for part in layer.project(x))
    query, key = (select.search_features(part, grid) for part in (query, key))
    if select.neighbors.aggregation_type == "Loc_Col":
        places = coordinates(grid_locations(grid), grid, value.dtype, 1)
        value = torch.cat([value, places.expand(value.shape[0], -1, -1)], dim=2)
    scores = {
        "matmul": lambda: query @ key.mT / math.sqrt(query.shape[2]),
        "cosine": lambda: F.cosine_similarity(query[:, :, None], key[:, None], dim=3),
        "euclidean": lambda: -(query[:, :, None] - key[:, None]).square().sum(dim=3).clamp_min(1e-300).sqrt(),
    }[select.neighbors.metric]() / layer.score_temperature
    constants = {name: weight.detach() for name, weight in layer.conv.named_parameters()}
    outputs = []
    for b in range(len(index)):
        for i in range(N):
            among = sorted({*candidates, i} if own else candidates)
            share = dict(zip(among, scores[b, i, among].softmax(dim=0), strict=True))
            slots = index[b, i].tolist()
            weights = scores[b, i, slots].softmax(dim=0).detach()
            hard = weights * value[b, slots].T
            soft = [share[j] * value[b, j].detach() for j in slots]
            soft[-1] = sum((share[j] * value[b, j].detach() for j in among if j not in slots), soft[-1])
            soft = functional_call(layer.conv, constants, (torch.stack(soft, dim=1)[None],))[0, :, 0]
            outputs.append(layer.conv(hard[None])[0, :, 0] + soft - soft.detach())
    out = torch.stack(outputs).view(*index.shape[:2], -1).unflatten(0, (-1, layer.num_heads))
    return layer.proj(out.transpose(1, 2).flatten(2))


CANDIDATES = {"all": range(N), "spatial": [0, *(1 + i for i in (0, 1, 3, 4, 5, 7, 8, 9, 11))]}


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("options", [one for one in OPTIONS[:6] if one.get("sampling_type") != "random"], ids=str)
@pytest.mark.parametrize("K", [1, 3])
def test_the_layer_is_the_equation(K, options, kind, monkeypatch):
    (layer,) = twins(convnn(K, **options), kind)
    layer.score_temperature = 0.7
    chosen = []
    find = lambda *given, **more: chosen.append(find_learned_neighbors(*given, **more)) or chosen[0]  # noqa: E731
    monkeypatch.setattr("layers1d.find_learned_neighbors", find)
    x = tokens(1)
    out, found = gradients(layer, x)
    sampling = options.get("sampling_type", "all")
    where = {"index": chosen[0].index, "own": sampling != "all", "candidates": CANDIDATES[sampling]}
    monkeypatch.setattr(layer, "forward", lambda x: by_the_equation(layer, x, **where))
    expected_out, expected = gradients(layer, x)
    torch.testing.assert_close(out, expected_out, **EXACT)
    assert_same_gradients(found, expected)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_draws_are_without_replacement_in_the_order_of_the_noise():
    """Ordered pairs (j, k) as often as p_j p_k / (1 - p_j)."""
    rows, scores = 40_000, torch.tensor([1.0, 0.0, -0.5, 0.4, 3.0], dtype=torch.float64)
    torch.manual_seed(0)
    key = scores[None, :, None]
    candidates = torch.tensor([0, 1, 2, 3])  # the largest one is none
    query = torch.ones(1, rows, 1, dtype=torch.float64)
    index, weights, shares = find_learned_neighbors(
        query, key, 2, "matmul", topk="gumbel", temperature=2.0, candidates=candidates
    )
    p = (scores[:4] / 2).softmax(dim=0)
    torch.testing.assert_close(shares[0, 0, :4], p, **EXACT)
    assert not shares[0, 0, 4]
    torch.testing.assert_close(weights, (scores[index] / 2).softmax(dim=2), **EXACT)
    for j, k in itertools.permutations(range(4), 2):
        expected = float(p[j] * p[k] / (1 - p[j]))
        share = (index == torch.tensor([j, k])).all(dim=2).double().mean()
        assert abs(share - expected) < 6 * math.sqrt(expected / rows), (j, k)
    assert torch.equal(index, choose_again(query, key, candidates))


def choose_again(query, key, candidates):
    torch.manual_seed(0)
    return find_learned_neighbors(query, key, 2, "matmul", topk="gumbel", temperature=2.0, candidates=candidates).index


def test_a_token_that_is_always_a_neighbor_is_not_drawn():
    query, key = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    own = torch.arange(5)
    drawn = find_learned_neighbors(query, key, 3, "cosine", topk="gumbel", candidates=torch.tensor([0, 2, 3]), self_index=own)
    assert torch.equal(drawn.index[:, :, 0], own.expand(2, -1))
    others = drawn.index[:, :, 1:]
    assert (
        not (others == own[:, None]).any()
        and (others[..., 0] != others[..., 1]).all()
        and set(others.unique().tolist()) <= {0, 2, 3}
    )
    assert (drawn.shares > 0).sum(dim=2).tolist() == [[3, 4, 3, 3, 4]] * 2


@pytest.mark.parametrize("make", [kvt(3), convnn(3, sampling_type="random", num_samples=6)], ids=["kvt", "convnn"])
def test_noise_is_of_training_and_follows_the_seed(make):
    plain, layer = twins(make, "hard", "gumbel")
    x = tokens()
    first, again, other = (gradients(layer, x, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    recomputed = gradients(Recomputed(layer), x, 1)
    assert torch.equal(first[0], recomputed[0])
    assert all(torch.equal(recomputed[1][f"layer.{name}".removeprefix("layer.x") or "x"], g) for name, g in first[1].items())
    layer.eval(), plain.eval()
    assert torch.equal(layer(x), plain(x))


class Recomputed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


# --- images, types, transforms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["matmul", "cosine", "euclidean"])
def test_under_autocast_scores_are_not_rounded(metric):
    query, key = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    expected = find_learned_neighbors(query, key, 2, metric, topk="straight_through")
    with torch.autocast("cpu", torch.bfloat16):
        found = find_learned_neighbors(query, key, 2, metric, topk="straight_through")
    assert torch.equal(found.index, expected.index) and torch.equal(found.shares, expected.shares)


@pytest.mark.parametrize("kind", LEARNED)
def test_on_images_and_sequences_it_is_the_same(kind):
    """ConvNN attention on (B, C, H, W) and on (B, N, C) without a class token, one head, and as one row of pixels."""
    neighbors = NeighborConfig(K=3, magnitude_type="matmul")
    (image,) = twins(lambda k: ConvNNAttention2d(6, 6, neighbors, topk=k, attention_dropout=0.3), kind)
    sequence = MultiHeadConvNNAttention(
        *(6, 1, neighbors), layout=TokenLayout(3, 4), convolution_type="standard", topk=kind, attention_dropout=0.3
    ).double()
    row = ConvNNAttention1d(6, 6, neighbors, topk=kind, attention_dropout=0.3).double()
    for other in (sequence, row):
        other.load_state_dict(image.state_dict())
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)

    class AsTokens(nn.Module):
        def __init__(self, layer, axes):
            super().__init__()
            self.layer, self.axes = layer, axes

        def forward(self, x):
            flat = x.flatten(2)
            out = self.layer(flat) if self.axes else self.layer(flat.transpose(1, 2)).transpose(1, 2)
            return out.view_as(x)

    expected, expected_gradients = gradients(image, x)
    for layer, axes in ((sequence, 0), (row, 1)):
        found, found_gradients = gradients(AsTokens(layer, axes), x)
        torch.testing.assert_close(found, expected, **EXACT)
        assert_same_gradients({name.removeprefix("layer."): g for name, g in found_gradients.items()}, expected_gradients)


def test_branches_pass_it_on():
    neighbors = NeighborConfig(K=3, magnitude_type="matmul")
    layer = BranchingAttention(12, 3, neighbors, layout=LAYOUT, topk="gumbel")
    assert layer.first.topk == "gumbel"


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("model", ["KvtAttention", "ConvNNAttention", "ConvNN_Attn"])
def test_under_autocast_and_in_bfloat16(model, kind):
    def make(topk):
        if model == "ConvNN_Attn":
            config = AllConvNetConfig(layer=model, channels=(8,), image_size=8, in_channels=3, K=3, topk=topk)
            return AllConvNet(config)
        sizes = {"image_size": 8, "patch_size": 2, "num_layers": 1, "num_heads": 2, "d_model": 8, "d_mlp": 8}
        return ViT(ViTConfig(layer=model, K=3, topk=topk, dropout=0.0, attention_dropout=0.0, **sizes))

    plain, layer = make("hard"), make(kind)
    layer.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    for half in (False, True):
        found = []
        for one in (plain, layer):
            one.to(torch.bfloat16 if half else torch.float32).train()
            with torch.autocast("cpu", torch.bfloat16, enabled=not half):
                torch.manual_seed(0)
                out = one(images.to(torch.bfloat16) if half else images)
            out.float().square().sum().backward()
            assert all(p.grad.isfinite().all() for p in one.parameters() if p.grad is not None)
            found.append(out)
        assert found[0].dtype == found[1].dtype
        assert kind == "gumbel" or model == "ConvNN_Attn" or torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("straight_through", kvt(3)),
        ("gumbel", convnn(3, sampling_type="random", num_samples=6, convolution_type="depthwise-separable")),
    ],
    ids=LEARNED,
)
def test_a_graph_without_breaks_is_the_layer(kind, make):
    torch._dynamo.reset()
    (layer,) = twins(make, kind)
    x = tokens()
    expected, expected_gradients = gradients(layer, x)
    found, found_gradients = gradients(Compiled(layer), x)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_gradients({name.removeprefix("layer."): g for name, g in found_gradients.items()}, expected_gradients)


class Compiled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.compiled = [torch.compile(layer, backend="aot_eager", fullgraph=True)]

    def forward(self, x):
        return self.compiled[0](x)


def test_in_evaluation_no_pair_is_scored_but_the_chosen(monkeypatch):
    monkeypatch.setattr("mixers.topk.all_pair_scores", lambda *_: pytest.fail("scores of all pairs"))
    on_sequence = lambda kind: ConvNNAttention1d(N, 6, NeighborConfig(K=3), topk=kind)  # noqa: E731
    for make in (kvt(3), convnn(3), on_sequence):
        for kind in LEARNED:
            (layer,) = twins(make, kind)
            layer.eval()(tokens())
        exported = torch.export.export(layer, (tokens().detach(),))
        assert not [node for node in exported.graph.nodes if "exponential" in str(node.target)]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_choice_that_cannot_be_learned_is_refused():
    for make, options, message in (
        (convnn(3), {}, "topk='no-such' is not one of hard, straight_through, gumbel"),
        (kvt(3), {}, "topk='no-such' is not one of hard, straight_through, gumbel"),
    ):
        with pytest.raises(ValueError, match=message):
            make("no-such", **options)
    with pytest.raises(ValueError, match="topk=gumbel learns to select by content, and similarity_type=Loc"):
        convnn(3, similarity_type="Loc")("gumbel")
    with pytest.raises(ValueError, match="topk=gumbel learns to select by content, and similarity_type=Loc"):
        ConvNNAttention2d(3, 3, NeighborConfig(K=3, similarity_type="Loc"), topk="gumbel")
    with pytest.raises(
        ValueError, match="topk=gumbel needs the softmax of the scores; use softmax_topk_val=True, or topk=hard"
    ):
        ConvNNAttention2d(3, 3, NeighborConfig(K=3), topk="gumbel", softmax_topk_val=False)
