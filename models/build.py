"""Build the network of a config, and load weights into it."""

from torch import Tensor, nn

from allconvnet import AllConvNet
from models.backbones import build_backbone, needed_flags
from models.pretrained import load_vit_weights
from models.replace import replace_attention
from models.timm import load_timm_weights, make_timm, name_of_weights
from options.models import ModelConfig
from options.vit import ViTConfig
from runs.checkpoints import Loaded, LoadPolicy, load_state
from vit import ViT

FROM_TIMM = {"attention_dropout", "attention_bias", "qkv_bias", "proj_bias", "num_heads"}  # its attention has them


def build_network(config: ModelConfig) -> nn.Module:
    """Build the network that `config.model` names. Raises ValueError if a layer does not fit its map or its block."""
    if not isinstance(config, ViTConfig):
        return build_backbone(config) if config.is_backbone else AllConvNet(config)
    if not config.is_backbone:
        return ViT(config)
    model = make_timm(config)
    if config.layer != "Attention":
        names = set().union({"branch_ratio", "mixer_option"}, *(row.options for row in config.rows.values())) - FROM_TIMM
        try:
            replace_attention(model, config.layer, **{name: getattr(config, name) for name in names})
        except ValueError as error:
            raise ValueError(f"layer={config.layer} in model={config.model}: {error}") from None
    return model


def load_network_weights(network: nn.Module, state_dict: dict[str, Tensor], policy: LoadPolicy = LoadPolicy()) -> Loaded:  # noqa: B008
    """Load a state dict of this network; also one of torchvision for a backbone with Conv2d, see `load_vit_weights` for a ViT.

    policy: accepted differences; by default none. Raises ValueError with the first difference, and the flags of the backbone
    that the weights belong to.
    """
    if isinstance(network.config, ViTConfig):
        if network.config.is_backbone:
            return load_timm_weights(network, state_dict, policy)
        try:
            return load_vit_weights(network, state_dict, policy)
        except ValueError as error:
            name = name_of_weights(state_dict) if "patch_embed.proj.weight" in state_dict else ""
            raise ValueError(f"{error}; it is timm's {name}, which --model timm:{name} loads" if name else str(error)) from None
    try:
        return load_state(network, state_dict, policy)
    except ValueError as error:
        flags = needed_flags(network.config, state_dict)
        raise ValueError(f"{error}; these weights need {flags}" if flags else str(error)) from None
