"""Every option in one place, without torch: `--help` and errors about options come at once.

The fields of the dataclasses below are the flags of the command lines, the keys of the YAML files and the columns of the
results: name, type, default, choices, range and help are stated here and nowhere else. The layers stand here as well, as rows
that name a class and the options it takes. Ranges are checked always, relations between options only for the layer in use.
How flags and YAML are read is in `cli.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

from cli import OneLineParser, make_parser, over, read_values, read_yaml
from hosts import HOSTS, RESNET, STEMS, VGG, Place, choose, default_stem, places_of
from machine import cpu_cores
from option_fields import (
    Spec,
    address_hint,
    as_words,
    build,
    check_fields,
    check_option,
    check_value,
    decide,
    did_you_mean,
    option,
    redefault,
    shown,
    specs,
)
from own_mixer import NO_FLAGS, OwnMixer, flag_of, is_address, label_of, lines_of_help, load, settle, split_layers
from reading import as_text, what_is_wrong_with

__all__ = [
    "CONVIT_SIZES",
    "CONVOLUTION_TYPES",
    "DATASETS",
    "GRAPH_AGGREGATIONS",
    "LAYERS1D_NAMES",
    "LAYERS1D_ROWS",
    "LAYERS2D_NAMES",
    "LAYERS2D_ROWS",
    "MASK_TYPES",
    "METRICS",
    "METRIC_ALIASES",
    "PERFORMER_KERNELS",
    "PROGRAMS",
    "RESUME_MAY_CHANGE",
    "SHUFFLE_PATTERNS",
    "SYSTEM",
    "TOPKS",
    "VIT_MODELS",
    "AllConvNetConfig",
    "BenchmarkConfig",
    "DataConfig",
    "DatasetInfo",
    "NeighborConfig",
    "OneLineParser",
    "Options",
    "Program",
    "Row",
    "Spec",
    "TrainConfig",
    "ViTConfig",
    "branch_widths",
    "build",
    "canonical_metric",
    "check_dropout",
    "check_fields",
    "check_heads",
    "check_slots",
    "check_temperature",
    "check_topk",
    "check_window",
    "did_you_mean",
    "dilate",
    "layer_label",
    "layer_row",
    "make_parser",
    "option",
    "parse_options",
    "read_values",
    "read_yaml",
    "redefault",
    "region_sides",
    "resolve",
    "same_value",
    "sequence_grid",
    "shuffle_factors",
    "specs",
    "warn_fitted",
    "warn_oversized",
    "warn_without_effect",
]

METRIC_ALIASES = {
    "cosine": "cosine",
    "similarity": "cosine",
    "euclidean": "euclidean",
    "distance": "euclidean",
    "matmul": "matmul",
}
METRICS = METRIC_ALIASES  # its former name
SHUFFLE_PATTERNS = ("BA", "NA", "B", "A")
MASK_TYPES = ("1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors")
PERFORMER_KERNELS = ("softmax", "relu")
BRANCH_JOINS = ("relu", "conv1x1")
GRAPH_AGGREGATIONS = ("max", "mean", "edge")
TOPKS = ("hard", "straight_through", "gumbel")
CONVIT_SIZES = {"Ti": (192, 4), "Ti_plus": (256, 4), "S": (432, 9), "S_plus": (576, 9), "B": (768, 16), "B_plus": (1024, 16)}
CONVOLUTION_TYPES = ("standard", "depthwise", "depthwise-separable")


def canonical_metric(name: str) -> str:
    """cosine, euclidean or matmul, from any of their names. Raises ValueError for another name."""
    if name not in METRIC_ALIASES:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRIC_ALIASES)}")
    return METRIC_ALIASES[name]


# The most that an option accepts, where nothing smaller is in its nature: far above what any run needs.
SIDE = 2**14  # of an image, a map or a window
TOKENS = 2**24
WIDTH = 2**20  # channels or features
LAYERS = 10**4
BATCH = 10**7  # images
IMAGES = 10**10
EPOCHS = 10**7
LARGEST = 1e38  # of a number that float32 holds


class DatasetInfo(NamedTuple):
    """What validation needs to know of a data set before it is read."""

    size: int  # side of the image a model sees unless --resize says otherwise
    channels: int
    classes: int | None  # None: as many as the training folder has
    streamed: bool  # read from files as training goes, instead of held on the device
    images: tuple[int, int] | None  # for training and for testing; None: as many as there are in the folder


DATASETS = {
    "cifar10": DatasetInfo(32, 3, 10, False, (50_000, 10_000)),
    "cifar100": DatasetInfo(32, 3, 100, False, (50_000, 10_000)),
    "imagenet": DatasetInfo(224, 3, 1000, True, (1_281_167, 50_000)),
    "imagenet100": DatasetInfo(224, 3, 100, True, None),
    "imagenette": DatasetInfo(224, 3, 10, True, (9_469, 3_925)),
    "mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000)),
    "fashion_mnist": DatasetInfo(28, 1, 10, False, (60_000, 10_000)),
    "digits": DatasetInfo(8, 1, 10, False, (1_437, 360)),
    "folder": DatasetInfo(224, 3, None, True, None),
}


# ---------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A layer as data: its class, and the options that its constructor takes as keywords. `registry.py` builds it.

    What the model alone knows comes first and by position: channels in and out of a 2-D layer, features and heads of a 1-D one.
    An option that no layer in use takes has no effect, and is named in a warning.
    """

    target: str  # "module:Class"
    # Names of options, argument=option where the constructor calls it otherwise, and of what the model knows: `neighbors`, a
    # NeighborConfig; `layout`, what the tokens are; `image_size`, the sides of the map; `biases`, whether the projections have
    # any; `stride` and `bias`, as a host of convolutions wants.
    takes: str
    fixed: tuple[tuple[str, object], ...] = ()  # arguments that are not options
    branches: tuple[str, ...] = ()  # of two layers side by side: what is built at branch_ratio 1, and at 0

    @property
    def arguments(self) -> dict[str, str]:
        """The option behind each argument of the constructor."""
        pairs = (word.partition("=") for word in self.takes.split())
        return {argument: option or argument for argument, _, option in pairs}

    @property
    def options(self) -> set[str]:
        """Names of the options that the layer reads."""
        names = set(self.arguments.values())
        several = {"neighbors": NEIGHBOR_OPTIONS, "biases": BIASES}
        own = names - several.keys() - {*NO_FLAGS}
        return own | {option for name in names & several.keys() for option in several[name]}


BY_PLACE = "place_attention"
PAIRS = "attention_dropout bias=biases"  # of layers that weigh pairs of tokens
CONVNN = f"neighbors layout convolution_type softmax_topk_val score_temperature topk {PAIRS}"
REGIONS = f"layout region_size top_regions {PAIRS}"
CONV1D = "kernel_size layout convolution_type bias=biases"
BIASES = {"attention_bias", "qkv_bias", "proj_bias"}
SHUFFLES = "shuffle_pattern shuffle_scale"

LAYERS2D_ROWS = {
    "Conv2d": Row("layers2d:make_conv2d", "kernel_size aggregation_type image_size stride bias"),
    "ConvNN": Row("layers2d:ConvNN2d", f"neighbors padding image_size bias {SHUFFLES}"),
    "ConvNN_Attn": Row(
        "layers2d:ConvNNAttention2d",
        f"neighbors score_temperature topk convolution_type attention_dropout image_size {SHUFFLES}",
    ),
    "Attention": Row("layers2d:Attention2d", f"num_heads attention_dropout {SHUFFLES}"),
    "ViG": Row("graph_layers:GraphConv2d", f"num_heads neighbors aggregation=graph_aggregation image_size {SHUFFLES}"),
}
LAYERS1D_ROWS = {
    "Attention": Row("layers1d:MultiHeadAttention", PAIRS),
    "ConvNN": Row("layers1d:MultiHeadConvNN", CONVNN),
    "ConvNNAttention": Row("layers1d:MultiHeadConvNNAttention", CONVNN),
    "Conv1d": Row("layers1d:MultiHeadConv1d", CONV1D),
    "Conv1dAttention": Row("layers1d:MultiHeadConv1dAttention", CONV1D),
    "KvtAttention": Row("layers1d:MultiHeadKvtAttention", f"K score_temperature topk {PAIRS}"),
    "LocalAttention": Row(f"{BY_PLACE}:MultiHeadLocalAttention", f"layout window_size {PAIRS}"),
    "SparseAttention": Row(
        f"{BY_PLACE}:MultiHeadSparseAttention", f"layout mode=sparse_mode context=sparse_context_window {PAIRS}"
    ),
    "MaskedAttention": Row(f"{BY_PLACE}:MultiHeadMaskedAttention", f"layout mask_type expansion_step {PAIRS}"),
    "NeighborhoodAttention": Row(f"{BY_PLACE}:NeighborhoodAttention", f"layout kernel_size dilation {PAIRS}"),
    "Linformer": Row("linear_attention:LinformerAttention", f"layout k=linformer_k {PAIRS}"),
    "Performer": Row("linear_attention:PerformerAttention", f"num_features=performer_features kernel=performer_kernel {PAIRS}"),
    "Nystromformer": Row(
        "linear_attention:NystromformerAttention",
        f"layout num_landmarks=nystrom_landmarks conv_kernel=nystrom_conv_kernel {PAIRS}",
    ),
    "Hybrid": Row(
        "linear_attention:HybridAttention",
        "layout window=hybrid_window dilations=hybrid_dilations num_features=performer_features kernel=performer_kernel "
        f"{PAIRS}",
    ),
    "GPSA": Row(f"{BY_PLACE}:GatedPositionalSelfAttention", f"layout locality_strength {PAIRS}"),
    "BranchConv": Row(
        "layers1d:BranchingConv", f"branch_ratio kernel_size {CONVNN}", branches=("ConvNNAttention", "Conv1dAttention")
    ),
    "BranchAttention": Row("layers1d:BranchingAttention", f"branch_ratio {CONVNN}", branches=("ConvNNAttention", "Attention")),
    "ViG": Row("graph_layers:GraphMixer", "neighbors layout aggregation=graph_aggregation dilation bias=biases"),
    "GreedyViG": Row("graph_layers:AxialGraphMixer", "layout dilation bias=biases"),
    "BiFormer": Row("region_attention:BiLevelRoutingAttention", f"{REGIONS} value_convolution"),
    "BlockTopK": Row("region_attention:BlockTopKAttention", REGIONS),
    "PaCa": Row("region_attention:PatchToClusterAttention", f"num_clusters {PAIRS}"),
    "ContextCluster": Row("region_attention:ContextClusterMixer", "layout region_size bias=biases"),
}
LAYERS2D_NAMES = tuple(LAYERS2D_ROWS)
LAYERS1D_NAMES = tuple(LAYERS1D_ROWS)


