"""Models of timm as options: sizes and preprocessing of `--model timm:NAME`, read from a model without weights."""

import functools
from typing import NamedTuple

from options.fields import did_you_mean

PREFIX = "timm:"


class TimmModel(NamedTuple):
    """Options that follow from a model of timm."""

    sizes: dict  # of `ViTConfig`; other values are errors
    data: dict  # of `DataConfig`: defaults from its `pretrained_cfg`


def is_timm(model: object) -> bool:
    return str(model).startswith(PREFIX)


@functools.cache
def describe(model: str) -> TimmModel:
    """Return the options that follow from `timm:NAME`. Raises ValueError if timm has no such transformer of patches."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"model={model} needs the package timm: pip install timm") from None
    name = model.removeprefix(PREFIX)
    if not timm.is_model(name):
        raise ValueError(f"model={model!r}: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        network = make_without_weights(name)
    except RuntimeError as error:  # of an unknown tag of weights
        raise ValueError(f"model={model!r}: {error}") from None
    config = network.pretrained_cfg
    try:
        block, grid = network.blocks[0], network.patch_embed.grid_size
        sizes = {
            "num_layers": len(network.blocks),
            "num_heads": block.attn.num_heads,
            "d_model": network.embed_dim,
            "d_mlp": block.mlp.fc2.in_features,
            "patch_size": config["input_size"][1] // grid[0],
            "prefix_tokens": network.num_prefix_tokens,
            "num_local_layers": None,
            **{f"{part}_bias": _has_bias(block.attn, part) for part in ("qkv", "proj")},
        }
    except (AttributeError, TypeError):
        raise ValueError(
            f"model={model!r}: {type(network).__name__} has no blocks of attention on one grid of patches; use a vit_*, "
            "deit*, beit* or eva02* of timm"
        ) from None
    interpolation = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    data = {"resize": config["input_size"][1:], "interpolation": interpolation, "mean": config["mean"], "std": config["std"]}
    return TimmModel(sizes, data)


def make_without_weights(name: str):
    """Return a model of timm on the meta device, which takes no memory."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name)


def _has_bias(attention, part: str) -> bool:
    return getattr(getattr(attention, part, None), "bias", None) is not None
