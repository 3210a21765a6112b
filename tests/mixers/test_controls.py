"""mixers/controls.py against closed forms and timm's pooling."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allconvnet import make_layer2d
from mixers.base import TokenLayout
from mixers.controls import Identity, MeanMixing, Pointwise, Pooling, Pooling2d, RandomMixing
from options.allconvnet import AllConvNetConfig
from options.vit import ViTConfig
from tests.mixers.test_mixers import LAYOUTS, assert_same, tokens
from vit import ViT

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def test_identity_and_pointwise_do_not_mix():
    x = tokens(TokenLayout(3, 4))
    assert torch.equal(Identity(12, 3)(x), x) and not list(Identity(12, 3).parameters())
    layer = Pointwise(12, 3).double()
    assert_same(layer(x), layer.proj(layer.value(x)), (x, *layer.parameters()))
    (gradient,) = torch.autograd.grad(layer(x)[:, 5].sum(), x)
    assert gradient[:, 5].all() and not gradient[:, torch.arange(12) != 5].any()
    assert layer(x, True)[1] is None


@layouts
def test_mean_and_random_mixing_are_matrices_between_two_projections(layout):
    x, N = tokens(layout), layout.num_tokens
    random = RandomMixing(12, 3, layout=layout).double()
    torch.testing.assert_close(random.random_matrix.sum(1), torch.ones(N).double())
    matrices = {MeanMixing(12, 3).double(): torch.full((N, N), 1 / N, dtype=torch.float64), random: random.random_matrix}
    for layer, matrix in matrices.items():
        assert_same(layer(x), F.linear(matrix @ layer.value(x), layer.proj.weight, layer.proj.bias), (x, *layer.parameters()))
        torch.testing.assert_close(layer(x, True)[1], matrix.expand(2, 3, N, N))


def test_the_random_matrix_follows_the_seed_and_is_in_the_checkpoint():
    def model(seed):
        torch.manual_seed(seed)
        return ViT(ViTConfig(layer="RandomMixing", image_size=16, patch_size=4, num_layers=2, num_heads=2, d_model=8, d_mlp=8))

    first, again, other = model(1), model(1), model(2)
    matrices = [block.mixer.random_matrix for block in first.blocks]
    assert torch.equal(matrices[0], again.blocks[0].mixer.random_matrix) and not torch.equal(*matrices)
    assert matrices[0].min() > 0 and not matrices[0].requires_grad
    other.load_state_dict(first.state_dict())
    assert torch.equal(other.blocks[1].mixer.random_matrix, matrices[1])


@layouts
def test_pooling_patch_by_patch(layout):
    """Class tokens get the mean of all tokens; patches do not see them."""
    c, N = layout.class_tokens, layout.num_tokens
    matrix = torch.zeros(N, N).double()
    matrix[:c] = 1 / N
    places = [(i // layout.width, i % layout.width) for i in range(layout.num_patches)]
    for i, (row, column) in enumerate(places):
        near = [c + j for j, (y, x) in enumerate(places) if abs(y - row) <= 1 and abs(x - column) <= 1]
        matrix[c + i, near] = 1 / len(near)
    layer, x = Pooling(12, 3, layout=layout), tokens(layout)
    assert_same(layer(x), matrix @ x - x, (x,))
    out, found = layer(x, True)
    torch.testing.assert_close(found, (matrix - torch.eye(N)).expand(2, 3, N, N))
    assert torch.equal(out, layer(x)) and not list(layer.parameters())


def test_pooling_is_timms():
    reference = pytest.importorskip("timm.models.metaformer").Pooling()
    image = torch.randn(2, 12, 4, 5)
    ours = Pooling(12, 3, layout=TokenLayout(4, 5))(image.flatten(2).mT).mT.unflatten(2, (4, 5))
    torch.testing.assert_close(ours, reference(image), atol=1e-5, rtol=0)
    layer = Pooling2d(12, 8)
    torch.testing.assert_close(layer(image), layer.conv(reference(image)), atol=1e-5, rtol=0)


def test_identity_on_images_is_a_1_x_1_convolution():
    layer = make_layer2d(AllConvNetConfig(layer="Identity", channels=(8,), K=1), 3, 8)
    assert isinstance(layer, nn.Conv2d) and layer.weight.shape == (8, 3, 1, 1)
    image = torch.randn(2, 3, 5, 6)
    expected = F.linear(image.movedim(1, 3), layer.weight[:, :, 0, 0], layer.bias).movedim(3, 1)
    torch.testing.assert_close(layer(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", ["Identity", "Pointwise"])
def test_a_class_token_without_mixing_is_refused(layer):
    with pytest.raises(ValueError, match=f"^pool=cls with layer={layer}: .*; use --pool mean$"):
        ViTConfig(layer=layer)
    ViTConfig(layer=layer, num_local_layers=2)  # the class token joins after the layers that do not mix
