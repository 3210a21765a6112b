"""Build the network of a convolutional config, and load weights into it."""

from torch import Tensor, nn

from allconvnet import AllConvNet
from models.backbones import build_backbone, needed_flags
from options.allconvnet import AllConvNetConfig
from runs.checkpoints import Loaded, LoadPolicy, load_state


def build_network(config: AllConvNetConfig) -> nn.Module:
    """Build the network that `config.model` names. Raises ValueError if a layer does not fit its map."""
    return build_backbone(config) if config.is_backbone else AllConvNet(config)


def load_network_weights(network: nn.Module, state_dict: dict[str, Tensor], policy: LoadPolicy = LoadPolicy()) -> Loaded:  # noqa: B008
    """Load a state dict of this network; for a backbone with Conv2d also one of torchvision.

    policy: accepted differences; by default none. Raises ValueError with the first difference, and the flags of the backbone
    that the weights belong to.
    """
    try:
        return load_state(network, state_dict, policy)
    except ValueError as error:
        flags = needed_flags(network.config, state_dict)
        raise ValueError(f"{error}; these weights need {flags}" if flags else str(error)) from None
