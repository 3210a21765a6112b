"""Build the network of a convolutional config, and load weights into it."""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from options.allconvnet import AllConvNetConfig
from options.backbones import VGG, flags_for
from runs.checkpoints import Leeway, Loaded, load_state


def build_network(config: AllConvNetConfig) -> nn.Module:
    """The network that `config.model` names. Raises ValueError as its constructor does."""
    module, name = ("models.vgg", "VGG") if config.model in VGG else ("models.resnet", "ResNet")
    if not config.is_host:
        module, name = "allconvnet", "AllConvNet"
    return getattr(importlib.import_module(module), name)(config)


def load_network_weights(network: nn.Module, state_dict: dict[str, Tensor], leeway: Leeway = Leeway()) -> Loaded:  # noqa: B008
    """Load a state dict of this network; torchvision's are those of its hosts with Conv2d.

    leeway: how far they may differ; by default not at all. Raises ValueError that names the first difference, and the flags of
    the host that the weights are of.
    """
    try:
        return load_state(network, state_dict, leeway)
    except ValueError as error:
        flags = flags_for(network.config, state_dict)
        raise ValueError(f"{error}{'; these weights need ' * bool(flags)}{flags}") from None
