"""Policies and erasing: every image is as torchvision's own transforms make it, on numbers that depend on it alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing, v2

import dataset
from dataset import DeviceBatches, Recipe
from tests.test_dataset import CPU, device_batches, everything, load, pixels, random_images
from utils import keys

POLICIES = {"rand": v2.RandAugment, "trivial": v2.TrivialAugmentWide}


def seeded(index, epoch, stream, seed=0):
    """torch's generator, set as for this image."""
    torch.manual_seed(keys(seed, epoch, torch.tensor([index]), stream).item() % 2**32)


def normalized(image, name):
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in dataset.STATS.get(name, dataset.IMAGENET_STATS))
    return (image / 255 - mean) / std


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])  # of three channels and one
def test_images_on_the_device_are_those_of_torchvision_in_the_order_of_its_reference(name, policy):
    images = random_images(24, *((3, 32) if name == "cifar10" else (1, 28)))
    images[::2] //= 4  # dark, for what stretches the range
    cropped, places = everything(device_batches(images, name=name, augment=True), 2)
    found, same = everything(device_batches(images, name=name, augment=True, auto_augment=policy, random_erasing=0.5), 2)
    assert torch.equal(places, same)
    changed = erased = 0
    for crop, index, image in zip(pixels(cropped, name).round().to(torch.uint8), places.tolist(), found, strict=True):
        seeded(index, 2, dataset.POLICY)
        out = POLICIES[policy](interpolation=InterpolationMode.BILINEAR)(v2.functional.to_pil_image(crop))
        changed += (v2.functional.pil_to_tensor(out) != crop).any().item()
        whole = normalized(v2.functional.pil_to_tensor(out), name)
        seeded(index, 2, dataset.ERASE)
        expected = RandomErasing(0.5)(whole)
        erased += (expected != whole).any().item()
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert changed > 8 and 4 < erased < 20


def test_streamed_images_are_those_of_torchvision_too(tmp_path):
    for part, n in (("train", 12), ("val", 2)):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i, image in enumerate(random_images(n, size=20, seed=ord(label))):
                Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / part / label / f"{i:02}.png")
    options = {"augment": True, "auto_augment": "trivial", "random_erasing": 0.5}
    train = load("folder", tmp_path, resize=16, **options).train
    bilinear = InterpolationMode.BILINEAR
    reference = v2.Compose(
        [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(interpolation=bilinear), v2.PILToTensor()]
    )
    files = [path for label in "ab" for path in sorted((tmp_path / "train" / label).iterdir())]
    for row, image in zip(train.order(1).tolist(), everything(train, 1)[0], strict=True):
        seeded(row, 1, dataset.WORKER)
        whole = normalized(reference(Image.open(files[row])), "folder")
        seeded(row, 1, dataset.ERASE)
        torch.testing.assert_close(image, RandomErasing(0.5)(whole), rtol=0, atol=1e-5)
    tested = everything(load("folder", tmp_path, resize=16, **options).test)[0]
    assert torch.equal(tested, everything(load("folder", tmp_path, resize=16).test)[0])


OPTIONS = {"augment": True, "auto_augment": "rand", "random_erasing": 0.5, "noise": 0.1, "resize": 24}


def test_an_image_depends_on_its_index_the_epoch_and_the_seed_alone():
    images = random_images(21)
    expected, _ = everything(device_batches(images, batch_size=8, **OPTIONS), 1)
    rest, _ = everything(device_batches(images, batch_size=8, **OPTIONS), 1, start=1)
    assert torch.equal(rest, expected[8:])  # of a run that was resumed
    recipes = [Recipe("cifar10", "train", 8, 0, device=CPU, rank=rank, world=2, **OPTIONS) for rank in (0, 1)]
    shares = [DeviceBatches(images, np.arange(21), np.arange(21), recipe).epoch(1) for recipe in recipes]
    together = torch.cat([images for steps in zip(*shares, strict=True) for images, _ in steps])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    for batch_size in (1, 21):
        found, _ = everything(device_batches(images, batch_size=batch_size, **OPTIONS), 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain = {"auto_augment": "rand", "random_erasing": 0.5}
    for options, epoch in ((plain, 0), (plain | {"seed": 1}, 1)):
        found, places = everything(device_batches(images, **options), epoch)
        first, others = everything(device_batches(images, **plain), 1)
        same = (found[places.argsort()] == first[others.argsort()]).flatten(1).all(1)
        assert same.sum() < 14


def test_images_that_are_not_trained_on_stay_as_they_are(tmp_path):
    options = {"train_limit": 60, "test_limit": 20, "val_fraction": 0.3}
    plain = load("digits", tmp_path, **options)
    augmented = load("digits", tmp_path, auto_augment="trivial", random_erasing=1.0, **options)
    for part in ("val", "test"):
        assert torch.equal(everything(getattr(plain, part))[0], everything(getattr(augmented, part))[0])
    assert not torch.equal(everything(plain.train)[0], everything(augmented.train)[0])
