"""All-convolutional networks whose layers are any mixer of `layers2d.py`, or two of them side by side."""

from __future__ import annotations

import dataclasses
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers2d import Branching2d
from options import LAYERS2D_ROWS, AllConvNetConfig
from registry import build_layer

__all__ = ["LAYERS2D", "AllConvNet", "AllConvNetConfig", "make_layer2d"]


def _make(name: str, config: AllConvNetConfig, in_channels: int, out_channels: int) -> nn.Module:
    """The mixer of this name, or at this address, with the options of the config, on maps of its size."""
    return build_layer(config.rows[name], config, in_channels, out_channels)


LAYERS2D = {name: partial(_make, name) for name in LAYERS2D_ROWS}


def make_layer2d(config: AllConvNetConfig, in_channels: int, out_channels: int) -> nn.Module:
    """The mixer that `config.layer` names, on maps of `config.image_size`; A/B splits the output channels."""
    layers = [_make(name, config, in_channels, width) for name, width in config.branches(out_channels)]
    return layers[0] if len(layers) == 1 else Branching2d(*layers)


class AllConvNet(nn.Module):
    """Per entry of `channels` a mixer, BatchNorm and ReLU; then average pooling, dropout and a linear classifier.

    (B, in_channels, H, W) -> logits (B, num_classes). Raises ValueError for a config that cannot be built. `recompute`
    keeps only the inputs of the layers for the backward pass; for a compiled model, since eagerly it would count every
    batch twice in BatchNorm's statistics.
    """

    def __init__(self, config: AllConvNetConfig):
        super().__init__()
        self.config = config
        layers = []
        in_channels = config.in_channels
        for out_channels, grid in zip(config.channels, config.grids(), strict=True):
            # A config of this one layer: shuffle patterns A and B change the size of the map from layer to layer.
            one = dataclasses.replace(config, channels=(out_channels,), num_layers=None, image_size=grid)
            mixer = make_layer2d(one, in_channels, out_channels)
            layers.append(nn.Sequential(mixer, nn.BatchNorm2d(out_channels), nn.ReLU()))
            in_channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.recompute = False
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(in_channels, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        x = x.mean(dim=(2, 3))  # (B, C)
        return self.classifier(self.dropout(x))
