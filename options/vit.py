"""`ViTConfig`: options of the vision transformer, and its presets."""

import math
from dataclasses import InitVar, dataclass
from typing import ClassVar

from options.checks import (
    branch_widths,
    check_heads,
    check_patches,
    check_slots,
    check_topk,
    check_value_convolution,
    check_window,
    dilate,
    region_sides,
    sequence_grid,
)
from options.fields import LAYERS, NOT_GIVEN, SIDE, TOKENS, WIDTH, Spec, check_one, decide, option, with_default
from options.layers import (
    CONVOLUTION_TYPES,
    CUSTOM_LAYER,
    GRAPH_AGGREGATIONS,
    LAYERS1D_NAMES,
    LAYERS1D_ROWS,
    MASK_TYPES,
    PERFORMER_KERNELS,
    TOPKS,
    Row,
    layer_label,
    layer_row,
    layers_of,
)
from options.models import GRAPH_AGGREGATION, LAYER_SHA256, MIXER_OPTION, SCORE_TEMPERATURE, TOPK, ModelConfig, preset_option
from options.neighbors import NeighborConfig
from options.timm import describe, is_timm

CONVIT_SIZES = {"Ti": (192, 4), "Ti_plus": (256, 4), "S": (432, 9), "S_plus": (576, 9), "B": (768, 16), "B_plus": (1024, 16)}


