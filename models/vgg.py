"""VGG (Simonyan and Zisserman, arXiv 1409.1556) whose 3 x 3 convolutions are any mixer of `layers2d.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allconvnet import make_convolution
from options.allconvnet import AllConvNetConfig

__all__ = ["VGG"]


class VGG(nn.Module):
    """VGG-11 to VGG-19: five stages of convolutions and ReLUs, each ended by a pooling; then three linears.

    (B, in_channels, H, W) -> logits (B, num_classes). Names and numbers of its parts are torchvision's, so that with
    `--layer Conv2d` and the stem `imagenet` it is torchvision's `vgg11` to `vgg19`, and with `batch_norm` `vgg11_bn` to
    `vgg19_bn`. With the stem `small`, for images of 32 x 32, the classifier sees the 1 x 1 map that five poolings leave,
    instead of 7 x 7. `recompute` keeps only the inputs of the stages for the backward pass.
    """

    head = "classifier.6."

    def __init__(self, config: AllConvNetConfig):
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.stages: list[range] = []  # numbers of the parts of each stage
        channels, places, mixers = config.in_channels, config.places(), []
        for stage in sorted({place.stage for place in places}):
            start = len(self.features)
            for place in (place for place in places if place.stage == stage):
                mixers.append(len(self.features))
                # With a bias even where BatchNorm follows, as torchvision has it.
                self.features.append(make_convolution(config, place, channels, bias=True))
                channels = place.out_channels
                if config.batch_norm:
                    self.features.append(nn.BatchNorm2d(channels))
                self.features.append(nn.ReLU())
            self.features.append(nn.MaxPool2d(2))
            self.stages.append(range(start, len(self.features)))
        side, width = 1 if config.stem == "small" else 7, config.classifier_width
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(channels * side**2, width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(width, config.num_classes),
        )
        # What other weights need not have (`runs.checkpoints.Leeway`).
        self.replaceable = rf"classifier\.6\.|features\.({'|'.join(map(str, mixers))})\."
        self.recompute = False
        self.init_classifier()

    @torch.no_grad()
    def init_classifier(self) -> None:
        """As torchvision does it; its 0.01, made for 25,088 features, would stifle 512: with the small stem He et al.'s."""
        for linear in self.classifier:
            if isinstance(linear, nn.Linear):
                small = self.config.stem == "small"
                nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.in_features) if small else 0.01)
                nn.init.zeros_(linear.bias)

    def run_stage(self, x: Tensor, stage: range) -> Tensor:
        for number in stage:
            x = self.features[number](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            recompute = self.recompute and self.training
            x = checkpoint(self.run_stage, x, stage, use_reentrant=False) if recompute else self.run_stage(x, stage)
        return self.classifier(self.avgpool(x).flatten(1))
