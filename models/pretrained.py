"""Load weights of this program, torchvision and timm into a ViT."""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runs.checkpoints import Loaded, LoadPolicy, load_state
from vit import resample_positions

# Names in the state dicts of torchvision and timm, and ours.
TORCHVISION = {
    r"conv_proj\.": "patch_embedding.",
    r"encoder\.pos_embedding": "pos_embedding",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_": r"blocks.\1.mixer.qkv.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.": r"blocks.\1.mixer.proj.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:linear_1|0)\.": r"blocks.\1.mlp.0.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:linear_2|3)\.": r"blocks.\1.mlp.2.",
    r"encoder\.ln\.": "norm.",
    r"heads\.head\.": "classifier.",
}


TIMM = {
    r"patch_embed\.proj\.": "patch_embedding.",
    r"cls_token": "class_token",
    r"pos_embed": "pos_embedding",
    r"blocks\.(\d+)\.attn\.gating_param": r"blocks.\1.mixer.gate",
    r"blocks\.(\d+)\.attn\.": r"blocks.\1.mixer.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"blocks.\1.mlp.0.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"blocks.\1.mlp.2.",
    r"norm\.": "norm.",
    r"head\.": "classifier.",
}


FOREIGN = {"conv_proj.weight": TORCHVISION, "patch_embed.proj.weight": TIMM}  # by the name of their first weight


def fit_positions(table: Tensor, grid: tuple[int, int] | None, new: tuple[int, int], ours: int) -> tuple[Tensor, str]:
    """Return learned positions resampled to the grid of a model, and a note on it.

    Tokens without a position, such as a class token that joins after the local layers, come first: surplus positions are
    dropped, and missing ones are zero.

    Args:
        table: positions (1, tokens, d) of the other model.
        grid: rows and columns of its patches; None: a square, or those of this model if its shape agrees and is no square's.
        new: rows and columns of the patches of this model.
        ours: positions before the patches in this model.

    Raises ValueError if the grid cannot be derived.
    """
    count = table.shape[1]
    if grid is None:
        side = math.isqrt(count)  # of a square grid, with or without a class token
        is_own = count == ours + math.prod(new) and math.isqrt(count - ours) ** 2 != count - ours
        grid = new if is_own else (side, side)
    theirs = count - math.prod(grid)
    if theirs not in (0, 1, ours) or 0 in grid:
        raise ValueError(
            f"of an unknown grid: its {count} positions are not of a square of patches, with or without a class token"
        )
    table = resample_positions(table, grid, new, theirs)
    table = table[:, theirs - ours :] if theirs > ours else F.pad(table, (0, 0, ours - theirs, 0))
    return table, "" if grid == new else f"{grid[0]} x {grid[1]} to {new[0]} x {new[1]} patches"


def joined_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join `qk` and `v` of timm's ConViT to one `qkv`."""
    joined = dict(weights)
    for name in weights:
        value = name.replace(".mixer.qk.", ".mixer.v.")
        if value != name and value in weights and weights[name].shape[1:] == weights[value].shape[1:]:
            joined[name.replace(".qk.", ".qkv.")] = torch.cat([joined.pop(name), joined.pop(value)])
    return joined


def load_vit_weights(model: nn.Module, state_dict: dict[str, Tensor], policy: LoadPolicy = LoadPolicy()) -> Loaded:  # noqa: B008  it is immutable
    """Load a state dict of this model, or of the same architecture by torchvision or timm (`vit_b_16`, `vit_base_patch16_224`).

    Both need patch_norm=False, final_norm=True, pos_embedding="learned" and the same number of classes; timm's ConViT
    (`convit_tiny`) is `model="convit_ti"` with proj_bias=True. Models of timm with `fc_norm` are of another architecture.

    policy: accepted differences; by default none. Raises ValueError that names the first difference.
    """
    stem = next((name for name in FOREIGN if name in state_dict), None)
    weights = {}
    for name, value in state_dict.items():
        patterns = FOREIGN.get(stem, {})
        pattern = next((pattern for pattern in patterns if re.match(pattern, name)), None)
        weights[name if pattern is None else re.sub(pattern, patterns[pattern], name, count=1)] = value
    weights, resampled = joined_projections(weights), ""
    try:
        table = weights.get("pos_embedding")
        if table is not None and table.ndim == 3 and model.config.pos_embedding == "learned":
            has_grid = (stem or policy.grid) and table.shape == model.pos_embedding.shape  # the shape does not tell another one
            if policy.resample or has_grid:
                config = model.config
                weights["pos_embedding"], resampled = fit_positions(table, policy.grid, config.grid, config.class_tokens)
            if resampled and not policy.resample:
                raise ValueError(f"of another architecture: pos_embedding is of another grid, {resampled}")
        return load_state(model, weights, policy)._replace(resampled=resampled)
    except ValueError as error:
        config, advice = model.config, ""
        fits = {"--no-patch_norm": not config.patch_norm, "--final_norm": config.final_norm}
        fits |= {"--pos_embedding learned": config.pos_embedding == "learned"}
        if stem and not all(fits.values()):
            needed = " ".join(flag for flag, is_given in fits.items() if not is_given)
            advice += f"; those of torchvision and timm need {needed}"
        if "blocks.0.attn.gating_param" in state_dict and config.bias != (False, True):
            advice += "; those of timm's ConViT need --no-attention_bias --proj_bias"
        new, old = config.grid, policy.grid
        if policy.resample and old not in (None, new) and ".mixer." in str(error):
            advice += (
                f"; --layer {config.layer} has parameters for every token, so it runs on the {old[0]} x {old[1]} patches "
                "that it was made for"
            )
        if stem and state_dict[stem].ndim == 4 and state_dict[stem].shape[1] != config.in_channels:
            channels = state_dict[stem].shape[1]
            advice += f"; they are for images of {channels} channels, and these have {config.in_channels}"
        raise ValueError(f"{error}{advice}") from None
