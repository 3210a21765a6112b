"""Crop, flip and resize images; torchvision's policies and random erasing.

torchvision draws from torch's global generator. Here that generator is seeded anew for every image and restored afterwards: an
image is augmented alike in any batch and process, and the run's own random numbers are unaffected.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from options.data import sides_of
from readers.files import import_torchvision

# Streams of random numbers: independent numbers for independent purposes (`utils.keys`).
CROP, ORDER, WORKER, TRAIN_NOISE, VAL_NOISE, TEST_NOISE, POLICY, ERASE = range(8)
NOISE = {"train": TRAIN_NOISE, "val": VAL_NOISE, "test": TEST_NOISE}
INTERPOLATION = {"bilinear": 2, "bicubic": 3}  # PIL's numbers
POLICIES = {"rand": "RandAugment", "trivial": "TrivialAugmentWide"}  # names in torchvision.transforms.v2


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Add a black border to images (B, C, H, W), crop each to (H, W) at its own place, and mirror some.

    Args:
        top, left: Corners of the crops, (B,) int64 from 0 to 2 padding.
        flip: Images to mirror, (B,) bool.
    """
    B, C, H, W = images.shape
    # One gather for the whole batch, by the index of every output pixel in the flattened padded image.
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    cols = torch.arange(W, device=images.device).expand(B, W)
    cols = left[:, None] + torch.where(flip[:, None], W - 1 - cols, cols)  # (B, W), read backwards where mirrored
    pixel = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]  # (B, H, W)
    return padded.gather(2, pixel.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


def resize_images(images: Tensor, size: int | tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Resize pixels from 0 to 255 (B, C, H, W) to float32 (B, C, *size), whole numbers as by PIL's resize."""
    images = F.interpolate(images.float(), size=sides_of(size), mode=interpolation, align_corners=False, antialias=True)
    return images.round_().clamp_(0, 255)


def center_crop(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Crop images (B, C, H, W) around their center to (B, C, *sides), rounding as torchvision's CenterCrop."""
    top, left = (round((size - side) / 2) for size, side in zip(images.shape[2:], sides, strict=True))
    return images[:, :, top : top + sides[0], left : left + sides[1]]


def covering(size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest height and width, in the proportions of `size`, that cover `sides`."""
    (height, width), (rows, columns) = size, sides
    if rows * width >= columns * height:
        return rows, rows * width // height
    return columns * height // width, columns


def _resize(sides: tuple[int, int], interpolation: int, squash: bool, image):
    """Resize a PIL image to (height, width), or in its own proportions to cover them."""
    height, width = sides if squash else covering(image.size[::-1], sides)
    return image.resize((width, height), interpolation)


def image_transform(
    sides: tuple[int, int],
    *,
    augment: bool = False,
    auto_augment: str = "none",
    margin: bool = True,
    interpolation: str = "bilinear",
    squash: bool = False,
) -> Callable:
    """Return a transform of PIL images to (C, *sides) uint8, drawing from torch's CPU generator.

    Args:
        augment: Random resized crop and horizontal flip. Otherwise the image is resized to cover the sides and cropped
            around its center.
        auto_augment: Policy that follows: none, rand or trivial.
        margin: Resize to cover 256/224 of the sides before the center crop.
        squash: Resize to the sides instead, without a crop.
    """
    v2, mode = import_torchvision().transforms.v2, INTERPOLATION[interpolation]
    if augment:
        steps = [v2.RandomResizedCrop(sides, interpolation=mode), v2.RandomHorizontalFlip()]
    else:
        covered = tuple(round(side * 256 / 224) for side in sides) if margin and not squash else sides
        steps = [partial(_resize, covered, mode, squash), v2.CenterCrop(sides)]
    if auto_augment != "none":
        steps.append(make_policy(auto_augment))
    return v2.Compose([*steps, v2.PILToTensor()])


def seeded(items: Iterable, seeds: Tensor) -> Iterator:
    """Yield each item with torch's CPU generator seeded by its number of `seeds` (B,); then restore the generator's state."""
    with torch.random.fork_rng(devices=[]):
        for item, seed in zip(items, seeds.tolist(), strict=True):
            # The CPU generator only: torch.manual_seed would also reset the GPU's, which dropout uses.
            torch.default_generator.manual_seed(seed % 2**32)
            yield item


def make_policy(name: str) -> Callable:
    """Return torchvision's policy with its defaults, bilinear as in its reference: PIL image -> PIL image of equal size."""
    transforms = import_torchvision().transforms
    return getattr(transforms.v2, POLICIES[name])(interpolation=transforms.InterpolationMode.BILINEAR)


def apply_policy(policy: Callable, images: Tensor, seeds: Tensor) -> Tensor:
    """Apply a policy to uint8 images (B, C, H, W) of 1 or 3 channels on the CPU, each with its seed (B,).

    The images are converted to PIL one by one, for which the policies are fastest.
    """
    functional = import_torchvision().transforms.v2.functional
    out = torch.empty_like(images)
    for image, changed in seeded(zip(images, out, strict=True), seeds):
        changed.copy_(functional.pil_to_tensor(policy(functional.to_pil_image(image))))
    return out


def erase(images: Tensor, probability: float, seeds: Tensor) -> Tensor:
    """Set a box of each image (B, C, H, W) to 0, in place, with this probability (Zhong et al., arXiv 1708.04896).

    Boxes are those of torchvision's RandomErasing with its defaults. They are drawn on the CPU, seeded by `seeds` (B,),
    without waiting for the device.
    """
    B, _, H, W = images.shape
    transform = import_torchvision().transforms.RandomErasing(probability, inplace=True)
    kept = torch.ones(B, 1, H, W, dtype=torch.bool, pin_memory=images.is_cuda)
    for image in seeded(kept, seeds):
        transform(image)
    return images.masked_fill_(~kept.to(images.device, non_blocking=True), 0)
