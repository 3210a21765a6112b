"""Data sets as batches on the device: one row per data set, and `load_data`.

Small data sets stay on the device as one uint8 tensor and are cropped, flipped, resized and normalized there, one batch at a
time. Folders of images are decoded by worker processes; noise and normalization follow on the device.

Nothing here draws from a global random number generator: order, augmentation and noise are functions of (seed, epoch,
index of the image), so they do not depend on batch size, workers, or where a run was interrupted.

To add a data set, write a reader (see `readers/files.py`, or take `read_folders`), and give it a row here and its size and
number of classes a row in `options/data.py`.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from options.data import TASKS, DataConfig, info_of, sides_of
from options.storage import DISK
from readers.augmentation import (
    CROP,
    ERASE,
    NOISE,
    ORDER,
    POLICY,
    apply_policy,
    center_crop,
    covering,
    crop_and_flip,
    erase,
    image_transform,
    make_policy,
    resize_images,
)
from readers.files import Source, read_cifar, read_digits, read_mnist
from readers.folders import read_folders
from readers.images import check_images, decode_image
from readers.libraries import read_hub, read_torchvision
from readers.splits import stratified_split
from readers.stream import ImageStream, warnings_of_workers
from readers.tasks import read_task
from runs import DataError
from runs.fingerprint import make_fingerprint
from utils import gaussian, keys, uniform


class Row(NamedTuple):
    """Reader and augmentation of one data set."""

    read: Callable[[DataConfig, tuple[str, ...]], Source]
    flip: bool = True  # False for digits: a mirrored 2 is no digit
    border: int = 4  # black pixels around an image that is cropped


ROWS = {
    "cifar10": Row(read_cifar),
    "cifar100": Row(read_cifar),
    "mnist": Row(read_mnist, flip=False),
    "fashion_mnist": Row(read_mnist),
    "digits": Row(read_digits, flip=False, border=1),
    "imagenet": Row(read_folders),
    "imagenet100": Row(read_folders),
    "imagenette": Row(read_folders),
    "folder": Row(read_folders),
    "torchvision": Row(read_torchvision),
    "hf": Row(read_hub),
}
ROWS |= {f"task_{task}": Row(read_task, flip=False) for task in TASKS}


def channel_stats(config: DataConfig) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels, (C, 1, 1) each, of pixels from 0 to 1."""
    return _as_channels(*config.statistics)


