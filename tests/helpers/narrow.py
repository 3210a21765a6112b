"""Backbones of an eighth of their channels, in which every layer trains in a moment."""

import torch
import torchvision
from torch import nn


def narrow_backbones(monkeypatch) -> None:
    """Let `torchvision.models.get_model` divide the channels of a network by eight; images and classes keep theirs."""
    build = torchvision.models.get_model

    def get_model(name, **options):
        network = build(name, **options)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.in_channels, module.out_channels = max(module.in_channels // 8, 3), module.out_channels // 8
                sizes = module.out_channels, module.in_channels, *module.kernel_size
                module.weight = nn.Parameter(torch.empty(sizes))
                module.bias = None if module.bias is None else nn.Parameter(torch.empty(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.__init__(module.num_features // 8)
            elif isinstance(module, nn.Linear):
                module.__init__(module.in_features // 8, module.out_features)
        return network

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
