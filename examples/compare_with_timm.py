"""Vision transformers of timm and vit-pytorch in the training loop of `vit_main.py`, as rows of a comparison.

python examples/compare_with_timm.py --layer timm --config configs/vit_cifar_small.yaml --dataset digits --lr 1e-3

Needs the packages timm and vit-pytorch (requirements-dev.txt). Sizes, patches, data and training are those of
`vit_main.py`; positions, norms and initialization are the other library's.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from options.fields import option
from options.runs import Program, parse_options
from options.vit import ViTConfig
from runs.streams import run_program

PEERS = {"timm": "timm", "vit-pytorch": "vit_pytorch", "vit-pytorch-simple": "vit_pytorch"}  # layer -> package


@dataclass(frozen=True, kw_only=True)
class PeerConfig(ViTConfig):
    """A ViT of another library."""

    layer: str = option("timm", "timm's VisionTransformer, or vit-pytorch's ViT or SimpleViT", choices=tuple(PEERS))

    def __post_init__(self, d_hidden: int | None):
        super().__post_init__(d_hidden)
        if self.layer == "vit-pytorch-simple" and self.d_model % 4:
            raise ValueError(f"d_model={self.d_model} is not a multiple of 4, which layer={self.layer} requires")


PROGRAM = Program(PeerConfig, "Peers", {"lr": 1e-4, "resize": 224})


def make_peer(config: PeerConfig):
    """Return the other library's model in the size of the config: (B, channels, H, W) -> logits (B, classes)."""
    if config.layer == "timm":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            num_classes=config.num_classes,
            embed_dim=config.d_model,
            depth=config.num_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.d_mlp / config.d_model,
            proj_drop_rate=config.dropout,
            attn_drop_rate=config.attention_dropout,
        )
    from vit_pytorch import SimpleViT, ViT

    size = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "dim": config.d_model,
        "depth": config.num_layers,
        "heads": config.num_heads,
        "mlp_dim": config.d_mlp,
        "channels": config.in_channels,
        "dim_head": config.d_model // config.num_heads,
    }
    return ViT(**size, dropout=config.dropout) if config.layer == "vit-pytorch" else SimpleViT(**size)


def main(argv: list[str] | None = None) -> int:
    options, parser = parse_options(PROGRAM, __doc__.splitlines()[0], argv)
    package = PEERS[options.model.layer]
    if importlib.util.find_spec(package) is None:
        parser.error(f"--layer {options.model.layer} needs a package: pip install {package.replace('_', '-')}")
    from train_eval import run

    return run(options, make_peer, program=PROGRAM, stated=parser.stated)


if __name__ == "__main__":
    sys.exit(run_program(main))
