"""Convolutional networks with any mixer of `layers2d.py`, or two mixers side by side, as layers."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers2d import Branching2d, Strided2d
from mixers.build import build_layer
from options.allconvnet import AllConvNetConfig


def make_single2d(
    name: str, config: AllConvNetConfig, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """Build the mixer of this name or address, on maps of `config.image_size`."""
    row = config.rows[name]
    layer = build_layer(row, config, in_channels, out_channels, stride=stride, bias=bias)
    return layer if stride == 1 or "stride" in row.arguments else Strided2d(layer, stride)


def make_layer2d(
    config: AllConvNetConfig, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """Build the mixer that `config.layer` names, on maps of `config.image_size`; A/B splits the output channels.

    Args:
        stride: keep every stride-th row and column of the output.
        bias: False where BatchNorm follows. Two layers side by side keep theirs: a ReLU or a 1 x 1 convolution comes first.
    """
    branches = config.branches(out_channels)
    bias = bias or len(branches) > 1
    layers = [make_single2d(name, config, in_channels, width, stride=stride, bias=bias) for name, width in branches]
    if len(layers) == 1:
        return layers[0]
    return Branching2d(*layers, nn.Conv2d(out_channels, out_channels, 1) if config.branch_join == "conv1x1" else None)


class AllConvNet(nn.Module):
    """A mixer, BatchNorm and ReLU for each entry of `channels`, then average pooling, dropout and a linear classifier.

    (B, in_channels, H, W) -> logits (B, num_classes). `recompute` keeps only the inputs of the layers for the backward pass.
    Use it with compiled models only: in eager mode, BatchNorm would count every batch twice.
    """

    replaceable = r"classifier\.|layers\.\d+\.0\."  # weights that a checkpoint need not have (`runs.checkpoints.LoadPolicy`)

    def __init__(self, config: AllConvNetConfig):
        super().__init__()
        self.config = config
        layers = []
        in_channels = config.in_channels
        for out_channels, grid in zip(config.channels, config.grids(), strict=True):
            mixer = make_layer2d(config.layer_on(out_channels, grid), in_channels, out_channels)
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
