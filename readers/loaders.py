"""Batches of any iterable of (images, labels): a DataLoader, a list, or an object of another library."""

import operator
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from readers.stream import start_worker
from runs import DataError


class LoaderBatches:
    """Batches of an iterable on the device, for the loops of training and evaluation (`dataset.Batches`).

    The iterable is read anew in every epoch. While it is read, the global random numbers of Python, NumPy and torch's CPU, and
    its own `generator`, are a function of seed and epoch: order and augmentation do not depend on what the model draws, and an
    interrupted epoch goes on with the images that are left.

    Args:
        name: of the argument, for errors.

    Raises TypeError for an object that cannot be read again.
    """

    def __init__(self, loader: Iterable, device: torch.device, *, name: str = "loader", seed: int = 0):
        if hasattr(loader, "__next__") or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise TypeError(
                f"{name} is a {type(loader).__name__}, which cannot be read in every epoch; give a DataLoader or a list"
            )
        self.loader, self.device, self.name, self.seed = loader, device, name, seed
        self.num_samples = 0  # known after `count_classes`
        self._batches = operator.length_hint(loader)  # 0: not known yet
        self._size = self._before = 0  # images of the batch that was read last, and of those before it

    @property
    def num_batches(self) -> int:
        """Batches of an epoch; an iterable without a length is read to count them."""
        if not self._batches:
            self._batches = sum(1 for _ in self._read(0))
        return self._batches

    def __len__(self) -> int:
        return self.num_batches

    def images_in(self, step: int) -> int:
        """Return the size of the batch that was read last."""
        return self._size

    def first_image(self, number: int) -> int:
        """Return the row of the first image of the batch that was read last."""
        return self._before

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, ...) and labels (B,) int64 on the device, from batch number `start` on. Raises DataError."""
        steps = self._size = self._before = 0
        for steps, batch in enumerate(self._read(epoch), start=1):
            if steps > start:
                images, labels = self._check(batch)
                self._size, self._before = len(labels), self._before + self._size
                yield images.to(self.device, non_blocking=True), labels.to(self.device, torch.int64, non_blocking=True)
        if not steps:
            raise DataError(f"{self.name} gives no batch")
        if self._batches not in (0, steps):
            raise DataError(f"{self.name} gave {steps} batches in epoch {epoch + 1}, and {self._batches} before")
        self._batches = steps

    def _read(self, epoch: int) -> Iterator:
        numbers = RandomNumbers(self.seed, epoch)
        with numbers:
            iterator = self._start(numbers)
        while True:
            with numbers:
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def _start(self, numbers: "RandomNumbers") -> Iterator:
        if isinstance(generator := getattr(self.loader, "generator", None), torch.Generator):
            generator.manual_seed(numbers.seed)
        if not isinstance(self.loader, DataLoader) or not self.loader.num_workers:
            return iter(self.loader)
        given = self.loader.worker_init_fn
        self.loader.worker_init_fn = lambda worker: (start_worker(worker), given and given(worker))
        try:
            return iter(self.loader)
        finally:
            self.loader.worker_init_fn = given

    def _check(self, batch) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{self.name} gives a {type(batch).__name__}, not pairs (images, labels)")
        try:
            images, labels = map(torch.as_tensor, batch)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name} gives no tensors: {error}") from None
        integers = not labels.is_floating_point() and labels.ndim == 1
        if not images.is_floating_point() or not integers or not 0 < len(labels) == len(images):
            found = f"images {tuple(images.shape)} of {images.dtype} and labels {tuple(labels.shape)} of {labels.dtype}"
            raise DataError(f"{self.name} gives {found}; it must give (B, ...) of torch.float32 and (B,) of torch.int64")
        return images, labels


def count_classes(batches: LoaderBatches, classes: int) -> list[int]:
    """Read all batches once; return the number of images of each class. Raises DataError."""
    counts = torch.zeros(classes, dtype=torch.int64)
    for _, labels in batches.epoch(0):
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= classes:
            raise DataError(f"{batches.name} has the label {low if low < 0 else high}, and the model has {classes} outputs")
        counts += labels.cpu().bincount(minlength=classes)
    batches.num_samples = int(counts.sum())
    return counts.tolist()


class RandomNumbers:
    """Context in which the global random numbers of Python, NumPy and torch's CPU go on from a seed; outside they stay."""

    def __init__(self, *key: int):
        self.seed = random.Random(repr(key)).getrandbits(32)
        self._inside = None

    def __enter__(self) -> None:
        self._outside = random.getstate(), np.random.get_state(), torch.get_rng_state()
        if self._inside is None:
            random.seed(self.seed)
            np.random.seed(self.seed)
            torch.default_generator.manual_seed(self.seed)
        else:
            self._restore(self._inside)

    def __exit__(self, *_exception) -> None:
        self._inside = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._restore(self._outside)

    @staticmethod
    def _restore(states: tuple) -> None:
        for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
            restore(state)