# Defaults of the options by `model` (ConViT: d'Ascoli et al., arXiv 2103.10697).
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
TIMM = {"dropout": 0.0, "attention_dropout": 0.0}  # defaults of the options by a model of timm, besides its sizes
NOT_OF_TIMM = (
    "attention_bias separate_qkv pos_embedding patch_norm final_norm pool initializer_range".split()
)  # its own model decides


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """A vision transformer: patches, then blocks of a mixer and an MLP, then a linear classifier.

    Options that are not given take their values from `VIT_MODELS[model]`, else their defaults. `dataclasses.replace` gives all
    options, so it keeps their values when it changes `model`.
    """

    rows: ClassVar[dict[str, Row]] = LAYERS1D_ROWS
    sizes: ClassVar[tuple[str, str]] = ("d_model", "num_heads")
    unscored: ClassVar[frozenset[str]] = frozenset({"ViG"})

    model: str = option(
        "vit",
        "ViT or a ConViT size, whose options other flags override; or a transformer of timm, with --layer in its blocks "
        "(Attention: its own)",
        metavar="{" + ",".join(VIT_MODELS) + ",timm:NAME}",
    )
    layer: str = preset_option(
        "Attention", f"token mixer of the blocks{CUSTOM_LAYER}", metavar="{" + ",".join(LAYERS1D_NAMES) + "}"
    )
    mixer_option: tuple[str, ...] | None = option(None, MIXER_OPTION, kind=str, many=True, metavar="NAME=VALUE", repeat=True)
    layer_sha256: str | None = option(None, LAYER_SHA256, kind=str, flag=False)
    patch_size: int = preset_option(16, "side of a patch in pixels", low=1, high=SIDE)
    num_layers: int = preset_option(8, "blocks", low=1, high=LAYERS)
    num_heads: int = preset_option(8, "heads; 1 gives ConvNN attention without head splitting", low=1, high=WIDTH)
    d_model: int = preset_option(512, "features per token", low=1, high=WIDTH, aliases=("d_hidden",))
    d_mlp: int = preset_option(2048, "hidden features of the MLP", low=1, high=WIDTH)
    dropout: float = preset_option(0.1, "probability of dropping an output feature of a mixer or MLP", low=0, below=1)
    attention_dropout: float = preset_option(0.1, "probability of dropping a weight of a pair of tokens", low=0, below=1)
    attention_bias: bool = preset_option(True, "biases of the q, k, v and output projections")
    qkv_bias: bool | None = option(None, "biases of the q, k, v projections; none: --attention_bias", kind=bool)
    proj_bias: bool | None = option(None, "bias of the output projection; none: --attention_bias", kind=bool)
    separate_qkv: bool = option(False, "Attention: q, k and v by a linear each, instead of one of three times the width")
    pos_embedding: str = preset_option("sinusoidal", "positions added to the tokens", choices=("sinusoidal", "learned", "none"))
    patch_norm: bool = preset_option(True, "LayerNorm after the patch embedding")
    final_norm: bool = preset_option(False, "LayerNorm after the last block")
    pool: str = option("cls", "classify by a class token, or by the mean of the patches", choices=("cls", "mean"))
    num_local_layers: int | None = preset_option(
        None, "the first n blocks use --layer, the rest Attention and the class token", kind=int, low=0, high=LAYERS
    )
    initializer_range: float | None = preset_option(
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
        True, "ConvNN layers: weight values by the softmax of the K scores; False: by the raw scores"
    )
    graph_aggregation: str = option("max", GRAPH_AGGREGATION, choices=GRAPH_AGGREGATIONS)
    score_temperature: float = option(1.0, f"ConvNN layers, KvtAttention: {SCORE_TEMPERATURE}", low=1e-6, high=1e6)
    topk: str = option("hard", f"ConvNN layers, KvtAttention: {TOPK}", choices=TOPKS)
    coordinate_encoding: bool = option(False, "short for --similarity_type Loc_Col")
    kernel_size: int = option(
        9, "Conv1d, Conv1dAttention, BranchConv: tokens; NeighborhoodAttention: side of the window, odd", low=1, high=SIDE
    )
    window_size: int = option(16, "LocalAttention: |i - j| <= window_size", low=0, high=TOKENS)
    sparse_mode: str = option("strided", "SparseAttention: sparsity pattern", choices=("all", "local", "strided"))
    sparse_context_window: int = option(14, "SparseAttention: stride, and width of the local window", low=1, high=TOKENS)
    dilation: int = option(
        1,
        "NeighborhoodAttention, GreedyViG: step between patches; ViG: every n-th of the K * n nearest",
        low=1,
        high=SIDE,
    )
    region_size: int = option(2, "BiFormer, BlockTopK, ContextCluster, Swin: side of a region in patches", low=1, high=SIDE)
    top_regions: int = option(4, "BiFormer, BlockTopK: attended regions", low=1, high=TOKENS)
    value_convolution: int = option(
        0, "BiFormer: side of a depthwise convolution of the values, odd; 0: no convolution", low=0, high=SIDE
    )
    num_clusters: int = option(16, "PaCa: attended clusters", low=1, high=TOKENS)
    branch_ratio: float = option(0.5, "BranchConv, BranchAttention: share of the ConvNN branch", low=0, high=1)
    mask_type: str = option(
        "2d_all_neighbors", "MaskedAttention: tokens or patches that count as neighbors; full: all", choices=MASK_TYPES
    )
    expansion_step: int = option(
        1, "MaskedAttention: steps to the farthest neighbor; 0: the token itself only", low=0, high=SIDE
    )
    linformer_k: int = option(64, "Linformer: learned mixtures of the keys and of the values", low=1, high=TOKENS)
    performer_features: int = option(64, "Performer, Hybrid: random features", low=1, high=TOKENS)
    performer_kernel: str = option("softmax", "Performer, Hybrid: kernel of the random features", choices=PERFORMER_KERNELS)
    nystrom_landmarks: int = option(32, "Nystromformer: landmarks; as many as tokens is attention", low=1, high=TOKENS)
    nystrom_conv_kernel: int = option(0, "Nystromformer: kernel of the depthwise value convolution; 0: off", low=0, high=TOKENS)
    hybrid_window: int = option(3, "Hybrid: side of the windows, odd", low=1, high=SIDE)
    hybrid_dilations: tuple[int, ...] = option(
        (1, 2), "Hybrid: steps between the patches of a window, one window each", low=1, high=SIDE
    )
    locality_strength: float = option(
        1.0, "GPSA: initial sharpness of attention around the offset of each head", low=0, high=1000
    )
    magnitude_type: str = with_default(NeighborConfig, "magnitude_type", "matmul")
    similarity_type: str = with_default(NeighborConfig, "similarity_type", "Col", decided=True)
    image_size: int | tuple[int, int] = 224
    prefix_tokens: int | None = None  # tokens before the patches in a model of another library: class token and registers
    d_hidden: InitVar[int | None] = None  # another name of d_model

    def __post_init__(self, d_hidden: int | None):
        if d_hidden is not None:
            if self.d_model is not NOT_GIVEN:
                raise ValueError("d_hidden and d_model are two names of one option; drop one of them")
            object.__setattr__(self, "d_model", d_hidden)
        sizes = describe(self.model).sizes if self.is_backbone else {}
        decided = TIMM | sizes if self.is_backbone else VIT_MODELS.get(str(self.model), {})
        decide(self, decided | ({"similarity_type": "Loc_Col"} if self.coordinate_encoding else {}))
        for name, value in sizes.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name}={getattr(self, name)}: model={self.model} has {value}; drop {name}")
            object.__setattr__(self, name, value)
        if len(layers_of(str(self.layer))) > 1 and not self.layer.endswith(".py"):
            raise ValueError(
                f"layer={self.layer!r} must be one layer; only allconvnet_main.py takes two in parallel. "
                "Write a folder with the name of a layer as ./Attention/file.py:Class"
            )
        self._check_ranges()
        if not self.is_backbone:
            check_one("model", self.model, Spec(str, "", choices=tuple(VIT_MODELS)))
        check_patches(self.patch_size, self.image_size)
        check_heads(self.d_model, self.num_heads)
        if self.initializer_range == 0:
            raise ValueError("initializer_range=0 must be above 0, or all weights would start at 0")
        if self.num_local_layers is not None and self.num_local_layers >= self.num_layers:
            raise ValueError(
                f"num_local_layers={self.num_local_layers} must be below num_layers={self.num_layers}; "
                f"use a smaller number, or none for {self.layer} in every block"
            )
        if self.num_local_layers != 0:
            self._check_layer()

    @staticmethod
    def drop_overridden(values: dict, given: dict) -> dict:
        """Drop also the options that follow from the model of a config.yaml, if another model is given.

        A file without a model applies to any model. A config.yaml holds both coordinate_encoding and the similarity_type that
        it implies; either can be given.
        """
        values, dropped = ModelConfig.drop_overridden(values, given), set()
        if "model" in values and given.get("model", values["model"]) != values["model"]:
            dropped |= VIT_MODELS["convit_ti"].keys()
            if is_timm(values["model"]) or is_timm(given["model"]):
                dropped |= {"patch_size", "qkv_bias", "proj_bias", "resize", "mean", "std", "interpolation"}
        if given.get("similarity_type") == "Col":
            dropped.add("coordinate_encoding")
        implied = "Loc_Col" if values.get("coordinate_encoding") is True else "Col"
        if "coordinate_encoding" in given and values.get("similarity_type") == implied:
            dropped.add("similarity_type")
        return {name: value for name, value in values.items() if name not in dropped}

    def layers_in_use(self) -> list[str]:
        local = [] if self.num_local_layers == 0 else [self.layer]
        return local if self.num_local_layers is None else [*local, "Attention"]

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        found = super().without_effect(defaults=defaults)
        if self.is_backbone:
            found |= dict.fromkeys(NOT_OF_TIMM, "model")
        if self.num_layers == 1:
            found["drop_path"] = "num_layers"  # its rate is 0 in the first block
        no_layer = self.num_local_layers == 0
        return {name: "num_local_layers" if no_layer and other == "layer" else other for name, other in found.items()}

    @property
    def is_backbone(self) -> bool:
        """True for a model of timm."""
        return is_timm(self.model)

    @property
    def title(self) -> str:
        return f"{self.model} with {layer_label(self.layer)}" if self.is_backbone else layer_label(self.layer)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def bias(self) -> bool | tuple[bool, bool]:
        """Bias of all projections in a mixer, or of (q, k, v) and of the output projection where they differ."""
        pair = tuple(self.attention_bias if one is None else one for one in (self.qkv_bias, self.proj_bias))
        return pair[0] if pair[0] == pair[1] else pair

    @property
    def class_tokens(self) -> int:
        """Number of tokens before the patches in the blocks that use `layer`.

        With num_local_layers the class token joins after them.
        """
        if self.prefix_tokens is not None:
            return self.prefix_tokens
        return int(self.pool == "cls" and self.num_local_layers is None)

    def _check_layer(self) -> None:
        """Check the options of the layer in use against each other."""
        if self.layer not in self.rows:
            return
        row = layer_row(self.rows, self.layer, self.branch_ratio)
        grid = sequence_grid(self.grid)
        if self.class_tokens and not row.mixes:
            remedy = "--pool mean" if self.prefix_tokens is None else "a model without one"
            raise ValueError(f"pool=cls with layer={self.layer}: a class token sees no patch without mixing; use {remedy}")
        if row.branches:
            branch_widths(self.d_model, self.num_heads, self.branch_ratio)
        if "neighbors" in row.arguments:
            self.check_candidates(grid, axes=len(grid), class_tokens=self.class_tokens)
            if "convolution_type" in row.arguments:
                check_slots(self.convolution_type or "depthwise", self.aggregation_type)
            if "topk" in row.arguments:
                check_topk(self.topk, self.similarity_type, self.softmax_topk_val)
            if "dilation" in row.arguments:
                dilate(self.neighbors, self.dilation).check_candidates(grid, axes=len(grid), class_tokens=self.class_tokens)
            if self.coordinate_encoding and self.similarity_type != "Loc_Col":
                raise ValueError(
                    f"coordinate_encoding=True means similarity_type=Loc_Col, not {self.similarity_type}; drop one of them"
                )
        elif "K" in row.arguments:
            NeighborConfig(K=self.K).check_candidates(grid, class_tokens=self.class_tokens)
        if "region_size" in row.arguments:
            sides = region_sides(self.region_size, self.grid)
            regions = math.prod(self.grid) // math.prod(sides)
            if "top_regions" in row.arguments and self.top_regions > regions:
                raise ValueError(f"top_regions={self.top_regions} is more than the {regions} regions; use 1 to {regions}")
        if "value_convolution" in row.arguments:
            check_value_convolution(self.value_convolution, grid)
        if {"kernel_size", "dilation"} <= row.arguments.keys():
            check_window(self.kernel_size, self.dilation, grid)
        if "dilations" in row.arguments:
            for dilation in self.hybrid_dilations:
                check_window(self.hybrid_window, dilation, grid, names=("hybrid_window", "hybrid_dilations"))