def _as_channels(*statistics: tuple[float, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(numbers).view(-1, 1, 1) for numbers in statistics)


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Settings for the batches of one part of a data set."""

    dataset: str
    part: str  # train (a new order every epoch), val or test
    batch_size: int  # over all processes
    seed: int
    resize: int | tuple[int, int]  # side of the images, or height and width
    device: torch.device
    augment: bool = False
    auto_augment: str = "none"
    random_erasing: float = 0.0  # probability for an image
    noise: float = 0.0  # standard deviation, of pixels from 0 to 1
    rank: int = 0  # number of this process among `world`
    world: int = 1
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std of the channels; None: the data set's
    interpolation: str = "bilinear"
    crop: str | None = None


class Batches:
    """Batches of `index` (n,), the numbers of the images in the whole data set, before limits and splits.

    A row is an image's position in `index`; random numbers for an image depend on its number.

    Several processes share every training batch, and take turns with whole batches of the other parts, so that each of
    those is computed exactly as by one process. All processes get equally many batches, some of which may be empty.
    """

    def __init__(self, index: np.ndarray, recipe: Recipe):
        self.num_samples = len(index)
        self.recipe = recipe
        info = info_of(recipe.dataset)
        statistics = _as_channels(*(recipe.statistics or (info.mean, info.std)))
        self._mean, self._std = (numbers.to(recipe.device) for numbers in statistics)
        self._epochs = itertools.count()
        self._images_per_step = recipe.batch_size * (1 if recipe.part == "train" else recipe.world)

    def __len__(self) -> int:
        """Return the number of batches per epoch; the last may be short."""
        return -(-self.num_samples // self._images_per_step)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, of all processes together."""
        return -(-self.num_samples // self.recipe.batch_size)

    def first_image(self, number: int) -> int:
        """Return the row of the first image of a batch that all processes count together; not for training."""
        return number * self.recipe.batch_size

    def images_in(self, step: int) -> int:
        """Count the images that all processes together see in batch number `step` of an epoch."""
        return min(self._images_per_step, self.num_samples - step * self._images_per_step)

    def order(self, epoch: int) -> Tensor:
        """Return the rows of the images (n,) in the order of this epoch, on the CPU."""
        if self.recipe.part != "train":
            return torch.arange(self.num_samples)
        # Hashed first: a CPU generator takes the low 32 bits of its seed only.
        key = keys(self.recipe.seed, epoch, torch.zeros(1), ORDER).item()
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(key % 2**32))

    def chunks(self, epoch: int) -> list[Tensor]:
        """Return the rows of the images in every batch of this process, on the CPU."""
        recipe, batches = self.recipe, self.order(epoch).split(self.recipe.batch_size)
        if recipe.part == "train":
            return [batch.tensor_split(recipe.world)[recipe.rank] for batch in batches]
        mine = list(batches[recipe.rank :: recipe.world])
        # Every process makes equally many steps, or the collectives of the last one would wait for ever.
        return mine + [batches[0][:0]] * (len(self) - len(mine))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the next epoch: of the first one when it is called for the first time."""
        return self.epoch(next(self._epochs))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized images (B, C, height, width) float32 and labels (B,) int64, both on the device.

        Begins at batch number `start`, with exactly the batches that `epoch(epoch)` yields from there on.

        Raises:
            DataError: An image cannot be read.
        """
        raise NotImplementedError

    def _finish(self, images: Tensor, index: Tensor, numbers: Tensor, epoch: int) -> Tensor:
        """Add noise to pixels from 0 to 255, normalize and erase, in place unless gray images are repeated to three channels.

        numbers: `index` (B,) on the CPU.
        """
        recipe = self.recipe
        images.div_(255)
        if recipe.noise:
            drawn_in = epoch if recipe.part == "train" else 0
            noise = gaussian(recipe.seed, drawn_in, index, images.shape[1:].numel(), NOISE[recipe.part])
            images.add_(noise.view(images.shape), alpha=recipe.noise)
        if len(self._mean) > images.shape[1]:
            images = images.repeat(1, len(self._mean), 1, 1)
        images.sub_(self._mean).div_(self._std)
        if recipe.random_erasing:
            erase(images, recipe.random_erasing, keys(recipe.seed, epoch, numbers, ERASE))
        return images


class DeviceBatches(Batches):
    """A small data set that stays on the device: images (n, C, H, W) uint8, labels (n,), index (n,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe):
        super().__init__(index, recipe)
        self._policy = None if recipe.auto_augment == "none" else make_policy(recipe.auto_augment)
        # Policies run on the CPU: images stay there, and each batch goes to the device after its policy.
        self._home = recipe.device if self._policy is None else torch.device("cpu")
        self._numbers = torch.from_numpy(index).to(torch.int64)
        self._images = torch.from_numpy(images).to(self._home)
        self._labels = torch.from_numpy(labels).to(self._home, torch.int64)
        self._index = self._numbers.to(self._home)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, row, chunks = self.recipe, ROWS[self.recipe.dataset], self.chunks(epoch)
        order = torch.cat(chunks).to(self._home)  # at once, not one copy to the device per batch
        at_home = order.split([len(chunk) for chunk in chunks])
        for rows, chosen in zip(chunks[start:], at_home[start:], strict=True):
            images, labels, index = self._images[chosen], self._labels[chosen], self._index[chosen]
            if recipe.augment:
                draws = uniform(recipe.seed, epoch, index, 3, CROP)
                top, left = (draws[:, :2] * (2 * row.border + 1)).long().unbind(1)
                images = crop_and_flip(images, top, left, (draws[:, 2] < 0.5) & row.flip, row.border)
            if self._policy is not None:
                images = apply_policy(self._policy, images, keys(recipe.seed, epoch, index, POLICY))
                if recipe.device.type == "cuda":
                    images, labels, index = (tensor.pin_memory() for tensor in (images, labels, index))
                images, labels, index = (x.to(recipe.device, non_blocking=True) for x in (images, labels, index))
            size, sides = tuple(images.shape[2:]), sides_of(recipe.resize)
            if size == sides:
                images = images.float()
            else:
                covered = covering(size, sides) if recipe.crop == "center" else sides
                images = center_crop(resize_images(images, covered, recipe.interpolation), sides)
            yield self._finish(images, index, self._numbers[rows], epoch), labels


class StreamedBatches(Batches):
    """Image files, decoded as they are needed: paths (n,) as byte strings, labels (n,), index (n,)."""

    def __init__(
        self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, recipe: Recipe, num_workers: int, open_file: Callable
    ):
        super().__init__(index, recipe)
        sides, pin_memory = sides_of(recipe.resize), recipe.device.type == "cuda"
        transform = image_transform(
            sides,
            augment=recipe.augment,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.interpolation,
            squash=recipe.crop == "squash",
        )
        self._stream = ImageStream(files, labels, index, recipe.seed, transform, sides, num_workers, pin_memory, open_file)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._stream.read(epoch, self.chunks(epoch)[start:]):
            images, labels, index = (tensor.to(self.recipe.device, non_blocking=True) for tensor in batch)
            yield self._finish(images.float(), index, batch[2], epoch), labels


def read_image(path: str | os.PathLike, config: DataConfig) -> Tensor:
    """Read any image file as evaluation under these options would: normalized, (C, *config.resize).

    Unless `crop` is squash, the image is cropped around its center to the proportions of the model's images, with the margin
    that folders of images are tested with. Raises DataError for a file that cannot be read.
    """
    info, (mean, std) = info_of(config.dataset), channel_stats(config)
    image = decode_image(os.fspath(path)).convert("L" if info.channels == 1 else "RGB")
    how = {"interpolation": config.interpolation, "squash": config.crop == "squash"}
    pixels = image_transform(sides_of(config.resize), margin=info.streamed, **how)(image)
    return pixels.float().div_(255).sub(mean).div_(std)  # gray pixels become three channels where there are three means


# ---------------------------------------------------------------------------------------------------------------
# Limits and splits
# ---------------------------------------------------------------------------------------------------------------


def balanced_subset(labels: np.ndarray, n: int) -> np.ndarray:
    """Return the rows, ascending, of the first n images taken class by class in turn: counts differ by one at most."""
    order = np.argsort(labels, kind="stable")
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    rank_in_class[order] = np.arange(len(labels)) - np.repeat(first, sizes)
    return np.sort(np.argsort(rank_in_class, kind="stable")[:n])


def _limited(labels: np.ndarray, config: DataConfig, part: str) -> np.ndarray:
    """Return the rows that --train_limit or --test_limit leaves. Raises DataError for more than there are."""
    part = "test" if part == "val" else part
    limit = getattr(config, f"{part}_limit")
    if limit is None:
        return np.arange(len(labels))
    if limit > len(labels):
        raise DataError(f"--{part}_limit {limit} is more than the {len(labels)} {part} images of --dataset {config.dataset}")
    return balanced_subset(labels, limit)


# ---------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Batches of each part, and the names of the classes in the order of their labels."""

    train: Batches | None  # None if only the test set was asked for
    val: Batches | None  # None without --val_fraction, except for generated tasks
    test: Batches
    class_names: list[str]
    fingerprint: dict  # of all images, before limits and splits; see `runs.fingerprint`

    @property
    def selection_split(self) -> str:
        """The part that chooses the best epoch: "val" where images are held out, else "test"."""
        return "test" if self.val is None else "val"


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
    """Read the data set that `config` names; `config.resize` and `config.num_workers` must be set.

    Args:
        batch_size: Images of a batch, over all `world` processes.
        test_only: Do not read the training images.
        rank: Number of this process.

    Raises:
        DataError: Data is missing or damaged, or cannot meet a limit or fraction.
    """
    assert config.resize is not None and config.num_workers is not None
    parts = ("test",) if test_only else ("train", "test")
    try:
        source = ROWS[config.dataset.partition(":")[0]].read(config, parts)
    except OSError as error:
        raise DataError(f"--data_path {config.data_path}: {error}") from None
    streamed, warnings = info_of(config.dataset).streamed, list(source.warnings)
    if streamed:
        warnings += warnings_of_workers(config.num_workers, batch_size * 3 * math.prod(sides_of(config.resize)))
    for warning in warnings if rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    classes = len(source.class_names)
    counts = {part: np.bincount(images.labels, minlength=classes).tolist() for part, images in source.parts.items()}
    fingerprint = make_fingerprint(source.class_names, counts, source.hashes)
    rows = {}
    for part in source.parts:
        rows[part] = _limited(source.parts[part].labels, config, part)
        if streamed:  # now, not in the middle of the first epoch or at its end
            files, threads = source.parts[part].data[rows[part]], max(config.num_workers, 1)
            storage = source.storages.get(part, DISK)
            check_images(files, storage, threads=threads, quiet=rank > 0, rank=rank, world=world)

    def batches(part: str, index: np.ndarray) -> Batches:
        origin = part if part in source.parts else "train"  # val is held out
        images, storage = source.parts[origin], source.storages.get(origin, DISK)
        names = ("augment", "auto_augment", "random_erasing", "noise") if part == "train" else ("noise",)
        options = {name: getattr(config, name) for name in names}
        options |= {"rank": rank, "world": world, "statistics": config.statistics}
        options |= {"interpolation": config.interpolation, "crop": config.crop}
        recipe = Recipe(config.dataset, part, batch_size, seed, config.resize, device, **options)
        data, labels = images.data[index], images.labels[index]
        if streamed:
            return StreamedBatches(data, labels, index, recipe, config.num_workers, storage.open)
        return DeviceBatches(data, labels, index, recipe)

    if config.val_fraction and not test_only:
        index = rows["train"]
        kept, held = stratified_split(source.parts["train"].labels[index], config.val_fraction)
        if not len(kept) or not len(held):
            what = "to train on" if not len(kept) else "for validation"
            raise DataError(f"--val_fraction {config.val_fraction} of {len(index)} training images leaves none {what}")
        rows |= {"train": index[kept], "val": index[held]}
    made = {part: batches(part, index) for part, index in rows.items()}
    return Data(made.get("train"), made.get("val"), made["test"], source.class_names, fingerprint)
