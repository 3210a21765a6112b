"""The convolutional networks that `--layer` goes into, without torch: their 3 x 3 convolutions, in stages, on maps of a size.

VGG (Simonyan and Zisserman, arXiv 1409.1556) and ResNet (He et al., arXiv 1512.03385) as torchvision has them.
`models/vgg.py` and `models/resnet.py` build them.
"""

from __future__ import annotations

from typing import NamedTuple

VGG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
RESNET = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # blocks of two convolutions
HOSTS = VGG | RESNET
WIDTHS = (64, 128, 256, 512, 512)  # channels of each stage
STEMS = ("small", "imagenet")
SMALL = 128  # images whose shorter side is below it have the small stem, unless another is asked for


class Place(NamedTuple):
    """A 3 x 3 convolution of a host."""

    stage: int  # counted from 1
    out_channels: int
    grid: tuple[int, int]  # height and width of the map that enters
    stride: int = 1
    is_replaced: bool = True  # by --layer


def default_stem(image_size: tuple[int, int]) -> str:
    return "small" if min(image_size) < SMALL else "imagenet"


def places_of(model: str, stem: str, image_size: tuple[int, int]) -> list[Place]:
    """The 3 x 3 convolutions of a host in their order. Raises ValueError for an image that VGG's five poolings use up."""
    return _vgg_places(model, image_size) if model in VGG else _resnet_places(model, stem, image_size)


def _vgg_places(model: str, grid: tuple[int, int]) -> list[Place]:
    if min(grid) < 32:
        size = f"{grid[0]} x {grid[1]}"
        raise ValueError(
            f"model={model} halves the map five times and needs images of at least 32 x 32, not {size}; use resize"
        )
    places = []
    for stage, (count, width) in enumerate(zip(VGG[model], WIDTHS, strict=True), start=1):
        places += [Place(stage, width, grid)] * count
        grid = grid[0] // 2, grid[1] // 2
    return places


def _resnet_places(model: str, stem: str, grid: tuple[int, int]) -> list[Place]:
    places = []
    if stem == "small":
        places.append(Place(1, WIDTHS[0], grid))  # the stem itself, on maps of stage 1
    else:  # a 7 x 7 convolution and a pooling, each of which halves the map
        grid = _half(_half(grid))
    for stage, (blocks, width) in enumerate(zip(RESNET[model], WIDTHS, strict=False), start=1):
        first = Place(stage, width, grid, stride=1 if stage == 1 else 2)
        grid = grid if stage == 1 else _half(grid)
        places += [first, *[Place(stage, width, grid)] * (2 * blocks - 1)]
    return places


def _half(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)


def flags_for(config, weights: dict) -> str:
    """The flags that would make `config` the host of these weights (by torchvision's names, of anything with a shape)."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    wanted = {}
    if config.model in VGG and len(first := shapes.get("classifier.0.weight", ())) == 2:
        small = first[1] != WIDTHS[-1] * 49
        wanted = {"stem": "small" if small else "imagenet", "classifier_width": first[0]}
        wanted["batch_norm"] = "features.1.running_mean" in shapes
    elif config.model in RESNET and len(first := shapes.get("conv1.weight", ())) == 4:
        wanted = {"stem": "imagenet" if first[-1] == 7 else "small"}
    flags = []
    for name, value in wanted.items():
        if value != getattr(config, name):
            flags.append(f"--{name} {value}" if type(value) is not bool else f"--{'' if value else 'no-'}{name}")
    return " ".join(flags)


def choose(words: tuple[str, ...], places: list[Place], model: str) -> list[Place]:
    """The places with `is_replaced` as the words of --replace say. Raises ValueError for words that make no sense here."""
    flag = f"replace={' '.join(words)}"
    what, numbers = words[0], words[1:]
    if what == "all" and not numbers:
        chosen = [True] * len(places)
    elif what == "last" and len(numbers) == 1 and numbers[0].isdecimal():
        count = int(numbers[0])
        if not 1 <= count <= len(places):
            raise ValueError(f"{flag}: model={model} has {len(places)} convolutions of 3 x 3; use last 1 to last {len(places)}")
        chosen = [number >= len(places) - count for number in range(len(places))]
    elif what == "stages" and numbers and all(number.isdecimal() for number in numbers):
        stages, last = {int(number) for number in numbers}, places[-1].stage
        if not stages <= set(range(1, last + 1)):
            raise ValueError(f"{flag}: model={model} has the stages 1 to {last}")
        chosen = [place.stage in stages for place in places]
    else:
        raise ValueError(f"{flag} is neither all, nor last n, nor stages with their numbers, as in stages 3 4")
    return [place._replace(is_replaced=one) for place, one in zip(places, chosen, strict=True)]
