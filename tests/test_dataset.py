"""Data: files of the real formats, written small, and the batches made of them against naive references."""

import builtins
import collections
import contextlib
import functools
import gzip
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import dataset
from dataset import DeviceBatches, Recipe, load_data
from options.data import DATASETS, DataConfig
from readers import files as data_files
from readers.augmentation import crop_and_flip, resize_images
from readers.files import READERS, import_torchvision
from readers.images import DataError, decode_image
from utils import gaussian, keys, uniform

CPU = torch.device("cpu")
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Workers on a machine with one core are as good a test as on any other.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in dataset.STATS.get(name, dataset.IMAGENET_STATS))
    return (images * std + mean) * 255


def random_images(n, channels=3, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size)).astype(np.uint8)


def device_batches(images, *, part="train", name="cifar10", batch_size=8, seed=0, **options):
    """Batches whose labels are the images' places."""
    recipe = Recipe(name, part, batch_size, seed, **{"resize": images.shape[-1], "device": CPU} | options)
    return DeviceBatches(images, np.arange(len(images)), np.arange(len(images)), recipe)


# ---------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------


def murmur(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def uniform_in_integers(seed, epoch, index, column, stream):
    keys = []
    for salt in (0, 1):
        x = index
        for word in (stream, epoch, seed):
            x = murmur((x + word * 0x9E3779B9 + salt + 1) % 2**32)
        keys.append(x)
    return (murmur((keys[0] + (keys[1] | 1) * murmur(column + 1)) % 2**32) >> 8) / 2**24


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_uniform_is_the_hash_in_plain_integers(seed, epoch, index):
    drawn = uniform(seed, epoch, torch.tensor(index), 7, stream=2)
    expected = [[uniform_in_integers(seed, epoch, i, column, 2) for column in range(7)] for i in index]
    assert torch.equal(drawn, torch.tensor(expected, dtype=torch.float32))


def test_uniform_is_uniform_and_uncorrelated():
    rows = uniform(0, 0, torch.arange(20000), 50)
    assert 0 <= rows.min() < 1e-5 and 1 - 1e-5 < rows.max() < 1
    assert abs(rows.mean() - 0.5) < 5 * (1 / 12 / 1e6) ** 0.5
    assert abs(rows.var() - 1 / 12) < 5 * (1 / 180 / 1e6) ** 0.5
    counts = torch.bincount((rows * 256).long().flatten(), minlength=256).double()
    chi_squared = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5

    def correlation(a, b):
        return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])

    neighbours = {
        "index": (rows[1:], rows[:-1]),
        "index, shifted": (rows[1:, 1:], rows[:-1, :-1]),
        "column": (rows[:, 1:], rows[:, :-1]),
        "epoch": (rows, uniform(0, 1, torch.arange(20000), 50)),
        "seed": (rows, uniform(1, 0, torch.arange(20000), 50)),
        "stream": (rows, uniform(0, 0, torch.arange(20000), 50, stream=1)),
    }
    for what, (a, b) in neighbours.items():
        assert abs(correlation(a, b)) < 5e-3, what  # five standard deviations of 1e6 pairs
    between_columns = torch.corrcoef(rows.T) - torch.eye(50)
    between_rows = torch.corrcoef(uniform(3, 0, torch.arange(200), 20000)) - torch.eye(200)
    assert between_columns.abs().max() < 6 / 20000**0.5 and between_rows.abs().max() < 6 / 20000**0.5


def test_seed_epoch_and_stream_all_matter_and_no_two_keys_collide():
    index = torch.arange(100)
    rows = [keys(s, e, index, r).tolist() for s in range(10) for e in range(10) for r in range(3)]
    repeats = 30000 - len({key for row in rows for key in row})
    assert repeats < 3  # 0.1 expected of 32-bit numbers drawn at random
    assert len(keys(7, 3, torch.arange(10**6), 1).unique()) == 10**6


def test_gaussian_moments():
    z = gaussian(5, 2, torch.arange(1001), 999, stream=3).double()
    assert z.shape == (1001, 999)
    assert abs(z.mean()) < 5e-3 and abs(z.var() - 1) < 7e-3
    assert abs((z**3).mean()) < 0.02 and abs((z**4).mean() - 3) < 0.05
    assert abs((z.abs() > 3).double().mean() - 0.0027) < 3e-4 and z.abs().max() > 4.2
    halves = torch.corrcoef(torch.stack((z[:, :499].flatten(), z[:, 500:].flatten())))[0, 1]  # cosine and sine
    assert abs(halves) < 8e-3


# ---------------------------------------------------------------------------------------------------------------
# Crop, flip, resize
# ---------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------
# Batches on the device
# ---------------------------------------------------------------------------------------------------------------


def test_normalisation():
    images = random_images(5)
    out, places = everything(device_batches(images, part="test"))
    mean, std = (np.array(numbers).reshape(1, 3, 1, 1) for numbers in dataset.STATS["cifar10"])
    assert out.dtype == torch.float32 and places.dtype == torch.int64
    np.testing.assert_allclose(out.numpy(), (images / 255 - mean) / std, atol=2e-6)
    assert places.tolist() == [0, 1, 2, 3, 4]


