"""ConViT (d'Ascoli et al., arXiv 2103.10697): a vision transformer whose first layers may start as convolutions.

Use `ViT` with `--model convit_ti` to train, or to load timm's weights. Use this one from Python for post-norm, token dropout
or an activation before the classifier.
"""

import math
from dataclasses import MISSING, Field, dataclass, field, replace
from functools import partialmethod

import torch
from torch import Tensor, nn

from layers1d import MultiHeadAttention
from mixers.base import TokenLayout
from mixers.local import GatedPositionalSelfAttention
from options.fields import SIDE, Spec, check_fields, check_value
from options.vit import CONVIT_SIZES
from vit import Block, drop_path_rates, init_vit_weights, prepend

ACTIVATIONS = ("Identity", "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh", "Sigmoid")


def checked(kind: type, default=MISSING, **accepts) -> Field:
    """Make a dataclass field with the checks of an option."""
    return field(default=default, metadata={"option": Spec(kind, "", optional=default is None, **accepts)})


@dataclass(frozen=True)
class ConViTConfig:
    """A ConViT and its classifier.

    Args:
        image_size: pixels, of a square or (height, width).
        num_local_layers: layers of gated positional self-attention; the class token joins after them.
        num_nonlocal_layers: layers of self-attention.
        locality_strength: initial sharpness of the attention of heads around their offsets (alpha in the paper).
        heads, head_dim: one follows from the other and dim; without both, a square number of heads with about 48 features
            each, as in the models of the paper.
        pre_norm: normalize the input of attention and feed-forward instead of their output.
        ff_dim: hidden features of the feed-forward; None: 4 * dim.
        ff_dropout: probability of dropping a hidden or an output feature of the feed-forward.
        attention_dropout: probability of dropping a weight of a pair of tokens.
        token_dropout: probability of dropping a patch.
        drop_path: probability of skipping the attention or the feed-forward of the last layer for an image; it rises linearly
            from 0 in the first layer.
        pred_act_fnc_name: activation (a class of `torch.nn`) between the class token and the linear classifier; `Identity` in
            the presets, as in the paper.

    Raises ValueError if the patches or the heads do not fit, or a value is out of its range.
    """

    image_size: int | tuple[int, int]
    image_channel: int = checked(int, low=1)
    patch_size: int = checked(int, low=1)
    num_local_layers: int = checked(int, low=0)
    num_nonlocal_layers: int = checked(int, low=0)
    dim: int = checked(int, low=1)
    num_classes: int = checked(int, low=1)
    locality_strength: float = checked(float, 1.0, low=0)
    heads: int | None = checked(int, None, low=1)
    head_dim: int | None = checked(int, None, low=1)
    pre_norm: bool = False
    ff_dim: int | None = checked(int, None, low=1)
    ff_dropout: float = checked(float, 0.0, low=0, below=1)
    attention_dropout: float = checked(float, 0.0, low=0, below=1)
    token_dropout: float = checked(float, 0.0, low=0, below=1)
    drop_path: float = checked(float, 0.0, low=0, below=1)
    pred_act_fnc_name: str = checked(str, "ReLU", choices=ACTIVATIONS)

    def __post_init__(self):
        check_fields(self)
        if self.num_local_layers + self.num_nonlocal_layers == 0:
            raise ValueError("num_local_layers=0 and num_nonlocal_layers=0 leave no layer; one of them must be at least 1")
        patch_grid(self.image_size, self.patch_size)
        object.__setattr__(self, "heads", resolve_heads(self.dim, self.heads, self.head_dim))
        object.__setattr__(self, "ff_dim", self.ff_dim or 4 * self.dim)

    @classmethod
    def preset(cls, size: str, num_classes: int = 1000, **changes) -> "ConViTConfig":
        """Return the config of a model in the paper, with 10 local and 2 other layers, by the name of its size.

        changes: fields of the config to override.
        """
        dim, heads = CONVIT_SIZES[size]
        paper = {"dim": dim, "heads": heads, "pre_norm": True, "pred_act_fnc_name": "Identity"}
        image = {"image_size": 224, "image_channel": 3, "patch_size": 16}
        layers = {"num_local_layers": 10, "num_nonlocal_layers": 2}
        return cls(**{**image, **layers, **paper, "num_classes": num_classes, **changes})

    ConViT_Ti = partialmethod(preset, "Ti")
    ConViT_Ti_plus = partialmethod(preset, "Ti_plus")
    ConViT_S = partialmethod(preset, "S")
    ConViT_S_plus = partialmethod(preset, "S_plus")
    ConViT_B = partialmethod(preset, "B")
    ConViT_B_plus = partialmethod(preset, "B_plus")


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return rows and columns of patches. Raises ValueError if they do not fit the image."""
    has_two = isinstance(image_size, (tuple, list)) and len(image_size) == 2
    height, width = (check_value("image_size", side, int, 1, SIDE) for side in (image_size if has_two else [image_size] * 2))
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
    return height // patch_size, width // patch_size


def resolve_heads(dim: int, heads: int | None, head_dim: int | None) -> int:
    """Return the number of heads, from either of the two or from dim alone. Raises ValueError if they contradict dim."""
    if heads is None and head_dim is None:
        squares = (side**2 for side in range(1, math.isqrt(dim) + 1) if dim % side**2 == 0)
        return min(squares, key=lambda heads: abs(dim // heads - 48))
    found = heads or dim // head_dim
    if found < 1 or found * (head_dim or dim // found) != dim:
        raise ValueError(f"heads={heads} and head_dim={head_dim} must multiply to dim={dim}; give one of them")
    return found


def run_with_matrix(module: nn.Module, x: Tensor, output_attentions: bool) -> tuple:
    """Return the output of a module and its mixing matrices, or None without `output_attentions`."""
    return module(x, True) if output_attentions else (module(x), None)


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
        super().__init__(dim, ff_dim or 4 * dim, mixer, ff_dropout, drop_path)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return the tokens; with `output_attentions`, also the mixing matrix (B, heads, N, N)."""
        mixed = self.norm1(x) if self.pre_norm else x
        mixed, matrix = run_with_matrix(self.mixer, mixed, output_attentions)
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

    Patches in raster order with learned positions go through the local layers; then the class token joins.

    Args:
        config: the model; its classifier is not part of the backbone.
        fields: fields of `ConViTConfig` that change `config`; without `config`, all required ones but num_classes.

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
        self.token_dropout = nn.Dropout1d(config.token_dropout)  # drops whole rows of (B, N, dim)
        shared = {"attention_dropout": config.attention_dropout, "bias": False}
        local = shared | {"layout": layout, "locality_strength": config.locality_strength}
        mixers = [GatedPositionalSelfAttention(dim, config.heads, **local) for _ in range(config.num_local_layers)]
        mixers += [MultiHeadAttention(dim, config.heads, **shared) for _ in range(config.num_nonlocal_layers)]
        layer = {"pre_norm": config.pre_norm, "ff_dim": config.ff_dim, "ff_dropout": config.ff_dropout}
        rates = drop_path_rates(config.drop_path, len(mixers))
        self.blocks = nn.ModuleList(
            ConViTLayer(dim, mixer, **layer, drop_path=rate) for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6) if config.pre_norm else nn.Identity()
        init_vit_weights(self, std=0.02)

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return the tokens; with `output_attentions`, also the mixing matrix of each layer.

        These are (B, heads, N, N) in the local layers and (B, heads, 1 + N, 1 + N) in the others.
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} were given, and the model was made for {self.image_size}")
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = self.token_dropout(x + self.pos_embedding)
        matrices, local = [], self.config.num_local_layers
        for layer in self.blocks[:local]:
            x, matrix = run_with_matrix(layer, x, output_attentions)
            matrices.append(matrix)
        x = prepend(self.class_token, x)  # (B, 1 + N, dim)
        for layer in self.blocks[local:]:
            x, matrix = run_with_matrix(layer, x, output_attentions)
            matrices.append(matrix)
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
        """Return the logits; with `output_attentions`, also the mixing matrices of the layers."""
        tokens, matrices = run_with_matrix(self.backbone, images, output_attentions)
        logits = self.classifier(self.activation(tokens[:, 0]))
        return (logits, matrices) if output_attentions else logits