def layers_of(layer: str) -> list[str]:
    """The layers of A/B, or the one there is: names, and addresses of classes of one's own."""
    return split_layers(layer, {*LAYERS1D_NAMES, *LAYERS2D_NAMES})


def layer_label(layer: str) -> str:
    """A layer as folders and figures call it: an address by its class."""
    return label_of(layer, {*LAYERS1D_NAMES, *LAYERS2D_NAMES})


# ---------------------------------------------------------------------------------------------------------------
# Neighbors
# ---------------------------------------------------------------------------------------------------------------


NEIGHBORS = {"group": "neighbors"}


@dataclass(frozen=True)
class NeighborConfig:
    """Which K tokens a token is mixed with, and what is compared to find them."""

    K: int = option(9, "neighbors per token, counting itself where it is always one of them", low=1, high=TOKENS, **NEIGHBORS)
    sampling_type: str = option(
        "all",
        "candidates: all tokens, a random set drawn anew each step, or a spatial grid",
        choices=("all", "random", "spatial"),
        **NEIGHBORS,
    )
    num_samples: int = option(
        -1, "random: candidates; spatial: side of their grid; -1: all tokens", low=-1, high=TOKENS, **NEIGHBORS
    )
    sample_padding: int = option(0, "spatial: margin left free at the border, in tokens", low=0, high=SIDE, **NEIGHBORS)
    magnitude_type: str = option(
        "cosine",
        "measure of similarity; similarity is cosine, distance is euclidean",
        choices=tuple(METRIC_ALIASES),
        **NEIGHBORS,
    )
    similarity_type: str = option(
        "Col", "compare features (Col), coordinates (Loc) or both (Loc_Col)", choices=("Col", "Loc", "Loc_Col"), **NEIGHBORS
    )
    aggregation_type: str = option(
        "Col", "aggregate values, or values with their coordinates appended (Loc_Col)", choices=("Col", "Loc_Col"), **NEIGHBORS
    )
    lambda_param: float = option(
        0.5, "Loc_Col: weight of the features; coordinates get 1 - lambda_param", low=0, high=1, **NEIGHBORS
    )

    def __post_init__(self):
        self._check_ranges()
        # A class token may be one candidate more; without one, check_candidates is stricter by one.
        most = {"all": math.inf, "random": self.num_samples + 1, "spatial": self.num_samples**2 + 1}[self.sampling]
        if self.K > most:
            self._too_few(most - 1, f", or {most} with a class token")

    def _check_ranges(self) -> None:
        check_fields(self)
        if self.num_samples == 0:
            raise ValueError("num_samples=0 leaves no candidates; give at least 1, or -1 for all tokens")

    @property
    def metric(self) -> str:
        """`magnitude_type` without aliases: cosine, euclidean or matmul."""
        return canonical_metric(self.magnitude_type)

    @property
    def sampling(self) -> str:
        """`sampling_type`, where num_samples=-1 means all."""
        return "all" if self.num_samples == -1 else self.sampling_type

    def check_candidates(self, grid: tuple[int, ...] | None, *, axes: int = 2, class_tokens: int = 0) -> None:
        """Raise ValueError if a token of this grid of sides cannot have K neighbors.

        With `grid=None` (size not known yet) only what `axes` sides of any length allow is checked.
        """
        s, pad = self.num_samples, self.sample_padding
        tokens = math.prod(grid) if grid else math.inf
        if self.sampling == "random" and s > tokens:
            raise ValueError(f"num_samples={s} is more than the {tokens} tokens of the {_sides(grid)} grid")
        if self.sampling == "spatial" and grid and s > min(grid) - 2 * pad:
            raise ValueError(
                f"num_samples={s} with sample_padding={pad} does not fit the {_sides(grid)} grid; "
                f"at most {max(min(grid) - 2 * pad, 0)} per side"
            )
        candidates = class_tokens + {"all": tokens, "random": s, "spatial": s**axes}[self.sampling]
        if self.K > candidates:
            self._too_few(candidates)

    def _too_few(self, candidates: int, more: str = ""):
        how = "tokens there are" if self.sampling == "all" else f"candidates of sampling_type={self.sampling_type} with "
        how += "" if self.sampling == "all" else f"num_samples={self.num_samples}"
        raise ValueError(f"K={self.K} is more than the {candidates} {how}; K can be 1 to {candidates}{more}")


def _sides(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))


def shuffle_factors(pattern: str, scale: int, axes: int) -> tuple[int, int]:
    """Factors by which a shuffle pattern multiplies the input and output channels a mixer works on."""
    factor = scale**axes
    return (factor if pattern in ("B", "BA") else 1), (factor if pattern in ("A", "BA") else 1)


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------

NEIGHBOR_OPTIONS = {*specs(NeighborConfig), "coordinate_encoding"}
# (option, other option, values of the other under which the first has no effect)
WITHOUT_EFFECT = (
    ("num_samples", "sampling_type", ("all",)),
    ("sampling_type", "num_samples", (-1,)),
    ("sample_padding", "num_samples", (-1,)),
    ("sample_padding", "sampling_type", ("all", "random")),
    ("lambda_param", "similarity_type", ("Col", "Loc")),
    ("shuffle_scale", "shuffle_pattern", ("NA",)),
    ("sparse_context_window", "sparse_mode", ("all",)),
    ("score_temperature", "softmax_topk_val", (False,)),
)


def layer_row(rows: dict[str, Row], layer: str, branch_ratio: float) -> Row:
    """The row of a layer; at a branch_ratio of 0 or 1 that of the branch which has all features."""
    branches = rows[layer].branches
    return rows[branches[int(branch_ratio == 0)]] if branches and branch_ratio in (0, 1) else rows[layer]


