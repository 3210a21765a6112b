"""Small data sets of the real formats, and the batches made of them."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DeviceBatches, Recipe, channel_stats, load_data
from options.data import DATASETS, DataConfig
from runs import DataError

CPU = torch.device("cpu")
FASHION = Path("/usr/share/datasets/fashion-mnist")


def load(name, path, *, batch_size=8, seed=0, test_only=False, **options):
    options = {"resize": DATASETS[name].size, "num_workers": 0, "download": False} | options
    config = DataConfig(dataset=name, data_path=str(path), **options)
    return load_data(config, batch_size=batch_size, seed=seed, device=CPU, test_only=test_only)


def fails(name, path, **options) -> str:
    with pytest.raises(DataError) as caught:
        data = load(name, path, **options)
        for batches in data[:3]:
            list(batches.epoch(0) if batches else ())
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def everything(batches, epoch=0, start=0):
    images, labels = zip(*batches.epoch(epoch, start), strict=True)
    return torch.cat(images), torch.cat(labels)


def pixels(images, name):
    """Normalised images back to 0 to 255."""
    mean, std = channel_stats(DataConfig(dataset=name))
    return (images * std + mean) * 255


def random_images(n, channels=3, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size)).astype(np.uint8)


def device_batches(images, *, part="train", name="cifar10", batch_size=8, seed=0, **options):
    """Batches whose labels are the images' places."""
    recipe = Recipe(name, part, batch_size, seed, **{"resize": images.shape[-1], "device": CPU} | options)
    return DeviceBatches(images, np.arange(len(images)), np.arange(len(images)), recipe)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder, *, gz=False, parts=("train", "t10k"), n=20):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, part in enumerate(parts):
        arrays[part] = random_images(n, 1, 28, seed)[:, 0], (np.arange(n) + seed) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            raw = idx(array)
            (folder / f"{part}-{kind}-ubyte{'.gz' * gz}").write_bytes(gzip.compress(raw) if gz else raw)
    return arrays


def write_cifar(root, name="cifar10", *, n=12, protocol=4):
    folder, key, files = {
        "cifar10": ("cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]),
        "cifar100": ("cifar-100-python", "fine_labels", ["train", "test"]),
    }[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, file in enumerate(files):
        batch = {"data": random_images(n, seed=seed).reshape(n, 3072), key: [i % 10 for i in range(n)]}
        written[file] = batch["data"]
        (root / folder / file).write_bytes(pickle.dumps(batch, protocol=protocol))
    return written


def write_folder(root, *, classes=("ant", "bee", "cat"), train=5, val=2, suffix="png"):
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                image = rng.integers(0, 60, (30 + 3 * i, 40, 3)) + 60 * label
                Image.fromarray(image.astype(np.uint8)).save(root / part / name / f"{i}.{suffix}")
