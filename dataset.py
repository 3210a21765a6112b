"""Data sets by name, as batches on the device: `load_data`.

Small sets stay on the device as one uint8 tensor and are cropped, flipped, resized and normalized there, a batch at a
time. Folders of images are decoded by worker processes; noise and normalization follow on the device. `readers/files.py` reads
the files; `readers/augmentation.py` crops, mirrors and resizes, and has what torchvision draws.

Nothing here draws from a global random number generator: order, augmentation and noise are functions of (seed, epoch,
index of the image), so they do not depend on batch size, workers, or where a run was interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from options.data import DATASETS, DataConfig, sides_of
from readers.augmentation import (
    apply_policy,
    cover,
    crop_and_flip,
    erase,
    forked_generator,
    make_policy,
    resize_images,
    with_margin,
)
from readers.files import (
    READERS,
    Images,
    import_torchvision,
)
from readers.images import DataError, check_images, decode_image
from runs.processes import Signals
from utils import gaussian, keys, uniform

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS = {  # mean and standard deviation of each channel, of pixels from 0 to 1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.3054,), (0.3760,)),
}
NO_FLIP = ("mnist", "digits")  # a mirrored 2 is no digit
# Streams: independent numbers for independent purposes.
CROP, ORDER, WORKER, TRAIN_NOISE, VAL_NOISE, TEST_NOISE, POLICY, ERASE = range(8)
NOISE_STREAM = {"train": TRAIN_NOISE, "val": VAL_NOISE, "test": TEST_NOISE}


# ---------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------


def channel_stats(dataset: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, of pixels from 0 to 1: (C, 1, 1) each."""
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in STATS.get(dataset, IMAGENET_STATS))
    return mean, std


@dataclass(frozen=True)
class Recipe:
    """How the images of one part of a data set become batches."""

    dataset: str
    part: str  # train (a new order every epoch), val or test
    batch_size: int
    seed: int
    resize: int | tuple[int, int]  # side of the images that leave, or height and width
    device: torch.device
    augment: bool = False
    auto_augment: str = "none"
    random_erasing: float = 0.0  # probability for an image
    noise: float = 0.0  # standard deviation, of pixels from 0 to 1
    rank: int = 0  # of `world` processes this one's share of the images
    world: int = 1


