"""torchvision's VGG, ResNet and DenseNet, their 3 x 3 convolutions replaced by any layer of `layers2d.py`."""

import math
import re
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allconvnet import make_layer2d
from layers2d import Attention2d, Branching2d, ConvNN2d, ConvNNAttention2d, CoordConv2d, ShuffledConv2d, Strided2d
from mixers.controls import Pooling2d
from mixers.graph import GraphConv2d
from options.allconvnet import AllConvNetConfig
from options.backbones import DENSENET, RESNET, VGG
from options.models import ModelConfig
from options.neighbors import as_sides
from readers.files import import_torchvision


class Convolution(NamedTuple):
    """A 3 x 3 convolution of a backbone.

    Args:
        name: of the module in the network.
        module: the convolution itself, on the meta device.
        stage: counted from 1.
        grid: height and width of the map that enters.
        layer: config of the layer that replaces it; None: it stays.
    """

    name: str
    module: nn.Conv2d
    stage: int
    grid: tuple[int, int]
    layer: AllConvNetConfig | None


def plan(config: AllConvNetConfig) -> tuple[nn.Module, list[Convolution]]:
    """Build torchvision's network on the meta device, with the stem of the config, and list its 3 x 3 convolutions in order.

    Raises ValueError for a `replace` that the network does not have, and for a layer that does not fit the map it is for.
    """
    name = f"{config.model}_bn" if config.model in VGG and config.batch_norm else config.model
    grids = {}

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        grids[module] = tuple(inputs[0].shape[2:])

    with torch.device("meta"), torch.no_grad():
        network = import_torchvision().models.get_model(name, weights=None, num_classes=config.num_classes)
        adapt(network, config)
        found = find_convolutions(network)
        hooks = [module.register_forward_pre_hook(record) for _, module, _ in found]
        network.eval()(torch.empty(1, config.in_channels, *config.image_size))
        network.train()
    for hook in hooks:
        hook.remove()
    chosen = choose(config.replace, [stage for *_, stage in found], config.model)
    convolutions = []
    for (name, module, stage), is_chosen in zip(found, chosen, strict=True):
        grid = grids[module]
        try:
            layer = config.layer_on(module.out_channels, grid) if is_chosen else None
        except ValueError as error:
            where = f"layer={config.layer} on the {as_sides(grid)} map of stage {stage} of model={config.model}"
            raise ValueError(f"{where}: {error}; or keep the convolution (replace)") from None
        convolutions.append(Convolution(name, module, stage, grid, layer))
    return network, convolutions


def adapt(network: nn.Module, config: AllConvNetConfig) -> None:
    """Give torchvision's network the stem of the config, its input channels and, in a VGG, its classifier."""
    stem = next(name for name, part in network.named_modules() if isinstance(part, nn.Conv2d))
    old = network.get_submodule(stem)
    geometry = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding, "bias": old.bias is not None}
    is_small = config.stem == "small"
    if is_small and config.model not in VGG:
        geometry |= {"kernel_size": 3, "stride": 1, "padding": 1}
        network.set_submodule("maxpool" if config.model in RESNET else "features.pool0", nn.Identity())
    network.set_submodule(stem, nn.Conv2d(config.in_channels, old.out_channels, **geometry))
    if config.model in VGG:
        channels, side, width = network.classifier[0].in_features // 7**2, 1 if is_small else 7, config.classifier_width
        network.avgpool = nn.AdaptiveAvgPool2d(side)
        network.classifier[0] = nn.Linear(channels * side**2, width)
        network.classifier[3] = nn.Linear(width, width)
        network.classifier[6] = nn.Linear(width, config.num_classes)
        for part in network.features:
            if isinstance(part, nn.ReLU):
                part.inplace = False  # a layer may need its output in the backward pass


def find_convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d, int]]:
    """Return name, module and stage of the 3 x 3 convolutions in their order; a stem belongs to stage 1."""
    found, stage = [], 1
    for name, module in network.named_modules():
        if re.fullmatch(r"layer\d|features\.denseblock\d", name):
            stage = int(name[-1])
        elif isinstance(module, nn.MaxPool2d):  # ends a stage of a VGG
            stage += 1
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            found.append((name, module, stage))
    return found


