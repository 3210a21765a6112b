"""From a row of `options.py` to a module: its class is imported when a layer is built, and gets the options by name.

And from a config of `allconvnet_main.py` to its network.
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from hosts import VGG, flags_for
from options import AllConvNetConfig, ModelConfig, Row
from runs.checkpoints import Leeway, Loaded, load_state


def build_layer(row: Row, config: ModelConfig, *sizes: int, **known) -> nn.Module:
    """The layer of this row, with the options of the config. Raises ValueError as its constructor does.

    Args:
        sizes: of the layer: channels in and out in 2-D, features and heads in 1-D.
        known: what a row may name and the config does not know, such as the layout of the tokens.
    """
    return layer_class(row)(*sizes, **layer_arguments(row, config, **known))


def layer_class(row: Row) -> type[nn.Module]:
    module, _, name = row.target.partition(":")
    return getattr(importlib.import_module(module), name)


def layer_arguments(row: Row, config: ModelConfig, **known) -> dict:
    """What the constructor gets by name, from the options of the config and from what is `known` besides."""
    values = {
        argument: known[option] if option in known else getattr(config, option) for argument, option in row.arguments.items()
    }
    # None leaves an option to the default of the class.
    return dict(row.fixed) | {argument: value for argument, value in values.items() if value is not None}


def build_network(config: AllConvNetConfig) -> nn.Module:
    """The network that `config.model` names. Raises ValueError as its constructor does."""
    module, name = ("vgg", "VGG") if config.model in VGG else ("resnet", "ResNet")
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