class Batches:
    """What both kinds of batches share. `index` (n,) numbers the images in the whole data set, before any was left out.

    A row is an image's number among those that are left; what is drawn for an image depends on its index.

    Several processes share every training batch, and take turns with whole batches of the other parts, so that each of
    those is computed exactly as one process would. All get equally many batches, some of which may then be empty.
    """

    def __init__(self, index: np.ndarray, recipe: Recipe):
        self.num_samples = len(index)
        self.recipe = recipe
        self._mean, self._std = (numbers.to(recipe.device) for numbers in channel_stats(recipe.dataset))

    @property
    def _images_per_step(self) -> int:
        return self.recipe.batch_size * (1 if self.recipe.part == "train" else self.recipe.world)

    def __len__(self) -> int:
        """Batches per epoch; the last may be short."""
        return -(-self.num_samples // self._images_per_step)

    def images_in(self, step: int) -> int:
        """Images that all processes together see in batch number `step` of an epoch."""
        return min(self._images_per_step, self.num_samples - step * self._images_per_step)

    def chunks(self, epoch: int) -> list[Tensor]:
        """Rows of the images of every batch of this process, on the CPU."""
        recipe, batches = self.recipe, self.order(epoch).split(self.recipe.batch_size)
        if recipe.part == "train":
            return [batch.tensor_split(recipe.world)[recipe.rank] for batch in batches]
        mine = list(batches[recipe.rank :: recipe.world])
        # Every process makes as many steps as any other, or the collectives of the last one would wait for ever.
        return mine + [batches[0][:0]] * (len(self) - len(mine))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, height, width) float32, normalized, and labels (B,) int64, both on the device.

        Begins at batch number `start`, with exactly the batches that `epoch(epoch)` gives from there on. Raises DataError
        for an image that cannot be read.
        """
        raise NotImplementedError

    def order(self, epoch: int) -> Tensor:
        """Rows of the images (n,) in the order of this epoch, on the CPU."""
        if self.recipe.part != "train":
            return torch.arange(self.num_samples)
        # Hashed first: a CPU generator takes the low 32 bits of its seed only.
        key = keys(self.recipe.seed, epoch, torch.zeros(1), ORDER).item()
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(key % 2**32))

    def _nothing(self, channels: int) -> tuple[Tensor, Tensor]:
        """A batch without images."""
        size, device = sides_of(self.recipe.resize), self.recipe.device
        return torch.empty(0, channels, *size, device=device), torch.empty(0, dtype=torch.int64, device=device)

    def _finish(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """float32 pixels from 0 to 255, changed in place -> noisy and normalized."""
        recipe = self.recipe
        images.div_(255)
        if recipe.noise:
            epoch = epoch if recipe.part == "train" else 0
            n, stream = images[0].numel(), NOISE_STREAM[recipe.part]
            noise = gaussian(recipe.seed, epoch, index, n, stream)
            images.add_(noise.reshape(images.shape), alpha=recipe.noise)
        return images.sub_(self._mean).div_(self._std)

    def _erase(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Normalized images, some with a box at the mean of all images; index (B,) is on the CPU."""
        probability = self.recipe.random_erasing
        return erase(images, probability, keys(self.recipe.seed, epoch, index, ERASE)) if probability else images


