"""Images cropped, mirrored and resized; and torchvision's own augmentation: a policy, and erasing.

torchvision draws from torch's global generator. Here it draws from that one's copy, set anew for every image, so that an image
is augmented alike in any batch and process, and the run's own numbers stay as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from options.data import sides_of
from readers.files import import_torchvision

BILINEAR = 2  # of PIL
POLICIES = {"rand": "RandAugment", "trivial": "TrivialAugmentWide"}  # names in torchvision.transforms.v2


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Images (B, C, H, W) in a black border, cut back to (H, W) at (top, left) from 0 to 2 padding, some then mirrored.

    `top`, `left` (B,) are int64, `flip` (B,) is bool: each image has its own.
    """
    B, C, H, W = images.shape
    # One gather for the whole batch: the index of every pixel that leaves, in the padded image laid flat.
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    cols = torch.arange(W, device=images.device).expand(B, W)
    cols = left[:, None] + torch.where(flip[:, None], W - 1 - cols, cols)  # (B, W), read backwards where mirrored
    pixel = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]  # (B, H, W)
    return padded.gather(2, pixel.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


def resize_images(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Pixels from 0 to 255 (B, C, H, W) -> float32 (B, C, *size), whole numbers as PIL's bilinear resize gives."""
    images = F.interpolate(images.float(), size=sides_of(size), mode="bilinear", align_corners=False, antialias=True)
    return images.round_().clamp_(0, 255)


def with_margin(sides: tuple[int, int]) -> tuple[int, int]:
    """What images are resized to before their middle is cut out to these sides."""
    return tuple(round(side * 256 / 224) for side in sides)


def cover(sides: tuple[int, int], image):
    """A PIL image resized, in its own proportions, to the smallest that covers (height, width)."""
    (width, height), (rows, columns) = image.size, sides
    if rows * width >= columns * height:
        return image.resize((rows * width // height, rows), BILINEAR)
    return image.resize((columns, columns * height // width), BILINEAR)


@contextlib.contextmanager
def forked_generator() -> Iterator[torch.Generator]:
    """torch's CPU generator to set and draw from, as it was again afterwards."""
    with torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would reset the GPU's for dropout as well.
        yield torch.default_generator


def make_policy(name: str):
    """torchvision's transform with its defaults, bilinear as in its reference: a PIL image -> another of its size and mode."""
    transforms = import_torchvision().transforms
    return getattr(transforms.v2, POLICIES[name])(interpolation=transforms.InterpolationMode.BILINEAR)


def apply_policy(policy, images: Tensor, seeds: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) of 1 or 3 channels on the CPU, one by one through a policy (as PIL images: the fastest)."""
    functional = import_torchvision().transforms.v2.functional
    out = torch.empty_like(images)
    with forked_generator() as generator:
        for image, seed, to in zip(images, seeds.tolist(), out, strict=True):
            generator.manual_seed(seed % 2**32)
            to.copy_(functional.pil_to_tensor(policy(functional.to_pil_image(image))))
    return out


def erase(images: Tensor, probability: float, seeds: Tensor) -> Tensor:
    """Images (B, C, H, W) in place -> a box of each set to 0 with this probability (Zhong et al., arXiv 1708.04896).

    The boxes are those of torchvision's RandomErasing with its defaults, drawn on the CPU; the device is not waited for.
    """
    B, _, H, W = images.shape
    transform = import_torchvision().transforms.RandomErasing(probability, inplace=True)
    kept = torch.ones(B, 1, H, W, dtype=torch.bool, pin_memory=images.is_cuda)
    with forked_generator() as generator:
        for image, seed in zip(kept, seeds.tolist(), strict=True):
            generator.manual_seed(seed % 2**32)
            transform(image)
    return images.masked_fill_(~kept.to(images.device, non_blocking=True), 0)
