"""Policies and erasing: every image is as torchvision's own transforms make it, on numbers that depend on it alone."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing, v2

from dataset import DeviceBatches, Recipe, channel_stats
from options.data import DATASETS, DataConfig
from readers.augmentation import ERASE, POLICY, WORKER, crop_and_flip, resize_images
from tests.helpers.data import CPU, device_batches, everything, load, pixels, random_images
from utils import keys

POLICIES = {"rand": v2.RandAugment, "trivial": v2.TrivialAugmentWide}


def seeded(index, epoch, stream, seed=0):
    """torch's generator, set as for this image."""
    torch.manual_seed(keys(seed, epoch, torch.tensor([index]), stream).item() % 2**32)


def normalized(image, name):
    mean, std = channel_stats(DataConfig(dataset=name))
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
        seeded(index, 2, POLICY)
        out = POLICIES[policy](interpolation=InterpolationMode.BILINEAR)(v2.functional.to_pil_image(crop))
        changed += (v2.functional.pil_to_tensor(out) != crop).any().item()
        whole = normalized(v2.functional.pil_to_tensor(out), name)
        seeded(index, 2, ERASE)
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
        seeded(row, 1, WORKER)
        whole = normalized(reference(Image.open(files[row])), "folder")
        seeded(row, 1, ERASE)
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


def naive_crop_and_flip(image, top, left, flip, padding):
    _, H, W = image.shape
    out = torch.zeros_like(image)
    for y in range(H):
        for x in range(W):
            row, col = y + top - padding, (W - 1 - x if flip else x) + left - padding
            if 0 <= row < H and 0 <= col < W:
                out[:, y, x] = image[:, row, col]
    return out


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_crop_and_flip_equals_a_loop(data):
    B, C, H, W, padding = (data.draw(st.integers(low, high)) for low, high in [(1, 4), (1, 3), (1, 9), (1, 9), (0, 4)])
    images = torch.randint(256, (B, C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(B * H + W))
    offsets = st.lists(st.integers(0, 2 * padding), min_size=B, max_size=B)
    top, left = data.draw(offsets), data.draw(offsets)
    flip = data.draw(st.lists(st.booleans(), min_size=B, max_size=B))
    out = crop_and_flip(images, torch.tensor(top), torch.tensor(left), torch.tensor(flip), padding)
    assert out.dtype == torch.uint8
    for i in range(B):
        assert torch.equal(out[i], naive_crop_and_flip(images[i], top[i], left[i], flip[i], padding))


@pytest.mark.parametrize("native, size", [(32, 224), (32, 48), (32, 16), (32, 31), (28, 7), (8, 33)])
def test_resize_equals_pil(native, size):
    images = random_images(3, 3, native)
    ours = resize_images(torch.from_numpy(images), size)
    for image, mine in zip(images, ours, strict=True):
        pil = Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BILINEAR)
        difference = mine.permute(1, 2, 0) - torch.from_numpy(np.array(pil).astype(np.float32))
        assert difference.abs().max() <= 1 and difference.abs().mean() < 0.3  # PIL also rounds between rows and columns
        assert torch.equal(mine, mine.round())


@pytest.mark.parametrize("name, flips, padding", [("digits", False, 1), ("mnist", False, 4), ("fashion_mnist", True, 4)])
def test_augmentation_draws_every_crop_per_image(name, flips, padding):
    size = DATASETS[name].size
    image = torch.from_numpy(random_images(1, 1, size)[0])
    possible = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            for flip in (False, True) if flips else (False,):
                padded = torch.nn.functional.pad(image, [padding] * 4)[:, top : top + size, left : left + size]
                possible[(padded.flip(2) if flip else padded).numpy().tobytes()] = (top, left, flip)
    batches = device_batches(np.repeat(image[None].numpy(), 3000, 0), name=name, augment=True, batch_size=1000)
    seen = collections.Counter()
    for images, _ in batches.epoch(0):
        for out in pixels(images, name).round().to(torch.uint8):
            seen[possible[out.numpy().tobytes()]] += 1  # KeyError: no crop of the image
    assert set(seen) == set(possible.values())
    expected = 3000 / len(possible)
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < len(possible) + 5 * (2 * len(possible)) ** 0.5
