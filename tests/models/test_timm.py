"""timm both ways: its weights in our models, and our mixers in its models. Weights are random: none can be downloaded."""

import copy
import io
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from models.pretrained import load_vit_weights
from models.timm import timm_mixer
from options.layers import LAYERS1D_NAMES, LAYERS1D_ROWS
from options.vit import ViTConfig
from runs.checkpoints import LoadPolicy
from runs.measure import count_parameters
from tests.helpers.pools import pool_of
from vit import ViT

timm = pytest.importorskip("timm")
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "num_classes": 5}
OURS = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 3, "d_model": 16, "d_mlp": 32, "num_classes": 5}
MIXER = {"image_size": 8, "patch_size": 2, "kernel_size": 3, "hybrid_dilations": (1,)}


def random_weights(model):
    """In float64, and large enough for a mistake anywhere to show in the logits."""
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5)
            if "norm" in name:
                parameter.add_("weight" in name)
    return model


def vit(**options):
    return timm.models.vision_transformer.VisionTransformer(**SMALL | {"embed_dim": 16} | options)


# --- its weights in our models --------------------------------------------------------------------------------------

# 1000 classes at 224 x 224, in float32 and as timm initializes them.
MODELS = {
    "convit_tiny": {"model": "convit_ti", "proj_bias": True},
    "vit_tiny_patch16_224": {
        **{"num_layers": 12, "num_heads": 3, "d_model": 192, "d_mlp": 768},
        **{"pos_embedding": "learned", "patch_norm": False, "final_norm": True},
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_logits_of_timm(name):
    reference = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 1:  # biases are zero at first, and would hide
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = ViT(ViTConfig(**MODELS[name], num_classes=1000)).eval()
    assert count_parameters(model) == count_parameters(reference)
    load_vit_weights(model, reference.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = model(x), reference(x)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_convit_by_weights_that_matter(qkv_bias):
    reference = random_weights(timm.models.convit.ConVit(**SMALL, embed_dim=4, local_up_to_layer=2, qkv_bias=qkv_bias))
    config = ViTConfig(model="convit_ti", **OURS, num_local_layers=2, qkv_bias=qkv_bias, proj_bias=True)
    model = ViT(config).double().eval()
    load_vit_weights(model, reference.state_dict())
    x = torch.randn(2, 1, 8, 8).double()
    torch.testing.assert_close(model(x), reference(x), atol=1e-9, rtol=1e-9)


def test_convit_without_the_bias_that_it_has_is_refused_with_advice():
    reference = timm.models.convit.ConVit(**SMALL, embed_dim=4, local_up_to_layer=2)
    model = ViT(ViTConfig(model="convit_ti", **OURS, num_local_layers=2))
    with pytest.raises(ValueError, match=r"no blocks\.0\.mixer\.proj\.bias; .*need --no-attention_bias --proj_bias$"):
        load_vit_weights(model, reference.state_dict())


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
@pytest.mark.parametrize(("qkv", "proj"), [(False, True), (True, False)])
def test_biases_of_every_mixer_apart(layer, qkv, proj):
    options = {"K": 3, "kernel_size": 3, "hybrid_dilations": (1,), "num_heads": 2, "pool": pool_of(layer)}
    model = ViT(ViTConfig(**OURS | options | {"num_layers": 1}, layer=layer, attention_bias=proj, qkv_bias=qkv))
    names = [name for name, _ in model.blocks[0].mixer.named_parameters() if name.endswith("bias")]
    if "bias" not in LAYERS1D_ROWS[layer].arguments:
        assert not names
        return
    assert any(word in name for name in names for word in ("qkv", "value", "input")) == qkv
    assert any(name == "proj.bias" for name in names) == proj
    assert any(name in ("first.proj.bias", "second.proj.bias") for name in names) == (proj and layer.startswith("Branch"))


def test_weights_of_timm_at_another_image_size_are_as_timm_resamples_them():
    from timm.layers import resample_abs_pos_embed

    reference = random_weights(vit())
    same_as_timm = {"pos_embedding": "learned", "patch_norm": False, "final_norm": True, "num_heads": 4}
    model = ViT(ViTConfig(**OURS | same_as_timm | {"image_size": 12, "num_classes": 3})).double()
    loaded = load_vit_weights(model, reference.state_dict(), LoadPolicy(partial=True, resample=True))
    assert loaded.resampled == "4 x 4 to 6 x 6 patches" and list(loaded.new) == ["classifier.weight", "classifier.bias"]
    expected = resample_abs_pos_embed(reference.pos_embed, [6, 6])
    torch.testing.assert_close(model.pos_embedding, expected, atol=1e-6, rtol=0)
    assert torch.equal(model.blocks[2].mixer.proj.weight, reference.blocks[2].attn.proj.weight)


# --- our mixers in its models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["ConvNNAttention", "KvtAttention", "Attention"])
def test_attention_swapped_for_all_tokens_gives_the_same_logits(layer):
    reference = random_weights(vit(qkv_bias=True))
    swap = vit(qkv_bias=True, attn_layer=timm_mixer(layer, K=17, **MIXER)).double().eval()
    missing, unexpected = swap.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("attn.conv.weight") for name in missing)
    x = torch.randn(2, 1, 8, 8).double()
    torch.testing.assert_close(swap(x), reference(x), atol=1e-9, rtol=1e-9)
    few = vit(qkv_bias=True, attn_layer=timm_mixer(layer, K=3, **MIXER)).double().eval()
    few.load_state_dict(reference.state_dict(), strict=False)
    assert torch.allclose(few(x), reference(x)) == (layer == "Attention")


@pytest.mark.parametrize("layer", LAYERS1D_NAMES)
def test_every_mixer_trains_a_step_in_timms_model(layer):
    options = {"depth": 1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    if pool_of(layer) == "mean":
        options |= {"class_token": False, "global_pool": "avg"}
    model = vit(**options, attn_layer=timm_mixer(layer, K=3, pool=pool_of(layer), **MIXER))
    x = torch.randn(4, 1, 8, 8)
    model(x).square().sum().backward()
    if hasattr(model.blocks[0].attn, "proj"):
        assert model.blocks[0].attn.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for name, p in model.named_parameters() if "attn" in name)
    assert torch.equal(model.eval()(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, copied = torch.load(file, weights_only=False), copy.deepcopy(model)
    assert torch.equal(loaded(x), model(x)) and torch.equal(copied(x), model(x))
    assert type(copied.blocks[0].attn) is type(model.blocks[0].attn)


def test_a_blocks_attention_is_replaced_in_place():
    """As in a model that is there already; without a class token the tokens are the patches."""
    model = random_weights(vit(class_token=False, global_pool="avg", qkv_bias=True))
    x = torch.randn(2, 1, 8, 8).double()
    before = model(x)
    make = timm_mixer("ConvNNAttention", K=16, pool="mean", **MIXER)
    for block in model.blocks:
        attn = make(16, num_heads=4, qkv_bias=True).double()
        attn.load_state_dict(block.attn.state_dict(), strict=False)
        block.attn = attn
    torch.testing.assert_close(model(x), before, atol=1e-9, rtol=1e-9)


def test_what_a_mixer_cannot_do_is_said():
    make = timm_mixer("KvtAttention", K=3, **MIXER)
    with pytest.raises(ValueError, match="scale_norm must be False"):
        make(16, num_heads=4, scale_norm=True)
    with pytest.raises(ValueError, match="ViG has no norm of queries and keys: qk_norm must be False"):
        timm_mixer("ViG", K=3, **MIXER)(16, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match="takes no mask"):
        make(16, num_heads=4)(torch.randn(1, 17, 16), is_causal=True)
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=16"):
        make(16, num_heads=3)
    with pytest.raises(ValueError, match="K=18 is more than the 17"):
        timm_mixer("KvtAttention", K=18, **MIXER)
    with pytest.raises(ValueError, match="layer='Kvt' is not one of"):
        timm_mixer("Kvt")
    with pytest.raises(ValueError, match="11 tokens were given, and the layer was made for"):
        timm_mixer("ConvNNAttention", K=3, **MIXER)(16, num_heads=4)(torch.randn(1, 11, 16))


def test_the_example_swaps_and_fine_tunes(monkeypatch, capsys):
    """With an epoch each, where it takes thirty and two."""
    example = runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "timm_swap.py"), run_name="example")
    train = example["train"]
    monkeypatch.setitem(example["main"].__globals__, "train", lambda model, data, epochs, lr: train(model, data, 1, lr))
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "timm's attention",
        "ConvNN attention, K = N = 17",
        "ConvNN attention, K = 5, before",
        "",
    ]
    assert lines[-1].split()[0] == "after" and all(line.endswith("%") for line in (lines[0], *lines[2:]))
