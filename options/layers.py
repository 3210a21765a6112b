"""Layers as data: the class behind each name, and the options that it takes."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from options.custom_mixer import is_address
from options.fields import did_you_mean, specs
from options.neighbors import NeighborConfig

SHUFFLE_PATTERNS = ("BA", "NA", "B", "A")
LOCAL_MASKS = ("1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors")
MASK_TYPES = (*LOCAL_MASKS, "full")
PERFORMER_KERNELS = ("softmax", "relu")
BRANCH_JOINS = ("relu", "conv1x1")
GRAPH_AGGREGATIONS = ("max", "mean", "edge")
TOPKS = ("hard", "straight_through", "gumbel")
CONVOLUTION_TYPES = ("standard", "depthwise", "depthwise-separable")


# Options behind an argument that the model computes; any other argument is filled by the option of its name.
READS = {
    "neighbors": {*specs(NeighborConfig), "coordinate_encoding"},  # a NeighborConfig
    "bias": {"attention_bias", "qkv_bias", "proj_bias"},  # 1-D: of the projections; 2-D: as the backbone asks for it
    "layout": set(),  # 1-D: the TokenLayout
    "block": set(),  # 1-D: the number of the block
    "image_size": set(),  # 2-D: sides of the map
    "stride": set(),  # 2-D: of a convolution in a backbone
}


class Row(NamedTuple):
    """A layer as data: its class and the keyword arguments of its constructor. `mixers/build.py` builds it.

    Sizes come first and by position: channels in and out in 2-D, features and heads in 1-D. Options that no layer in use
    takes have no effect, and a warning names them.
    """

    target: str  # "module:Class"
    takes: tuple[str, ...]  # arguments that are called like the option that fills them, or like a key of `READS`
    renamed: tuple[tuple[str, str], ...] = ()  # (argument, option), where their names differ
    fixed: tuple[tuple[str, object], ...] = ()  # (argument, value)
    branches: tuple[str, ...] = ()  # of two layers side by side: the layers built at branch_ratio 1 and at 0
    mixes: bool = True  # False: no token sees another
    heads: bool = True  # False: num_heads has no effect

    @property
    def arguments(self) -> dict[str, str]:
        """The option behind each argument of the constructor."""
        return {name: name for name in self.takes} | dict(self.renamed)

    @property
    def options(self) -> set[str]:
        """Names of the options that the layer reads."""
        return set().union(*(READS.get(name, {name}) for name in self.arguments.values()))


PAIRS = ("attention_dropout", "bias")  # of layers that weight pairs of tokens
CONVNN = ("neighbors", "layout", "convolution_type", "softmax_topk_val", "score_temperature", "topk", *PAIRS)
CONV1D = ("kernel_size", "layout", "convolution_type", "bias")
REGIONS = ("layout", "region_size", "top_regions", *PAIRS)
SHUFFLES = ("shuffle_pattern", "shuffle_scale")
GRAPH = (("aggregation", "graph_aggregation"),)
PERFORMER = (("num_features", "performer_features"), ("kernel", "performer_kernel"))


LAYERS2D_ROWS = {
    "Conv2d": Row("layers2d:make_conv2d", ("kernel_size", "aggregation_type", "stride", "bias")),
    "Conv2d_New": Row("layers2d:ShuffledConv2d", ("kernel_size", "aggregation_type", "bias", *SHUFFLES)),
    "ConvNN": Row("layers2d:ConvNN2d", ("neighbors", "convolution_type", "padding", "image_size", "bias", *SHUFFLES)),
    "ConvNN_Attn": Row(
        "layers2d:ConvNNAttention2d",
        ("neighbors", "score_temperature", "topk", "convolution_type", "attention_dropout", "image_size", *SHUFFLES),
    ),
    "Attention": Row("layers2d:Attention2d", ("num_heads", "attention_dropout", *SHUFFLES)),
    "ViG": Row("mixers.graph:GraphConv2d", ("num_heads", "neighbors", "image_size", *SHUFFLES), renamed=GRAPH),
    "Identity": Row("layers2d:make_conv2d", ("stride", "bias"), fixed=(("kernel_size", 1),)),
    "Pooling": Row("mixers.controls:Pooling2d", ("bias",)),
}


LAYERS1D_ROWS = {
    "Attention": Row("layers1d:MultiHeadAttention", ("separate_qkv", *PAIRS)),
    "ConvNN": Row("layers1d:MultiHeadConvNN", CONVNN),
    "ConvNNAttention": Row("layers1d:MultiHeadConvNNAttention", CONVNN),
    "Conv1d": Row("layers1d:MultiHeadConv1d", CONV1D),
    "Conv1dAttention": Row("layers1d:MultiHeadConv1dAttention", CONV1D),
    "KvtAttention": Row("layers1d:MultiHeadKvtAttention", ("K", "score_temperature", "topk", *PAIRS)),
    "LocalAttention": Row("mixers.local:MultiHeadLocalAttention", ("layout", "window_size", *PAIRS)),
    "SparseAttention": Row(
        "mixers.local:MultiHeadSparseAttention",
        ("layout", *PAIRS),
        renamed=(("mode", "sparse_mode"), ("context", "sparse_context_window")),
    ),
    "MaskedAttention": Row("mixers.local:MultiHeadMaskedAttention", ("layout", "mask_type", "expansion_step", *PAIRS)),
    "NeighborhoodAttention": Row("mixers.local:NeighborhoodAttention", ("layout", "kernel_size", "dilation", *PAIRS)),
    "Linformer": Row("mixers.linear:LinformerAttention", ("layout", *PAIRS), renamed=(("k", "linformer_k"),)),
    "Performer": Row("mixers.linear:PerformerAttention", PAIRS, renamed=PERFORMER),
    "Nystromformer": Row(
        "mixers.linear:NystromformerAttention",
        ("layout", *PAIRS),
        renamed=(("num_landmarks", "nystrom_landmarks"), ("conv_kernel", "nystrom_conv_kernel")),
    ),
    "Hybrid": Row(
        "mixers.linear:HybridAttention",
        ("layout", *PAIRS),
        renamed=(("window", "hybrid_window"), ("dilations", "hybrid_dilations"), *PERFORMER),
    ),
    "GPSA": Row("mixers.local:GatedPositionalSelfAttention", ("layout", "locality_strength", *PAIRS)),
    "BranchConv": Row(
        "layers1d:BranchingConv",
        ("branch_ratio", "kernel_size", *CONVNN),
        branches=("ConvNNAttention", "Conv1dAttention"),
    ),
    "BranchAttention": Row("layers1d:BranchingAttention", ("branch_ratio", *CONVNN), branches=("ConvNNAttention", "Attention")),
    "ViG": Row("mixers.graph:GraphMixer", ("neighbors", "layout", "dilation", "bias"), renamed=GRAPH),
    "GreedyViG": Row("mixers.graph:AxialGraphMixer", ("layout", "dilation", "bias")),
    "BiFormer": Row("mixers.region:BiLevelRoutingAttention", (*REGIONS, "value_convolution")),
    "BlockTopK": Row("mixers.region:BlockTopKAttention", REGIONS),
    "PaCa": Row("mixers.region:PatchToClusterAttention", ("num_clusters", *PAIRS)),
    "ContextCluster": Row("mixers.region:ContextClusterMixer", ("layout", "region_size", "bias")),
    "Identity": Row("mixers.controls:Identity", (), mixes=False, heads=False),
    "Pointwise": Row("mixers.controls:Pointwise", ("bias",), mixes=False, heads=False),
    "MeanMixing": Row("mixers.controls:MeanMixing", ("bias",), heads=False),
    "RandomMixing": Row("mixers.controls:RandomMixing", ("layout", "bias"), heads=False),
    "Pooling": Row("mixers.controls:Pooling", ("layout",), heads=False),
    "MlpMixer": Row("mixers.classical:MlpMixer", ("layout", "bias"), heads=False),
    "FNet": Row("mixers.classical:FourierMixer", (), heads=False),
    "GFNet": Row("mixers.classical:GlobalFilterMixer", ("layout",), heads=False),
    "XCiT": Row("mixers.classical:CrossCovarianceAttention", PAIRS),
    "LinearAttention": Row("mixers.linear:LinearAttention", PAIRS),
    "Swin": Row("mixers.region:ShiftedWindowAttention", ("layout", "region_size", "block", *PAIRS)),
    "FocalModulation": Row("mixers.classical:FocalModulation", ("layout", "bias"), heads=False),
}


LAYERS2D_NAMES = tuple(LAYERS2D_ROWS)
LAYERS1D_NAMES = tuple(LAYERS1D_ROWS)


def layers_of(layer: str) -> list[str]:
    """Split A/B into its layers; each is a name, or the address of a custom mixer, whose path has slashes as well.

    A name before the first slash is a layer; a folder of this name is written ./Conv2d/file.py:Class.
    """
    if not is_address(layer):
        return layer.split("/")
    first, slash, rest = layer.partition("/")
    if slash and (first in LAYERS1D_ROWS or first in LAYERS2D_ROWS):
        return [first, *layers_of(rest)]
    found = re.fullmatch(r"(.+?:[^/:]*)/(.*)", layer, flags=re.S)  # a class ends an address
    return [found[1], *layers_of(found[2])] if found else [layer]


CUSTOM_LAYER = "; a custom mixer is FILE.py:Class or package.module:Class"


# Names in the published code or the other program, and ours.
LAYER_SYNONYMS = {
    "Branching": "Conv2d/ConvNN",
    "Branching_Attn": "Conv2d/ConvNN_Attn",
    "Conv1d_Branching": "BranchConv",
    "Conv1d_NN": "ConvNN",
    "Conv1d_NN_Attn": "ConvNNAttention",
    "Conv2d_Attn_Branching": "Conv2d/ConvNN_Attn",
    "Conv2d_Branching": "Conv2d/ConvNN",
    "Conv2d_NN": "ConvNN",
    "Conv2d_NN_Attn": "ConvNN_Attn",
    "ConvNNAttention": "ConvNN_Attn",
    "ConvNN_Attn": "ConvNNAttention",
}


def check_layer(layer: str, valid: Iterable[str], more: str = "") -> None:
    """Raise ValueError for a part of A/B that is neither a valid name nor an address.

    Args:
        more: end of the list of valid names in the message.
    """
    for name in layers_of(layer):
        if name in valid or is_address(name):
            continue
        if layer.endswith(".py"):
            raise ValueError(f"layer={layer!r} must name the class too: {layer}:Class")
        synonym = LAYER_SYNONYMS.get(name, "")
        if set(synonym.split("/")) <= set(valid):
            hint = f"; did you mean {synonym}?"
        elif name in LAYERS1D_ROWS or name in LAYERS2D_ROWS:
            hint = f"; {name} is a layer of {'vit_main.py' if name in LAYERS1D_ROWS else 'allconvnet_main.py'}"
        else:
            hint = did_you_mean(name, valid) or CUSTOM_LAYER
        raise ValueError(f"layer={layer!r} is not one of {', '.join(valid)}{more}{hint}")


def layer_label(layer: str) -> str:
    """Return a layer as folders and figures name it: a custom mixer by its class."""
    return "/".join(part.rpartition(":")[2] for part in layers_of(layer))


# (option, other option, values of the other under which the first has no effect)
WITHOUT_EFFECT = (
    ("num_samples", "sampling_type", ("all",)),
    ("sampling_type", "num_samples", (-1,)),
    ("sample_padding", "num_samples", (-1,)),
    ("sample_padding", "sampling_type", ("all", "random")),
    ("lambda_param", "similarity_type", ("Col", "Loc")),
    ("shuffle_scale", "shuffle_pattern", ("NA",)),
    ("sparse_context_window", "sparse_mode", ("all",)),
    ("expansion_step", "mask_type", ("full",)),
    ("score_temperature", "softmax_topk_val", (False,)),
    # Options of data and training, checked by `options.runs.unused_options`.
    ("data_path", "dataset", ("digits",)),
    ("momentum", "optimizer", ("adam", "adamw")),
    ("lr_step", "scheduler", ("cosine", "none")),
    ("lr_gamma", "scheduler", ("cosine", "none")),
    ("plateau_metric", "scheduler", ("step", "cosine", "none")),
    ("compile_mode", "use_compiled", (False,)),
    ("amp_dtype", "use_amp", (False,)),
)


def layer_row(rows: dict[str, Row], layer: str, branch_ratio: float) -> Row:
    """Return the row of a layer; at a branch_ratio of 0 or 1, the row of its only branch."""
    branches = rows[layer].branches
    return rows[branches[int(branch_ratio == 0)]] if branches and branch_ratio in (0, 1) else rows[layer]
