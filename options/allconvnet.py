"""`AllConvNetConfig`: model options of the convolutional program."""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from options.backbones import BACKBONES, CLASSIFIER_WIDTHS, RESNET, STEMS, VGG, check_image_size, default_stem
from options.checks import check_slots, check_topk, closest_divisor, shuffle_factors
from options.data import info_of, sides_of
from options.fields import LAYERS, SIDE, WIDTH, as_words, decide, option, with_default
from options.layers import (
    BRANCH_JOINS,
    CONVOLUTION_TYPES,
    CUSTOM_LAYER,
    GRAPH_AGGREGATIONS,
    LAYERS2D_NAMES,
    LAYERS2D_ROWS,
    SHUFFLE_PATTERNS,
    TOPKS,
    Row,
    layer_label,
    layers_of,
)
from options.models import GRAPH_AGGREGATION, LAYER_SHA256, MIXER_OPTION, SCORE_TEMPERATURE, TOPK, ModelConfig, preset_option
from options.neighbors import NeighborConfig, as_sides


def _decided_by_size(values: dict, given: dict) -> set[str]:
    """Return the options in a config.yaml that follow from its data set, size or stem, if another one is given."""
    if "model" not in values:  # written by hand: every value is deliberate
        return set()
    found, resize, stem = set(), values.get("resize"), str(values.get("stem"))
    info = info_of(values.get("dataset"))
    if "dataset" in given and info and resize == info.size:
        found.add("resize")
    if "resize" in given or found:
        with contextlib.suppress(TypeError, ValueError):  # an invalid size: reported elsewhere
            found |= {"stem"} if stem == default_stem(sides_of(resize)) else set()
    if "stem" in found | given.keys() and values.get("classifier_width") == CLASSIFIER_WIDTHS.get(stem):
        found.add("classifier_width")
    return found