OWN_LAYER = "; FILE.py:Class or package.module:Class is one of your own"
MIXER_OPTION = "an option of a layer of your own, repeatable; --help beside --layer FILE.py:Class lists them"
LAYER_SHA256 = "of the file of a layer of your own, as a run notes it"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(NeighborConfig):
    """What both models have: neighbors, layers that stand in `rows`, and the three fields that the data set decides.

    The `rows` of a config whose layer is a class of one's own have that as well, under its address.
    """

    heading = "model and layer"
    rows: ClassVar[dict[str, Row]] = {}
    sizes: ClassVar[tuple[str, str]]  # what a layer gets by position
    unscored: ClassVar[frozenset[str]]  # layers that look for neighbors and have no use for their scores

    drop_path: float = option(
        0.0,
        "ViT: probability of skipping a block's mixer or MLP for an image, rising linearly over the blocks to this",
        low=0,
        below=1,
    )
    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    num_classes: int = 10

    def _check_ranges(self) -> None:
        super()._check_ranges()
        size = self.image_size
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"image_size={shown(size)} is neither a side nor height and width")
        object.__setattr__(self, "image_size", tuple(check_value("image_size", side, int, 1, SIDE) for side in sides))
        for name in ("in_channels", "num_classes"):
            object.__setattr__(self, name, check_value(name, getattr(self, name), int, 1, WIDTH))
        self._take_own_mixers()

    @classmethod
    def own_mixers(cls, layer: str) -> list[OwnMixer]:
        """The classes that a layer names by address, imported. Raises ValueError for one that cannot be a mixer."""
        # Words that a row may take: the options of the layers, by their own names, and what the model makes of its options.
        words = {name: name for row in cls.rows.values() for name in row.arguments.values()}
        words |= {name: name for name in specs(NeighborConfig)}
        words |= {"bias": "biases"} if "biases" in words else {}
        return [load(name, cls.sizes, words) for name in layers_of(layer) if is_address(name)]

    def _take_own_mixers(self) -> None:
        """Import the classes that `layer` names by address; then the config holds their rows, whole addresses and hashes."""
        mixers = self.own_mixers(self.layer)
        if not mixers:
            for name in ("mixer_option", "layer_sha256"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={as_words(getattr(self, name))} is of a class of your own, as layer=FILE.py:Class, and not of "
                        f"{self.layer}, whose options are flags"
                    )
            return
        addresses = iter([mixer.address for mixer in mixers])
        layer = "/".join(next(addresses) if is_address(name) else name for name in layers_of(self.layer))
        sha256 = "/".join(mixer.sha256 for mixer in mixers)
        if self.layer_sha256 not in (None, sha256):
            raise ValueError(
                f"layer={layer} has changed: its SHA-256 was {self.layer_sha256} and is now {sha256}; give its file the former "
                "content back, or take it as it is now: by the flag --layer for a new run, by --override under --test_only"
            )
        values, settled = settle(mixers, self.mixer_option or ())
        rows = {
            mixer.address: Row(mixer.target, " ".join(f"{a}={o}" for a, o in mixer.takes.items()), fixed=tuple(own.items()))
            for mixer, own in zip(mixers, values, strict=True)
        }
        found = {"layer": layer, "layer_sha256": sha256, "mixer_option": settled or None, "rows": self.rows | rows}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def more_help(cls, given: dict) -> list[tuple[str, str, dict[str, str]]]:
        """What --help lists of the classes that --layer names by address: title, text, and a line for each option."""
        layers = given.get("layer") or []
        mixers = [mixer for layer in ([layers] if isinstance(layers, str) else layers) for mixer in cls.own_mixers(layer)]
        result = []
        for mixer in mixers:
            sources = {argument: flag_of(name) for argument, name in mixer.takes.items()}
            flags = [flag + f" (as {a})" * (flag != f"--{a}") if flag else a for a, flag in sources.items()]
            text = mixer.about + f" Of the model it gets {', '.join(flags)}." * bool(flags)
            result.append((f"options of {mixer.address}", text, lines_of_help(mixer)))
        return result

    @property
    def neighbors(self) -> NeighborConfig:
        return NeighborConfig(**{f.name: getattr(self, f.name) for f in fields(NeighborConfig)})

    @property
    def title(self) -> str:
        """What a run is of, in its first line."""
        return layer_label(self.layer)

    def layers_in_use(self) -> list[str]:
        """Names of the layers that the model is made of."""
        raise NotImplementedError

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        """Options that this model does not read, each with the option that makes it so.

        An option at its default says nothing else than the other one, as in --sampling_type all --num_samples -1: it is left
        out here unless `defaults`.
        """
        in_use = self.layers_in_use()
        if not self.rows.keys() >= set(in_use):
            return {}  # a layer of another library: what it reads is not known here
        read = {name for layer in in_use for name in self._options_of(layer)}
        of_layers = {name for row in self.rows.values() for name in row.options}
        own = specs(type(self))
        found = {name: "layer" for name in own if name in of_layers - read}
        if self.mixer_option and not any(map(is_address, in_use)):
            found["mixer_option"] = "layer"
        for name, other, values in WITHOUT_EFFECT:
            if name not in own or name in found or other not in own or other in found:
                continue
            if getattr(self, other) in values and (defaults or getattr(self, name) != own[name].default):
                found[name] = other
        readers = {layer for layer in in_use if "magnitude_type" in self._options_of(layer)}
        if self.similarity_type == "Loc" and readers <= self.unscored:  # which rank by distance then
            found.setdefault("magnitude_type", "similarity_type")
        with_heads = {layer for layer in in_use if "num_heads" in self.sizes or "num_heads" in self._options_of(layer)}
        if with_heads == {"ViG"} and self.graph_aggregation == "edge":  # one linear for all features
            found["num_heads"] = "graph_aggregation"
        return found

    def _options_of(self, layer: str) -> set[str]:
        row = layer_row(self.rows, layer, self.branch_ratio)
        return row.options | ({"branch_ratio"} if self.rows[layer].branches else set())

    @staticmethod
    def values_that_hold(values: dict, given: dict) -> dict:
        """Of the values in a YAML file those that still hold beside the ones that the command line gives.

        A layer that is given is another one than the file's, or the same in another place. Beside the config.yaml of a run
        that trained, a test is of its result, not of the weights that it started from, and exports nothing.
        """
        dropped = set()
        if "layer" in given:
            is_same = layer_label(str(given["layer"])) == layer_label(str(values.get("layer")))
            dropped = {"layer_sha256"} if is_same else {"layer_sha256", "mixer_option"}
        if [str(one.get("test_only")).lower() for one in (values, given)] == ["false", "true"]:
            dropped |= {"checkpoint", "export"}
        return {name: value for name, value in values.items() if name not in dropped}


CLASSIFIER_WIDTHS = {"small": 512, "imagenet": 4096}  # of VGG, by the stem


def _decided_by_size(values: dict, given: dict) -> set[str]:
    """Names of what the data set, the size or the stem in a config.yaml decided and, as another is given, decides anew."""
    if "model" not in values:  # written by hand: all of it was meant
        return set()
    found, resize, stem = set(), values.get("resize"), str(values.get("stem"))
    info = DATASETS.get(str(values.get("dataset")))
    if "dataset" in given and info and resize == info.size:
        found.add("resize")
    if "resize" in given or found:
        with contextlib.suppress(TypeError, ValueError):  # of a size that is none
            found |= {"stem"} if stem == default_stem(sides_of(resize)) else set()
    if "stem" in found | given.keys() and values.get("classifier_width") == CLASSIFIER_WIDTHS.get(stem):
        found.add("classifier_width")
    return found


of_model = functools.partial(option, decided=True)  # an option that `model` may decide