def choose(words: tuple[str, ...], stages: list[int], model: str) -> list[bool]:
    """Return a mask of the convolutions that --replace selects, given the stage of each. Raises ValueError for other words."""
    flag, rule, numbers = f"replace={' '.join(words)}", words[0], words[1:]
    if rule == "all" and not numbers:
        return [True] * len(stages)
    if rule == "last" and len(numbers) == 1 and numbers[0].isdecimal():
        kept = len(stages) - int(numbers[0])
        if not 0 <= kept < len(stages):
            raise ValueError(f"{flag}: model={model} has {len(stages)} convolutions of 3 x 3; use last 1 to last {len(stages)}")
        return [number >= kept for number in range(len(stages))]
    if rule == "stages" and numbers and all(number.isdecimal() for number in numbers):
        wanted = {int(number) for number in numbers}
        if not wanted <= set(stages):
            raise ValueError(f"{flag}: model={model} has the stages 1 to {stages[-1]}")
        return [stage in wanted for stage in stages]
    raise ValueError(f"{flag} is neither all, nor last n, nor stages with their numbers, as in stages 3 4")


def fitted_options(config: ModelConfig) -> list[str]:
    """Return warnings where maps of a backbone have fewer tokens than the neighbors or samples that the config asks for."""
    if not isinstance(config, AllConvNetConfig) or not config.is_backbone:
        return []
    warnings, convolutions = [], plan(config)[1]
    for name in ("K", "num_samples"):
        maps = []
        for _, _, stage, grid, layer in convolutions:
            if layer is not None and getattr(layer, name) != getattr(config, name):
                value = "all" if name == "num_samples" else layer.K
                maps.append(f"{value} on the {as_sides(grid)} map of stage {stage}")
        if maps:
            where = ", ".join(dict.fromkeys(maps))
            warnings.append(f"--{name} {getattr(config, name)} does not fit all maps of --model {config.model}: it is {where}")
    return warnings


# ---------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------


class Segments(nn.Sequential):
    """Run modules in sequence; if `recompute` of the network is set, keep only the inputs of segments for the backward pass.

    A segment ends with a pooling or a block.
    """

    owner: tuple[nn.Module, ...] = ()  # the network, in a tuple so that it is no submodule; empty in a slice

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not any(network.recompute for network in self.owner):
            return super().forward(x)
        start = 0
        for end, part in enumerate(self, start=1):
            is_block = type(part).__module__.startswith("torchvision.")
            if is_block or isinstance(part, nn.MaxPool2d) or end == len(self):
                x = checkpoint(self.run, x, range(start, end), use_reentrant=False)
                start = end
        return x

    def run(self, x: Tensor, segment: range) -> Tensor:
        for number in segment:
            x = self[number](x)
        return x


def build_backbone(config: AllConvNetConfig) -> nn.Module:
    """Build torchvision's network with the layer of the config in place of its 3 x 3 convolutions.

    (B, in_channels, H, W) -> logits (B, num_classes). Parts have torchvision's names, so that with `--layer Conv2d` and the
    stem `imagenet` it is torchvision's network, whose weights it takes. A 3 x 3 stem is replaced with stage 1.

    It has the attributes `config`; `head`, the prefix of its classifier; `replaceable` (see `runs.checkpoints.LoadPolicy`); and
    `recompute`, to keep only the inputs of blocks, or of stages in a VGG, for the backward pass.
    Raises ValueError as `plan` does.
    """
    network, convolutions = plan(config)
    layers = {convolution.name: convolution.layer for convolution in convolutions}
    parts = list(network.named_modules())
    stem = next(name for name, part in parts if isinstance(part, nn.Conv2d))
    head = [name for name, part in parts if isinstance(part, nn.Linear)][-1]
    # Weights are drawn in the order of the forward pass, each layer's once: the initial numbers belong to a seed.
    for name, part in parts:
        if layers.get(name) is not None:
            channels, stride, bias = (part.in_channels, part.out_channels), part.stride[0], part.bias is not None
            part = make_layer2d(layers[name], *channels, stride=stride, bias=bias)
            network.set_submodule(name, part)
        elif hasattr(part, "reset_parameters"):
            part.to_empty(device=torch.get_default_device())
            part.reset_parameters()
        init_for_relu(part, "fan_in" if config.model in DENSENET else "fan_out")
    if config.model not in RESNET:
        init_classifier(network.classifier, config)
    for name, part in list(network.named_children()):
        if isinstance(part, nn.Sequential) and name != "classifier":
            segments = Segments(OrderedDict(part.named_children()))
            segments.owner = (network,)
            setattr(network, name, segments)
    network.config = config
    network.head = f"{head}."
    network.replaceable = "|".join(re.escape(f"{name}.") for name in (stem, *layers, head))
    network.recompute = False
    return network