def test_training_order():
    batches = device_batches(random_images(50, size=4))
    orders = [everything(batches, epoch)[1].tolist() for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] == orders[2] != orders[1] and orders[0] != list(range(50))
    other = everything(device_batches(random_images(50, size=4), seed=1))[1].tolist()
    assert other not in orders
    firsts = {everything(device_batches(random_images(50, size=4), seed=s), e)[1][0].item() for s in range(8) for e in range(8)}
    assert len(firsts) > 25  # 36 expected of 64 independent draws from 50


@pytest.mark.parametrize("part", ["train", "test"])
def test_resumed_epoch_gives_the_same_batches(part):
    batches = device_batches(random_images(43), part=part, augment=part == "train", noise=0.1, resize=33)
    whole = list(batches.epoch(3))
    assert len(whole) == len(batches) == 6 and batches.num_samples == 43
    assert [len(images) for images, _ in whole] == [8, 8, 8, 8, 8, 3]
    for start in range(7):
        rest = list(batches.epoch(3, start))
        assert len(rest) == 6 - start
        for (images, labels), (again, labels_again) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, again) and torch.equal(labels, labels_again)


def test_results_do_not_depend_on_batch_size_or_place_in_memory():
    images = random_images(43)
    options = {"augment": True, "noise": 0.2, "resize": 40}
    expected, order = everything(device_batches(images, batch_size=43, **options), 1)
    for batch_size in (1, 5, 100):
        out, places = everything(device_batches(images, batch_size=batch_size, **options), 1)
        assert torch.equal(places, order)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    # An image that moved, but kept its index, is augmented alike.
    recipe = Recipe("cifar10", "train", 10, 0, 40, CPU, augment=True, noise=0.2)
    half = np.arange(1, 43, 2)
    out, places = everything(DeviceBatches(images[half], half, half, recipe), 1)
    torch.testing.assert_close(out[places.argsort()], expected[order.argsort()][half], rtol=0, atol=1e-5)


def test_augmentation_changes_with_epoch_and_seed():
    def epoch(e, seed=0):
        images, places = everything(device_batches(random_images(64), augment=True, seed=seed), e)
        return images[places.argsort()]

    first = epoch(0)
    for other in (epoch(1), epoch(0, seed=1)):
        same = (first == other).flatten(1).all(1).sum()
        assert same < 8  # 64 / (81 * 2) expected


def test_noise():
    images = np.full((200, 3, 16, 16), 128, np.uint8)

    def noise(part, epoch, seed=0):
        out, places = everything(device_batches(images, part=part, noise=0.1, seed=seed), epoch)
        return (pixels(out, "cifar10") / 255 - 128 / 255)[places.argsort()]

    base = noise("train", 0)
    assert abs(base.mean()) < 2e-3 and abs(base.std() - 0.1) < 2e-3
    assert torch.equal(base, noise("train", 0))
    assert torch.equal(noise("test", 0), noise("test", 5)) and torch.equal(noise("val", 0), noise("val", 5))
    others = [noise("train", 1), noise("train", 0, seed=1), noise("test", 0), noise("val", 0), noise("test", 0, seed=1)]
    for a, other in enumerate(others):
        for b in [base, *others[:a]]:
            assert abs(torch.corrcoef(torch.stack((other.flatten(), b.flatten())))[0, 1]) < 0.02
    between_images = torch.corrcoef(base.flatten(1)) - torch.eye(200)
    assert between_images.abs().max() < 6 / 768**0.5


def test_global_generators_are_left_alone(tmp_path):
    write_folder(tmp_path)
    options = {"augment": True, "auto_augment": "rand", "random_erasing": 0.5, "noise": 0.1}
    streamed = load("folder", tmp_path, resize=16, **options)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for batches in (device_batches(random_images(20), **options), streamed.train, streamed.test):
        everything(batches)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("more", [{}, {"auto_augment": "trivial", "random_erasing": 0.5}], ids=["plain", "policy"])
def test_cuda_gives_the_same_batches_without_waiting(more):
    images = random_images(64)
    options = {"augment": True, "noise": 0.1, "resize": 48, **more}
    expected, _ = everything(device_batches(images, **options))
    on_gpu = device_batches(images, **options | {"device": torch.device("cuda")}).epoch(0)
    first = next(on_gpu)  # the order is copied to the device once an epoch
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [first, *on_gpu]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.cat([x for x, _ in batches]).cpu(), expected, rtol=0, atol=0.02)


# ---------------------------------------------------------------------------------------------------------------
# Limits and splits
# ---------------------------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array)


@given(LABELS, st.data())
@settings(deadline=None)
def test_balanced_subset(labels, data):
    n = data.draw(st.integers(1, len(labels)))
    subset = dataset.balanced_subset(labels, n)
    taken, rounds = [], 0  # naive: in every round, in order, each class gives its next image
    while len(taken) < n:
        round_ = [np.flatnonzero(labels == c)[rounds] for c in range(6) if (labels == c).sum() > rounds]
        taken += sorted(round_)[: n - len(taken)]
        rounds += 1
    assert subset.tolist() == sorted(taken)


