"""Augmentation by torchvision's own transforms, of each image on random numbers of its own: a policy, and erasing.

torchvision draws from torch's global generator. Here it draws from that one's copy, set anew for every image, so that an image
is augmented alike in any batch and process, and the run's own numbers stay as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from data_files import import_torchvision

POLICIES = {"rand": "RandAugment", "trivial": "TrivialAugmentWide"}  # names in torchvision.transforms.v2


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
    F = import_torchvision().transforms.v2.functional
    out = torch.empty_like(images)
    with forked_generator() as generator:
        for image, seed, to in zip(images, seeds.tolist(), out, strict=True):
            generator.manual_seed(seed % 2**32)
            to.copy_(F.pil_to_tensor(policy(F.to_pil_image(image))))
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
