"""ConViT (d'Ascoli et al., arXiv 2103.10697): a vision transformer whose first layers may start as convolutions.

`ViT` builds the same plan from `--model convit_ti`; here it stands on its own, with its own config.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from layers1d import MultiHeadAttention, TokenLayout
from local_attention import GatedPositionalSelfAttention
from options import CONVIT_SIZES
from vit import init_vit_weights

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
        heads, head_dim: one follows from the other and dim.
        pre_norm: normalize what goes into attention and feed-forward, instead of what comes out.
        ff_dim: hidden features of the feed-forward; None: 4 * dim.
        ff_dropout: probability of dropping a hidden or an output feature of the feed-forward.
        attention_dropout: probability of dropping a weight of a pair of tokens.
        token_dropout: probability of dropping a patch.
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
    pred_act_fnc_name: str = "ReLU"

    def __post_init__(self):
        patch_grid(self.image_size, self.patch_size)
        if min(self.num_local_layers, self.num_nonlocal_layers) < 0 or self.num_local_layers + self.num_nonlocal_layers < 1:
            raise ValueError(
                f"num_local_layers={self.num_local_layers} and num_nonlocal_layers={self.num_nonlocal_layers} "
                "must be at least 0, and one of them at least 1"
            )
        for name in ("image_channel", "dim", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("ff_dropout", "attention_dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.ff_dim is None:
            object.__setattr__(self, "ff_dim", 4 * self.dim)
        heads = resolve_heads(self.dim, self.heads, self.head_dim)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "head_dim", self.dim // heads)
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


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
    return height // patch_size, width // patch_size


def resolve_heads(dim: int, heads: int | None, head_dim: int | None) -> int:
    """The number of heads from either of the two."""
    found = heads or (dim // head_dim if head_dim else 0)
    if found < 1 or found * (head_dim or dim // found) != dim:
        raise ValueError(f"heads={heads} and head_dim={head_dim} must multiply to dim={dim}; give one of them")
    return found


class ConViTLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm before (`pre_norm`) or after: (B, N, dim) -> the same.

    Args:
        mixer: a module on (B, N, dim): `GatedPositionalSelfAttention` in local layers, `MultiHeadAttention` in others.
        ff_dim: hidden features of the feed-forward; None: 4 * dim.
        ff_dropout: probability of dropping a hidden or an output feature of the feed-forward.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, *, pre_norm: bool = False, ff_dim: int | None = None, ff_dropout: float = 0.0
    ):
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = 4 * dim if ff_dim is None else ff_dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(ff_dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.mixer(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.mixer(x))
        return self.norm2(x + self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        first, activation, second = self.mlp
        return self.dropout(second(self.dropout(activation(first(x)))))


class ConViTBackbone(nn.Module):
    """Images (B, channels, H, W) -> tokens (B, 1 + N, dim), the class token first.

    Patches in raster order with learned positions go through the local layers; the class token joins for the others.
    Arguments and errors are those of `ConViTConfig`.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        image_channel: int,
        patch_size: int,
        num_local_layers: int,
        num_nonlocal_layers: int,
        dim: int,
        locality_strength: float = 1.0,
        heads: int | None = None,
        head_dim: int | None = None,
        pre_norm: bool = False,
        ff_dim: int | None = None,
        ff_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        token_dropout: float = 0.0,
    ):
        super().__init__()
        heads, height, width = resolve_heads(dim, heads, head_dim), *patch_grid(image_size, patch_size)
        layout = TokenLayout(height, width)
        self.patch_embedding = nn.Conv2d(image_channel, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, layout.num_tokens, dim))
        self.token_dropout = nn.Dropout1d(token_dropout)  # of whole rows of (B, N, dim)
        self.num_local_layers = num_local_layers
        attention = {"attention_dropout": attention_dropout, "bias": False}
        mixers = [
            GatedPositionalSelfAttention(dim, heads, layout=layout, locality_strength=locality_strength, **attention)
            for _ in range(num_local_layers)
        ]
        mixers += [MultiHeadAttention(dim, heads, **attention) for _ in range(num_nonlocal_layers)]
        feed_forward = {"ff_dim": ff_dim, "ff_dropout": ff_dropout}
        self.blocks = nn.ModuleList(ConViTLayer(dim, mixer, pre_norm=pre_norm, **feed_forward) for mixer in mixers)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pre_norm else nn.Identity()
        init_vit_weights(self, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = self.token_dropout(x + self.pos_embedding)
        for layer in self.blocks[: self.num_local_layers]:
            x = layer(x)
        x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for layer in self.blocks[self.num_local_layers :]:
            x = layer(x)
        return self.norm(x)


class ConViTWithLinearClassifier(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes): a `ConViTBackbone`, an activation and a linear classifier."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config = config
        of_the_head = ("num_classes", "pred_act_fnc_name")
        self.backbone = ConViTBackbone(**{f.name: getattr(config, f.name) for f in fields(config) if f.name not in of_the_head})
        self.activation = getattr(nn, config.pred_act_fnc_name)()
        self.classifier = nn.Linear(config.dim, config.num_classes)
        init_vit_weights(self, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.activation(self.backbone(images)[:, 0]))
