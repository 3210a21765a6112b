"""graph_layers.py: what every pair gives, written out pair by pair."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels.reference import gather
from layers2d import ConvNN2d
from mixers.base import TokenLayout
from mixers.graph import AxialGraphMixer, GraphAggregation, GraphConv2d, GraphMixer
from options.layers import GRAPH_AGGREGATIONS
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from tests.helpers.naive import scores
from tests.mixers.test_mixers import assert_same, tokens

LAYOUTS = [TokenLayout(4, 5, 1), TokenLayout(3, 3), TokenLayout(1, 11, 2)]


def plain_aggregation(graph, x, index):
    """Everything for every pair: (B, N, K, C)."""
    own, others = x[:, :, None], gather(x, index)
    if graph.kind == "edge":
        return F.relu(F.linear(others - own, graph.relative.weight) + graph.own(x)[:, :, None]).amax(2)
    taken = (others - own).amax(2) if graph.kind == "max" else others.mean(2)
    weights, biases = graph.update.weight.squeeze(2).chunk(graph.num_heads), graph.update.bias.chunk(graph.num_heads)
    heads = zip(x.chunk(graph.num_heads, 2), taken.chunk(graph.num_heads, 2), weights, biases, strict=True)
    return torch.cat([F.linear(torch.cat([a, b], dim=2), weight, bias) for a, b, weight, bias in heads], dim=2)


def with_classes(graph, x, index):
    """Class tokens, the first ones, for which there is no index, take from all: (B, P, K) -> everything for all N tokens."""
    classes = x.shape[1] - index.shape[1]
    everyone = torch.arange(x.shape[1]).expand(len(x), x.shape[1], -1)
    of_patches = torch.cat([index[:, :1].expand(-1, classes, -1), index], dim=1)
    return torch.cat(
        [plain_aggregation(graph, x, everyone)[:, :classes], plain_aggregation(graph, x, of_patches)[:, classes:]], dim=1
    )


@pytest.mark.parametrize("kind", GRAPH_AGGREGATIONS)
@pytest.mark.parametrize("heads, classes", [(1, 0), (3, 0), (3, 2)])
def test_aggregation(kind, heads, classes):
    graph = GraphAggregation(6, 9, heads, kind).double()
    x = torch.randn(2, 7, 6).double().requires_grad_()
    index = torch.stack([torch.randperm(7)[:4] for _ in range(14)]).view(2, 7, 4)[:, classes:]
    assert_same(graph(x, index), with_classes(graph, x, index), (x, *graph.parameters()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_vig(layout, metric, dilation):
    layer = GraphMixer(12, 2, NeighborConfig(K=4, magnitude_type=metric), layout=layout, dilation=dilation).double()
    x = tokens(layout)
    inner = layer.input(x)
    own = torch.eye(layout.num_tokens, dtype=torch.bool)
    nearest = scores(inner, inner, metric).masked_fill(own, torch.inf).topk(4 * dilation, dim=2).indices[:, :, ::dilation]
    expected = layer.proj(F.gelu(with_classes(layer.graph, inner, nearest[:, layout.class_tokens :])))
    assert_same(layer(x), expected, (x, *layer.parameters()))
    assert layer(x, output_attentions=True)[1] is None


@pytest.mark.parametrize("kind", GRAPH_AGGREGATIONS)
def test_the_class_token_hears_of_every_patch(kind):
    """With the K nearest only it would classify by few of them."""
    layout = TokenLayout(4, 5, 1)
    layer = GraphMixer(48, 2, NeighborConfig(K=2), layout=layout, aggregation=kind)
    x = torch.randn(1, layout.num_tokens, 48, requires_grad=True)
    layer(x)[:, 0].sum().backward()
    assert (x.grad.abs().sum(dim=2) > 0).float().mean() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_greedy_vig(layout, step):
    layer = AxialGraphMixer(12, 3, layout=layout, dilation=step).double()
    x = tokens(layout)
    inner, c = layer.input(x), layout.class_tokens
    taken = torch.empty_like(inner)
    for b in range(len(x)):
        candidates = {}
        for i in range(layout.num_patches):
            (y, column), others = divmod(i, layout.width), list(range(c))
            for j in range(layout.num_patches):
                down, right = j // layout.width - y, j % layout.width - column
                if (down == 0) != (right == 0) and (down + right) % step == 0:
                    others.append(c + j)
            candidates[c + i] = others
        apart = {(i, j): (inner[b, i] - inner[b, j]).norm().item() for i, others in candidates.items() for j in others}
        lengths = torch.tensor(list(apart.values()), dtype=torch.float64)
        threshold = (lengths.mean() - lengths.std(correction=0)).item()
        for i in range(layout.num_tokens):
            near = range(layout.num_tokens) if i < c else [i, *(j for j in candidates[i] if apart[i, j] < threshold)]
            taken[b, i] = torch.stack([inner[b, j] - inner[b, i] for j in near]).amax(0)
    expected = layer.proj(F.gelu(layer.graph.join(inner, taken)))
    assert_same(layer(x), expected, (x, *layer.parameters()))


def test_some_candidates_are_near_and_some_are_not():
    """So that the test above compares something."""
    layer = AxialGraphMixer(12, 3, layout=LAYOUTS[0])
    x = torch.randn(2, LAYOUTS[0].num_tokens, 12)
    changed = layer.near_candidates(x, layer.layout) == layer.tables.first.candidates
    assert 0.05 < changed[:, :, 1:].float().mean() < 0.5


def test_a_common_offset_loses_no_neighbor():
    layer, x = AxialGraphMixer(12, 3, layout=LAYOUTS[0]), torch.randn(4, LAYOUTS[0].num_tokens, 12)
    x = x + 1000 * torch.randn(12)
    found, expected = (layer.near_candidates(each, layer.layout) for each in (x, x.double()))
    assert (found == expected).float().mean() > 0.99  # the threshold may fall on a distance


@pytest.mark.parametrize("pattern", ["NA", "B", "BA"])
@pytest.mark.parametrize("kind", GRAPH_AGGREGATIONS)
def test_vig_on_images(pattern, kind):
    neighbors = NeighborConfig(K=3)
    layer = GraphConv2d(4, 8, 2, neighbors, aggregation=kind, shuffle_pattern=pattern, image_size=(6, 4)).double()
    x = torch.randn(2, 4, 6, 4).double().requires_grad_()
    inputs = F.pixel_unshuffle(x, 2) if "B" in pattern else x
    inner = layer.input(inputs.flatten(2).mT)
    own = torch.eye(inner.shape[1], dtype=torch.bool)
    nearest = scores(inner, inner, "cosine").masked_fill(own, torch.inf).topk(3, dim=2).indices
    out = layer.proj(F.gelu(plain_aggregation(layer.graph, inner, nearest))).mT.unflatten(2, inputs.shape[2:])
    assert_same(layer(x), F.pixel_shuffle(out, 2) if pattern == "BA" else out, (x, *layer.parameters()))


def test_a_mean_of_neighbors_is_a_convnn():
    """With the identity in, its slots weighed equally: what joins them is the linear on [x_i, ConvNN(x)_i]."""
    convnn = ConvNN2d(5, 5, NeighborConfig(K=4), bias=False).double()
    with torch.no_grad():
        convnn.conv.weight.copy_(torch.eye(5)[:, :, None].expand(-1, -1, 4) / 4)
    vig = GraphConv2d(5, 5, 1, NeighborConfig(K=4), aggregation="mean").double()
    vig.input = nn.Identity()
    x = torch.randn(2, 5, 4, 3).double()
    both = torch.cat([x, convnn(x)], dim=1).flatten(2).mT
    expected = vig.proj(F.gelu(F.linear(both, vig.graph.update.weight.squeeze(2), vig.graph.update.bias)))
    torch.testing.assert_close(vig(x).flatten(2).mT, expected, atol=1e-9, rtol=0)


def test_errors():
    layout = TokenLayout(3, 3)
    with pytest.raises(ValueError, match="graph_aggregation='sum' is not one of max, mean, edge"):
        GraphAggregation(4, 4, 1, "sum")
    with pytest.raises(ValueError, match="num_heads=3 does not divide"):
        GraphAggregation(6, 8, 3, "max")
    with pytest.raises(ValueError, match="dilation=0"):
        AxialGraphMixer(12, 3, layout=layout, dilation=0)
    with pytest.raises(ValueError, match="K=10 is more than the 9 tokens"):
        GraphMixer(12, 3, NeighborConfig(K=5), layout=layout, dilation=2)
    sizes = {"layer": "ViG", "image_size": 32, "patch_size": 8, "pool": "mean"}
    with pytest.raises(ValueError, match="K=18 is more than the 16 tokens"):
        ViTConfig(**sizes, K=9, dilation=2)
    with pytest.raises(ValueError, match="dilation=2 with K=9: K=18"):
        ViTConfig(**sizes, K=9, dilation=2, sampling_type="random", num_samples=10)