@dataclass(frozen=True, kw_only=True)
class AllConvNetConfig(ModelConfig):
    """A convolutional network: mixer, BatchNorm and ReLU for every entry of `channels`, or a backbone (`options/backbones.py`).

    `models/backbones.py` checks that the layers of a backbone fit their maps.
    """

    rows: ClassVar[dict[str, Row]] = LAYERS2D_ROWS
    sizes: ClassVar[tuple[str, str]] = ("in_channels", "out_channels")
    unscored: ClassVar[frozenset[str]] = frozenset({"ConvNN", "ViG"})
    layer_form: ClassVar[str] = " or A/B of two"

    model: str = option(
        "allconvnet",
        "a stack of --channels, or a VGG, ResNet or DenseNet with --layer for its 3 x 3 convolutions",
        choices=("allconvnet", *BACKBONES),
    )
    layer: str = option("ConvNN", f"{', '.join(LAYERS2D_NAMES)}, or A/B of two different ones side by side{CUSTOM_LAYER}")
    mixer_option: tuple[str, ...] | None = option(None, MIXER_OPTION, kind=str, many=True, metavar="NAME=VALUE", repeat=True)
    layer_sha256: str | None = option(None, LAYER_SHA256, kind=str, flag=False)
    num_layers: int | None = option(None, "must match the length of --channels if given", kind=int, low=1, high=LAYERS)
    channels: tuple[int, ...] = option((32, 64, 128, 256, 512), "output channels of each layer", low=1, high=WIDTH)
    kernel_size: int = option(3, "Conv2d, Conv2d_New: side of the window", low=1, high=SIDE)
    num_heads: int = option(4, "Attention: heads", low=1, high=WIDTH)
    attention_dropout: float = option(
        0.0, "ConvNN_Attn, Attention: probability of dropping a weight of a pair of tokens", low=0, below=1
    )
    convolution_type: str = option("standard", "ConvNN, ConvNN_Attn: convolution over the K slots", choices=CONVOLUTION_TYPES)
    shuffle_pattern: str = preset_option(
        "BA",
        "pixel-unshuffle before (B), shuffle after (A), both (BA) or neither (NA, the default in a backbone)",
        choices=SHUFFLE_PATTERNS,
    )
    shuffle_scale: int = option(2, "side of the block that a shuffle moves into channels", low=0, high=SIDE)
    graph_aggregation: str = option("max", GRAPH_AGGREGATION, choices=GRAPH_AGGREGATIONS)
    score_temperature: float = option(1.0, f"ConvNN_Attn: {SCORE_TEMPERATURE}", low=1e-6, high=1e6)
    topk: str = option("hard", f"ConvNN_Attn: {TOPK}", choices=TOPKS)
    padding: int = option(0, "ConvNN: zero ring around the image that takes part in the search", low=0, high=SIDE)
    branch_ratio: float = option(0.5, "A/B: share of the output channels of B; 0 and 1 build the single layer", low=0, high=1)
    branch_join: str = option("relu", "A/B: ReLU after each, or a 1 x 1 convolution of both", choices=BRANCH_JOINS)
    replace: tuple[str, ...] = option(
        ("all",), "backbones: 3 x 3 convolutions that --layer replaces: all, last n, or stages 3 4"
    )
    stem: str | None = option(
        None,
        "ResNet, DenseNet: a 3 x 3 convolution, or 7 x 7 and a pooling; VGG: classifier on 1 x 1, or on 7 x 7 pixels (default: "
        "small for images below 128 pixels)",
        kind=str,
        choices=STEMS,
    )
    classifier_width: int | None = option(
        None,
        "VGG: hidden features of the classifier (default: 512 with the small stem, else 4096)",
        kind=int,
        low=1,
        high=WIDTH,
    )
    batch_norm: bool = option(False, "VGG: BatchNorm after each convolution")
    magnitude_type: str = with_default(NeighborConfig, "magnitude_type", "similarity")

    def __post_init__(self):
        decide(self, {"shuffle_pattern": "NA"} if str(self.model) in BACKBONES else {})
        if isinstance(self.replace, (list, tuple)):  # [last, 3] in a file
            object.__setattr__(self, "replace", tuple(str(word) if type(word) is int else word for word in self.replace))
        self._check_ranges()
        names = layers_of(self.layer)
        if len(names) > 2 or len(set(names)) != len(names):
            raise ValueError(f"layer={self.layer!r} must be one layer, or A/B of two different ones")
        if self.shuffle_scale == 0 and self.shuffle_pattern != "NA":
            raise ValueError(f"shuffle_scale=0 must be at least 1 with shuffle_pattern={self.shuffle_pattern}")
        if self.is_backbone:
            self._settle_backbone()
            return
        if self.num_layers not in (None, len(self.channels)):
            raise ValueError(
                f"num_layers={self.num_layers} does not match channels={as_words(self.channels)}; drop one of them"
            )
        object.__setattr__(self, "num_layers", len(self.channels))
        for index, grid in enumerate(self.grids()):
            for name, width in self.branches(self.channels[index]):
                self._check_layer(name, width, grid)

    @property
    def is_backbone(self) -> bool:
        """True if the layer replaces convolutions of a torchvision network."""
        return self.model in BACKBONES

    @property
    def title(self) -> str:
        return f"{self.model} with {layer_label(self.layer)}" if self.is_backbone else layer_label(self.layer)

    def _settle_backbone(self) -> None:
        """Set the options that a backbone derives from the image size, and check the options that need no map."""
        stem = self.stem or default_stem(self.image_size)
        object.__setattr__(self, "stem", stem)
        if self.model in VGG and self.classifier_width is None:
            object.__setattr__(self, "classifier_width", CLASSIFIER_WIDTHS[stem])
        check_image_size(self.model, stem, self.image_size)
        has_shuffle = any("shuffle_pattern" in self.rows[name].arguments for name in self.layers_in_use())
        if has_shuffle and self.shuffle_pattern in ("A", "B"):
            raise ValueError(
                f"shuffle_pattern={self.shuffle_pattern} changes the size of the map, which model={self.model} fixes; "
                "use BA or NA"
            )
        if self.model in RESNET and "Conv2d" in self.layers_in_use() and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd in model={self.model}, which has strides")

    def layer_on(self, out_channels: int, grid: tuple[int, int]) -> "AllConvNetConfig":
        """Return the config of a single layer with these output channels on a map of this height and width.

        In a backbone, K is at most the number of tokens of the map, and all tokens are candidates on a map that is too small
        for the samples. Raises ValueError if another option does not fit.
        """
        changes = {"model": "allconvnet", "channels": (out_channels,), "num_layers": None, "image_size": grid}
        grids = [self._tokens(name, grid) for name in self.layers_in_use() if "neighbors" in self.rows[name].arguments]
        if self.is_backbone and grids:
            tokens = min(grids, key=math.prod)
            limit = {"all": math.inf, "random": math.prod(tokens), "spatial": min(tokens) - 2 * self.sample_padding}
            changes["K"] = min(self.K, math.prod(tokens))
            changes["num_samples"] = self.num_samples if self.num_samples <= limit[self.sampling] else -1
        return dataclasses.replace(self, **changes)

    def _tokens(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the sides of the grid of tokens of a map. Raises ValueError if the shuffle does not divide it."""
        options = self.rows[name].arguments
        if "shuffle_pattern" in options and self.shuffle_pattern in ("B", "BA"):
            self._check_divides(grid)
            grid = tuple(side // self.shuffle_scale for side in grid)
        ring = 2 * self.padding if "padding" in options else 0
        return tuple(side + ring for side in grid)

    @staticmethod
    def drop_overridden(values: dict, given: dict) -> dict:
        """Drop also the values that follow from channels, model, image size or stem, if the command line changes these."""
        values = ModelConfig.drop_overridden(values, given)
        dropped = _decided_by_size(values, given) | ({"num_layers"} if "channels" in given else set())
        if "model" in given and given["model"] != values.get("model", "allconvnet"):
            dropped |= {"shuffle_pattern", "stem", "classifier_width"}
        return {name: value for name, value in values.items() if name not in dropped}

    def layers_in_use(self) -> list[str]:
        return [name for name, _ in self.branches(2)]

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        found = super().without_effect(defaults=defaults)
        others = {"channels", "num_layers"} if self.is_backbone else {"replace", "stem"}
        others |= set() if self.model in VGG else {"classifier_width", "batch_norm"}
        found |= dict.fromkeys(others, "model")
        if len(layers_of(self.layer)) == 1:
            found["branch_ratio"] = found["branch_join"] = "layer"
        elif self.branch_ratio in (0, 1):
            found["branch_join"] = "branch_ratio"
        found["drop_path"] = "layer"  # neither a stack nor a backbone can skip its blocks
        return found

    def branches(self, out_channels: int) -> list[tuple[str, int]]:
        """Return name and output channels of the one or two layers side by side."""
        first, *others = layers_of(self.layer)
        if not others or self.branch_ratio == 0:
            return [(first, out_channels)]
        (second,) = others
        if self.branch_ratio == 1:
            return [(second, out_channels)]
        if out_channels < 2:
            raise ValueError(f"channels={out_channels} cannot be shared by the two branches of layer={self.layer}")
        width = min(max(math.ceil(out_channels * self.branch_ratio - 0.5), 1), out_channels - 1)  # a half goes to the first
        return [(first, out_channels - width), (second, width)]

    def grids(self) -> list[tuple[int, int]]:
        """Return height and width of the input map of each layer in a stack; the patterns A and B change them."""
        names = self.layers_in_use()
        keeping = [name for name in names if "shuffle_pattern" not in self.rows[name].arguments]
        if self.shuffle_pattern in ("A", "B") and keeping and keeping != names:
            raise ValueError(
                f"shuffle_pattern={self.shuffle_pattern} changes the size of the map and {keeping[0]} keeps it; use BA or NA"
            )
        result = [self.image_size]
        for _ in self.channels:
            result.append(self.grid_after(names[0], result[-1]))
        return result[:-1]

    def grid_after(self, layer: str, grid: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output map of a layer."""
        pattern = self.shuffle_pattern if "shuffle_pattern" in self.rows[layer].arguments else "NA"
        if pattern == "A":
            return grid[0] * self.shuffle_scale, grid[1] * self.shuffle_scale
        if pattern == "B":
            self._check_divides(grid)
            return grid[0] // self.shuffle_scale, grid[1] // self.shuffle_scale
        return grid

    def _check_divides(self, grid: tuple[int, int]) -> None:
        if any(side % self.shuffle_scale for side in grid):
            raise ValueError(
                f"shuffle_scale={self.shuffle_scale} does not divide the {as_sides(grid)} map; "
                f"use a scale that divides it, shuffle_pattern=NA or another size (resize)"
            )

    def _check_layer(self, name: str, out_channels: int, grid: tuple[int, int]) -> None:
        """Check relations between options of a layer. Raises ValueError."""
        options = self.rows[name].arguments
        grid = self._tokens(name, grid)
        if "num_heads" in options:
            pattern = self.shuffle_pattern if "shuffle_pattern" in options else "NA"
            width = out_channels * shuffle_factors(pattern, self.shuffle_scale, 2)[1]
            if width % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide the {width} channels that attention runs on; use a divisor, "
                    f"such as {closest_divisor(width, self.num_heads)}"
                )
        if "neighbors" in options:
            self.neighbors.check_candidates(grid)
        if "convolution_type" in options:
            check_slots(self.convolution_type, self.aggregation_type)
        if "topk" in options:
            check_topk(self.topk, self.similarity_type)
