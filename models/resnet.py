"""ResNet (He et al., arXiv 1512.03385) whose 3 x 3 convolutions are any mixer of `layers2d.py`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allconvnet import init_for_relu, make_convolution
from options.allconvnet import AllConvNetConfig
from options.backbones import RESNET, Place

__all__ = ["BasicBlock", "ResNet"]


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm, and a way around them: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""

    def __init__(self, config: AllConvNetConfig, first: Place, second: Place, in_channels: int):
        super().__init__()
        out_channels, stride = second.out_channels, first.stride
        self.conv1 = make_convolution(config, first, in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = make_convolution(config, second, out_channels, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            init_for_relu(shortcut)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    """ResNet-18 and ResNet-34: a stem, four stages of blocks, average pooling and a linear classifier.

    (B, in_channels, H, W) -> logits (B, num_classes). Names of its parts are torchvision's, so that with `--layer Conv2d` and
    the stem `imagenet` it is torchvision's `resnet18` or `resnet34`. The stem `small`, for images of 32 x 32, is one 3 x 3
    convolution without stride and pooling; it is replaced with those of stage 1. `recompute` keeps only the inputs of the
    blocks for the backward pass.
    """

    head = "fc."
    replaceable = r"fc\.|conv1\.|layer\d\.\d+\.conv[12]\."  # what other weights need not have (`runs.checkpoints.Leeway`)

    def __init__(self, config: AllConvNetConfig):
        super().__init__()
        self.config = config
        channels = config.places()[0].out_channels  # of the stem and of stage 1
        places = iter(config.places())
        if config.stem == "small":
            self.conv1 = make_convolution(config, next(places), config.in_channels, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(config.in_channels, channels, 7, stride=2, padding=3, bias=False)
            init_for_relu(self.conv1)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        for stage, blocks in enumerate(RESNET[config.model], start=1):
            layer = nn.Sequential()
            for _ in range(blocks):
                layer.append(BasicBlock(config, next(places), next(places), channels))
                channels = layer[-1].bn2.num_features
            setattr(self, f"layer{stage}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return self.fc(self.avgpool(x).flatten(1))