@dataclass(frozen=True, kw_only=True)
class AllConvNetConfig(ModelConfig):
    """A convolutional network whose convolutions are a mixer: one, BatchNorm and ReLU per entry of `channels`, or a host.

    In a host (`hosts.py`) every layer has the options that its map allows: `at`.
    """

    rows: ClassVar[dict[str, Row]] = LAYERS2D_ROWS

    sizes: ClassVar[tuple[str, str]] = ("in_channels", "out_channels")
    unscored: ClassVar[frozenset[str]] = frozenset({"ConvNN", "ViG"})

    model: str = option(
        "allconvnet",
        "a stack of --channels, or VGG, ResNet with --layer for 3 x 3 convolutions",
        choices=("allconvnet", *HOSTS),
    )
    layer: str = option("ConvNN", f"{', '.join(LAYERS2D_NAMES)}, or A/B of two different ones side by side{OWN_LAYER}")
    mixer_option: tuple[str, ...] | None = option(None, MIXER_OPTION, kind=str, many=True, metavar="NAME=VALUE", repeat=True)
    layer_sha256: str | None = option(None, LAYER_SHA256, kind=str, flag=False)
    num_layers: int | None = option(None, "must match the length of --channels if given", kind=int, low=1, high=LAYERS)
    channels: tuple[int, ...] = option((32, 64, 128, 256, 512), "output channels of each layer", low=1, high=WIDTH)
    kernel_size: int = option(3, "Conv2d: side of the window", low=1, high=SIDE)
    num_heads: int = option(4, "Attention: heads", low=1, high=WIDTH)
    attention_dropout: float = option(
        0.0, "ConvNN_Attn, Attention: probability of dropping a weight of a pair of tokens", low=0, below=1
    )
    convolution_type: str = option("standard", "ConvNN_Attn: convolution over the K slots", choices=CONVOLUTION_TYPES)
    shuffle_pattern: str = of_model(
        "BA",
        "pixel-unshuffle before (B), shuffle after (A), both (BA) or neither (NA, the default in VGG and ResNet)",
        choices=SHUFFLE_PATTERNS,
    )
    shuffle_scale: int = option(2, "side of the block that a shuffle moves into channels", low=1, high=SIDE)
    graph_aggregation: str = option("max", "ViG: what a token takes from its neighbors", choices=GRAPH_AGGREGATIONS)
    score_temperature: float = option(
        1.0, "ConvNN attention: what scores are divided by before the softmax", low=1e-6, high=1e6
    )
    topk: str = option(
        "hard",
        "ConvNN attention: the choice of neighbors in training, hard, or learned by a gradient for all candidates, of the "
        "nearest (straight_through) or of K drawn by their scores (gumbel)",
        choices=TOPKS,
    )
    padding: int = option(0, "ConvNN: zero ring around the image that takes part in the search", low=0, high=SIDE)
    branch_ratio: float = option(0.5, "A/B: share of the output channels of B; 0 and 1 build the single layer", low=0, high=1)
    branch_join: str = option("relu", "A/B: ReLU after each, or a 1 x 1 convolution of both", choices=BRANCH_JOINS)
    replace: tuple[str, ...] = option(
        ("all",), "VGG, ResNet: the 3 x 3 convolutions that --layer replaces: all, last n, or stages 3 4"
    )
    stem: str | None = option(
        None,
        "ResNet: a 3 x 3 convolution, or 7 x 7 and a pooling; VGG: classifier on 1 x 1, or on 7 x 7 pixels (default: small "
        "for images below 128 pixels)",
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
    magnitude_type: str = redefault(NeighborConfig, "magnitude_type", "similarity")

    def __post_init__(self):
        decide(self, {"shuffle_pattern": "NA"} if str(self.model) in HOSTS else {})
        if isinstance(self.replace, (list, tuple)):  # [last, 3] in a file
            object.__setattr__(self, "replace", tuple(str(word) if type(word) is int else word for word in self.replace))
        self._check_ranges()
        self._check_names()
        if self.is_host:
            self._settle()
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
    def is_host(self) -> bool:
        """Whether the layers replace convolutions of a network that exists without them."""
        return self.model in HOSTS

    @property
    def title(self) -> str:
        return f"{self.model} with {layer_label(self.layer)}" if self.is_host else layer_label(self.layer)

    def _check_names(self) -> None:
        names = layers_of(self.layer)
        for name in names:
            if name not in self.rows:
                valid, whole = ", ".join(LAYERS2D_NAMES), self.layer if self.layer.endswith(".py") else name
                raise ValueError(
                    f"layer={self.layer!r} is not one of {valid} or A/B of two{address_hint(whole, LAYERS2D_NAMES)}"
                )
        if len(names) > 2 or len(set(names)) != len(names):
            raise ValueError(f"layer={self.layer!r} must be one layer, or A/B of two different ones")

    def _settle(self) -> None:
        """What a host decides by the size of the images, and whether every layer fits its place."""
        stem = self.stem or default_stem(self.image_size)
        object.__setattr__(self, "stem", stem)
        if self.model in VGG and self.classifier_width is None:
            object.__setattr__(self, "classifier_width", CLASSIFIER_WIDTHS[stem])
        takers = [name for name in self.layers_in_use() if "shuffle_pattern" in self.rows[name].arguments]
        if takers and self.shuffle_pattern in ("A", "B"):
            raise ValueError(
                f"shuffle_pattern={self.shuffle_pattern} changes the size of the map, which model={self.model} decides; "
                "use BA or NA"
            )
        if self.model in RESNET and "Conv2d" in self.layers_in_use() and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd in model={self.model}, where it has strides")
        for place in dict.fromkeys(self.places()):
            if place.is_replaced:
                try:
                    self.at(place)
                except ValueError as error:
                    where = f"layer={self.layer} on the {_sides(place.grid)} map of stage {place.stage} of model={self.model}"
                    raise ValueError(f"{where}: {error}; or let it stay a convolution (replace)") from None

    def places(self) -> list[Place]:
        """The 3 x 3 convolutions of a host in their order, and which of them `layer` replaces."""
        return choose(self.replace, places_of(self.model, self.stem, self.image_size), self.model)

    def at(self, place: Place) -> AllConvNetConfig:
        """The config of the single layer at this place of a host.

        A token cannot have more neighbors than its map has tokens: there K is their number. Where the samples are more than
        there are tokens, or than there are rows or columns, all tokens are candidates. Raises ValueError if something else
        does not fit.
        """
        own = {"model": "allconvnet", "channels": (place.out_channels,), "num_layers": None, "image_size": place.grid}
        grids = [self._tokens(name, place.grid) for name in self.layers_in_use() if "neighbors" in self.rows[name].arguments]
        if grids:
            grid = min(grids, key=math.prod)
            most = {"all": math.inf, "random": math.prod(grid), "spatial": min(grid) - 2 * self.sample_padding}
            fitted = {"num_samples": self.num_samples if self.num_samples <= most[self.sampling] else -1}
            own |= fitted | {"K": min(self.K, math.prod(grid))}
        return dataclasses.replace(self, **own)

    def _tokens(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        """Sides of the grid of tokens that this layer makes of a map. Raises ValueError if the shuffle does not divide it."""
        options = self.rows[name].arguments
        if "shuffle_pattern" in options and self.shuffle_pattern in ("B", "BA"):
            self._check_divides(grid)
            grid = tuple(side // self.shuffle_scale for side in grid)
        ring = 2 * self.padding if "padding" in options else 0
        return tuple(side + ring for side in grid)

    @staticmethod
    def values_that_hold(values: dict, given: dict) -> dict:
        """Without num_layers beside other channels: config.yaml holds the length of those it was written with.

        And without what the file's model decided, beside another model, or the size of its images, beside another size.
        """
        values = ModelConfig.values_that_hold(values, given)
        dropped = _decided_by_size(values, given) | ({"num_layers"} if "channels" in given else set())
        if "model" in given and given["model"] != values.get("model", "allconvnet"):
            dropped |= {"shuffle_pattern", "stem", "classifier_width"}
        return {name: value for name, value in values.items() if name not in dropped}

    def layers_in_use(self) -> list[str]:
        return [name for name, _ in self.branches(2)]

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        found = super().without_effect(defaults=defaults)
        own = {"channels", "num_layers"} if self.is_host else {"replace", "stem"}
        own |= set() if self.model in VGG else {"classifier_width", "batch_norm"}
        found |= dict.fromkeys(own, "model")
        if len(layers_of(self.layer)) == 1:
            found["branch_ratio"] = found["branch_join"] = "layer"
        elif self.branch_ratio in (0, 1):
            found["branch_join"] = "branch_ratio"
        found["drop_path"] = "layer"  # a stack, and a host of convolutions, has none in its blocks
        return found

    def branches(self, out_channels: int) -> list[tuple[str, int]]:
        """(layer, its share of the output channels) of the one or two layers side by side."""
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
        """Height and width of the feature map that enters each layer; patterns A and B change it on the way."""
        height, width = self.image_size
        names = self.layers_in_use()
        keeping = [name for name in names if "shuffle_pattern" not in self.rows[name].arguments]
        if keeping == names or self.shuffle_pattern in ("BA", "NA"):
            return [(height, width)] * self.num_layers
        if keeping:
            raise ValueError(
                f"shuffle_pattern={self.shuffle_pattern} changes the size of the map and {keeping[0]} keeps it; use BA or NA"
            )
        result = []
        for _ in self.channels:
            result.append((height, width))
            height, width = self.grid_after(names[0], (height, width))
        return result

    def grid_after(self, layer: str, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the map that leaves a layer."""
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
                f"shuffle_scale={self.shuffle_scale} does not divide the {_sides(grid)} map; "
                f"use a scale that divides it, shuffle_pattern=NA or another size (resize)"
            )

    def _check_layer(self, name: str, out_channels: int, grid: tuple[int, int]) -> None:
        """Relations between options that only matter for the layers in use."""
        options = self.rows[name].arguments
        grid = self._tokens(name, grid)
        if "num_heads" in options:
            pattern = self.shuffle_pattern if "shuffle_pattern" in options else "NA"
            width = out_channels * shuffle_factors(pattern, self.shuffle_scale, 2)[1]
            if width % self.num_heads:
                raise ValueError(f"num_heads={self.num_heads} does not divide the {width} channels that attention runs on")
        if "neighbors" in options:
            self.neighbors.check_candidates(grid)
        if "convolution_type" in options:
            check_slots(self.convolution_type, self.aggregation_type)
        if "topk" in options:
            check_topk(self.topk, self.similarity_type)


# What `model` stands for (ConViT: d'Ascoli et al., arXiv 2103.10697).
VIT_MODELS = {"vit": {}} | {
    f"convit_{size.lower()}": {
        "layer": "GPSA",
        "num_layers": 12,
        "num_local_layers": 10,
        "num_heads": heads,
        "d_model": dim,
        "d_mlp": 4 * dim,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "pos_embedding": "learned",
        "patch_norm": False,
        "final_norm": True,
        "initializer_range": 0.02,
    }
    for size, (dim, heads) in CONVIT_SIZES.items()
}
CONVITS = VIT_MODELS.keys() - {"vit"}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """A vision transformer: patches, then blocks of a mixer and an MLP, then a linear classifier.

    What is not given comes from `VIT_MODELS[model]`, and else from the defaults; `dataclasses.replace` gives all that there is.
    """

    rows: ClassVar[dict[str, Row]] = LAYERS1D_ROWS
    sizes: ClassVar[tuple[str, str]] = ("d_model", "num_heads")
    unscored: ClassVar[frozenset[str]] = frozenset({"ViG"})

    model: str = option("vit", "ViT, or the flags of a ConViT; others given beside it win", choices=tuple(VIT_MODELS))
    layer: str = of_model("Attention", f"token mixer of the blocks{OWN_LAYER}", choices=LAYERS1D_NAMES, address=True)
    mixer_option: tuple[str, ...] | None = option(None, MIXER_OPTION, kind=str, many=True, metavar="NAME=VALUE", repeat=True)
    layer_sha256: str | None = option(None, LAYER_SHA256, kind=str, flag=False)
    patch_size: int = option(16, "side of a patch in pixels", low=1, high=SIDE)
    num_layers: int = of_model(8, "blocks", low=1, high=LAYERS)
    num_heads: int = of_model(8, "heads; 1 gives ConvNN attention without head splitting", low=1, high=WIDTH)
    d_model: int = of_model(512, "features per token", low=1, high=WIDTH, aliases=("d_hidden",))
    d_mlp: int = of_model(2048, "hidden features of the MLP", low=1, high=WIDTH)
    dropout: float = of_model(0.1, "probability of dropping what a mixer or MLP adds", low=0, below=1)
    attention_dropout: float = of_model(0.1, "probability of dropping a weight of a pair of tokens", low=0, below=1)
    attention_bias: bool = of_model(True, "biases of the q, k, v and output projections")
    qkv_bias: bool | None = option(None, "biases of the q, k, v projections; none: --attention_bias", kind=bool)
    proj_bias: bool | None = option(None, "bias of the output projection; none: --attention_bias", kind=bool)
    pos_embedding: str = of_model("sinusoidal", "positions added to the tokens", choices=("sinusoidal", "learned", "none"))
    patch_norm: bool = of_model(True, "LayerNorm after the patch embedding")
    final_norm: bool = of_model(False, "LayerNorm after the last block")
    pool: str = option("cls", "classify by a class token, or by the mean of the patches", choices=("cls", "mean"))
    num_local_layers: int | None = of_model(
        None, "the first n blocks use --layer, the rest Attention and the class token", kind=int, low=0, high=LAYERS
    )
    initializer_range: float | None = of_model(
        None, "standard deviation of a truncated normal initialization; none: Xavier uniform", kind=float, low=0, high=100
    )
    convolution_type: str | None = option(
        None,
        "ConvNN layers: convolution over the K slots; Conv1d, Conv1dAttention, BranchConv: along the sequence; none: "
        "depthwise over slots, standard along the sequence",
        kind=str,
        choices=CONVOLUTION_TYPES,
    )
    softmax_topk_val: bool = option(
        True, "ConvNN layers: weigh values by the softmax of the K scores; False: by the raw scores"
    )
    graph_aggregation: str = option("max", "ViG: what a token takes from its neighbors", choices=GRAPH_AGGREGATIONS)
    score_temperature: float = option(
        1.0, "ConvNN layers, KvtAttention: what scores are divided by before the softmax", low=1e-6, high=1e6
    )
    topk: str = option(
        "hard",
        "ConvNN layers, KvtAttention: the choice of neighbors in training, hard, or learned by a gradient for all candidates, "
        "of the nearest (straight_through) or of K drawn by their scores (gumbel)",
        choices=TOPKS,
    )
    coordinate_encoding: bool = option(False, "short for --similarity_type Loc_Col")
    kernel_size: int = option(
        9, "Conv1d, Conv1dAttention, BranchConv: tokens; NeighborhoodAttention: side of the window, odd", low=1, high=SIDE
    )
    window_size: int = option(16, "LocalAttention: |i - j| <= window_size", low=0, high=TOKENS)
    sparse_mode: str = option("strided", "SparseAttention: which tokens attend to which", choices=("all", "local", "strided"))
    sparse_context_window: int = option(14, "SparseAttention: stride, and twice the reach to either side", low=1, high=TOKENS)
    dilation: int = option(
        1,
        "NeighborhoodAttention, GreedyViG: step between patches; ViG: takes every n-th of the K * n nearest",
        low=1,
        high=SIDE,
    )
    region_size: int = option(2, "BiFormer, BlockTopK, ContextCluster: side of a region in patches", low=1, high=SIDE)
    top_regions: int = option(4, "BiFormer, BlockTopK: regions that are attended to", low=1, high=TOKENS)
    value_convolution: int = option(
        0, "BiFormer: side of the depthwise convolution of the values that is added, odd; 0: off", low=0, high=SIDE
    )
    num_clusters: int = option(16, "PaCa: clusters that are attended to", low=1, high=TOKENS)
    branch_ratio: float = option(0.5, "BranchConv, BranchAttention: share of the ConvNN branch", low=0, high=1)
    mask_type: str = option("2d_all_neighbors", "MaskedAttention: which patches are near", choices=MASK_TYPES)
    expansion_step: int = option(1, "MaskedAttention: how far near patches are", low=0, high=SIDE)
    linformer_k: int = option(64, "Linformer: learned mixtures of the keys and of the values", low=1, high=TOKENS)
    performer_features: int = option(64, "Performer, Hybrid: random features", low=1, high=TOKENS)
    performer_kernel: str = option("softmax", "Performer, Hybrid: kernel of the random features", choices=PERFORMER_KERNELS)
    nystrom_landmarks: int = option(32, "Nystromformer: landmarks; as many as tokens is attention", low=1, high=TOKENS)
    nystrom_conv_kernel: int = option(0, "Nystromformer: kernel of the depthwise value convolution; 0: off", low=0, high=TOKENS)
    hybrid_window: int = option(3, "Hybrid: side of the windows, odd", low=1, high=SIDE)
    hybrid_dilations: tuple[int, ...] = option(
        (1, 2), "Hybrid: step between the patches of a window, one for each", low=1, high=SIDE
    )
    locality_strength: float = option(1.0, "GPSA: how sharply heads attend around their offsets at first", low=0, high=1000)
    magnitude_type: str = redefault(NeighborConfig, "magnitude_type", "matmul")
    image_size: int | tuple[int, int] = 224

    def __post_init__(self):
        decide(self, VIT_MODELS.get(str(self.model), {}))
        if is_address(str(self.layer)) and len(layers_of(self.layer)) > 1:
            raise ValueError(
                f"layer={self.layer!r} must be one layer; two side by side are of allconvnet_main.py, and a folder that is "
                "called as a layer is written ./Attention/file.py:Class"
            )
        self._check_ranges()
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"patch_size={self.patch_size} does not divide the {_sides(self.image_size)} image; "
                f"use one that does, or another size (resize)"
            )
        check_heads(self.d_model, self.num_heads)
        if self.initializer_range == 0:
            raise ValueError("initializer_range=0 makes all projections equal; it must be above 0")
        if self.num_local_layers is not None and self.num_local_layers >= self.num_layers:
            raise ValueError(
                f"num_local_layers={self.num_local_layers} must be below num_layers={self.num_layers}; "
                f"a smaller number, or none for {self.layer} in every block"
            )
        if self.coordinate_encoding and self.similarity_type == "Col":
            object.__setattr__(self, "similarity_type", "Loc_Col")
        if self.num_local_layers != 0:
            self._check_layer()

    @staticmethod
    def values_that_hold(values: dict, given: dict) -> dict:
        """Without what the file's model stands for, beside another model: it says nothing of that one.

        config.yaml names its model; a file that names none says what it says of any. And it holds both coordinate_encoding and
        the similarity_type that this stands for, of which one may be given.
        """
        values, dropped = ModelConfig.values_that_hold(values, given), set()
        if "model" in values and given.get("model", values["model"]) != values["model"]:
            dropped |= VIT_MODELS["convit_ti"].keys()
        if given.get("similarity_type") == "Col":
            dropped.add("coordinate_encoding")
        if "coordinate_encoding" in given and values.get("coordinate_encoding") is True:
            dropped |= {"similarity_type"} if values.get("similarity_type") == "Loc_Col" else set()
        return {name: value for name, value in values.items() if name not in dropped}

    def layers_in_use(self) -> list[str]:
        local = [] if self.num_local_layers == 0 else [self.layer]
        return local if self.num_local_layers is None else [*local, "Attention"]

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        found = super().without_effect(defaults=defaults)
        if self.num_layers == 1:
            found["drop_path"] = "num_layers"  # it rises from 0 in the first block
        no_layer = self.num_local_layers == 0  # which is why the options of `layer` are not read
        return {name: "num_local_layers" if no_layer and other == "layer" else other for name, other in found.items()}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def biases(self) -> bool | tuple[bool, bool]:
        """Of all projections in a mixer, or of those before mixing and of the one after it where they differ."""
        pair = tuple(self.attention_bias if one is None else one for one in (self.qkv_bias, self.proj_bias))
        return pair[0] if pair[0] == pair[1] else pair

    @property
    def class_tokens(self) -> int:
        """Class tokens in the blocks that use `layer`: under num_local_layers it joins after them."""
        return int(self.pool == "cls" and self.num_local_layers is None)

    def _check_layer(self) -> None:
        """Relations between options that only matter for the layer in use."""
        if self.layer not in self.rows:
            return
        row = layer_row(self.rows, self.layer, self.branch_ratio)
        if row.branches:
            branch_widths(self.d_model, self.num_heads, self.branch_ratio)
        if "neighbors" in row.arguments:
            grid = sequence_grid(self.grid)
            self.check_candidates(grid, axes=len(grid), class_tokens=self.class_tokens)
            if "convolution_type" in row.arguments:
                check_slots(self.convolution_type or "depthwise", self.aggregation_type)
            if "topk" in row.arguments:
                check_topk(self.topk, self.similarity_type, self.softmax_topk_val)
            if self.coordinate_encoding and self.similarity_type == "Loc":
                raise ValueError("coordinate_encoding=True is short for similarity_type=Loc_Col, not Loc; drop one of them")
        elif "K" in row.arguments:
            tokens = math.prod(self.grid) + self.class_tokens
            if self.K > tokens:
                raise ValueError(f"K={self.K} is more than the {tokens} tokens there are; K can be 1 to {tokens}")
        if self.layer == "ViG":
            dilate(self.neighbors, self.dilation).check_candidates(grid, axes=len(grid), class_tokens=self.class_tokens)
        if "region_size" in row.arguments:
            sides = region_sides(self.region_size, self.grid)
            regions = math.prod(self.grid) // math.prod(sides)
            if "top_regions" in row.arguments and self.top_regions > regions:
                raise ValueError(f"top_regions={self.top_regions} is more than the {regions} regions there are")
        if self.layer == "BiFormer":
            check_value_convolution(self.value_convolution, sequence_grid(self.grid))
        if self.layer == "NeighborhoodAttention":
            check_window(self.kernel_size, self.dilation, sequence_grid(self.grid))
        if self.layer == "Hybrid":
            for dilation in self.hybrid_dilations:
                check_window(
                    self.hybrid_window, dilation, sequence_grid(self.grid), names=("hybrid_window", "hybrid_dilations")
                )


def sequence_grid(grid: tuple[int, int]) -> tuple[int, ...]:
    """Sides of a grid of tokens; a single row or column of them is a sequence, which has one side."""
    return tuple(side for side in grid if side > 1) or (1,)


def check_heads(d_model: int, num_heads: int) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}")


def check_dropout(attention_dropout: float) -> None:
    if not 0 <= attention_dropout < 1:
        raise ValueError(f"attention_dropout={attention_dropout} must be at least 0 and below 1")


def check_slots(convolution_type: str, aggregation_type: str) -> None:
    """Raise ValueError for an unknown convolution over the slots, or one that the values do not fit."""
    if convolution_type not in CONVOLUTION_TYPES:
        raise ValueError(f"convolution_type={convolution_type!r} is not one of {', '.join(CONVOLUTION_TYPES)}")
    if aggregation_type == "Loc_Col" and convolution_type == "depthwise":
        raise ValueError(
            "aggregation_type=Loc_Col appends coordinates to the values, so it needs "
            "convolution_type=standard or depthwise-separable, not depthwise"
        )


def check_temperature(score_temperature: float) -> None:
    if not score_temperature > 0:
        raise ValueError(f"score_temperature={score_temperature} must be above 0")


def check_topk(topk: str, similarity_type: str = "Col", softmax_topk_val: bool = True) -> None:
    """Raise ValueError for an unknown choice of neighbors, or for one that these options leave nothing to learn."""
    if topk not in TOPKS:
        raise ValueError(f"topk={topk!r} is not one of {', '.join(TOPKS)}")
    if topk == "hard":
        return
    if similarity_type == "Loc":
        raise ValueError(
            f"topk={topk} learns a choice by content, and similarity_type=Loc chooses by location; "
            "use Col or Loc_Col, or topk=hard"
        )
    if not softmax_topk_val:
        raise ValueError(f"topk={topk} needs the softmax of the scores; use softmax_topk_val=True, or topk=hard")


def dilate(neighbors: NeighborConfig, dilation: int) -> NeighborConfig:
    """The neighbors of which every `dilation`-th is taken. Raises ValueError where there are not K * dilation candidates."""
    if dilation < 1:
        raise ValueError(f"dilation={dilation} must be at least 1")
    try:
        return dataclasses.replace(neighbors, K=neighbors.K * dilation)
    except ValueError as error:
        raise ValueError(f"dilation={dilation} with K={neighbors.K}: {error}") from None


def region_sides(region_size: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a region of patches: a square, in a single row or column of patches a stretch of it.

    Raises ValueError if regions do not divide the grid.
    """
    if region_size < 1:
        raise ValueError(f"region_size={region_size} must be at least 1")
    sides = tuple(min(region_size, side) if 1 in grid else region_size for side in grid)
    if any(side % part for side, part in zip(grid, sides, strict=True)):
        raise ValueError(f"region_size={region_size} does not divide the {_sides(grid)} grid of patches; use one that does")
    return sides


def check_value_convolution(kernel_size: int, grid: tuple[int, ...]) -> None:
    """Raise ValueError if a convolution of this side has no middle, or taps that no two patches of the grid need; 0 is none."""
    if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
        raise ValueError(f"value_convolution={kernel_size} must be odd, or 0 for none")
    most = 2 * min(grid) - 1
    if kernel_size > most:
        raise ValueError(
            f"value_convolution={kernel_size} reaches over the whole grid of patches, {_sides(grid)}; it can be at most {most}"
        )


def check_window(
    kernel_size: int, dilation: int, grid: tuple[int, ...], names: tuple[str, str] = ("kernel_size", "dilation")
) -> None:
    """Raise ValueError, by the names of the two options, if a neighborhood of this size does not lie within the grid."""
    window, step = names
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{window}={kernel_size} must be odd for a neighborhood")
    if dilation < 1:
        raise ValueError(f"{step}={dilation} must be at least 1")
    if kernel_size * dilation > min(grid):
        raise ValueError(
            f"{window}={kernel_size} with {step}={dilation} spans {kernel_size * dilation} patches and the grid has "
            f"{_sides(grid)}; their product can be at most {min(grid)}"
        )


def branch_widths(d_model: int, num_heads: int, branch_ratio: float) -> tuple[int, int]:
    """Features of the ConvNN branch and of the other one. Raises ValueError if their heads do not divide them."""
    width = math.floor(d_model * branch_ratio + 0.5)  # a half goes to the first branch
    if not 0 < width < d_model or width % num_heads or d_model % num_heads:
        raise ValueError(
            f"branch_ratio={branch_ratio} splits d_model={d_model} into {width} + {d_model - width} features, and both need "
            f"a positive multiple of num_heads={num_heads}"
        )
    return width, d_model - width


# ---------------------------------------------------------------------------------------------------------------
# Data, training, system
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """What images a run sees."""

    heading = "data"

    dataset: str = option("cifar10", "data set; digits is embedded, folder has train/ and val/", choices=tuple(DATASETS))
    data_path: str = option("./Data", "folder that holds the data sets")
    resize: int | tuple[int, int] | None = option(
        None, "side the images are resized to, or height and width", kind=int, many=True, low=1, high=SIDE
    )
    val_fraction: float = option(
        0.0, "share of the training set held out; the best epoch then goes by it, not by the test set", low=0, below=1
    )
    augment: bool = option(False, "random crop, and horizontal flip where the class survives it")
    auto_augment: str = option(
        "none",
        "after --augment, torchvision's RandAugment (two operations of magnitude 9) or TrivialAugmentWide (one operation)",
        choices=("none", "rand", "trivial"),
    )
    random_erasing: float = option(
        0.0, "probability that a training image gets a box of the mean color, by torchvision's RandomErasing", low=0, high=1
    )
    noise: float = option(
        0.0, "standard deviation of Gaussian noise on training and test images, whose values run from 0 to 1", low=0, high=1000
    )
    download: bool = option(True, "download the data set if it is not there")
    num_workers: int | None = option(
        None, "processes that read images (default: one per core, at most 8)", kind=int, low=0, high=1024
    )
    train_limit: int | None = option(None, "train on the first n images, balanced by class", kind=int, low=1, high=IMAGES)
    test_limit: int | None = option(None, "test on the first n images, balanced by class", kind=int, low=1, high=IMAGES)

    def __post_init__(self):
        if self.resize is not None and not isinstance(self.resize, (list, tuple)):
            object.__setattr__(self, "resize", (self.resize,))
        check_fields(self)
        if self.resize is not None:
            if len(self.resize) > 2:
                raise ValueError(f"resize={as_words(self.resize)} is neither a side nor height and width")
            if len(set(self.resize)) == 1:
                object.__setattr__(self, "resize", self.resize[0])


KERNELS = ("auto", "chunked", "triton")
KERNELS_HELP = "what searches and aggregates: the fastest for the device, PyTorch in chunks, or Triton (CUDA)"
# What the environment variable may say instead of --kernels; the last one is for tests.
KERNELS_VARIABLE, KERNELS_IN_ENVIRONMENT = "CONVNN_KERNELS", (*KERNELS, "reference")
SYSTEM = {"group": "system and output"}
# What may differ when a run is resumed: how long and where it runs, and what it writes; device and compilation change
# its numbers by rounding only. All else would make it another run.
RESUME_MAY_CHANGE = set(
    "num_epochs num_workers data_path download device output_dir resume checkpoint save_minutes save_every export test_only "
    "tensorboard wandb early_stopping use_compiled compile_mode kernels overwrite override strict".split()
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What `benchmark.py` measures, and how."""

    heading = "benchmark"

    layer: tuple[str, ...] | None = option(None, "layers, one row each (default: all)", kind=str, many=True)
    resolution: tuple[int, ...] | None = option(
        None, "sides of the grid of tokens (default: 16 32)", kind=int, many=True, low=1, high=SIDE
    )
    tokens: tuple[int, ...] | None = option(
        None, "the same by the number of tokens: squares", kind=int, many=True, low=1, high=SIDE**2
    )
    batch_size: int = option(8, "images at once, for everything but latency", low=1, high=BATCH)
    precision: tuple[str, ...] = option(("fp32",), "fp32, or autocast to one of the others", choices=("fp32", "bf16", "fp16"))
    execution: tuple[str, ...] = option(("eager",), "as it is, or by torch.compile", choices=("eager", "compiled"))
    against: str | None = option(
        None,
        "measure the naive form of each layer beside it, if it has one, and the ratios to it",
        kind=str,
        choices=("naive",),
    )
    baseline: bool = option(
        False,
        "also what it is compared with: Attention of vit with three projections instead of a merged one, torchvision's "
        "network beside a host (--model) of Conv2d",
    )
    repeats: int = option(7, "measurements of each row, in turns; medians count", low=1, high=10**6)
    device: str = option("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cpu", "cuda", "mps"))
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS)
    seed: int = option(0, "of weights and inputs", low=0, below=2**31)
    output_dir: str = option("./Output/benchmark", "folder for the table and the plot")

    def __post_init__(self):
        check_fields(self)
        if self.resolution and self.tokens:
            raise ValueError(f"tokens={as_words(self.tokens)} is another way to say resolution; drop one of them")
        if not self.tokens:
            object.__setattr__(self, "resolution", self.resolution or (16, 32))
            return
        for tokens in self.tokens:
            side = math.isqrt(tokens)
            if side**2 != tokens:
                raise ValueError(
                    f"tokens={tokens} is not a square number, as square grids have; {side**2} and {(side + 1) ** 2} are"
                )
        object.__setattr__(self, "resolution", tuple(math.isqrt(tokens) for tokens in self.tokens))


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, where, and what it leaves behind."""

    heading = "training"

    batch_size: int = option(256, "images per optimizer step, over all accumulated micro-batches", low=1, high=BATCH)
    num_epochs: int = option(150, "epochs", low=1, high=EPOCHS)
    use_amp: bool = option(False, "automatic mixed precision")
    amp_dtype: str = option("bfloat16", "precision under --use_amp; float16 needs CUDA", choices=("bfloat16", "float16"))
    use_compiled: bool = option(False, "torch.compile the model")
    compile_mode: str = option(
        "default",
        "torch.compile mode; reduce-memory is default with activations recomputed",
        choices=("default", "reduce-overhead", "reduce-memory", "max-autotune"),
    )
    clip_grad_norm: float = option(1.0, "largest norm of the gradient; 0: no clipping", low=0, high=LARGEST)
    accumulate_steps: int = option(1, "micro-batches per optimizer step", low=1, high=BATCH)
    criterion: str = option("CrossEntropy", "loss; MSE is on one-hot targets", choices=("CrossEntropy", "MSE"))
    label_smoothing: float = option(0.0, "share of the target spread over all classes", low=0, below=1)
    optimizer: str = option("adamw", "optimizer", choices=("adam", "sgd", "adamw"))
    lr: float = option(1e-3, "learning rate", low=0, high=LARGEST)
    weight_decay: float = option(1e-6, "weight decay", low=0, high=1e6)
    decay_norms: bool = option(True, "weight decay of norms, biases, positions and the class token too")
    layer_decay: float = option(
        1.0, "each block learns at this times the learning rate of the one after it; embeddings slowest", low=0.01, high=1
    )
    freeze: str | None = option(None, "backbone: train the classifier only", kind=str, choices=("backbone",))
    momentum: float = option(0.9, "sgd: momentum", low=0, below=1)
    scheduler: str = option(
        "none",
        "step: times lr_gamma every lr_step epochs; cosine: to 0 at the end; plateau: times lr_gamma after lr_step "
        "epochs without a better loss",
        choices=("step", "cosine", "plateau", "none"),
    )
    lr_step: int = option(20, "step, plateau: epochs", low=1, high=EPOCHS)
    lr_gamma: float = option(0.1, "step, plateau: factor", low=0, below=1)
    warmup_epochs: int = option(0, "epochs over which the learning rate rises linearly from 0", low=0, high=EPOCHS)
    mixup: float = option(
        0.0, "alpha of mixup; 0: off. With cutmix, each batch takes one of them", low=0, high=1000, least=1e-3
    )
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", low=0, high=1000, least=1e-3)
    ema_decay: float = option(0.0, "decay of the averaged weights that are then evaluated; 0: off", low=0, below=1)
    early_stopping: int = option(
        0, "stop after n epochs without a better test (or validation) loss; 0: never", low=0, high=EPOCHS
    )

    device: str = option("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cpu", "cuda", "mps"), **SYSTEM)
    kernels: str = option("auto", KERNELS_HELP, choices=KERNELS, **SYSTEM)
    seed: int = option(0, "of weights, order and augmentation", low=0, below=2**31, **SYSTEM)
    deterministic: bool = option(False, "use deterministic algorithms only", **SYSTEM)
    output_dir: str | None = option(None, "where results go (default: ./Output/<model>/<layer>)", kind=str, **SYSTEM)
    resume: bool = option(False, "resume from last.pt in the output directory; start if there is none", **SYSTEM)
    overwrite: bool = option(
        False,
        "write over a run in the output directory (its weights stay as *.pt.old), or over the file of --export",
        **SYSTEM,
    )
    checkpoint: str | None = option(
        None, "weights to start from, or to evaluate with --test_only: FILE.pt or FILE.safetensors", kind=str, **SYSTEM
    )
    strict: bool = option(
        False, "checkpoint: refuse one that does not hold every weight of this model in its shape, and no others", **SYSTEM
    )
    save_minutes: float = option(
        10.0, "write last.pt this often within an epoch too; 0: only at its end", low=0, high=10**7, **SYSTEM
    )
    save_every: int = option(0, "keep epoch_<n>.pt every n epochs; 0: none", low=0, high=EPOCHS, **SYSTEM)
    export: str | None = option(
        None, "write the best weights to FILE.safetensors, or the model with them to FILE.onnx", kind=str, **SYSTEM
    )
    test_only: bool = option(
        False,
        "evaluate --checkpoint, else best.pt in the output directory, as the model it was trained as, and write "
        "test_results.json (test_results-2.json and so on beside a result of other options)",
        **SYSTEM,
    )
    override: bool = option(
        False, "test_only: model options that are given win over those that the checkpoint was trained with", **SYSTEM
    )
    tensorboard: bool = option(False, "write event files for TensorBoard too", **SYSTEM)
    wandb: bool = option(False, "log to Weights & Biases too; WANDB_MODE=offline keeps that in the output directory", **SYSTEM)

    def __post_init__(self):
        check_fields(self)
        if self.accumulate_steps > self.batch_size:
            raise ValueError(f"accumulate_steps={self.accumulate_steps} is more than batch_size={self.batch_size} images")
        if self.warmup_epochs > self.num_epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is more than num_epochs={self.num_epochs}")
        if self.export and not self.export.endswith((".safetensors", ".onnx")):
            raise ValueError(f"export={self.export!r} must end in .safetensors or .onnx")
        if self.override and not self.test_only:
            raise ValueError("override=True is of test_only=True: training takes all options as they are given")
        if self.freeze and self.layer_decay != 1:
            raise ValueError(
                f"layer_decay={self.layer_decay} is of a backbone that learns, and freeze={self.freeze} keeps it as it is; "
                "drop one of them"
            )
        if self.export and self.test_only:
            raise ValueError(f"export={self.export!r} writes weights and test_only=True writes only its results; drop one")
        if self.checkpoint and not self.checkpoint.endswith((".pt", ".pth", ".safetensors")):
            raise ValueError(f"checkpoint={self.checkpoint!r} must end in .pt, .pth or .safetensors")
        if self.checkpoint and not self.resume:  # a run that is resumed does not read it
            if os.path.isdir(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} is a folder; name a file in it")
            if not os.path.isfile(self.checkpoint):
                raise ValueError(f"checkpoint={self.checkpoint!r} does not exist")


# ---------------------------------------------------------------------------------------------------------------
# A run's options, from flags and YAML
# ---------------------------------------------------------------------------------------------------------------


def check_environment() -> None:
    """Raise ValueError for a variable that would end the import of the kernels."""
    kernels = os.environ.get(KERNELS_VARIABLE, "auto")
    if kernels not in KERNELS_IN_ENVIRONMENT:
        raise ValueError(f"{KERNELS_VARIABLE}={shown(kernels)} is not one of {', '.join(KERNELS_IN_ENVIRONMENT)}")


class Options(NamedTuple):
    """The resolved options of one run."""

    model: AllConvNetConfig | ViTConfig
    data: DataConfig
    train: TrainConfig

    def as_dict(self) -> dict:
        """Every option by name, as plain values that YAML and a checkpoint can hold."""
        values = {}
        for config in self:
            for name in specs(type(config)):
                value = getattr(config, name)
                value = list(value) if isinstance(value, tuple) else value
                values[name] = as_text(value) if isinstance(value, str) else value
        return values


def _check_paths(data: DataConfig, train: TrainConfig) -> None:
    """Raise ValueError for a path that can neither be read nor made; permissions and free space show when it is used."""
    for name, path in (("data_path", data.data_path), ("output_dir", train.output_dir), ("export", train.export)):
        wrong = path and what_is_wrong_with(path)
        if wrong:
            raise ValueError(f"{name}={path!r}: {wrong}")


def _count_classes(data_path: str) -> int:
    train = Path(data_path) / "train"
    if not all(os.path.isdir(os.path.join(data_path, part)) for part in ("train", "val")):
        raise ValueError(f"data_path={data_path!r} must hold train/ and val/ with one folder per class for dataset=folder")
    try:
        classes = sum(entry.is_dir() for entry in train.iterdir())
    except OSError as error:
        raise ValueError(f"data_path={data_path!r}: {error.filename} cannot be read ({error.strerror})") from None
    if classes < 2:
        raise ValueError(f"data_path={data_path!r} has {classes} class folders in train/; it needs at least 2")
    return classes


def resolve(model_type: type, family: str, values: dict) -> Options:
    """Options from plain values by name; what the data set decides is filled in. Raises ValueError."""

    data, train = build(DataConfig, values), build(TrainConfig, values)
    if train.override:  # the file of a layer may be another than the one that was trained
        values = {name: value for name, value in values.items() if name != "layer_sha256"}
    info = DATASETS[data.dataset]
    data = dataclasses.replace(
        data,
        resize=data.resize or info.size,
        num_workers=min(8, cpu_cores()) if data.num_workers is None else data.num_workers,
    )
    classes = info.classes or _count_classes(data.data_path)
    model = build(model_type, values, image_size=data.resize, in_channels=info.channels, num_classes=classes)
    if train.output_dir is None:
        name, preset = layer_label(model.layer).replace("/", "-"), getattr(model, "model", None)
        folder = f"{preset}/{name}" if preset in HOSTS else f"{family}/{preset if preset in CONVITS else name}"
        train = dataclasses.replace(train, output_dir=f"./Output/{folder}")
    _check_paths(data, train)
    return Options(model, data, train)


class Program(NamedTuple):
    """A command line that trains: its model, the name of its output folder, and its own defaults."""

    model: type
    family: str
    defaults: dict


PROGRAMS = {
    "allconvnet_main.py": Program(AllConvNetConfig, "AllConvNet", {}),
    "vit_main.py": Program(ViTConfig, "ViT", {"lr": 1e-4, "resize": 224}),
}


def parse_options(
    program: Program, description: str, argv: list[str] | None = None, prog: str | None = None
) -> tuple[Options, OneLineParser]:
    """Flags over YAML over defaults -> checked options of a run, and the parser, whose `error` ends it in one line."""
    values, parser = read_values(program.model, (DataConfig, TrainConfig), description, argv, program.defaults, prog)
    parser.stated, wrong = values, None
    try:
        check_environment()
        return resolve(program.model, program.family, program.defaults | values), parser
    except ValueError as error:
        wrong = error
    if values.get("test_only"):
        # Options of a model go with the others that a checkpoint names, and the size with its model: `as_trained` judges them.
        of_folder = {"model", "layer", "mixer_option"} if "layer" in values else {"model"}  # which is called after them
        left = (specs(program.model).keys() - of_folder) | {"resize"}
        with contextlib.suppress(ValueError):
            for name in values.keys() & specs(program.model).keys():
                check_option(name, values[name], specs(program.model)[name])
            others = {name: value for name, value in values.items() if name not in left}
            options = resolve(program.model, program.family, program.defaults | others)
            size = {"resize": values["resize"]} if "resize" in values else {}
            return options._replace(data=build(DataConfig, options.as_dict() | size)), parser
    parser.error(str(wrong))


# Options of a model that change neither its weights nor what it computes when it is evaluated.
ONLY_IN_TRAINING = {"dropout", "attention_dropout", "drop_path", "initializer_range", "topk"}
# Those that the shapes of its weights show; `model` stands for others.
SHOWN_BY_SHAPES = set(
    "model num_layers channels patch_size d_model d_mlp kernel_size attention_bias qkv_bias proj_bias patch_norm final_norm "
    "pos_embedding pool linformer_k convolution_type branch_ratio shuffle_pattern shuffle_scale replace stem classifier_width "
    "batch_norm".split()
)


def program_of(options: dict) -> str | None:
    """The program whose run wrote these options, if they are those of one of ours."""
    found = [name for name, program in PROGRAMS.items() if specs(program.model).keys() <= options.keys()]
    return found[0] if len(found) == 1 else None


def evaluation_options(options: Options) -> dict:
    """What decides the result of an evaluation, by name, as plain values."""
    names = "dataset data_path resize noise test_limit criterion use_amp amp_dtype seed".split()
    values = options.as_dict()
    return {name: values[name] for name in (*specs(type(options.model)), *names)}


class AsTrained(NamedTuple):
    """How to evaluate a checkpoint of ours."""

    options: Options  # the model's as it was trained, but for those that were stated
    changes: dict[str, tuple]  # stated options of the model that were others in training: (trained, stated)


def as_trained(program: Program, stated: dict, trained: dict) -> AsTrained:
    """From the options that the command line and its file state, and those in the checkpoint, if any. Raises ValueError."""
    other = program_of(trained)
    if other and program in PROGRAMS.values() and PROGRAMS[other] is not program:
        raise ValueError(f"it was trained by {other}; evaluate it with that")
    model = [name for name in specs(program.model) if name in trained]
    own = {name: trained[name] for name in (*model, "dataset", "data_path", "resize", "criterion") if name in trained}
    if "dataset" in stated:
        own.pop("data_path", None)
    # Other images are for the model as it was trained.
    model_options = {name: value for name, value in stated.items() if name not in ("dataset", "resize")}
    held = program.defaults | program.model.values_that_hold(own, model_options)
    values = over(held, stated, specs(program.model))
    options = resolve(program.model, program.family, values)
    now, unused = options.as_dict(), options.model.without_effect().keys() | ONLY_IN_TRAINING
    if "resize" in own and isinstance(options.model, AllConvNetConfig):
        # Its layers run on maps of any size; those of a host would have other K, and so other weights, in a model for this one.
        options = options._replace(model=dataclasses.replace(options.model, image_size=own["resize"]))
    both = {name: (own[name], now[name]) for name in (*model, "resize") if name in own and name not in unused}
    return AsTrained(options, {name: pair for name, pair in both.items() if not same_value(name, *pair)})


def same_value(name: str, first, second) -> bool:
    """Whether two values of an option mean the same; a layer by address is the same wherever its file lies."""
    return _plain(name, first) == _plain(name, second)


def sides_of(resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width: one number is a square."""
    return (resize, resize) if isinstance(resize, int) else tuple(resize)


def _plain(name: str, value):
    """A value in the one form, of several, that means the same."""
    if name == "layer":
        return layer_label(str(value))
    if name == "resize":
        return sides_of(value)
    if name == "magnitude_type":
        return canonical_metric(value)
    if name in ("checkpoint", "data_path"):
        return value and os.path.realpath(value)
    return tuple(value) if isinstance(value, list) else value


def grid_of(trained: dict | None) -> tuple[int, int] | None:
    """Rows and columns of patches in the model that had these options, if they say so."""
    if not isinstance(trained, dict):
        return None
    size, patch = trained.get("resize"), trained.get("patch_size")
    sides = (size, size) if isinstance(size, int) else size
    numbers = (*sides, patch) if isinstance(sides, (list, tuple)) else ()
    is_known = len(numbers) == 3 and all(type(one) is int and one > 0 for one in numbers)
    return (sides[0] // patch, sides[1] // patch) if is_known else None


def assumed_options(model: ModelConfig) -> dict:
    """Options that decide what a model computes and that the shapes of its weights do not show, by name."""
    names = specs(type(model)).keys() - SHOWN_BY_SHAPES - ONLY_IN_TRAINING - model.without_effect().keys()
    values = {name: getattr(model, name) for name in specs(type(model)) if name in names}
    return {name: value for name, value in values.items() if value is not None}


def warn_without_effect(model: ModelConfig, parser: OneLineParser) -> None:
    """A line on stderr for every option that the command line gave and the model does not read; files serve several layers."""
    for name, other in model.without_effect().items():
        if name in parser.given:
            parser.warn(f"{name}={as_words(getattr(model, name))} is not used by {other}={as_words(getattr(model, other))}")


def warn_fitted(model: AllConvNetConfig, parser: OneLineParser) -> None:
    """A line on stderr where maps of a host have fewer tokens than neighbors or samples are asked for."""
    if not model.is_host:
        return
    found: dict[str, list[str]] = {}
    for place in dict.fromkeys(place for place in model.places() if place.is_replaced):
        one = model.at(place)
        for name in ("K", "num_samples"):
            if getattr(one, name) != getattr(model, name):
                value = "all" if name == "num_samples" else one.K
                found.setdefault(name, []).append(f"{value} on the {_sides(place.grid)} map of stage {place.stage}")
    for name, maps in found.items():
        given = f"{name}={getattr(model, name)}"
        parser.warn(f"{given} does not fit all maps of model={model.model}: it is {', '.join(dict.fromkeys(maps))}")


def warn_oversized(model: AllConvNetConfig, parser: OneLineParser) -> None:
    """A line on stderr where the default network, made for 32 x 32 pixels, meets images of at most 8 x 8."""
    spec = specs(AllConvNetConfig)["channels"]
    if not model.is_host and max(model.image_size) <= 8 and model.channels == spec.default and "channels" not in parser.given:
        parser.warn(
            f"the default channels={as_words(spec.default)} are for images of 32 x 32 and learn {_sides(model.image_size)} "
            "slowly and badly; channels=16 32 64, as in configs/demo.yaml, would fit"
        )
