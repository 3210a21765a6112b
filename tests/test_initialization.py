"""A comparison of mixers starts where all of them can learn: what blocks do to the scale of their input, at the first step."""

import pytest
import torch

from options.layers import LAYERS1D_NAMES
from options.vit import ViTConfig
from tests.helpers.pools import pool_of
from vit import ViT

SMALL = {
    "image_size": 32,
    "in_channels": 1,
    "patch_size": 4,
    "num_layers": 4,
    "num_heads": 4,
    "d_model": 48,
    "d_mlp": 192,
    "pos_embedding": "learned",
    "final_norm": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "kernel_size": 3,
    "hybrid_dilations": (1, 2),
}
VARIANTS = [
    *({"layer": layer, "pool": pool_of(layer)} for layer in LAYERS1D_NAMES),
    *(
        {"layer": layer, "convolution_type": kind}
        for layer in ("ConvNN", "ConvNNAttention", "BranchAttention", "BranchConv", "Conv1d", "Conv1dAttention")
        for kind in ("standard", "depthwise", "depthwise-separable")
    ),
    {"layer": "Performer", "performer_kernel": "relu"},
    {"layer": "Nystromformer", "nystrom_conv_kernel": 5},
    {"layer": "BiFormer", "value_convolution": 5},
    {"layer": "Linformer", "linformer_k": 8},
    {"layer": "Linformer", "linformer_k": 64, "image_size": 64},
]


def variances(model):
    """(block's output over its input, mixer's output) of every block, in eval mode, on images of smooth noise."""
    found, mixed = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: found.append((out.var() / given[0].var()).item()))
        block.mixer.register_forward_hook(lambda _, given, out: mixed.append(out.var().item()))
    side = model.config.image_size[0]
    images = torch.nn.functional.interpolate(torch.randn(16, 1, 8, 8), (side, side), mode="bicubic")
    with torch.no_grad():
        model.eval()(images)
    return list(zip(found, mixed, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_blocks_keep_the_scale_of_their_input_and_mixers_have_a_say(options):
    most = 5 if options["layer"] == "Identity" else 3  # the same tokens twice have four times the variance
    for ratio, mixed in variances(ViT(ViTConfig(**SMALL | options))):
        assert 1 / 3 < ratio < most
        # A mixer works on tokens of variance one; a mean of all 65 of them, where they have nothing in common, has 1/65.
        assert mixed > 0.003


def test_without_a_number_linears_are_xavier_and_positions_have_the_scale_of_the_tokens():
    wide = SMALL | {"d_model": 256, "d_mlp": 512}
    for patch_norm, scale in ((True, 1.0), (False, 0.02)):
        model = ViT(ViTConfig(**wide, patch_norm=patch_norm))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                bound = (6 / sum(module.weight.shape)) ** 0.5
                torch.testing.assert_close(module.weight.abs().max().item(), bound, rtol=0.02, atol=0)
                torch.testing.assert_close(module.weight.std().item(), bound / 3**0.5, rtol=0.05, atol=0)
                assert not module.bias.any()
        for parameter in (model.pos_embedding, model.class_token):
            torch.testing.assert_close(parameter.std().item(), scale, rtol=0.15, atol=0)
        bound = model.patch_embedding.weight[0].numel() ** -0.5  # what nn.Conv2d does by itself
        torch.testing.assert_close(model.patch_embedding.weight.abs().max().item(), bound, rtol=0.02, atol=0)


def test_a_number_is_the_deviation_of_truncated_normals():
    model = ViT(ViTConfig(**SMALL | {"d_model": 256}, initializer_range=0.02))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for weight in (*weights, model.patch_embedding.weight, model.pos_embedding, model.class_token):
        torch.testing.assert_close(weight.std().item(), 0.02, rtol=0.15, atol=0)
    assert not model.patch_embedding.bias.any()


def test_presets_that_copy_other_models_keep_their_initialization():
    for model in ("convit_ti", "convit_b_plus"):
        assert ViTConfig(model=model).initializer_range == 0.02