@torch.no_grad()
def init_classifier(classifier: nn.Module, config: AllConvNetConfig) -> None:
    """Initialize the linears of a VGG or a DenseNet as torchvision does.

    A VGG with the small stem takes He et al.'s scale: torchvision's 0.01, made for 25,088 features, would stifle 512.
    """
    for linear in classifier.modules():
        if isinstance(linear, nn.Linear):
            if config.model in VGG:
                small = config.stem == "small"
                nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.in_features) if small else 0.01)
            nn.init.zeros_(linear.bias)


@torch.no_grad()
def init_for_relu(layer: nn.Module, mode: str = "fan_out") -> None:
    """Initialize a layer so that, after the ReLU that follows, it keeps the scale of its input.

    Convolutions as torchvision does it (He et al., arXiv 1502.01852), the slots of a ConvNN as the taps of a convolution;
    projections of attention as linears that keep the variance, doubled before a ReLU or GELU. Other layers stay as they are.

    Args:
        mode: fan_out or fan_in, the size of a convolution that its scale goes by.
    """
    if isinstance(layer, Branching2d):
        init_for_relu(layer.first, mode)
        init_for_relu(layer.second, mode)
        if layer.join is not None:  # the branches come without the ReLU that they are initialized for: twice the variance
            nn.init.normal_(layer.join.weight, std=layer.join.in_channels**-0.5)
            nn.init.zeros_(layer.join.bias)
    elif isinstance(layer, Strided2d):
        init_for_relu(layer.layer, mode)
    elif isinstance(layer, ShuffledConv2d):
        init_for_relu(layer.conv, mode)
    elif isinstance(layer, (nn.Conv2d, CoordConv2d, ConvNN2d, Pooling2d)):
        convolution = layer if isinstance(layer, nn.Conv2d) else layer.conv
        *depthwise, last = convolution if isinstance(convolution, nn.Sequential) else [convolution]
        for slots in depthwise:
            nn.init.kaiming_normal_(slots.weight, nonlinearity="linear")
        nn.init.kaiming_normal_(last.weight, mode=mode if last.groups == 1 else "fan_in", nonlinearity="relu")
        if last.bias is not None:
            nn.init.zeros_(last.bias)
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
                gain = 1 if linear is layer.input else 2  # GELU and ReLU leave about a half
                nn.init.normal_(linear.weight, std=math.sqrt(gain / linear.weight[0].numel()))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)


def needed_flags(config: AllConvNetConfig, weights: dict[str, Tensor]) -> str:
    """Return the flags that would make `config` the backbone of these weights, by torchvision's names in them."""
    wanted = {}
    if config.model in VGG and "classifier.0.weight" in weights:
        width, features = weights["classifier.0.weight"].shape
        wanted = {"stem": "small" if features % 7**2 else "imagenet", "classifier_width": width}
        wanted["batch_norm"] = "features.1.running_mean" in weights
    for stem in ("conv1.weight", "features.conv0.weight"):
        if config.is_backbone and stem in weights:
            wanted["stem"] = "imagenet" if weights[stem].shape[-1] == 7 else "small"
    flags = []
    for name, value in wanted.items():
        if value != getattr(config, name):
            flags.append(f"--{name} {value}" if type(value) is not bool else f"--{'' if value else 'no-'}{name}")
    return " ".join(flags)
