import runpy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layers1d import MultiHeadAttention
from mixers.base import TokenLayout
from mixers.local import GatedPositionalSelfAttention
from models.convit import ConViTBackbone, ConViTConfig, ConViTLayer, ConViTWithLinearClassifier
from options.vit import ViTConfig
from runs.measure import count_parameters
from vit import ViT

SMALL = {
    "image_size": (8, 12),
    "image_channel": 1,
    "patch_size": 2,
    "num_local_layers": 2,
    "num_nonlocal_layers": 1,
    "dim": 18,
    "num_classes": 5,
    "heads": 9,
}
PAPER = {"Ti": (192, 4), "Ti_plus": (256, 4), "S": (432, 9), "S_plus": (576, 9), "B": (768, 16), "B_plus": (1024, 16)}


@pytest.mark.parametrize("size", PAPER)
def test_presets(size):
    config = getattr(ConViTConfig, f"ConViT_{size}")()
    assert (config.dim, config.heads) == PAPER[size]
    assert (config.num_local_layers, config.num_nonlocal_layers, config.patch_size, config.image_size) == (10, 2, 16, 224)
    assert config.num_classes == 1000 and config.pre_norm and config.ff_dim == 4 * config.dim
    changed = getattr(ConViTConfig, f"ConViT_{size}")(num_classes=7, token_dropout=0.2)
    assert changed == replace(config, num_classes=7, token_dropout=0.2)


def test_parameters_of_the_smallest_are_about_the_papers():
    model = ConViTWithLinearClassifier(ConViTConfig.ConViT_Ti(num_classes=1000))
    assert count_parameters(model) == pytest.approx(5.7e6, rel=0.01)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_presets_are_the_vit_of_the_same_name():
    """The same parameters by other names, and with the same weights the same logits."""
    model = ConViTWithLinearClassifier(ConViTConfig.ConViT_Ti(num_classes=10, image_size=(64, 32))).eval()
    twin = ViT(ViTConfig(model="convit_ti", image_size=(64, 32), num_classes=10)).eval()
    weights = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    for name in weights:
        nn.init.normal_(weights[name], std=0.05)
    twin.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model(images), twin(images))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_model_step_by_step(pre_norm):
    config = ConViTConfig(**SMALL, pre_norm=pre_norm, ff_dim=24, pred_act_fnc_name="Tanh", locality_strength=2.0)
    model = ConViTWithLinearClassifier(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images, back = torch.randn(3, 1, 8, 12).double(), model.backbone
    patches = F.unfold(images, 2, stride=2).transpose(1, 2)  # in raster order
    x = patches @ back.patch_embedding.weight.flatten(1).T + back.patch_embedding.bias + back.pos_embedding
    for number, layer in enumerate(back.blocks):
        assert type(layer.mixer) is (GatedPositionalSelfAttention if number < 2 else MultiHeadAttention)
        assert layer.mixer.layout in (TokenLayout(4, 6), None) and layer.mixer.num_heads == 9
        if number == 2:
            x = torch.cat([back.class_token.expand(3, -1, -1), x], dim=1)
        w1, b1, w2, b2 = (parameter for part in (layer.mlp[0], layer.mlp[2]) for parameter in (part.weight, part.bias))

        def mlp(y, w1=w1, b1=b1, w2=w2, b2=b2):
            return F.gelu(y @ w1.T + b1) @ w2.T + b2

        if pre_norm:
            x = x + layer.mixer(layer.norm1(x))
            x = x + mlp(layer.norm2(x))
        else:
            x = layer.norm1(x + layer.mixer(x))
            x = layer.norm2(x + mlp(x))
    if pre_norm:
        x = F.layer_norm(x, (18,), back.norm.weight, back.norm.bias, 1e-6)
    torch.testing.assert_close(back(images), x)
    torch.testing.assert_close(model(images), x[:, 0].tanh() @ model.classifier.weight.T + model.classifier.bias)


def test_local_layers_start_as_convolutions_and_the_rest_as_a_vit():
    model = ConViTWithLinearClassifier(ConViTConfig(**SMALL, locality_strength=2.0))
    for layer in model.backbone.blocks[:2]:
        assert torch.equal(layer.mixer.qkv.weight[36:], torch.eye(18)) and layer.mixer.qkv.bias is None
        assert (layer.mixer.pos_proj.weight[:, 2] == -2).all() and (layer.mixer.gate == 1).all()
    for weight in (model.classifier.weight, model.backbone.blocks[2].mixer.qkv.weight, model.backbone.patch_embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)


def test_every_parameter_learns():
    model = ConViTWithLinearClassifier(ConViTConfig(**SMALL, pre_norm=True))
    model(torch.randn(4, 1, 8, 12)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["ff_dropout", "attention_dropout", "token_dropout"])
def test_dropouts_work_in_training_only(name):
    model, images = ConViTWithLinearClassifier(ConViTConfig(**SMALL, **{name: 0.5})), torch.randn(2, 1, 8, 12)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_token_dropout_drops_whole_tokens():
    seen = []
    backbone = ConViTWithLinearClassifier(ConViTConfig(**SMALL, token_dropout=0.5)).backbone
    backbone.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone(torch.randn(8, 1, 8, 12))
    dropped = (seen[0] == 0).all(dim=2)
    assert torch.equal(dropped, (seen[0] == 0).any(dim=2)) and dropped.float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_a_backbone_and_a_layer_on_their_own():
    values = {
        name: value for name, value in asdict(ConViTConfig(**SMALL)).items() if name not in ("num_classes", "pred_act_fnc_name")
    }
    assert ConViTBackbone(**values)(torch.randn(2, 1, 8, 12)).shape == (2, 25, 18)
    layer = ConViTLayer(18, GatedPositionalSelfAttention(18, 3, layout=TokenLayout(4, 6)))
    assert layer(torch.randn(2, 24, 18)).shape == (2, 24, 18)


def test_heads_follow_from_their_features():
    sizes = {name: value for name, value in SMALL.items() if name != "heads"}
    assert ConViTConfig(**sizes, head_dim=2).heads == 9 and ConViTConfig(**sizes, heads=6, head_dim=3).heads == 6
    assert replace(ConViTConfig(**sizes, heads=6), heads=9).heads == 9
    # without either: a square number of heads, with about 48 features each
    found = {dim: ConViTConfig(**sizes | {"dim": dim}).heads for dim in (18, 48, 192, 432, 768, 100)}
    assert found == {18: 1, 48: 1, 192: 4, 432: 9, 768: 16, 100: 4}
    assert ConViTConfig(32, 3, 4, 2, 1, 48, 10).ff_dim == 192


def test_matrices():
    model = ConViTWithLinearClassifier(ConViTConfig(**SMALL, pre_norm=True)).eval()
    images = torch.randn(2, 1, 8, 12)
    logits, matrices = model(images, output_attentions=True)
    torch.testing.assert_close(logits, model(images))
    assert [matrix.shape for matrix in matrices] == [(2, 9, 24, 24), (2, 9, 24, 24), (2, 9, 25, 25)]
    for matrix in matrices:
        torch.testing.assert_close(matrix.sum(3), torch.ones_like(matrix[..., 0]))


@pytest.mark.parametrize(("local", "others"), [(0, 2), (2, 0)])
def test_without_local_or_without_other_layers(local, others):
    config = ConViTConfig(**SMALL | {"num_local_layers": local, "num_nonlocal_layers": others})
    assert ConViTWithLinearClassifier(config)(torch.randn(2, 1, 8, 12)).shape == (2, 5)


@pytest.mark.parametrize("size", [(2, 2), (12, 8), (9, 13)])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=r"images of .* the model was made for \(8, 12\)"):
        ConViTWithLinearClassifier(ConViTConfig(**SMALL))(torch.randn(1, 1, *size))


