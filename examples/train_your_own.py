"""Train a model of another library on a data set of your own, with ConvNN's loop, outputs and resume.

python examples/train_your_own.py torchvision
python examples/train_your_own.py huggingface  # needs transformers

The data set is a class of this file: stripes that run down or across, drawn as they are read. Either model learns them in a few
seconds. Interrupt the script and run it again: it goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convnn import TrainConfig, train

SIDE = 16


class Stripes(Dataset):
    """Gray images (1, 16, 16) of stripes in noise; label 0: down, 1: across."""

    def __init__(self, length: int, noise: float = 0.5):
        self.length, self.noise = length, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        label = number % 2
        row = (torch.arange(SIDE) * 2 * torch.pi / 4 + torch.rand(()) * 6.3).sin()
        image = row.expand(SIDE, SIDE) if label == 0 else row[:, None].expand(SIDE, SIDE)
        return (image + self.noise * torch.randn(SIDE, SIDE))[None], label


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=SIDE, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2
    )
    model.conv_proj = nn.Conv2d(1, 32, 4, stride=4)  # gray images
    return model


class Logits(nn.Module):
    """A classifier of Hugging Face: images -> logits, not an object that holds them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def huggingface_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=SIDE, patch_size=4, num_channels=1, num_labels=2, **sizes)
    return Logits(ViTForImageClassification(config))


MODELS = {"torchvision": torchvision_vit, "huggingface": huggingface_vit}


def main(name: str = "torchvision", output_dir: str = "Output/stripes", num_epochs: int = 5) -> dict:
    torch.manual_seed(0)
    model = MODELS[name]()
    train_loader = DataLoader(Stripes(512), batch_size=32, shuffle=True)
    test_loader = DataLoader(Stripes(128), batch_size=64)
    config = TrainConfig(num_epochs=num_epochs, lr=3e-3, scheduler="cosine", resume=True)
    return train(model, train_loader, test_loader, config, output_dir=f"{output_dir}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
