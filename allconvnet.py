"""All-convolutional networks whose layers are any mixer of `layers2d.py`, or two of them side by side.

What puts a mixer in the place of a convolution stands here as well: `models/vgg.py` and `models/resnet.py` share it.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers2d import Attention2d, Branching2d, ConvNN2d, ConvNNAttention2d, CoordConv2d, Strided2d
from mixers.build import build_layer
from mixers.graph import GraphConv2d
from options.allconvnet import AllConvNetConfig
from options.backbones import Place
from options.layers import LAYERS2D_ROWS

__all__ = ["LAYERS2D", "AllConvNet", "AllConvNetConfig", "make_convolution", "make_layer2d"]


def make_single2d(
    name: str, config: AllConvNetConfig, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """The mixer of this name, or at this address, with the options of the config, on maps of its size."""
    row = config.rows[name]
    layer = build_layer(row, config, in_channels, out_channels, stride=stride, bias=bias)
    return layer if stride == 1 or "stride" in row.arguments else Strided2d(layer, stride)


LAYERS2D = {name: partial(make_single2d, name) for name in LAYERS2D_ROWS}


def make_layer2d(
    config: AllConvNetConfig, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """The mixer that `config.layer` names, on maps of `config.image_size`; A/B splits the output channels.

    With a stride every so many rows and columns of its output are left. Without `bias`, because BatchNorm follows, a single
    layer that could do without has none; two side by side have ReLU, or a 1 x 1 convolution of both, in between.
    """
    branches = config.branches(out_channels)
    bias = bias or len(branches) > 1
    layers = [make_single2d(name, config, in_channels, width, stride=stride, bias=bias) for name, width in branches]
    if len(layers) == 1:
        return layers[0]
    return Branching2d(*layers, nn.Conv2d(out_channels, out_channels, 1) if config.branch_join == "conv1x1" else None)


# ---------------------------------------------------------------------------------------------------------------
# In the place of a convolution
# ---------------------------------------------------------------------------------------------------------------


def make_convolution(config: AllConvNetConfig, place: Place, in_channels: int, *, bias: bool) -> nn.Module:
    """The 3 x 3 convolution of a host at this place, or the layer that replaces it, initialized for the ReLU after it."""
    if place.is_replaced:
        layer = make_layer2d(config.at(place), in_channels, place.out_channels, stride=place.stride, bias=bias)
    else:
        layer = nn.Conv2d(in_channels, place.out_channels, 3, stride=place.stride, padding=1, bias=bias)
    init_for_relu(layer)
    return layer


@torch.no_grad()
def init_for_relu(layer: nn.Module) -> None:
    """Initialize a layer so that, after the ReLU that follows, it keeps the scale of its input.

    Convolutions as torchvision does it (He et al., arXiv 1502.01852, fan-out), the slots of a ConvNN as the taps of one;
    projections of attention as linears that keep the variance, doubled before a ReLU or GELU. A layer of another kind keeps
    what it has.
    """
    if isinstance(layer, Branching2d):
        init_for_relu(layer.first)
        init_for_relu(layer.second)
        if layer.join is not None:  # the branches come without the ReLU that they are initialized for: twice the variance
            nn.init.normal_(layer.join.weight, std=layer.join.in_channels**-0.5)
            nn.init.zeros_(layer.join.bias)
    elif isinstance(layer, Strided2d):
        init_for_relu(layer.layer)
    elif isinstance(layer, (nn.Conv2d, CoordConv2d, ConvNN2d)):
        convolution = layer if isinstance(layer, nn.Conv2d) else layer.conv
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    elif isinstance(layer, (Attention2d, ConvNNAttention2d)):
        for linear, gain in ((layer.qkv, 1), (layer.proj, 2)):
            nn.init.normal_(linear.weight, std=math.sqrt(gain / linear.in_features))
            nn.init.zeros_(linear.bias)
        if isinstance(layer, ConvNNAttention2d) and isinstance(layer.conv, nn.Conv1d) and layer.conv.groups == 1:
            # K slots with weights of about 1/K each add up to the variance of one value.
            nn.init.normal_(layer.conv.weight, std=math.sqrt(layer.select.neighbors.K / layer.conv.in_channels))
    elif isinstance(layer, GraphConv2d):
        for linear in layer.modules():
            if isinstance(linear, (nn.Linear, nn.Conv1d)):
                gain = 1 if linear is layer.input else 2  # what GELU and ReLU leave is about a half
                nn.init.normal_(linear.weight, std=math.sqrt(gain / linear.weight[0].numel()))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)


class AllConvNet(nn.Module):
    """Per entry of `channels` a mixer, BatchNorm and ReLU; then average pooling, dropout and a linear classifier.

    (B, in_channels, H, W) -> logits (B, num_classes). Raises ValueError for a config that cannot be built. `recompute`
    keeps only the inputs of the layers for the backward pass; for a compiled model, since eagerly it would count every
    batch twice in BatchNorm's statistics.
    """

    replaceable = r"classifier\.|layers\.\d+\.0\."  # what other weights need not have (`runs.checkpoints.Leeway`)

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
