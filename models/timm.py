"""Mixers of this package in the blocks of timm's models: `timm_mixer`, and the models of `--model timm:NAME`."""

import copyreg
import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mixers.base import MultiHeadMixer, TokenLayout, accepts_layout
from mixers.build import layer_arguments, layer_class
from models.pretrained import fit_positions
from options.fields import did_you_mean, specs
from options.layers import layer_row
from options.timm import PREFIX, describe, make_without_weights
from options.vit import ViTConfig
from runs.checkpoints import Loaded, LoadPolicy, load_state


class MixerType(type):
    """Type of the classes that `mixer_class` makes: pickle calls it again, as it finds them in no module."""

    made_from: tuple[Callable, str, dict]


copyreg.pickle(MixerType, lambda mixer: (partial(mixer_class, *mixer.made_from[:2], **mixer.made_from[2]), ()))


def timm_mixer(layer: str, **options) -> type[nn.Module]:
    """Return a class for timm's `attn_layer`, or for the `attn` of a `Block`: (B, N, dim) -> the same.

    Its parameters are called `qkv`, `proj`, `q_norm` and `k_norm` as in timm's attention, so it takes the weights of that. With
    timm's `dynamic_img_size`, images may have another size, in the proportions of `image_size`.

    Args:
        layer: a name in `LAYERS1D_ROWS`, or the address of a custom mixer.
        options: fields of `ViTConfig` for the mixer, and image_size (224), patch_size (16) and prefix_tokens (1: the class
            token; registers count too), which describe the tokens. timm passes heads, biases and dropout.

    Raises ValueError for an unknown layer or an option that does not fit; the class raises it for a norm that the mixer cannot
    have, and for masks.
    """
    return mixer_class(call_of_timm, layer, **options)


