"""region_attention.py: what it is where everything is chosen, and the papers' equations written out token by token."""

import math

import pytest
import torch
from torch.nn import functional as F

from layers1d import MultiHeadAttention, MultiHeadConvNNAttention, MultiHeadKvtAttention
from mixers.base import TokenLayout
from mixers.region import BiLevelRoutingAttention, BlockTopKAttention, ContextClusterMixer, PatchToClusterAttention, RegionMixer
from options.neighbors import NeighborConfig
from options.vit import ViTConfig
from tests.mixers.test_mixers import assert_same, tokens

LAYOUTS = [TokenLayout(4, 6, 1), TokenLayout(4, 4), TokenLayout(1, 12, 2)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
routed = pytest.mark.parametrize("kind", [BiLevelRoutingAttention, BlockTopKAttention])


def regions_of(layout, size):
    """Number of the region of every patch, and how many there are."""
    across = math.ceil(layout.width / size)
    numbers = [i // layout.width // size * across + i % layout.width // size for i in range(layout.num_patches)]
    return numbers, max(numbers) + 1


def same_weights(layer, other):
    other.load_state_dict(layer.state_dict())
    return other


def check(layer, x, expected, matrix):
    """Output, gradients and mixing matrix."""
    assert_same(layer(x), expected, (x, *layer.parameters()))
    out, found = layer(x, output_attentions=True)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(found, matrix, atol=1e-9, rtol=0)


@layouts
@routed
@pytest.mark.parametrize("region_size", [2, 12])
def test_all_regions_and_one_region_are_attention(layout, kind, region_size):
    if region_size == 12 and layout.height > 1:
        layout = TokenLayout(4, 4, layout.class_tokens)
        region_size = 4
    count = regions_of(layout, region_size)[1]
    layer = kind(12, 3, layout=layout, region_size=region_size, top_regions=count).double()
    attention = MultiHeadAttention(12, 3).double()
    attention.qkv, attention.proj = layer.qkv, layer.proj
    x = tokens(layout)
    check(layer, x, *attention(x, output_attentions=True))


def plain_attention(layer, x, allowed):
    """Attention of every head under masks (B, H, N, N) that say who attends to whom."""
    query, key, value = layer.project(x)
    matrix = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~allowed, -math.inf).softmax(-1)
    return layer.proj((matrix @ value).transpose(1, 2).flatten(2)), matrix


@layouts
@routed
@pytest.mark.parametrize("top", [1, 2])
def test_routing(layout, kind, top):
    layer = kind(12, 3, layout=layout, region_size=2, top_regions=top).double()
    x, c = tokens(layout), layout.class_tokens
    numbers, count = regions_of(layout, 2)
    query, key, _ = (part[:, :, c:].detach() for part in layer.project(x))
    members = [[i for i, number in enumerate(numbers) if number == r] for r in range(count)]
    mean_key = torch.stack([key[:, :, patches].mean(2) for patches in members], dim=2)  # (B, H, R, d)
    mean_query = torch.stack([query[:, :, patches].mean(2) for patches in members], dim=2)
    allowed = torch.ones(len(x), 3, layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for b in range(len(x)):
        for head in range(3):
            for i, own in enumerate(numbers):
                if kind is BlockTopKAttention:
                    affinity = mean_key[b, head] @ query[b, head, i]
                else:  # one route for all heads
                    affinity = (mean_key[b] @ mean_query[b, :, own, :, None]).sum(0).flatten()
                best = affinity.topk(top).indices.tolist()
                allowed[b, head, c + i, c:] = torch.tensor([number in best for number in numbers])
    check(layer, x, *plain_attention(layer, x, allowed))


@layouts
@pytest.mark.parametrize("side", [1, 3, 5])
def test_the_convolution_of_the_values(layout, side):
    """Patch by patch, tap by tap: what is added before the output projection. Class tokens get nothing of it."""
    options = {"layout": layout, "region_size": 2, "top_regions": 2}
    layer = BiLevelRoutingAttention(12, 3, **options, value_convolution=side).double()
    plain = BiLevelRoutingAttention(12, 3, **options).double()
    plain.qkv, plain.proj = layer.qkv, layer.proj
    x, c = tokens(layout), layout.class_tokens
    values, weight = layer.qkv(x)[:, :, 24:], layer.conv.weight
    rows = 1 if layout.height == 1 else side
    assert weight.shape == (12, 1, rows, side)
    added = []
    for i in range(layout.num_patches):
        total = torch.zeros(len(x), 12, dtype=x.dtype)
        for j in range(layout.num_patches):
            down = j // layout.width - i // layout.width + rows // 2
            right = j % layout.width - i % layout.width + side // 2
            if 0 <= down < rows and 0 <= right < side:
                total = total + weight[:, 0, down, right] * values[:, c + j]
        added.append(total)
    added = torch.cat([torch.zeros(len(x), c, 12, dtype=x.dtype), torch.stack(added, dim=1)], dim=1)
    expected, matrix = plain(x, output_attentions=True)
    check(layer, x, expected + F.linear(added, layer.proj.weight), matrix)


@pytest.mark.parametrize("kind, heads", [(BlockTopKAttention, 3), (BiLevelRoutingAttention, 1)])
def test_regions_of_one_patch_are_nearest_neighbors(kind, heads):
    """KVT attention, and ConvNN attention with depthwise weights of one."""
    layout = TokenLayout(4, 5)
    layer = kind(12, heads, layout=layout, region_size=1, top_regions=4).double()
    x = tokens(layout)
    kvt = same_weights(layer, MultiHeadKvtAttention(12, heads, 4).double())
    torch.testing.assert_close(layer(x), kvt(x), atol=1e-9, rtol=0)
    convnn = MultiHeadConvNNAttention(12, heads, NeighborConfig(K=4, magnitude_type="matmul"), layout=layout).double()
    convnn.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), convnn(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cluster_for_every_token_is_attention(bias, monkeypatch):
    layer = PatchToClusterAttention(12, 3, num_clusters=7, bias=bias).double()
    attention = MultiHeadAttention(12, 3, bias=bias).double()
    attention.load_state_dict(layer.state_dict(), strict=False)
    monkeypatch.setattr(layer, "assign", lambda x: torch.eye(7, dtype=x.dtype).expand(len(x), -1, -1))
    x = torch.randn(2, 7, 12).double().requires_grad_()
    expected, matrix = attention(x, output_attentions=True)
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(layer(x, output_attentions=True)[1], matrix, atol=1e-9, rtol=0)


def test_clusters_are_weighed_means():
    layer = PatchToClusterAttention(12, 3, num_clusters=4).double()
    x = torch.randn(2, 7, 12).double().requires_grad_()
    share = (x @ layer.cluster.weight.mT).softmax(1)  # (B, N, M)
    clusters = torch.stack([(share[:, :, m, None] * x).sum(1) for m in range(4)], dim=1)
    (query, _, _), (_, key, value) = (layer.qkv(part).chunk(3, dim=2) for part in (x, clusters))
    query, key, value = (layer.split_heads(part) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value)
    expected = layer.proj(mixed.transpose(1, 2).flatten(2))
    assert_same(layer(x), expected, (x, *layer.parameters()))
    values = layer.split_heads(layer.qkv(x).chunk(3, dim=2)[2])
    torch.testing.assert_close(layer(x, output_attentions=True)[1] @ values, mixed, atol=1e-9, rtol=0)


@layouts
def test_context_cluster(layout):
    layer = ContextClusterMixer(12, 3, layout=layout, region_size=2).double()
    torch.nn.init.normal_(layer.scale)
    torch.nn.init.normal_(layer.shift)
    x, c = tokens(layout, batch=1), layout.class_tokens
    numbers, count = regions_of(layout, 2)
    features, values = layer.project(x)
    mixed = []
    for f, v in zip(features[0], values[0], strict=True):  # (N, d) of one head
        members = [[c + i for i, number in enumerate(numbers) if number == r] for r in range(count)]
        centers = [f[patches].mean(0) for patches in members]
        cosine = torch.stack([F.cosine_similarity(f, center, dim=1) for center in centers], dim=1)  # (N, R)
        nearest = cosine.argmax(1).tolist()
        weight = (layer.scale * cosine + layer.shift).sigmoid()
        out = []
        for i, own in enumerate(nearest):
            joined = [j for j in range(layout.num_tokens) if nearest[j] == own]
            total = v[members[own]].mean(0) + sum(weight[j, own] * v[j] for j in joined)
            out.append(weight[i, own] * total / (1 + sum(weight[j, own] for j in joined)))
        mixed.append(torch.stack(out))
    mixed = torch.stack(mixed)[None]  # (1, H, N, d)
    assert_same(layer(x), layer.proj(mixed.transpose(1, 2).flatten(2)), (x, *layer.parameters()))
    torch.testing.assert_close(layer(x, output_attentions=True)[1] @ values, mixed, atol=1e-9, rtol=0)


def test_dropout_drops_weights_in_training_only():
    for kind in (BiLevelRoutingAttention, BlockTopKAttention):
        layer = kind(12, 3, layout=LAYOUTS[0], region_size=2, top_regions=2, attention_dropout=0.5)
        x = torch.randn(1, LAYOUTS[0].num_tokens, 12)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_a_temperature_scales_scores(temperature):
    """As if queries were shorter: the same neighbors."""
    layout, neighbors = TokenLayout(3, 4), NeighborConfig(K=5, magnitude_type="matmul")
    x = tokens(layout)
    for make in (
        lambda t: MultiHeadKvtAttention(12, 3, 5, score_temperature=t),
        lambda t: MultiHeadConvNNAttention(12, 3, neighbors, layout=layout, score_temperature=t),
    ):
        layer, other = make(temperature).double(), make(1.0).double()
        other.load_state_dict(layer.state_dict())
        with torch.no_grad():
            for part in (other.qkv.weight, other.qkv.bias):
                part[:12] /= temperature
        torch.testing.assert_close(layer(x), other(x), atol=1e-9, rtol=0)


def test_errors():
    layout = TokenLayout(4, 6)
    for region_size, top, message in (
        (4, 1, "region_size=4 does not divide the 4 x 6 grid"),
        (0, 1, "region_size=0 must be at least 1"),
        (2, 7, "top_regions=7 must be 1 to 6"),
        (2, 0, "top_regions=0 must be 1 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            RegionMixer(12, 3, layout=layout, region_size=region_size, top_regions=top)
    for side, message in ((2, "value_convolution=2 must be odd"), (9, "9 reaches over the whole 4 x 6 grid of patches")):
        with pytest.raises(ValueError, match=message):
            BiLevelRoutingAttention(12, 3, layout=layout, region_size=2, top_regions=2, value_convolution=side)
    with pytest.raises(ValueError, match="num_clusters=0"):
        PatchToClusterAttention(12, 3, num_clusters=0)
    with pytest.raises(ValueError, match="score_temperature=0 must be above 0"):
        MultiHeadKvtAttention(12, 3, 2, score_temperature=0)
    sizes = {"image_size": 24, "patch_size": 4}
    with pytest.raises(ValueError, match="region_size=4 does not divide the 6 x 6 grid of patches"):
        ViTConfig(layer="ContextCluster", region_size=4, **sizes)
    with pytest.raises(ValueError, match="top_regions=10 is more than the 9 regions"):
        ViTConfig(layer="BiFormer", top_regions=10, **sizes)
