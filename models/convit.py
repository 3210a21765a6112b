"""ConViT (d'Ascoli et al., arXiv 2103.10697): a vision transformer whose first layers may start as convolutions.

`ViT` builds the same plan from `--model convit_ti`; here it stands on its own, with its own config.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from layers1d import MultiHeadAttention
from mixers.base import TokenLayout
from mixers.local import GatedPositionalSelfAttention
from options.vit import CONVIT_SIZES
from vit import Block, drop_path_rates, init_vit_weights, prepend

__all__ = ["ConViTBackbone", "ConViTConfig", "ConViTLayer", "ConViTWithLinearClassifier", "GatedPositionalSelfAttention"]

ACTIVATIONS = ("Identity", "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh", "Sigmoid")


@dataclass(frozen=True)
class ConViTConfig:
    """A ConViT and its classifier.

    Args:
        image_size: pixels, of a square or (height, width).
        num_local_layers: layers of gated positional self-attention; then the class token joins.
        num_nonlocal_layers: layers of self-attention.
        locality_strength: how sharply heads attend around their offsets at first (alpha in the paper).
        heads, head_dim: one follows from the other and dim; without both, a square number of heads with about 48 features
            each, as the paper's models have.
        pre_norm: normalize what goes into attention and feed-forward, instead of what comes out.
        ff_dim: hidden features of the feed-forward; None: 4 * dim.
        ff_dropout: probability of dropping a hidden or an output feature of the feed-forward.
        attention_dropout: probability of dropping a weight of a pair of tokens.
        token_dropout: probability of dropping a patch.
        drop_path: probability of skipping the attention or the feed-forward of the last layer for an image; it rises to this
            linearly, from 0 in the first.
        pred_act_fnc_name: activation (a class of `torch.nn`) between the class token and the linear classifier; the
            presets, as the paper, have none: `Identity`.

    Raises ValueError if the patches, the heads or a range do not fit.
    """

    image_size: int | tuple[int, int]
    image_channel: int
    patch_size: int
    num_local_layers: int
    num_nonlocal_layers: int
    dim: int
    num_classes: int
    locality_strength: float = 1.0
    heads: int | None = None
    head_dim: int | None = None
    pre_norm: bool = False
    ff_dim: int | None = None
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    token_dropout: float = 0.0
    drop_path: float = 0.0
    pred_act_fnc_name: str = "ReLU"

    def __post_init__(self):
        for name in ("image_channel", "patch_size", "dim", "num_classes", "heads", "head_dim", "ff_dim"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), low=1))
        for name in ("num_local_layers", "num_nonlocal_layers"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), low=0))
        if self.num_local_layers + self.num_nonlocal_layers == 0:
            raise ValueError("num_local_layers=0 and num_nonlocal_layers=0 leave no layer; one of them must be at least 1")
        if not 0 <= self.locality_strength < math.inf:
            raise ValueError(f"locality_strength={self.locality_strength} must be at least 0 and finite")
        for name in ("ff_dropout", "attention_dropout", "token_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        patch_grid(self.image_size, self.patch_size)
        object.__setattr__(self, "heads", resolve_heads(self.dim, self.heads, self.head_dim))
        object.__setattr__(self, "ff_dim", self.ff_dim or 4 * self.dim)
        if self.pred_act_fnc_name not in ACTIVATIONS:
            raise ValueError(f"pred_act_fnc_name={self.pred_act_fnc_name!r} is not one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def preset(cls, size: str, num_classes: int = 1000, **changes) -> ConViTConfig:
        """One of the models of the paper, with 10 local and 2 other layers, by the name of its size."""
        dim, heads = CONVIT_SIZES[size]
        paper = {"dim": dim, "heads": heads, "pre_norm": True, "pred_act_fnc_name": "Identity"}
        image = {"image_size": 224, "image_channel": 3, "patch_size": 16}
        layers = {"num_local_layers": 10, "num_nonlocal_layers": 2}
        return cls(**{**image, **layers, **paper, "num_classes": num_classes, **changes})

    @classmethod
    def ConViT_Ti(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("Ti", num_classes, **changes)

    @classmethod
    def ConViT_Ti_plus(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("Ti_plus", num_classes, **changes)

    @classmethod
    def ConViT_S(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("S", num_classes, **changes)

    @classmethod
    def ConViT_S_plus(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("S_plus", num_classes, **changes)

    @classmethod
    def ConViT_B(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("B", num_classes, **changes)

    @classmethod
    def ConViT_B_plus(cls, num_classes: int = 1000, **changes) -> ConViTConfig:
        return cls.preset("B_plus", num_classes, **changes)


def check_whole(name: str, value: int | None, low: int) -> int | None:
    """The value as Python's int, whatever type of whole number it has. Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name}={value} must be a whole number of at least {low}")
    return int(value)


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    try:
        height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        sides = check_whole("height", height, low=1), check_whole("width", width, low=1)
    except ValueError:
        raise ValueError(f"image_size={image_size} must be a whole number, or two of them: height and width") from None
    if any(side % patch_size for side in sides):
        raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
    return sides[0] // patch_size, sides[1] // patch_size


