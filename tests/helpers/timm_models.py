"""Tiny models of timm, of five families, under names of timm's registry: images of 8 x 8, patches of 2 x 2, 16 features."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import _create_deit
from timm.models.vision_transformer import _create_vision_transformer

SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
FAMILIES = {  # by name, with the number of tokens before the patches
    "tiny_plain": (1, {}),
    "tiny_distilled": (2, {"distilled": True}),
    "tiny_deit3": (1, {"no_embed_class": True, "init_values": 0.5}),
    "tiny_registers": (5, {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5}),
    "tiny_qk_norm": (0, {"qk_norm": True, "class_token": False, "global_pool": "avg", "proj_bias": False, "fc_norm": False}),
    "tiny_scale_norm": (1, {"scale_attn_norm": True}),
}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.none": {
            **{"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 1000},
            **{"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj"},
            "classifier": ("head", "head_dist") if name == "tiny_distilled" else "head",
        }
        for name in FAMILIES
    }
)


def make(name):
    def entry(pretrained=False, **kwargs):
        create = _create_deit if name in ("tiny_distilled", "tiny_deit3") else _create_vision_transformer
        return create(name, pretrained=pretrained, **SIZES | FAMILIES[name][1] | kwargs)

    entry.__name__, entry.__module__ = name, __name__
    return register_model(entry)


for name in FAMILIES:
    make(name)