def call_of_timm(mixer: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if attn_mask is not None or is_causal:
        raise ValueError(f"{type(mixer).__name__} selects the tokens that attend to each other itself, and takes no mask")
    return mixer.mixed(x)


def mixer_class(call: Callable, layer: str, **options) -> type[nn.Module]:
    """Return the class of `timm_mixer`, with the forward pass of another library.

    call: function of the mixer and the arguments of that library, which calls `mixer.mixed(x)`.
    """
    if unknown := options.keys() - ViTConfig.__dataclass_fields__.keys():
        name = min(unknown)
        raise ValueError(f"{name}={options[name]!r} is no option of a mixer{did_you_mean(name, specs(ViTConfig))}")
    if known := options.keys() & {"model", "d_model", "num_heads"}:
        raise ValueError(f"{min(known)} comes from the model; drop it")
    base = ViTConfig(layer=layer, d_model=2**16, num_heads=1, **options)  # the model passes the features later
    layout = TokenLayout(*base.grid, base.class_tokens)
    row = layer_row(base.rows, base.layer, base.branch_ratio)
    takes_layout = accepts_layout(layer_class(row))
    can_norm = getattr(layer_class(row), "project", None) is MultiHeadMixer.project

    class Mixer(layer_class(row), metaclass=MixerType):
        made_from = call, base.layer, options
        forward = call

        def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            qk_norm: bool = False,
            scale_norm: bool = False,
            proj_bias: bool = True,
            attn_drop: float = 0.0,
            proj_drop: float = 0.0,
            norm_layer: type[nn.Module] | None = None,
            device=None,
            dtype=None,
            block: int = 0,
        ):
            if scale_norm:
                raise ValueError(f"{layer} has no norm of its output: scale_norm must be False")
            if qk_norm and not can_norm:
                raise ValueError(f"{layer} has no norm of queries and keys: qk_norm must be False; KvtAttention has")
            own = {"d_model": dim, "num_heads": num_heads, "attention_dropout": attn_drop}
            config = dataclasses.replace(base, **own, qkv_bias=qkv_bias, proj_bias=proj_bias)
            super().__init__(dim, num_heads, **layer_arguments(row, config, layout=layout, block=block))
            if qk_norm:
                self.q_norm, self.k_norm = norm_layer(dim // num_heads), norm_layer(dim // num_heads)
            self.proj_drop = nn.Dropout(proj_drop)
            self.to(device=device, dtype=dtype)

        def project(self, x: Tensor, *given: TokenLayout) -> tuple[Tensor, ...]:
            parts = super().project(x, *given)
            return (self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]) if hasattr(self, "q_norm") else parts

        def mixed(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
            """Mix tokens (B, N, dim); with output_attentions also the mixing matrix (B, H, N, N), None for convolutions."""
            given = self.layout_of(x)
            return super().forward(x, True, **given) if output_attentions else self.proj_drop(super().forward(x, **given))

        @staticmethod
        def layout_of(x: Tensor) -> dict[str, TokenLayout]:
            """Return the argument that describes tokens of another image size."""
            if not takes_layout or x.shape[1] == layout.num_tokens:
                return {}
            patches = x.shape[1] - layout.class_tokens
            scale = math.sqrt(max(patches, 0) / layout.num_patches)
            height, width = round(layout.height * scale), round(layout.width * scale)
            if patches < 1 or height * width != patches:
                raise ValueError(f"{x.shape[1]} tokens were given, and the layer was made for {layout}, or its proportions")
            return {"layout": TokenLayout(height, width, layout.class_tokens)}

    Mixer.__name__ = Mixer.__qualname__ = layer_class(row).__name__
    return Mixer


# ---------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------


class TimmModel:
    """Mixed into the class of a model of timm: what the programs ask of a model."""

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """images (B, channels, H, W) -> logits; with output_attentions also a mixing matrix (B, heads, N, N) per block."""
        if not output_attentions:
            return super().forward(images)
        matrices: list[Tensor | None] = []
        mixers = [block.attn for block in self.blocks]
        handles = [one.register_forward_hook(lambda mixer, x, _: matrices.append(mixer.mixed(x[0], True)[1])) for one in mixers]
        logits = super().forward(images)
        for handle in handles:
            handle.remove()
        return logits, matrices

    @property
    def recompute(self) -> bool:
        """Keep only the inputs of the blocks for the backward pass."""
        return self.grad_checkpointing

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.set_grad_checkpointing(value)


def make_timm(config: ViTConfig) -> nn.Module:
    """Build the model of timm that `config.model` names, with its own attention: (B, channels, H, W) -> logits (B, classes).

    Its parameters have timm's names. Raises ValueError for an option that this model does not have.
    """
    import timm

    rates = {"proj_drop_rate": config.dropout, "attn_drop_rate": config.attention_dropout, "drop_path_rate": config.drop_path}
    given = {name: rate for name, rate in rates.items() if rate}
    name = config.model.removeprefix(PREFIX)
    if tuple(describe(config.model).data["resize"]) != config.image_size:
        given["img_size"] = config.image_size
    try:
        model = timm.create_model(name, num_classes=config.num_classes, in_chans=config.in_channels, **given)
    except TypeError as error:
        raise ValueError(f"model={config.model}: {error}") from None
    model.__class__ = type(type(model).__name__, (TimmModel, type(model)), {})
    model.config = config
    heads = model.pretrained_cfg["classifier"]
    heads = [heads] if isinstance(heads, str) else heads
    model.replaceable = "|".join([*(re.escape(f"{head}.") for head in heads), r"blocks\.\d+\.attn\."])
    return model


def load_timm_weights(model: nn.Module, state_dict: dict[str, Tensor], policy: LoadPolicy) -> Loaded:
    """Load a state dict of this model, with positions of another grid resampled if `policy` allows it. Raises ValueError."""
    weights, resampled, grid = dict(state_dict), "", model.config.grid
    table, own = weights.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is not None and own is not None and table.ndim == 3 and policy.resample:
        weights["pos_embed"], resampled = fit_positions(table, policy.grid, grid, own.shape[1] - math.prod(grid))
    return load_state(model, weights, policy)._replace(resampled=resampled)


WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}  # in names


def name_of_weights(weights: dict[str, Tensor]) -> str:
    """Return the name of a model of timm with weights of these names and shapes, head aside; empty if there is none.

    One with positions of the same shape is preferred.
    """
    if importlib.util.find_spec("timm") is None:
        return ""
    import timm

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    names = timm.list_models(f"*{WIDTHS.get(width, '')}*patch{patch}*")
    found, wanted = "", {name: weights[name].shape for name in weights if not name.startswith("head")}
    for name in sorted(names, key=lambda name: (not name.startswith("vit"), len(name))):
        own = {key: value.shape for key, value in make_without_weights(name).state_dict().items() if not key.startswith("head")}
        if own == wanted:
            return name
        if own | {"pos_embed": None} == wanted | {"pos_embed": None}:
            found = found or name
    return found
