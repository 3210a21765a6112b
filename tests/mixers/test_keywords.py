"""Layers in code of one's own: neighbors by keyword, layouts only where location matters, extra tokens by number."""

import dataclasses

import pytest
import torch

from layers1d import BranchingAttention, BranchingConv, ConvNN1d, MultiHeadConv1d, MultiHeadConv1dAttention, MultiHeadConvNN
from layers1d import MultiHeadConvNNAttention as Attention
from layers2d import ConvNN2d, ConvNNAttention2d
from mixers.base import TokenLayout
from mixers.graph import GraphConv2d, GraphMixer
from options.layers import LAYERS1D_ROWS
from options.neighbors import NeighborConfig, NeighborFields
from options.vit import ViTConfig
from vit import make_layer1d

FIELDS = {"K": 3, "sampling_type": "random", "num_samples": 5, "magnitude_type": "euclidean"}
ON_TOKENS = [Attention, GraphMixer, BranchingAttention, BranchingConv]
SIZES = dict.fromkeys(ON_TOKENS, (8, 2)) | {
    ConvNN2d: (8, 4),
    ConvNNAttention2d: (8, 4),
    ConvNN1d: (8, 4),
    GraphConv2d: (8, 4, 2),
}
OTHERS = {BranchingConv: {"kernel_size": 3}}


def by_name(value):
    return getattr(value, "__name__", None)


def make(layer, *given, **options):
    torch.manual_seed(0)
    return layer(*SIZES[layer], *given, **OTHERS.get(layer, {}), **options).eval()


def test_the_keywords_are_the_fields():
    assert NeighborFields.__annotations__ == {field.name: field.type for field in dataclasses.fields(NeighborConfig)}


@pytest.mark.parametrize("layer", SIZES, ids=by_name)
def test_neighbors_by_keyword(layer):
    whole, by_field = make(layer, NeighborConfig(**FIELDS)), make(layer, **FIELDS)
    x = torch.randn({GraphConv2d: (2, 8, 3, 4), ConvNN2d: (2, 8, 3, 4), ConvNNAttention2d: (2, 8, 3, 4)}.get(layer, (2, 8, 8)))
    assert torch.equal(whole(x), by_field(x))
    assert not torch.equal(whole(x), make(layer, **FIELDS | {"K": 2})(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_sample'"):
        make(layer, num_sample=5)
    with pytest.raises(TypeError, match=r"^K cannot be given beside neighbors; set it in the NeighborConfig$"):
        make(layer, NeighborConfig(), K=3)
    with pytest.raises(
        TypeError, match=r"^neighbors=9 is not a NeighborConfig; give that, or its fields by keyword, such as K=9$"
    ):
        make(layer, 9)
    with pytest.raises(ValueError, match="K=0 must be at least 1"):
        make(layer, K=0)


@pytest.mark.parametrize("layer", [*ON_TOKENS, MultiHeadConv1dAttention], ids=by_name)
def test_without_a_layout_tokens_are_a_sequence(layer):
    given = {"kernel_size": 3} if layer is MultiHeadConv1dAttention else {"K": 4} | OTHERS.get(layer, {})
    for length in (5, 12):
        layouts = None, TokenLayout(1, length), TokenLayout(length, 1)
        x, outs = torch.randn(2, length, 8), []
        for layout in layouts:
            torch.manual_seed(0)
            outs.append(layer(8, 2, layout=layout, **given).eval()(x))
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert torch.equal(layer(8, 2, **given).train()(x).isfinite(), torch.ones(2, 12, 8).bool())


@pytest.mark.parametrize("layer", ON_TOKENS, ids=by_name)
def test_a_layout_is_asked_for_where_location_matters(layer):
    spatial = {"sampling_type": "spatial", "num_samples": 3}
    more = {} if layer is GraphMixer else {"convolution_type": "standard"}
    for fields in ({"similarity_type": "Loc"}, {"similarity_type": "Loc_Col"}, {"aggregation_type": "Loc_Col"}, spatial):
        with pytest.raises(ValueError, match=r"depends on locations; give layout=TokenLayout\(height, width, class_tokens\)$"):
            make(layer, K=4, **fields)
        make(layer, K=4, layout=TokenLayout(3, 4, 1), **more, **fields)(torch.randn(1, 13, 8))
    with pytest.raises(ValueError, match="K=9 is more than the 4 tokens"):
        make(layer, K=9)(torch.randn(1, 4, 8))


def test_parameters_for_every_token_ask_for_a_layout():
    for layer, given in ((MultiHeadConvNN, {"K": 3}), (MultiHeadConv1d, {"kernel_size": 3})):
        with pytest.raises(ValueError, match=f"^{layer.__name__} has parameters for every token; give layout="):
            layer(8, 2, **given)


ALONG = {"Conv1dAttention", "BranchConv", "FNet"}  # convolutions and a Fourier transform along the sequence
ROTARY = {"LocalAttention"}  # the position in the sequence turns queries and keys


@pytest.mark.parametrize("layer", sorted(LAYERS1D_ROWS.keys() - ALONG - ROTARY))
def test_class_and_register_tokens_have_no_order(layer):
    """Permuted before the mixer or after it, they and the patches get the same."""
    sizes = {"d_model": 16, "num_heads": 2, "image_size": 24, "patch_size": 4, "K": 4, "kernel_size": 3, "nystrom_landmarks": 3}
    config, layout = ViTConfig(layer=layer, linformer_k=4, pool="mean", **sizes), TokenLayout(6, 6, 5)
    mixer = make_layer1d(config, layout).double().eval()
    if getattr(mixer, "per_token", ""):
        pytest.skip("has parameters for every token")
    x, order = torch.randn(2, 41, 16).double(), torch.cat([torch.randperm(5), torch.arange(5, 41)])
    torch.testing.assert_close(mixer(x)[:, order], mixer(x[:, order]), atol=1e-9, rtol=0)
    if getattr(mixer, "layout", None) and LAYERS1D_ROWS[layer].mixes:
        with pytest.raises(ValueError, match="40 tokens were given"):
            mixer(x[:, 1:])


def test_d_hidden_is_d_model():
    assert ViTConfig(d_hidden=64, num_heads=4) == ViTConfig(d_model=64, num_heads=4)
    assert dataclasses.replace(ViTConfig(d_hidden=64, num_heads=4), d_model=32).d_model == 32
    with pytest.raises(ValueError, match=r"^d_hidden and d_model are two names of one option; drop one of them$"):
        ViTConfig(d_hidden=64, d_model=64)