class DeviceBatches(Batches):
    """A small data set that stays on the device. images (n, C, H, W) uint8, labels (n,), index (n,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe):
        super().__init__(index, recipe)
        self._policy = None if recipe.auto_augment == "none" else make_policy(recipe.auto_augment)
        # A policy runs on the CPU: there the images stay, and each batch goes to the device after it.
        home = recipe.device if self._policy is None else torch.device("cpu")
        self._images = torch.from_numpy(images).to(home)
        self._labels = torch.from_numpy(labels).to(home, torch.int64)
        self._index = torch.from_numpy(index).to(home, torch.int64)
        self._numbers = self._index.cpu()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = self.chunks(epoch)[start:]
        if not chunks:
            return
        order = torch.cat(chunks).to(self._images.device)  # at once, not a copy to the device for every batch
        for rows, chosen in zip(chunks, order.split([len(chunk) for chunk in chunks]), strict=True):
            if not len(chosen):
                yield self._nothing(self._images.shape[1])
                continue
            images, labels, index = self._images[chosen], self._labels[chosen], self._index[chosen]
            if self.recipe.augment:
                images = self._augment(images, index, epoch)
            if self._policy is not None:
                images = apply_policy(self._policy, images, keys(self.recipe.seed, epoch, index, POLICY))
                images, labels, index = (self._to_device(tensor) for tensor in (images, labels, index))
            native = tuple(images.shape[2:]) == sides_of(self.recipe.resize)
            images = images.float() if native else resize_images(images, self.recipe.resize)
            images = self._finish(images, index, epoch)
            yield self._erase(images, self._numbers[rows], epoch), labels

    def _to_device(self, tensor: Tensor) -> Tensor:
        """From the CPU, without waiting."""
        device = self.recipe.device
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    def _augment(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        padding = 1 if self.recipe.dataset == "digits" else 4
        draws = uniform(self.recipe.seed, epoch, index, 3, CROP)
        top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        flip = (draws[:, 2] < 0.5) & (self.recipe.dataset not in NO_FLIP)
        return crop_and_flip(images, top, left, flip, padding)


def read_image(path: str | os.PathLike, config: DataConfig) -> Tensor:
    """Any image file as evaluation under these options would see it: normalized (C, *config.resize).

    Cut to the middle, in the proportions of the model's images; for data sets of image files with a margin, as they are tested.
    Raises DataError for a file that cannot be read.
    """
    v2, info, sides = import_torchvision().transforms.v2, DATASETS[config.dataset], sides_of(config.resize)
    image = decode_image(os.fspath(path)).convert("L" if info.channels == 1 else "RGB")
    resized = cover(with_margin(sides) if info.streamed else sides, image)
    pixels = v2.functional.pil_to_tensor(v2.functional.center_crop(resized, list(sides)))
    mean, std = channel_stats(config.dataset)
    return pixels.float().div_(255).sub_(mean).div_(std)


class _ImageFiles(Dataset):
    """(epoch, row) -> image (3, height, width) uint8, label, index; or the DataError, which the main process then raises."""

    def __init__(self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe):
        self.files, self.labels, self.index = files, labels, index
        self.seed = recipe.seed
        v2, sides = import_torchvision().transforms.v2, sides_of(recipe.resize)
        if recipe.augment:
            steps = [v2.RandomResizedCrop(sides), v2.RandomHorizontalFlip()]
        else:
            steps = [partial(cover, with_margin(sides)), v2.CenterCrop(sides)]
        if recipe.auto_augment != "none":
            steps.append(make_policy(recipe.auto_augment))
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | DataError:
        epoch, row = key
        try:
            image = decode_image(os.fsdecode(self.files[row]))
        except DataError as error:
            return DataError(str(error))  # a copy without traceback, which would keep this frame alive
        index = int(self.index[row])
        with forked_generator() as generator:
            generator.manual_seed(keys(self.seed, epoch, torch.tensor([index]), WORKER).item() % 2**32)
            return self.transform(image), int(self.labels[row]), index


class _Plan:
    """The batch sampler of a loader that lives for many epochs: lists of (epoch, row).

    It does not know its batches: as part of a reference cycle the loader would take seconds to stop its workers.
    """

    def __init__(self):
        self.epoch, self.chunks = 0, ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, row) for row in chunk.tolist()] for chunk in self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _collate(samples: list) -> tuple[Tensor, Tensor, Tensor] | DataError | None:
    if not samples:
        return None
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels, index = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(index)


def _start_worker(worker: int) -> None:
    """Leave signals to the main process, which finishes a step, for which it needs its workers, and then ends them.

    Clusters and torchrun signal the whole group of processes. A worker ends when it is told to, or when its parent is gone.
    """
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(iterator: weakref.ref) -> None:
    """At exit: multiprocessing would send them SIGTERM and wait."""
    if iterator() is not None:
        iterator()._shutdown_workers()


class StreamedBatches(Batches):
    """Image files, decoded as they are needed. files (n,) byte strings, labels (n,), index (n,).

    The workers live from the first epoch on; one iterator at a time can be in use.
    """

    def __init__(self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe, num_workers: int):
        super().__init__(index, recipe)
        self._plan = _Plan()
        self._ends_at_exit = num_workers == 0
        self._loader = DataLoader(
            _ImageFiles(files, labels, index, recipe),
            batch_sampler=self._plan,
            collate_fn=_collate,
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=recipe.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each epoch draws from the global generator, and a resumed one twice
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._plan.epoch, self._plan.chunks = epoch, self.chunks(epoch)[start:]
        try:
            batches = iter(self._loader)
            if not self._ends_at_exit:
                atexit.register(_end_workers, weakref.ref(batches))
                self._ends_at_exit = True
            for batch in batches:
                if isinstance(batch, DataError):
                    raise DataError(str(batch))  # a copy: `batch` would hold its own traceback, and that the workers
                if batch is None:
                    yield self._nothing(3)
                    continue
                images, labels, index = (tensor.to(self.recipe.device, non_blocking=True) for tensor in batch)
                images = self._finish(images.float(), index, epoch)
                yield self._erase(images, batch[2], epoch), labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that reads images died ({error}); try --num_workers 0") from None


# ---------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many images of its class come before each image: (n,) -> (n,)."""
    order = np.argsort(labels, kind="stable")
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(first, sizes)
    return ranks


