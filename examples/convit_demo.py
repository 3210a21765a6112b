"""ConViT before training: the neighbor that each head attends to. Run: python examples/convit_demo.py"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.convit import ConViTConfig, ConViTWithLinearClassifier


def main() -> None:
    torch.manual_seed(0)
    # Rectangular gray images in 4 x 6 patches; nine heads on the taps of a 3 x 3 kernel.
    config = ConViTConfig(
        image_size=(16, 24),
        image_channel=1,
        patch_size=4,
        num_local_layers=2,
        num_nonlocal_layers=1,
        dim=36,
        num_classes=10,
        heads=9,
        locality_strength=2.0,
        pre_norm=True,
    )
    model = ConViTWithLinearClassifier(config).eval()
    attention = model.backbone.blocks[0].mixer
    _, matrix = attention(torch.randn(1, 24, 36), output_attentions=True)  # (1, heads, patches, patches)
    patch = 1 * 6 + 2  # row 1, column 2
    for head, weights in enumerate(matrix[0, :, patch], 1):
        row, column = divmod(int(weights.argmax()), 6)
        print(f"head {head} looks {row - 1:+d} down, {column - 2:+d} right of its patch: weight {weights.max():.2f}")
    print(f"gates: {attention.gate.sigmoid().detach().mean():.2f} by location, the rest by content")


if __name__ == "__main__":
    main()
