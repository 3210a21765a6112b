"""Batches of any iterable: random numbers that depend on seed and epoch only, sizes, and errors."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from readers.loaders import LoaderBatches, count_classes
from runs import DataError

CPU = torch.device("cpu")


class Drawn(Dataset):
    """Images that are drawn from all global generators as they are read."""

    def __len__(self):
        return 10

    def __getitem__(self, number):
        return torch.rand(1, 2, 2) + random.random() + float(np.random.rand()), number % 3


class Endless:
    """Batches without a length, in an order of its own every time."""

    def __iter__(self):
        rows = list(range(10))
        random.shuffle(rows)
        for first in range(0, 10, 4):
            yield np.random.rand(len(rows[first : first + 4]), 2).astype("float32"), rows[first : first + 4]


def loaders():
    yield DataLoader(Drawn(), 4, shuffle=True)
    yield DataLoader(Drawn(), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    yield DataLoader(Drawn(), 4, shuffle=True, num_workers=1)
    yield Endless()


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("number", range(4))
def test_batches_depend_on_seed_and_epoch_only(number):
    def read(epoch, start=0, seed=0, disturb=False):
        loader = list(loaders())[number]
        batches = LoaderBatches(loader, CPU, seed=seed)
        assert len(batches) == batches.num_batches == 3
        found = []
        for images, labels in batches.epoch(epoch, start):
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            assert batches.images_in(0) == len(labels)
            found.append((images, labels))
            if disturb:  # as a model with dropout does
                torch.rand(3), random.random(), np.random.rand()
        return found

    before = states()
    whole = read(1)
    assert states() == before
    assert [len(labels) for _, labels in whole] == [4, 4, 2]
    for other in (read(1, disturb=True), read(1)):
        for one, two in zip(whole, other, strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for one, two in zip(whole[2:], read(1, start=2), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(whole[0][0], read(2)[0][0]) and not torch.equal(whole[0][0], read(1, seed=1)[0][0])


def test_classes_are_counted():
    batches = LoaderBatches(DataLoader(Drawn(), 4), CPU)
    assert count_classes(batches, 4) == [4, 3, 3, 0] and batches.num_samples == 10
    with pytest.raises(DataError, match=r"^loader has the label 2, and the model has 2 outputs$"):
        count_classes(batches, 2)
    with pytest.raises(DataError, match=r"^loader has the label -1, and the model has 2 outputs$"):
        count_classes(LoaderBatches([(torch.rand(1, 2), torch.tensor([-1]))], CPU), 2)


IMAGES, LABELS = torch.rand(4, 1, 2, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixel_values": IMAGES, "labels": LABELS}, r"gives a dict, not pairs \(images, labels\)"),
        (IMAGES, r"gives a Tensor, not pairs"),
        ((IMAGES, LABELS, LABELS), r"gives a tuple, not pairs"),
        ((IMAGES, ["cat"] * 4), r"gives no tensors: "),
        ((IMAGES.byte(), LABELS), r"gives images \(4, 1, 2, 2\) of torch.uint8 and labels \(4,\) of torch.int64; it must give"),
        ((IMAGES, LABELS[:3]), r"labels \(3,\)"),
        ((IMAGES, LABELS.float()), r"labels \(4,\) of torch.float32"),
        ((IMAGES, torch.eye(4)), r"labels \(4, 4\) of torch.float32"),
        ((IMAGES[:0], LABELS[:0]), r"images \(0, 1, 2, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the same in every process
)
def test_batches_of_another_form(batch, message):
    with pytest.raises(DataError, match=f"^mine .*{message}") as error:
        list(LoaderBatches([batch], CPU, name="mine").epoch(0))
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_in_every_epoch():
    for loader, kind in ((iter([]), "list_iterator"), (((IMAGES, LABELS) for _ in range(2)), "generator"), (3, "int")):
        with pytest.raises(TypeError, match=f"^loader is a {kind}, which cannot be read in every epoch; give a DataLoader"):
            LoaderBatches(loader, CPU)
    growing = [(IMAGES, LABELS)]
    batches = LoaderBatches(growing, CPU, name="mine")
    growing.append(growing[0])
    with pytest.raises(DataError, match=r"^mine gave 2 batches in epoch 4, and 1 before$"):
        list(batches.epoch(3))