@given(LABELS, st.floats(0, 0.99))
@settings(deadline=None)
def test_stratified_split(labels, fraction):
    kept, held = dataset.stratified_split(labels, fraction)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept) and held.tolist() == sorted(held)
    assert abs(len(held) - len(labels) * fraction) <= 0.5 + 1e-9
    for c in range(6):
        assert abs((labels[held] == c).sum() - (labels == c).sum() * fraction) <= 1 + 1e-9


def test_stratified_split_is_exact_where_it_can_be_and_takes_images_from_everywhere():
    labels = np.repeat(np.arange(10), 500)
    _, held = dataset.stratified_split(labels, 0.1)
    assert np.bincount(labels[held]).tolist() == [50] * 10
    one_class = held[labels[held] == 3] - 1500
    assert len(set(one_class // 50)) >= 8  # of ten tenths of the class; not only its beginning
    assert len(set(np.diff(one_class))) > 10  # nor every tenth image


def test_limits_and_validation_split_of_digits(tmp_path):
    data = load("digits", tmp_path, train_limit=100, test_limit=50, val_fraction=0.2, augment=True, noise=0.0)
    assert (data.train.num_samples, data.val.num_samples, data.test.num_samples) == (80, 20, 50)
    val, val_labels = everything(data.val)
    assert torch.bincount(val_labels).tolist() == [2] * 10
    assert torch.bincount(everything(data.train)[1]).tolist() == [8] * 10
    assert torch.bincount(everything(data.test)[1]).tolist() == [5] * 10
    # The same images whatever the seed, unaugmented, and none of them trained on.
    other_seed = load("digits", tmp_path, seed=9, train_limit=100, val_fraction=0.2)
    assert torch.equal(everything(other_seed.val)[0], val) and torch.equal(everything(other_seed.val, 3)[0], val)
    trained = everything(other_seed.train)[0]
    assert (trained[:, None] == val[None]).flatten(2).all(2).sum() == 0
    assert "--train_limit 1438" in fails("digits", tmp_path, train_limit=1438)
    message = fails("digits", tmp_path, test_limit=5000)
    assert "--test_limit 5000" in message and "360" in message
    assert "--val_fraction 0.01" in fails("digits", tmp_path, train_limit=10, val_fraction=0.01)
    assert "none to train on" in fails("digits", tmp_path, train_limit=10, val_fraction=0.99)


# ---------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn(tmp_path):
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load("digits", tmp_path)
    train, labels = everything(data.train)
    test, test_labels = everything(data.test)
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8)
    assert abs(train.mean()) < 1e-3 and abs(train.std() - 1) < 1e-3
    values = pixels(torch.cat((train, test)), "digits") * 16 / 255
    ours = sorted([*image, label] for image, label in zip(values.flatten(1).round().int().tolist(), [*labels, *test_labels]))  # noqa: B905
    source = load_digits()
    assert ours == sorted([*image, label] for image, label in zip(source.data.astype(int).tolist(), source.target, strict=True))
    assert data.class_names == list("0123456789")
    assert list(tmp_path.iterdir()) == []


def test_test_only_and_short_batches(tmp_path):
    data = load("digits", tmp_path, test_only=True, batch_size=500, val_fraction=0.1, train_limit=10**6)
    assert data.train is None and data.val is None
    assert len(data.test) == 1 and [len(labels) for _, labels in data.test.epoch(0)] == [360]


# ---------------------------------------------------------------------------------------------------------------
# MNIST and Fashion-MNIST
# ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name, below", [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")])
def test_idx_files(tmp_path, name, below, gz):
    arrays = write_mnist(tmp_path / below, gz=gz)
    data = load(name, tmp_path)
    images, labels = everything(data.test)
    assert torch.equal(pixels(images, name).round()[:, 0].byte(), torch.from_numpy(arrays["t10k"][0]))
    assert labels.tolist() == arrays["t10k"][1].tolist()
    assert data.train.num_samples == 20 and len(data.class_names) == 10


def test_test_only_does_not_need_the_training_files(tmp_path):
    write_mnist(tmp_path, parts=("t10k",))
    assert load("mnist", tmp_path, test_only=True).test.num_samples == 20
    assert "train-images-idx3-ubyte" in fails("mnist", tmp_path)


@pytest.mark.parametrize(
    "file, damage, complaint",
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "15679 bytes of data where its header says 15680"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "15681 bytes"),
        ("train-images-idx3-ubyte", lambda raw: raw[:10], "nx28x28"),
        ("train-images-idx3-ubyte", lambda raw: b"", "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((20, 28, 27))), "nx28x28"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((0, 28, 28))), ""),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.zeros(19)), "20 images"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.arange(20)), "label 19 is out of range"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, file, damage, complaint):
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    message = fails("mnist", tmp_path)
    # Where there are no images, it is the labels that do not fit.
    assert str(tmp_path / file) in message or "holds no images" in message
    assert complaint in message


def test_no_more_of_a_gzip_file_is_unpacked_than_its_header_says(tmp_path, monkeypatch):
    write_mnist(tmp_path, gz=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    unpacked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: (unpacked.append(size), read(self, size))[1])
    for images in (20, 10**7 + 1):
        header = bytes((0, 0, 8, 3)) + np.array([images, 28, 28], ">u4").tobytes()
        file.write_bytes(gzip.compress(header + bytes(10**7)))
        message = fails("mnist", tmp_path)
        assert str(file) in message and ("15681 bytes or more" in message or "10000001 images" in message)
    assert max(unpacked) == 20 * 28 * 28 + 1 and min(unpacked) > 0


@pytest.mark.parametrize("asked, holds", [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")])
def test_files_of_another_data_set_are_noticed_by_their_first_labels(tmp_path, capsys, asked, holds):
    write_mnist(tmp_path)
    load(asked, tmp_path)
    assert capsys.readouterr().err == ""
    first = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}
    file = tmp_path / "train-labels-idx1-ubyte"
    file.write_bytes(idx(np.array(first[holds] * 2)))
    load(asked, tmp_path)
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and str(file) in err and f"--dataset {holds}" in err
    load(holds, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
@pytest.mark.parametrize("packed", [True, False])
def test_files_of_another_data_set_are_noticed_by_their_checksums(tmp_path, capsys, packed):
    """Those of Fashion-MNIST, packed as Debian has them or not, as MNIST's; images alone, which have no labels to tell by."""
    files = ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    for file in files:
        raw = gzip.decompress((FASHION / f"{file}.gz").read_bytes())
        (tmp_path / f"{file}{'.gz' * packed}").write_bytes(gzip.compress(raw, 1) if packed else raw)
    load("fashion_mnist", tmp_path, test_only=True)
    assert capsys.readouterr().err == ""
    load("mnist", tmp_path, test_only=True)
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and "--dataset fashion_mnist" in err
    assert files[0] in err and "(and 1 more like it)" in err
    labels = tmp_path / f"{files[1]}{'.gz' * packed}"
    labels.unlink()
    (tmp_path / files[1]).write_bytes(idx(np.arange(10000) % 10))
    load("mnist", tmp_path, test_only=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and files[0] in err and "more like it" not in err


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_a_file_of_the_test_set_in_place_of_one_of_the_training_set_is_noticed(tmp_path, capsys):
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(FASHION / f"t10k-{kind}-ubyte.gz", tmp_path)
        shutil.copy(FASHION / f"t10k-{kind}-ubyte.gz", tmp_path / f"train-{kind}-ubyte.gz")
    load("fashion_mnist", tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "train-images-idx3-ubyte.gz" in err and "content of t10k-images-idx3-ubyte" in err


def test_checksums_of_both_data_sets_are_known_for_every_file():
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    known = data_files.CHECKSUMS
    assert sorted(known.values()) == sorted((name, file) for name in ("mnist", "fashion_mnist") for file in files)
    if FASHION.is_dir():
        for file in files:
            raw = gzip.decompress((FASHION / f"{file}.gz").read_bytes())
            assert known[hashlib.md5(raw).hexdigest()] == ("fashion_mnist", file)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b"no gzip", lambda raw: raw[:40] + b"x" * 40])
def test_damaged_gzip_files_are_named(tmp_path, damage):
    write_mnist(tmp_path, gz=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in fails("mnist", tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_fashion_mnist(tmp_path):
    data = load("fashion_mnist", FASHION, batch_size=10000)
    assert data.train.num_samples == 60000 and data.test.num_samples == 10000
    images, labels = everything(data.train)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    assert data.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_missing_data_says_where_and_what(tmp_path, name):
    message = fails(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and f"--dataset {name}" in message and "--dataset digits" in message
    assert "expected " in message
    assert not list(tmp_path.iterdir())


def test_failed_download_leaves_nothing(tmp_path, monkeypatch, capsys):
    def download(root, download):
        folder = Path(root) / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half")
        print("Downloading")
        raise RuntimeError("Error downloading\nsecond line")

    monkeypatch.setattr(import_torchvision().datasets, "FashionMNIST", download)
    for path in (tmp_path / "not" / "there", tmp_path):
        message = fails("fashion_mnist", path, download=True)
        assert "Error downloading second line" in message and str(path) in message and "--dataset digits" in message
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "--dataset digits" in fails("fashion_mnist", tmp_path / "file", download=True)
    assert capsys.readouterr().out == ""


def test_download(tmp_path, monkeypatch, capsys):
    def download(root, download):
        print("Downloading")
        write_mnist(Path(root) / "FashionMNIST" / "raw", gz=True)

    monkeypatch.setattr(import_torchvision().datasets, "FashionMNIST", download)
    path = tmp_path / "new" / "Data"
    (path / "FashionMNIST" / "raw").mkdir(parents=True)  # left by something else
    data = load("fashion_mnist", path, download=True)
    assert data.train.num_samples == 20 and capsys.readouterr().out == ""
    assert [entry.name for entry in path.iterdir()] == ["FashionMNIST"]
    monkeypatch.delattr(import_torchvision().datasets, "FashionMNIST")  # a second time there is no need
    load("fashion_mnist", path, download=True)


# ---------------------------------------------------------------------------------------------------------------
# CIFAR
# ---------------------------------------------------------------------------------------------------------------


def write_cifar(root, name="cifar10", *, n=12, protocol=4, bytes_keys=True):
    folder, key, files = {
        "cifar10": ("cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]),
        "cifar100": ("cifar-100-python", "fine_labels", ["train", "test"]),
    }[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, file in enumerate(files):
        batch = {"data": random_images(n, seed=seed).reshape(n, 3072), key: [i % 10 for i in range(n)]}
        written[file] = batch["data"]
        batch = {key.encode() if bytes_keys else key: value for key, value in batch.items()}
        (root / folder / file).write_bytes(pickle.dumps(batch, protocol=protocol))
    return written


@pytest.mark.parametrize("protocol, bytes_keys", [(2, True), (4, False), (5, True)])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name, protocol, bytes_keys):
    written = write_cifar(tmp_path, name, protocol=protocol, bytes_keys=bytes_keys)
    data = load(name, tmp_path)
    *train, test = written.values()
    images, labels = everything(data.test)
    assert torch.equal(pixels(images, name).round().byte().flatten(1), torch.from_numpy(test))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    order = data.train.order(0)
    images, _ = everything(data.train)
    assert torch.equal(pixels(images, name).round().byte().flatten(1), torch.from_numpy(np.concatenate(train))[order])
    assert len(data.class_names) == len(set(data.class_names)) == DATASETS[name].classes
    assert data.class_names == sorted(data.class_names)


def python2_batch(images, labels):
    """What Python 2 wrote: byte strings for text and pixels alike."""
    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K"
    array += (
        bytes([len(images)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
    )
    array += b"\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels](" + b"".join(b"K" + bytes([y]) for y in labels) + b"eu."


def test_cifar_as_python_2_wrote_it(tmp_path):
    write_cifar(tmp_path)
    images = random_images(4, seed=7)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_batch(images, [3, 0, 9, 1]))
    out, labels = everything(load("cifar10", tmp_path, test_only=True).test)
    assert labels.tolist() == [3, 0, 9, 1]
    assert torch.equal(pixels(out, "cifar10").round().byte(), torch.from_numpy(images))


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_malicious_pickles_run_nothing(tmp_path):
    write_cifar(tmp_path)
    file, trace = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "trace"
    good = {"data": random_images(2).reshape(2, 3072), "labels": [0, 1]}
    attacks = [
        Malicious(os.system, f"touch {trace}"),
        Malicious(builtins.eval, f"open({str(trace)!r}, 'w')"),
        Malicious(builtins.getattr, "", "join"),
        Malicious(np.load, str(trace)),
        Malicious(np.memmap, str(trace), np.uint8, "w+", 0, 1),
    ]
    for attack in attacks:
        for protocol in (0, 2, 5):
            file.write_bytes(pickle.dumps(good | {"extra": attack}, protocol))
            message = fails("cifar10", tmp_path)
            assert str(file) in message and "not allowed" in message
            assert not trace.exists()
    pickle.loads(pickle.dumps(attacks[0]))
    assert trace.exists()  # the attack would have worked


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
        pickle.dumps({"data": np.zeros(3072, np.uint8), "labels": [0]}),
        b"\x80\x02}r\xff\xff\xff\x1f.",  # an entry of the memo far away: gigabytes in C
        pickle.dumps({"data": np.array(7, np.uint8), "labels": [0]}),  # without axes
        pickle.dumps({"data": np.zeros((1, 1, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [True]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}),
        pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": functools.reduce(lambda x, _: [x] * 10, range(40), 0)}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0.5]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, [1]]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})[:-100],
    ],
)
def test_damaged_cifar_files_are_named(tmp_path, batch):
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(batch)
    assert str(file) in fails("cifar10", tmp_path)


def test_missing_cifar_file(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert "data_batch_3" in fails("cifar10", tmp_path)
    assert load("cifar10", tmp_path, test_only=True).test.num_samples == 12


# ---------------------------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------------------------


def write_folder(root, *, classes=("ant", "bee", "cat"), train=5, val=2, suffix="png"):
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                image = rng.integers(0, 60, (30 + 3 * i, 40, 3)) + 60 * label
                Image.fromarray(image.astype(np.uint8)).save(root / part / name / f"{i}.{suffix}")


def test_folder_test_images_are_resized_and_cropped_as_by_pil(tmp_path):
    write_folder(tmp_path)
    data = load("folder", tmp_path, resize=16)
    images, labels = everything(data.test)
    assert data.class_names == ["ant", "bee", "cat"] and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    files = [tmp_path / "val" / name / f"{i}.png" for name in data.class_names for i in range(2)]
    for file, out in zip(files, pixels(images, "folder"), strict=True):
        with Image.open(file) as image:
            width, height = image.size  # 40 x 30 or 33; the short side becomes 16 * 256 / 224
            small = np.array(image.resize((int(18 * width / height), 18), Image.Resampling.BILINEAR)).astype(np.float32)
        left = round((small.shape[1] - 16) / 2)
        assert np.abs(out.permute(1, 2, 0).numpy() - small[1:17, left : left + 16]).max() < 1e-3


def modes(folder):
    """Files of every kind of pixel, all of the colour (200, 100, 50) or its nearest grey -> expected colours by name."""
    colour, grey = (200, 100, 50), (100, 100, 100)
    Image.new("L", (20, 20), 100).save(folder / "grey.png")
    Image.new("L", (20, 20), 100).save(folder / "grey.jpg")
    Image.new("LA", (20, 20), (100, 30)).save(folder / "grey_alpha.png")
    Image.new("RGBA", (20, 20), (*colour, 30)).save(folder / "rgba.png")
    Image.new("RGB", (20, 20), colour).quantize(4).save(folder / "palette.png")
    Image.new("RGB", (20, 20), colour).save(folder / "rgb.bmp")
    Image.new("CMYK", (20, 20), (55, 155, 205, 0)).save(folder / "cmyk.JPEG", quality=100)
    Image.fromarray(np.full((20, 20), 100 * 256 + 9, np.uint16)).save(folder / "grey16.png")
    Image.new("1", (20, 20), 1).save(folder / "one.png")
    return {
        path: (255, 255, 255) if path == "one.png" else grey if path.startswith("grey") else colour
        for path in sorted(file.name for file in folder.iterdir())
    }


def test_kinds_of_image_files(tmp_path):
    write_folder(tmp_path, classes=("a", "b"), val=0)
    expected = modes(tmp_path / "val" / "b")
    (tmp_path / "val" / "b" / "notes.txt").write_text("not an image")
    images, labels = everything(load("folder", tmp_path, resize=8).test)
    assert len(expected) == 9 and labels.tolist() == [1] * 9
    for (name, colour), out in zip(expected.items(), pixels(images, "folder"), strict=True):
        assert (out - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3, name


def test_workers_give_the_same_batches_and_epochs_can_be_left_and_resumed(tmp_path):
    write_folder(tmp_path, train=7, suffix="jpg")
    options = {"resize": 16, "batch_size": 4, "augment": True, "noise": 0.1, "val_fraction": 0.2}
    options |= {"auto_augment": "trivial", "random_erasing": 0.5}
    alone, workers = (load("folder", tmp_path, num_workers=n, **options) for n in (0, 2))
    assert (alone.train.num_samples, alone.val.num_samples) == (17, 4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    epochs = {}
    for epoch in (0, 1):
        a, b = list(alone.train.epoch(epoch)), list(workers.train.epoch(epoch))
        assert len(a) == len(b) == len(alone.train) == 5
        for (images, labels), (others, others_labels) in zip(a, b, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, others_labels)
        epochs[epoch] = a
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    pids = {worker.pid for worker in workers.train._loader._iterator._workers}
    half = workers.train.epoch(0)
    next(half)  # and never finished
    for data in (workers, alone):
        for start in (3, 5, 0):
            rest = list(data.train.epoch(1, start))
            assert len(rest) == 5 - start
            for (images, labels), (others, others_labels) in zip(rest, epochs[1][start:], strict=True):
                assert torch.equal(images, others) and torch.equal(labels, others_labels)
    assert pids == {worker.pid for worker in workers.train._loader._iterator._workers}  # kept between epochs
    torch.testing.assert_close(everything(alone.val, 0), everything(workers.val, 1), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_of_folders_depends_on_the_image_not_on_the_batch(tmp_path):
    write_folder(tmp_path, classes=("a",), train=12)
    sorted_images = []
    for batch_size in (1, 5):
        train = load("folder", tmp_path, resize=16, augment=True, batch_size=batch_size).train
        sorted_images.append(everything(train, 2)[0][train.order(2).argsort()])
    assert torch.equal(*sorted_images)
    plain = load("folder", tmp_path, resize=16, batch_size=5).train
    assert not torch.equal(everything(plain, 2)[0][plain.order(2).argsort()], sorted_images[0])


def test_augmentation_of_folders_crops_and_flips(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    for part, n in (("train", 60), ("val", 1)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(image).save(tmp_path / part / "a" / f"{i}.png")
    images = pixels(everything(load("folder", tmp_path, resize=16, augment=True).train)[0], "folder")
    assert len({out.numpy().tobytes() for out in images}) > 30
    # Which side is bright, where the crop has both.
    difference = images[:, 0, :, -1].mean(1) - images[:, 0, :, 0].mean(1)
    assert (difference > 200).sum() > 10 and (difference < -200).sum() > 10


def test_resuming_does_not_decode_what_is_skipped(tmp_path, monkeypatch):
    write_folder(tmp_path)
    train = load("folder", tmp_path, resize=16, batch_size=4).train
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kwargs: (opened.append(path), original(path, **kwargs))[1])
    assert len(list(train.epoch(0, start=2))) == 2 and len(opened) == 15 - 8


def test_images_are_turned_as_the_camera_was_held(tmp_path):
    upright = np.zeros((20, 20, 3), np.uint8)
    upright[:10, :10], upright[:10, 10:], upright[10:, :10] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for number in range(1, 9):
        # Stored so that turning by the tag gives `upright`: by PIL's own function, which is not used in the code.
        stored = next(
            image
            for image in (np.rot90(mirrored, k) for mirrored in (upright, upright[:, ::-1]) for k in range(4))
            if np.array_equal(np.asarray(ImageOps.exif_transpose(tagged(image, number, tmp_path / "try.png"))), upright)
        )
        tagged(stored, number, tmp_path / f"{number}.png").close()
        assert np.array_equal(np.asarray(decode_image(str(tmp_path / f"{number}.png"))), upright)
    tagged(upright, 200, tmp_path / "odd.png").close()
    assert np.array_equal(np.asarray(decode_image(str(tmp_path / "odd.png"))), upright)
    Image.fromarray(upright).save(tmp_path / "damaged.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fnothing")
    assert np.array_equal(np.asarray(decode_image(str(tmp_path / "damaged.png"))), upright)


def tagged(image, orientation, path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(image)).save(path, exif=exif)
    return Image.open(path)


def test_images_that_cannot_be_right_are_refused_before_training(tmp_path):
    write_folder(tmp_path, classes=("a", "b"), train=2)
    image, val = Image.fromarray(random_images(1)[0].transpose(1, 2, 0)), tmp_path / "val" / "b"
    image.save(tmp_path / "whole.jpg")
    image.save(tmp_path / "whole.png")
    image.save(tmp_path / "whole.webp")
    whole = {suffix: (tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("jpg", "png", "webp")}

    def check(name, write, says):
        file = val / name
        write(file)
        message = fails_to_load(tmp_path)
        assert str(file) in message and says in message, message
        file.unlink()

    for suffix, raw in whole.items():
        check(f"half.{suffix}", lambda file, raw=raw: file.write_bytes(raw[: len(raw) // 2]), "cannot be read as an image")
    check("long.tif", Image.fromarray(np.full((8, 8), 70000, np.int32)).save, "mode I")
    check("real.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)).save, "mode F")
    check("moves.gif", lambda file: image.save(file, save_all=True, append_images=[image.rotate(90)]), "2 images in one file")
    check("strip.png", Image.new("L", (1000, 2)).save, "1000 x 2")
    check("program.png", lambda file: image.save(file, format="EPS"), "begins like none of")
    check("pipe.png", os.mkfifo, "not a regular file")
    check("gone.png", lambda file: file.symlink_to("nowhere.png"), "not a regular file")
    check("folder", lambda file: file.symlink_to(tmp_path / "val"), "a folder that it lies in")
    check("root", lambda file: file.symlink_to("/"), "a folder that it lies in")
    load("folder", tmp_path)
    image.quantize().save(val / "still.gif")
    image.save(val / "photo.jfif", format="JPEG")
    # Bytes that a camera appends are no reason to refuse an image.
    (val / "appended.jpg").write_bytes(whole["jpg"] + b"more")
    assert load("folder", tmp_path).test.num_samples == 4 + 3


def fails_to_load(path) -> str:
    with pytest.raises(DataError) as caught:
        load("folder", path)
    return str(caught.value)


@pytest.mark.parametrize(
    "target, says", [(".", "images of its own"), ("ant", "images of its own"), ("..", "a folder that it lies in")]
)
def test_a_class_that_is_a_link_to_another_folder_of_the_set(tmp_path, target, says):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "train" / "dog").symlink_to(target)
    message = fails_to_load(tmp_path)
    assert str(tmp_path / "train" / "dog") in message and says in message


def test_warnings_of_folders_are_a_line_each_of_the_first_process(tmp_path, capsys):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "val" / "ant" / "0.png").rename(tmp_path / "val" / "ant" / "0.heic")
    config = DataConfig(dataset="folder", data_path=str(tmp_path), resize=8, num_workers=0)
    for rank in (0, 1):
        load_data(config, batch_size=2, seed=0, device=CPU, rank=rank, world=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") for line in lines)
    assert "1 of the 3 classes (ant)" in lines[0] and "1 of .heic" in lines[1]
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to("train")
    load("folder", tmp_path)
    assert "under another name" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image", None])
def test_corrupt_image_is_named(tmp_path, damage, num_workers):
    write_folder(tmp_path, classes=("a", "b"), suffix="jpg")
    data = load("folder", tmp_path, resize=16, num_workers=num_workers)
    file = tmp_path / "train" / "b" / "2.jpg"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    message = ""
    try:  # `pytest.raises` would keep the workers alive in the traceback
        list(data.train.epoch(0))
    except DataError as error:
        message = str(error)
    assert str(file) in message and "\n" not in message and len(message) < 400
    assert data.test.num_samples == len(everything(data.test)[0])


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    write_folder(tmp_path)
    train = load("folder", tmp_path, resize=16).train

    def loader(message):
        yield [torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1), torch.zeros(1)]
        raise RuntimeError(message)

    monkeypatch.setattr(train, "_loader", loader("DataLoader worker (pid 5) is killed by signal: Killed.\nmore"))
    with pytest.raises(DataError, match=r"pid 5.*--num_workers 0") as caught:
        list(train.epoch(0))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(train, "_loader", loader("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(train.epoch(0))


WORKER_SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
import dataset, torch
from options.data import DataConfig
assert "torchvision" not in sys.modules and "sklearn" not in sys.modules

def inherited(number, frame):
    os.write(1, b"inherited")

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, inherited)
leaves = os.fork() == 0  # one that leaves its workers, and then one whose worker is killed
if not leaves:
    print(os.waitstatus_to_exitcode(os.wait()[1]))
config = DataConfig(dataset="folder", data_path=sys.argv[1], resize=8, num_workers=2)
data = dataset.load_data(config, batch_size=1, seed=0, device=torch.device("cpu"))
train, test = data.train.epoch(0), data.test.epoch(0)
next(train), next(test)
worker = data.train._loader._iterator._workers[0]
for name in ("INT", "TERM", "USR1"):
    subprocess.run(["kill", f"-{name}", str(worker.pid)])
next(train)  # which the worker reads now, or has died
print(worker.is_alive(), flush=True)
try:
    if leaves:
        sys.exit()
    subprocess.run(["kill", "-KILL", str(worker.pid)])
    time.sleep(3600)
except RuntimeError:  # torch's handler of SIGCHLD
    print(worker.exitcode == -signal.SIGKILL)
"""


def test_workers_leave_signals_to_the_main_process_and_end_quietly_with_it(tmp_path):
    write_folder(tmp_path)
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", WORKER_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(dataset.__file__).parent, timeout=1800)
    assert done.stdout.split() == ["True", "0", "True", "True"] and done.stderr == "" and done.returncode == 0


@pytest.mark.parametrize("corrupt", [False, True])
def test_workers_stop_at_once_with_their_batches(tmp_path, corrupt, monkeypatch):
    write_folder(tmp_path)
    data = load("folder", tmp_path, resize=16, num_workers=1)
    next(data.train.epoch(0))
    worker = data.train._loader._iterator._workers[0]
    if corrupt:
        (tmp_path / "train" / "ant" / "0.png").write_bytes(b"")
        with contextlib.suppress(DataError):
            list(data.train.epoch(0))
    # torch waits this long for a worker that cannot be told, and then terminates it.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)
    del data
    assert not worker.is_alive() and worker.exitcode == 0


def test_where_folders_are_found(tmp_path):
    write_folder(tmp_path / "imagenette2", classes=[f"n{i}" for i in range(10)], train=1, val=1)
    assert load("imagenette", tmp_path).train.num_samples == 10
    assert load("imagenette", tmp_path / "imagenette2", resize=32).test.num_samples == 10
    (tmp_path / "imagenette2").rename(tmp_path / "imagenette")
    assert load("imagenette", tmp_path, train_limit=4).train.num_samples == 4


def test_classes_of_validation_are_those_of_training(tmp_path):
    write_folder(tmp_path, classes=("a", "b", "c"))
    for file in (tmp_path / "val" / "a").iterdir():
        file.unlink()
    (tmp_path / "val" / "a").rmdir()
    (tmp_path / "val" / "file").write_text("")
    for test_only in (False, True):
        data = load("folder", tmp_path, resize=8, test_only=test_only)
        assert everything(data.test)[1].tolist() == [1, 1, 2, 2] and data.class_names == ["a", "b", "c"]
    (tmp_path / "val" / "d").mkdir()
    assert str(tmp_path / "val" / "d") in fails("folder", tmp_path)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    write_folder(tmp_path, classes=("a", "b"))
    message = fails("imagenette", tmp_path)
    assert "2 class folders" in message and "10" in message and "imagenette" in message
    (tmp_path / "train" / "aa").mkdir()
    assert str(tmp_path / "train" / "aa") in fails("folder", tmp_path)
    (tmp_path / "train" / "aa").rmdir()
    for file in tmp_path.glob("val/*/*"):
        file.unlink()
    assert str(tmp_path / "val") in fails("folder", tmp_path)
    assert "--dataset digits" in fails("folder", tmp_path / "train")
    message = fails("imagenet", tmp_path / "nowhere", download=True)
    assert "cannot be downloaded" in message and not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        ModuleNotFoundError("No module named 'torchvision'"),
        OSError("libtorch_cuda.so: undefined symbol\nsecond line"),
    ],
)
def test_torchvision_made_for_another_torch(tmp_path, monkeypatch, error):
    write_folder(tmp_path)
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.split(".")[0] == "torchvision":
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    release = ".".join(torch.__version__.split(".")[:2])
    for message in (fails("folder", tmp_path), fails("mnist", tmp_path, download=True)):
        assert "pip install --upgrade torch torchvision" in message and f"made for torch {release}" in message
        assert str(error).splitlines()[0] in message


def test_data_error_crosses_processes_as_one_line():
    buffer = io.BytesIO(pickle.dumps(DataError("first\nsecond")))
    error = pickle.load(buffer)
    assert type(error) is DataError and str(error) == "first second"


def test_every_data_set_has_a_reader():
    assert set(READERS) == set(DATASETS)
    assert set(dataset.STATS) == {name for name, info in DATASETS.items() if not info.streamed}
    for name, (mean, std) in dataset.STATS.items():
        assert len(mean) == len(std) == DATASETS[name].channels
