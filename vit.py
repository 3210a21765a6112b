"""Vision transformers with any mixer that has a row in `options/layers.py` in place of attention."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixers.base import MultiHeadMixer, TokenLayout
from mixers.build import build_layer
from mixers.selection import ConstantTables
from options.layers import layer_row
from options.vit import ViTConfig


class ViT(ConstantTables):
    """Vision transformer (Dosovitskiy et al., arXiv 2010.11929) with any mixer: (B, channels, H, W) -> logits (B, classes).

    Patches, in raster order, after the class token if `pool="cls"`. Under `num_local_layers` the first blocks mix
    patches only, and the class token joins after them (d'Ascoli et al., arXiv 2103.10697). `recompute` keeps only the
    inputs of the blocks for the backward pass. Images of another size than `config.image_size` go through `resized`, with the
    same weights.
    """

    replaceable = r"classifier\.|blocks\.\d+\.mixer\."  # parameters that a loaded checkpoint may lack

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        d, height, width = config.d_model, *config.grid
        self.patch_embedding = nn.Conv2d(config.in_channels, d, config.patch_size, stride=config.patch_size)
        self.patch_norm = nn.LayerNorm(d, eps=1e-6) if config.patch_norm else nn.Identity()
        self.class_token = nn.Parameter(torch.empty(1, 1, d)) if config.pool == "cls" else None
        local = TokenLayout(height, width, config.class_tokens)
        if config.pos_embedding == "learned":
            self.pos_embedding = nn.Parameter(torch.empty(1, local.num_tokens, d))
        else:
            has_table = config.pos_embedding == "sinusoidal"
            self.set_tables(lambda: {"pos_embedding": sinusoidal_positions(local.num_tokens, d)[None] if has_table else None})
        self.num_local_layers = config.num_layers if config.num_local_layers is None else config.num_local_layers
        mixers = [make_layer1d(config, local, block) for block in range(config.num_layers)]
        rates = drop_path_rates(config.drop_path, config.num_layers)
        self.blocks = nn.ModuleList(
            Block(d, config.d_mlp, mixer, config.dropout, rate) for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(d, eps=1e-6) if config.final_norm else nn.Identity()
        self.classifier = nn.Linear(d, config.num_classes)
        self.recompute = False
        self._resized: dict[tuple[int, int], ViT] = {}  # no submodules: they share this one's parameters
        # Positions and class token start at the scale of the tokens they are added to: 1 after a LayerNorm.
        init_vit_weights(self, config.initializer_range, token_std=1.0 if config.patch_norm else 0.02)

    def resized(self, image_size: tuple[int, int]) -> ViT:
        """Return this network for images of another size: the same parameters, tables of the other grid.

        Learned positions are resampled by `resample_positions`, sinusoidal ones computed. Raises ValueError where a mixer has
        parameters for every token, or does not fit the grid.
        """
        new = self._resized.get(image_size)
        if new is None:
            with torch.device("meta"):  # its parameters are set below; tables are made on the CPU all the same
                new = ViT(dataclasses.replace(self.config, image_size=image_size))
            self._resized[image_size] = new
        new.recompute = self.recompute
        for name, module in self.named_modules():
            other = new.get_submodule(name)
            other.training = module.training
            for own, shared in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
                for key, value in own.items():
                    if value is None or key in module._non_persistent_buffers_set:
                        continue  # a table
                    if key == "pos_embedding":
                        value = resample_positions(value, self.config.grid, new.config.grid, self.config.class_tokens)
                    elif value.shape != shared[key].shape:
                        here, there = (f"{one.config.grid[0]} x {one.config.grid[1]}" for one in (self, new))
                        raise ValueError(
                            f"layer={self.config.layer} has parameters for every token ({name}.{key}), so it runs on the "
                            f"{here} patches that it was made for, not on {there}"
                        )
                    shared[key] = value
            for key, table in getattr(other, "_constants", {}).items():
                weight = self.classifier.weight
                other._buffers[key] = table.to(weight.device, weight.dtype if table.is_floating_point() else table.dtype)
        return new

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """images (B, channels, H, W) -> logits; with output_attentions also a mixing matrix (B, heads, N, N) per block."""
        if tuple(images.shape[2:]) != self.config.image_size:
            return self.resized(tuple(images.shape[2:]))(images, output_attentions)
        x = self.patch_norm(self.patch_embedding(images).flatten(2).transpose(1, 2))  # (B, N, d)
        if self.config.class_tokens:
            x = prepend(self.class_token, x)
        if self.pos_embedding is not None:
            x = x + self.pos_embedding
        matrices: list[Tensor | None] = []
        for number, block in enumerate(self.blocks):
            if number == self.num_local_layers and self.class_token is not None:
                x = prepend(self.class_token, x)
            if output_attentions:
                x, matrix = block(x, True)
                matrices.append(matrix)
            else:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        x = self.norm(x)
        logits = self.classifier(x[:, 0] if self.class_token is not None else x.mean(dim=1))
        return (logits, matrices) if output_attentions else logits


class Block(nn.Module):
    """Pre-norm transformer block: x + drop(mixer(norm(x))), then x + drop(mlp(norm(x))). (B, N, d_model) -> the same.

    Args:
        dropout: probability of dropping a feature of either sum's second term.
        drop_path: probability of dropping that term for a sample.
    """

    def __init__(self, d_model: int, d_mlp: int, mixer: nn.Module, dropout: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(d_model, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.GELU(), nn.Linear(d_mlp, d_model))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """x (B, N, d_model) -> the same; with output_attentions also the mixing matrix of the mixer."""
        mixed, matrix = self.mixer(self.norm1(x), True) if output_attentions else (self.mixer(self.norm1(x)), None)
        x = x + self.drop_path(self.dropout(mixed))
        x = x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))
        return (x, matrix) if output_attentions else x


def make_layer1d(config: ViTConfig, layout: TokenLayout, block: int = 0) -> nn.Module:
    """Make the mixer of a block: `config.layer`, after the first `num_local_layers` blocks attention."""
    is_local = config.num_local_layers is None or block < config.num_local_layers
    row = layer_row(config.rows, config.layer if is_local else "Attention", config.branch_ratio)
    return build_layer(row, config, config.d_model, config.num_heads, layout=layout)


def prepend(token: Tensor, x: Tensor) -> Tensor:
    """Put token (1, 1, d) before the tokens of every image: (B, N, d) -> (B, 1 + N, d)."""
    # x.shape[0], as len(x) is a plain number: under torch.export it would freeze the size of the batch.
    return torch.cat([token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)


def sinusoidal_positions(tokens: int, d_model: int) -> Tensor:
    """(tokens, d_model), sines and cosines in turn, of wavelengths from 2 pi to 20000 pi (arXiv 1706.03762, 3.5)."""
    half = torch.arange((d_model + 1) // 2, dtype=torch.float64)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * 10000 ** (-2 * half / d_model)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model].float()


@torch.no_grad()
def init_vit_weights(model: nn.Module, std: float | None = None, token_std: float = 0.02) -> None:
    """Initialize linears, patches, class token and positions, and then each mixer by its `init_weights`.

    std None: Xavier uniform for linears, the default of convolutions for patches, and normal positions and class tokens of
    standard deviation `token_std`. A number: truncated normals of that standard deviation for all of them, as in torchvision's,
    timm's and the ConViT models. Biases of linears are zero.
    """
    if std is None:
        init_weight, init_token = nn.init.xavier_uniform_, partial(nn.init.normal_, std=token_std)
    else:
        init_weight = init_token = partial(nn.init.trunc_normal_, std=std)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (name.endswith("patch_embedding") and std is not None):
            init_weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("class_token", "pos_embedding")):
            init_token(parameter)
    for module in model.modules():
        if isinstance(module, MultiHeadMixer):
            module.init_weights()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): in training, zero samples of x (B, ...) at this rate."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


def drop_path_rates(rate: float, num_layers: int) -> list[float]:
    """Rates of the blocks: from 0 in the first to `rate` in the last, as in timm."""
    return torch.linspace(0, rate, num_layers, device="cpu").tolist()


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], class_tokens: int = 0) -> Tensor:
    """Interpolate learned positions (1, class_tokens + h w, d) from a grid of patches to another: bicubic, antialiased.

    Positions of class tokens stay. Equal to timm's `resample_abs_pos_embed`.
    """
    if old == new:
        return table
    first, patches = table[:, :class_tokens], table[:, class_tokens:]
    image = patches.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, d, h, w)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    return torch.cat([first, image.flatten(2).mT.to(table.dtype)], dim=1)
