"""Batches on the device against naive references: order, augmentation, noise, limits and splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset import ROWS, DeviceBatches, Recipe
from options.data import DATASETS, OTHERS
from tests.helpers.data import CPU, device_batches, everything, fails, load, pixels, random_images, write_folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_normalisation():
    images = random_images(5)
    out, places = everything(device_batches(images, part="test"))
    mean, std = (np.array(numbers).reshape(1, 3, 1, 1) for numbers in (DATASETS["cifar10"].mean, DATASETS["cifar10"].std))
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


def test_test_only_and_short_batches(tmp_path):
    data = load("digits", tmp_path, test_only=True, batch_size=500, val_fraction=0.1, train_limit=10**6)
    assert data.train is None and data.val is None
    assert len(data.test) == 1 and [len(labels) for _, labels in data.test.epoch(0)] == [360]


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


def test_every_data_set_has_a_row():
    assert set(ROWS) == set(DATASETS) | {name.partition(":")[0] for name in OTHERS}
    for info in DATASETS.values():
        assert len(info.mean) == len(info.std) == info.channels