def test_feed_forward_drops_hidden_and_output_features():
    layer = ConViTLayer(18, torch.nn.Identity(), ff_dropout=0.5)
    seen = []
    layer.mlp[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = layer.feed_forward(torch.randn(2, 30, 18))
    for dropped in (seen[0], out):
        assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, r"patch_size=3 does not divide image_size=\(8, 12\)"),
        ({"heads": 5}, "heads=5 and head_dim=None must multiply to dim=18"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"heads": 4.0}, "heads=4.0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"ff_dim": 0}, "ff_dim=0"),
        ({"num_local_layers": 1.5}, "num_local_layers=1.5"),
        ({"image_size": (32,)}, r"image_size=\(32,\) is not a whole number"),
        ({"locality_strength": -1.0}, "locality_strength=-1.0"),
        ({"locality_strength": float("nan")}, "locality_strength=nan"),
        ({"dim": 18.0}, "dim=18.0"),
        ({"head_dim": 4}, "heads=9 and head_dim=4"),
        ({"num_local_layers": -1}, "num_local_layers=-1"),
        ({"num_local_layers": 0, "num_nonlocal_layers": 0}, "one of them must be at least 1"),
        ({"ff_dropout": 1.0}, "ff_dropout=1.0"),
        ({"dim": 0}, "dim=0"),
        ({"pred_act_fnc_name": "Relu"}, "pred_act_fnc_name='Relu' is not one of Identity, ReLU"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        ConViTConfig(**SMALL | changes)
    values = {name: value for name, value in (SMALL | changes).items() if name not in ("num_classes", "pred_act_fnc_name")}
    if "pred_act_fnc_name" not in changes:
        with pytest.raises(ValueError, match=message):
            ConViTBackbone(**values)


def test_the_demo_runs(capsys):
    runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "convit_demo.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "head 1 looks -1 down, -1 right" in text and "head 9 looks +1 down, +1 right" in text


def test_whole_numbers_of_numpy_are_whole_numbers():
    changes = {"dim": 8, "heads": 2, "patch_size": 2, "num_local_layers": 1, "num_nonlocal_layers": 0}
    plain = ConViTConfig.ConViT_Ti(10, image_size=(4, 6), **changes)
    numpy = {name: np.int64(value) for name, value in changes.items()}
    same = ConViTConfig.ConViT_Ti(np.int32(10), image_size=(np.int64(4), 6), **numpy)
    assert same == plain and all(type(getattr(same, name)) is int for name in changes)
    for bad in (np.float64(8), np.int64(0), np.bool_(True), True, np.array([8])):
        with pytest.raises(ValueError, match="dim="):
            ConViTConfig.ConViT_Ti(10, image_size=4, **changes | {"dim": bad})
    with pytest.raises(ValueError, match="image_size="):
        ConViTConfig.ConViT_Ti(10, image_size=np.float32(4), **changes)