def resolve_heads(dim: int, heads: int | None, head_dim: int | None) -> int:
    """The number of heads from either of the two, or from dim alone."""
    if heads is None and head_dim is None:
        squares = (side**2 for side in range(1, math.isqrt(dim) + 1) if dim % side**2 == 0)
        return min(squares, key=lambda heads: abs(dim // heads - 48))
    found = dim // head_dim if heads is None else heads
    if found < 1 or found * (dim // found if head_dim is None else head_dim) != dim:
        raise ValueError(f"heads={heads} and head_dim={head_dim} must multiply to dim={dim}; give one of them")
    return found


class ConViTLayer(Block):
    """Attention and feed-forward, each with a residual and a LayerNorm before (`pre_norm`) or after: (B, N, dim) -> the same.

    Unlike `Block` it drops features of the feed-forward only, hidden ones too.

    Args:
        mixer: a module on (B, N, dim): `GatedPositionalSelfAttention` in local layers, `MultiHeadAttention` in others.
        ff_dim: hidden features of the feed-forward; None: 4 * dim.
        ff_dropout: probability of dropping a hidden or an output feature of the feed-forward.
        drop_path: probability of adding nothing to a sample.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        pre_norm: bool = False,
        ff_dim: int | None = None,
        ff_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__(dim, 4 * dim if ff_dim is None else ff_dim, mixer, ff_dropout, drop_path)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """With output_attentions also the mixing matrix of the mixer."""
        inputs = self.norm1(x) if self.pre_norm else x
        mixed, matrix = self.mixer(inputs, True) if output_attentions else (self.mixer(inputs), None)
        if self.pre_norm:
            x = x + self.drop_path(mixed)
            x = x + self.drop_path(self.feed_forward(self.norm2(x)))
        else:
            x = self.norm1(x + self.drop_path(mixed))
            x = self.norm2(x + self.drop_path(self.feed_forward(x)))
        return (x, matrix) if output_attentions else x

    def feed_forward(self, x: Tensor) -> Tensor:
        first, activation, second = self.mlp
        return self.dropout(second(self.dropout(activation(first(x)))))


class ConViTBackbone(nn.Module):
    """Images (B, channels, H, W) -> tokens (B, 1 + N, dim), the class token first.

    Patches in raster order with learned positions go through the local layers; the class token joins for the others.

    Args:
        config: the model; its classifier is not part of the backbone.
        fields: of a `ConViTConfig`, by name: changes of the config, or all of one without num_classes.

    Raises ValueError as `ConViTConfig` does.
    """

    def __init__(self, config: ConViTConfig | None = None, **fields):
        super().__init__()
        config = ConViTConfig(**{"num_classes": 1, **fields}) if config is None else replace(config, **fields)
        self.config = config
        dim, patch_size = config.dim, config.patch_size
        layout = TokenLayout(*patch_grid(config.image_size, patch_size))
        self.image_size = layout.height * patch_size, layout.width * patch_size
        self.patch_embedding = nn.Conv2d(config.image_channel, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, layout.num_tokens, dim))
        self.token_dropout = nn.Dropout1d(config.token_dropout)  # of whole rows of (B, N, dim)
        self.num_local_layers = config.num_local_layers
        attention = {"attention_dropout": config.attention_dropout, "bias": False}
        local = {"layout": layout, "locality_strength": config.locality_strength}
        mixers = [GatedPositionalSelfAttention(dim, config.heads, **local, **attention) for _ in range(config.num_local_layers)]
        mixers += [MultiHeadAttention(dim, config.heads, **attention) for _ in range(config.num_nonlocal_layers)]
        layer = {"pre_norm": config.pre_norm, "ff_dim": config.ff_dim, "ff_dropout": config.ff_dropout}
        rates = drop_path_rates(config.drop_path, len(mixers))
        self.blocks = nn.ModuleList(
            ConViTLayer(dim, mixer, **layer, drop_path=rate) for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6) if config.pre_norm else nn.Identity()
        init_vit_weights(self, std=0.02)

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """With output_attentions also the mixing matrices of the layers, (B, heads, N, N) and 1 + N after the local ones."""
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} were given, and the model was made for {self.image_size}")
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = self.token_dropout(x + self.pos_embedding)
        matrices = []
        for number, layer in enumerate(self.blocks):
            if number == self.num_local_layers:
                x = prepend(self.class_token, x)
            x, matrix = layer(x, True) if output_attentions else (layer(x), None)
            matrices.append(matrix)
        if self.num_local_layers == len(self.blocks):
            x = prepend(self.class_token, x)
        x = self.norm(x)
        return (x, matrices) if output_attentions else x


class ConViTWithLinearClassifier(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes): a `ConViTBackbone`, an activation and a linear classifier."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config = config
        self.backbone = ConViTBackbone(config)
        self.activation = getattr(nn, config.pred_act_fnc_name)()
        self.classifier = nn.Linear(config.dim, config.num_classes)
        init_vit_weights(self.classifier, std=0.02)

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """With output_attentions also the mixing matrices of the layers."""
        tokens, matrices = self.backbone(images, True) if output_attentions else (self.backbone(images), None)
        logits = self.classifier(self.activation(tokens[:, 0]))
        return (logits, matrices) if output_attentions else logits