def balanced_subset(labels: np.ndarray, n: int) -> np.ndarray:
    """Rows, ascending, of the first n images taken class by class in turn: the classes differ by one at most."""
    return np.sort(np.argsort(_rank_in_class(labels), kind="stable")[:n])


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, of the images to keep and of the `fraction` of every class to hold out; always the same ones."""
    shuffle = keys(0, 0, torch.arange(len(labels)), ORDER).numpy()  # hashes differ, so they are an order
    by_class = np.lexsort((shuffle, labels))
    # An image is held out where the rounded share of those so far grows by one: round(n * fraction) in all, and, as images are
    # sorted by class, the right number of each class to within one.
    due = np.floor(np.arange(len(labels) + 1) * fraction + 0.5)
    held = np.diff(due) > 0
    return np.sort(by_class[~held]), np.sort(by_class[held])


class Data(NamedTuple):
    train: Batches | None  # None if only the test set was asked for
    val: Batches | None  # None without --val_fraction
    test: Batches
    class_names: list[str]


def _limited(labels: np.ndarray, config: DataConfig, part: str) -> np.ndarray:
    limit = getattr(config, f"{part}_limit")
    if limit is None:
        return np.arange(len(labels))
    if limit > len(labels):
        what = {"train": "training", "test": "test"}[part]
        raise DataError(f"--{part}_limit {limit} is more than the {len(labels)} {what} images of --dataset {config.dataset}")
    return balanced_subset(labels, limit)


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    test_only: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """The batches of the data set that `config` names; `config.resize` and `config.num_workers` must be known by now.

    batch_size: images of a batch, over all `world` processes, of which this is number `rank`. With `test_only` the training
    images are not read. Raises DataError if data is missing or wrong, and for limits and fractions that it cannot meet.
    """
    assert config.resize is not None and config.num_workers is not None
    try:
        source = READERS[config.dataset](config, ("test",) if test_only else ("train", "test"))
    except OSError as error:
        raise DataError(f"--data_path {config.data_path}: {error}") from None
    for warning in source.warnings if rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)

    def check(images: Images, index: np.ndarray) -> None:
        if DATASETS[config.dataset].streamed:  # now, not in the middle of the first epoch or at its end
            check_images(images.data[index], threads=max(config.num_workers, 1), quiet=rank > 0, rank=rank, world=world)

    def batches(images: Images, index: np.ndarray, part: str) -> Batches:
        names = ("augment", "auto_augment", "random_erasing") if part == "train" else ()
        options = {name: getattr(config, name) for name in (*names, "noise")}
        recipe = Recipe(config.dataset, part, batch_size, seed, config.resize, device, **options, rank=rank, world=world)
        data, labels = images.data[index], images.labels[index]
        if DATASETS[config.dataset].streamed:
            return StreamedBatches(data, labels, index, recipe, config.num_workers)
        return DeviceBatches(data, labels, index, recipe)

    train = val = None
    if not test_only:
        images = source.parts["train"]
        index = _limited(images.labels, config, "train")
        check(images, index)
        if config.val_fraction:
            kept, held = stratified_split(images.labels[index], config.val_fraction)
            if not len(kept) or not len(held):
                what = "to train on" if not len(kept) else "for validation"
                raise DataError(f"--val_fraction {config.val_fraction} of {len(index)} training images leaves none {what}")
            val = batches(images, index[held], "val")
            index = index[kept]
        train = batches(images, index, "train")
    images = source.parts["test"]
    index = _limited(images.labels, config, "test")
    check(images, index)
    test = batches(images, index, "test")
    return Data(train, val, test, source.class_names)
