"""Vision transformers with any mixer of `options/layers.py` in place of attention."""

import operator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixers.base import TokenLayout, TokenMixer, accepts_layout, layout_argument
from mixers.build import build_layer, layer_class
from mixers.tables import GridTables, PerGrid
from options.checks import check_patches
from options.layers import layer_row
from options.vit import ViTConfig


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., arXiv 2010.11929) with any mixer: (B, channels, H, W) -> logits (B, classes).

    Patches are in raster order. With `pool="cls"`, the class token comes first. With `num_local_layers`, the first blocks mix
    patches only, and the class token joins after them (d'Ascoli et al., arXiv 2103.10697). `recompute` keeps only the
    inputs of the blocks for the backward pass.

    The size of the images may differ from `config.image_size`. Learned positions are then resampled by `resample_positions`,
    and sinusoidal positions are computed. Blocks and mixers that accept a `layout` get the layout of the patches.

    Raises:
        ValueError: a mixer does not run at another image size. It has parameters for every token, does not fit the grid, or
            takes a `layout` only in its constructor.
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
        elif config.pos_embedding == "sinusoidal":
            self.sinusoids = PerGrid(partial(GridTables, partial(sinusoidal_positions, d)), (local.num_tokens,))
        self.num_local_layers = config.num_layers if config.num_local_layers is None else config.num_local_layers
        mixers = [make_layer1d(config, local, block) for block in range(config.num_layers)]
        row = config.rows.get(config.layer)
        self.asks_layout = layer_class(row) if row and "layout" in row.arguments.values() else ()  # for isinstance
        rates = drop_path_rates(config.drop_path, config.num_layers)
        self.blocks = nn.ModuleList(
            Block(d, config.d_mlp, mixer, config.dropout, rate) for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(d, eps=1e-6) if config.final_norm else nn.Identity()
        self.classifier = nn.Linear(d, config.num_classes)
        self.recompute = False
        # Positions and class token start at the scale of the tokens they are added to: 1 after a LayerNorm.
        init_vit_weights(self, config.initializer_range, token_std=1.0 if config.patch_norm else 0.02)

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """images (B, channels, H, W) -> logits; with output_attentions also a mixing matrix (B, heads, N, N) per block."""
        layout = self.find_layout(images)
        x = self.patch_norm(self.patch_embedding(images).flatten(2).transpose(1, 2))  # (B, N, d)
        if self.config.class_tokens:
            x = prepend(self.class_token, x)
        x = self.add_positions(x, layout)
        matrices: list[Tensor | None] = []
        for number, block in enumerate(self.blocks):
            if number == self.num_local_layers and self.class_token is not None:
                x = prepend(self.class_token, x)
                layout = layout and TokenLayout(layout.height, layout.width, 1)
            given = layout_argument(block, layout)
            if output_attentions:
                x, matrix = block(x, True, **given)
                matrices.append(matrix)
            elif self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False, **given)
            else:
                x = block(x, **given)
        x = self.norm(x)
        logits = self.classifier(x[:, 0] if self.class_token is not None else x.mean(dim=1))
        return (logits, matrices) if output_attentions else logits

    def find_layout(self, images: Tensor) -> TokenLayout | None:
        """Return the layout of the tokens of the first block; None for images of the size of the config."""
        config = self.config
        if tuple(images.shape[2:]) == config.image_size:
            return None
        size = tuple(operator.index(side) for side in images.shape[2:])  # a compiler may hold symbols
        check_patches(config.patch_size, size)
        layout = TokenLayout(size[0] // config.patch_size, size[1] // config.patch_size, config.class_tokens)
        for number, block in enumerate(self.blocks):
            reason = self.why_fixed(getattr(block, "mixer", None), f"blocks.{number}.mixer")
            if reason:
                raise ValueError(
                    f"layer={config.layer} {reason}, so it runs on the {config.grid[0]} x {config.grid[1]} patches that it was "
                    f"made for, not on {layout.height} x {layout.width}"
                )
        return layout

    def why_fixed(self, mixer: nn.Module | None, name: str) -> str:
        """Return the reason why a mixer runs on the grid of the config only, or an empty text."""
        if isinstance(mixer, TokenMixer):
            if mixer.per_token:
                return f"has parameters for every token ({name}.{mixer.per_token})"
            return "" if mixer.runs_on_any_layout else "does not set takes_layout"
        return "has no argument layout in forward" if isinstance(mixer, self.asks_layout) and not accepts_layout(mixer) else ""

    def add_positions(self, x: Tensor, layout: TokenLayout | None) -> Tensor:
        """Add positions to the tokens (B, N, d)."""
        config = self.config
        if config.pos_embedding == "learned":
            grid = config.grid if layout is None else (layout.height, layout.width)
            return x + resample_positions(self.pos_embedding, config.grid, grid, config.class_tokens)
        if config.pos_embedding == "sinusoidal":
            return x + self.sinusoids.at((x.shape[1],), x.device).positions
        return x


class Block(nn.Module):
    """Pre-norm transformer block: x + drop(mixer(norm(x))), then x + drop(mlp(norm(x))).

    (B, N, d_model) -> (B, N, d_model).

    Args:
        dropout: probability of dropping a feature of a residual branch.
        drop_path: probability of dropping a residual branch for a sample.
    """

    def __init__(self, d_model: int, d_mlp: int, mixer: nn.Module, dropout: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(d_model, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.GELU(), nn.Linear(d_mlp, d_model))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, output_attentions: bool = False, layout: TokenLayout | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x (B, N, d_model) -> the same; with output_attentions also the mixing matrix of the mixer.

        layout: layout of the tokens, if it is not that of the construction.
        """
        given, mixed, matrix = layout_argument(self.mixer, layout), self.norm1(x), None
        if output_attentions:
            mixed, matrix = self.mixer(mixed, True, **given)
        else:
            mixed = self.mixer(mixed, **given)
        x = x + self.drop_path(self.dropout(mixed))
        x = x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))
        return (x, matrix) if output_attentions else x


def make_layer1d(config: ViTConfig, layout: TokenLayout, block: int = 0) -> nn.Module:
    """Make the mixer of a block: `config.layer`, after the first `num_local_layers` blocks attention."""
    is_local = config.num_local_layers is None or block < config.num_local_layers
    row = layer_row(config.rows, config.layer if is_local else "Attention", config.branch_ratio)
    return build_layer(row, config, config.d_model, config.num_heads, layout=layout, block=block)


def prepend(token: Tensor, x: Tensor) -> Tensor:
    """Put token (1, 1, d) before the tokens of every image: (B, N, d) -> (B, 1 + N, d)."""
    # x.shape[0], as len(x) is a plain number: under torch.export it would freeze the size of the batch.
    return torch.cat([token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)


def sinusoidal_positions(d_model: int, tokens: int) -> dict[str, Tensor]:
    """Make `positions` (1, tokens, d_model): sines and cosines in turn, of wavelengths from 2 pi to 20000 pi.

    Vaswani et al., arXiv 1706.03762, section 3.5.
    """
    half = torch.arange((d_model + 1) // 2, dtype=torch.float64)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * 10000 ** (-2 * half / d_model)
    return {"positions": torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None, :, :d_model].float()}


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
        if isinstance(module, TokenMixer):
            module.init_weights()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): zero samples of x (B, ...) at this rate in training."""

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
