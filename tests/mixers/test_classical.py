"""mixers/classical.py, linear attention and shifted windows: against timm's modules with the same weights, or closed forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from mixers.base import TokenLayout
from mixers.classical import CrossCovarianceAttention, FocalModulation, FourierMixer, GlobalFilterMixer, MlpMixer
from mixers.linear import LinearAttention
from mixers.region import ShiftedWindowAttention
from options.vit import ViTConfig
from runs.measure import count_parameters, flops_of
from tests.mixers.test_mixers import LAYOUTS, assert_same, grads, tokens
from vit import ViT

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
GRID = TokenLayout(4, 6)


def as_grid(function, first):
    """A function of images, channels first or last, as one of tokens."""

    def of_tokens(x):
        image = x.unflatten(1, (GRID.height, GRID.width))
        return function(image.movedim(3, 1)).flatten(2).mT if first else function(image).flatten(1, 2)

    return of_tokens


def mlp_mixer():
    from timm.models.mlp_mixer import MixerBlock

    block, layer = MixerBlock(12, 24), MlpMixer(12, 3, layout=GRID)
    names = {"input": "fc1", "proj": "fc2"}
    return layer, block.mlp_tokens, names, lambda x: block.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)


def xcit():
    from timm.models.xcit import XCA

    reference = XCA(12, 3, qkv_bias=True)
    return CrossCovarianceAttention(12, 3), reference, {}, reference


def swin(shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(12, (4, 6), num_heads=3, window_size=2, shift_size=shift)
    layer = ShiftedWindowAttention(12, 3, layout=GRID, region_size=2, block=2 + shift)
    return layer, block.attn, {"offsets": "relative_position_bias_table"}, as_grid(block._attn, first=False)


def focal():
    from timm.models.focalnet import FocalModulation as Reference

    reference = Reference(12, focal_window=3, focal_level=2)
    names = {"input": "f", "modulator": "h", "conv.0": "focal_layers.0.0", "conv.1": "focal_layers.1.0"}
    return FocalModulation(12, 3, layout=GRID), reference, names, as_grid(reference, first=True)


TIMM = {"MlpMixer": mlp_mixer, "XCiT": xcit, "Swin": lambda: swin(0), "Swin shifted": lambda: swin(1), "FocalModulation": focal}


@pytest.mark.parametrize("name", TIMM)
def test_mixers_are_timms(name):
    """Output, gradients of the input and of all weights, number of parameters and FLOPs."""
    pytest.importorskip("timm")
    layer, reference, names, function = TIMM[name]()
    assert count_parameters(layer) == count_parameters(reference)
    theirs = dict(reference.named_parameters())
    pairs = []
    for own, parameter in layer.named_parameters():
        stem, _, kind = own.rpartition(".")
        other = theirs[f"{names[stem]}.{kind}" if stem in names else names.get(own, own)]
        with torch.no_grad():
            other.copy_(parameter.normal_(std=0.3).view_as(other))
        pairs.append((parameter, other))
    x = torch.randn(2, 24, 12, requires_grad=True)
    ours, expected = layer(x), function(x)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours)
    found = grads(ours, [x, *(own for own, _ in pairs)], direction)
    wanted = grads(expected, [x, *(other for _, other in pairs)], direction)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.view_as(a), atol=1e-4, rtol=1e-4)
    assert flops_of(lambda: layer(x[:1])) == flops_of(lambda: function(x[:1]))


@layouts
def test_fnet_is_a_product_with_cosines_and_sines(layout):
    x, N = tokens(layout), layout.num_tokens

    def waves(n):
        angles = 2 * math.pi / n * torch.outer(torch.arange(n), torch.arange(n)).double()
        return angles.cos() / n**0.5, angles.sin() / n**0.5

    (cos_tokens, sin_tokens), (cos_features, sin_features) = waves(N), waves(12)
    assert_same(FourierMixer(12, 3)(x), cos_tokens @ x @ cos_features - sin_tokens @ x @ sin_features, (x,))
    assert not list(FourierMixer(12, 3).parameters())


@layouts
def test_a_global_filter_is_a_circular_convolution(layout):
    """Class tokens get the mean of all tokens; patches do not see them."""
    layer, x = GlobalFilterMixer(12, 3, layout=layout).double(), tokens(layout)
    c, h, w = layout.class_tokens, layout.height, layout.width
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.filter), s=(h, w))  # (d, h, w)
    image = x[:, c:].mT.unflatten(2, (h, w))
    expected = sum(kernel[:, i, j, None, None] * image.roll((i, j), (2, 3)) for i in range(h) for j in range(w))  # (B, d, h, w)
    expected = torch.cat([x.mean(dim=1, keepdim=True).expand(-1, c, -1), expected.flatten(2).mT], dim=1)
    assert_same(layer(x), expected, (x, layer.filter))


@layouts
def test_linear_attention_is_the_quadratic_form(layout):
    layer, x = LinearAttention(12, 3).double(), tokens(layout)
    query, key, value = layer.project(x)
    features = [torch.where(part > 0, part + 1, part.exp()) for part in (query, key)]
    weights = features[0] @ features[1].mT
    matrix = weights / weights.sum(dim=3, keepdim=True)
    assert_same(layer(x), layer.proj((matrix @ value).transpose(1, 2).flatten(2)), (x, *layer.parameters()))
    torch.testing.assert_close(layer(x, True)[1], matrix, atol=1e-9, rtol=0)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("layout", "size"), [(TokenLayout(6, 9, 1), 3), (TokenLayout(1, 8, 2), 4), (TokenLayout(4, 4), 4)], ids=str
)
def test_shifted_windows_pair_by_pair(layout, size, block):
    """Class tokens attend to all and are attended by all, without a bias."""
    layer = ShiftedWindowAttention(12, 3, layout=layout, region_size=size, block=block).double()
    c, N, x = layout.class_tokens, layout.num_tokens, tokens(layout)
    sides = (layout.height, layout.width)
    shift = [size // 2 * block * (side > size) for side in sides]
    place = [divmod(i, layout.width) for i in range(layout.num_patches)]
    window = [[((at - s) % side // size, at < s) for at, side, s in zip(p, sides, shift, strict=True)] for p in place]
    scores = torch.zeros(3, N, N).double()
    for i, one in enumerate(place):
        for j, other in enumerate(place):
            row = (one[0] - other[0] + size - 1) * (2 * size - 1) + one[1] - other[1] + size - 1
            scores[:, c + i, c + j] = layer.offsets[row] if window[i] == window[j] else -math.inf
    query, key, value = layer.project(x)
    matrix = (query @ key.mT / 2 + scores).softmax(dim=3)
    assert_same(layer(x), layer.proj((matrix @ value).transpose(1, 2).flatten(2)), (x, *layer.parameters()))
    torch.testing.assert_close(layer(x, True)[1], matrix, atol=1e-9, rtol=0)


def test_windows_of_every_second_block_are_shifted():
    config = ViTConfig(layer="Swin", image_size=16, patch_size=4, num_layers=3, num_heads=2, d_model=8, d_mlp=8)
    first, second, third = (block.mixer.tables.first.regions for block in ViT(config).blocks)
    assert torch.equal(first, third) and first[0].tolist() == [0, 1, 4, 5] and second[0].tolist() == [5, 6, 9, 10]


def test_a_class_token_of_focal_modulation_has_the_mean_of_the_contexts_only():
    """Patches do not see it: they are those of the grid alone."""
    layer = FocalModulation(12, 3, layout=TokenLayout(4, 6, 1)).double()
    x = tokens(layer.layout)
    out = layer(x)
    torch.testing.assert_close(out[:, 1:], layer(x[:, 1:], layout=GRID), atol=1e-9, rtol=0)
    query, context, gates = layer.input(x).split([12, 12, 3], dim=2)
    image = context[:, 1:].mT.unflatten(2, (4, 6))
    for conv in layer.conv:
        image = F.gelu(conv(image))
    mean = F.gelu(image.mean(dim=(2, 3)))
    expected = layer.proj(query[:, 0] * layer.modulator(gates[:, 0, 2:] * mean))
    torch.testing.assert_close(out[:, 0], expected, atol=1e-9, rtol=0)
