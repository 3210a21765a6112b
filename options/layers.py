"""Every layer as data: the class that a name stands for, and the options that it takes."""

from __future__ import annotations

from typing import NamedTuple

from options.custom_mixer import NO_FLAGS, label_of, split_layers
from options.fields import specs
from options.neighbors import NeighborConfig

SHUFFLE_PATTERNS = ("BA", "NA", "B", "A")
MASK_TYPES = ("1d_cardinal", "1d_all_neighbors", "2d_cardinal", "2d_all_neighbors")
PERFORMER_KERNELS = ("softmax", "relu")
BRANCH_JOINS = ("relu", "conv1x1")
GRAPH_AGGREGATIONS = ("max", "mean", "edge")
TOPKS = ("hard", "straight_through", "gumbel")
CONVOLUTION_TYPES = ("standard", "depthwise", "depthwise-separable")


class Row(NamedTuple):
    """A layer as data: its class, and the options that its constructor takes as keywords. `mixers/build.py` builds it.

    What the model alone knows comes first and by position: channels in and out of a 2-D layer, features and heads of a 1-D one.
    An option that no layer in use takes has no effect, and is named in a warning.
    """

    target: str  # "module:Class"
    # Names of options, argument=option where the constructor calls it otherwise, and of what the model knows: `neighbors`, a
    # NeighborConfig; `layout`, what the tokens are; `image_size`, the sides of the map; `biases`, whether the projections have
    # any; `stride` and `bias`, as a backbone wants.
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


BY_PLACE = "mixers.local"
PAIRS = "attention_dropout bias=biases"  # of layers that weigh pairs of tokens
CONVNN = f"neighbors layout convolution_type softmax_topk_val score_temperature topk {PAIRS}"
REGIONS = f"layout region_size top_regions {PAIRS}"
CONV1D = "kernel_size layout convolution_type bias=biases"
BIASES = {"attention_bias", "qkv_bias", "proj_bias"}
SHUFFLES = "shuffle_pattern shuffle_scale"


LAYERS2D_ROWS = {
    "Conv2d": Row("layers2d:make_conv2d", "kernel_size aggregation_type stride bias"),
    "ConvNN": Row("layers2d:ConvNN2d", f"neighbors padding image_size bias {SHUFFLES}"),
    "ConvNN_Attn": Row(
        "layers2d:ConvNNAttention2d",
        f"neighbors score_temperature topk convolution_type attention_dropout image_size {SHUFFLES}",
    ),
    "Attention": Row("layers2d:Attention2d", f"num_heads attention_dropout {SHUFFLES}"),
    "ViG": Row("mixers.graph:GraphConv2d", f"num_heads neighbors aggregation=graph_aggregation image_size {SHUFFLES}"),
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
    "Linformer": Row("mixers.linear:LinformerAttention", f"layout k=linformer_k {PAIRS}"),
    "Performer": Row("mixers.linear:PerformerAttention", f"num_features=performer_features kernel=performer_kernel {PAIRS}"),
    "Nystromformer": Row(
        "mixers.linear:NystromformerAttention",
        f"layout num_landmarks=nystrom_landmarks conv_kernel=nystrom_conv_kernel {PAIRS}",
    ),
    "Hybrid": Row(
        "mixers.linear:HybridAttention",
        "layout window=hybrid_window dilations=hybrid_dilations num_features=performer_features kernel=performer_kernel "
        f"{PAIRS}",
    ),
    "GPSA": Row(f"{BY_PLACE}:GatedPositionalSelfAttention", f"layout locality_strength {PAIRS}"),
    "BranchConv": Row(
        "layers1d:BranchingConv", f"branch_ratio kernel_size {CONVNN}", branches=("ConvNNAttention", "Conv1dAttention")
    ),
    "BranchAttention": Row("layers1d:BranchingAttention", f"branch_ratio {CONVNN}", branches=("ConvNNAttention", "Attention")),
    "ViG": Row("mixers.graph:GraphMixer", "neighbors layout aggregation=graph_aggregation dilation bias=biases"),
    "GreedyViG": Row("mixers.graph:AxialGraphMixer", "layout dilation bias=biases"),
    "BiFormer": Row("mixers.region:BiLevelRoutingAttention", f"{REGIONS} value_convolution"),
    "BlockTopK": Row("mixers.region:BlockTopKAttention", REGIONS),
    "PaCa": Row("mixers.region:PatchToClusterAttention", f"num_clusters {PAIRS}"),
    "ContextCluster": Row("mixers.region:ContextClusterMixer", "layout region_size bias=biases"),
}


LAYERS2D_NAMES = tuple(LAYERS2D_ROWS)
LAYERS1D_NAMES = tuple(LAYERS1D_ROWS)


def layers_of(layer: str) -> list[str]:
    """The layers of A/B, or the one there is: names, and addresses of classes of one's own."""
    return split_layers(layer, {*LAYERS1D_NAMES, *LAYERS2D_NAMES})


def layer_label(layer: str) -> str:
    """A layer as folders and figures call it: an address by its class."""
    return label_of(layer, {*LAYERS1D_NAMES, *LAYERS2D_NAMES})


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
