"""Decode image files in worker processes, which live for all epochs."""

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from readers.augmentation import WORKER, seeded
from readers.images import decode_image
from runs import DataError
from runs.processes import Signals
from utils import keys


class _ImageFiles(Dataset):
    """(epoch, rows (B,)) -> images (B, 3, H, W) uint8, labels (B,) and index (B,), or the DataError of a damaged file."""

    def __init__(self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, seed: int, transform: Callable, sides):
        self.files, self.labels, self.index = files, labels, index
        self.seed, self.transform, self.sides = seed, transform, sides

    def __getitem__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor] | DataError:
        epoch, rows = batch
        index = torch.from_numpy(self.index[rows])
        images = torch.empty(len(rows), 3, *self.sides, dtype=torch.uint8)
        for image, row in seeded(zip(images, rows, strict=True), keys(self.seed, epoch, index, WORKER)):
            try:
                image.copy_(self.transform(decode_image(os.fsdecode(self.files[row]))))
            except DataError as error:
                return DataError(str(error))  # a copy without traceback, which would keep this frame alive
        return images, torch.from_numpy(self.labels[rows]), index


def start_worker(worker: int) -> None:
    """Ignore signals, which clusters send to all processes: the main process needs its workers to finish a step."""
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(loader: weakref.ref) -> None:
    """End the workers at exit, before multiprocessing sends them SIGTERM and waits."""
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


class ImageStream:
    """Batches of image files, decoded and transformed by `num_workers` processes, or in this one if there are none.

    The workers start with the first epoch. Only one iterator at a time can be in use.

    Args:
        files: Paths (n,) as byte strings.
        labels: (n,) int64.
        index: Number of each image in the whole data set, (n,) int64; with `seed` and epoch it seeds `transform`.
        transform: PIL image -> (3, *sides) uint8, drawing from torch's CPU generator.
    """

    def __init__(
        self,
        files: np.ndarray,
        labels: np.ndarray,
        index: np.ndarray,
        seed: int,
        transform: Callable,
        sides: tuple[int, int],
        num_workers: int,
        pin_memory: bool,
    ):
        # The batches of an epoch. A sampler that refers back to the loader would delay the end of its workers by seconds.
        self._plan: list[tuple[int, np.ndarray]] = []
        self.loader = DataLoader(
            _ImageFiles(files, labels, index, seed, transform, sides),
            batch_size=None,  # an item is a batch
            sampler=self._plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else each epoch draws from the global generator, and a resumed one twice
        )
        atexit.register(_end_workers, weakref.ref(self.loader))

    def read(self, epoch: int, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images (B, 3, H, W) uint8, labels (B,) and index (B,) for the rows (B,) of each chunk.

        Raises:
            DataError: An image cannot be read, or a worker has died.
        """
        self._plan[:] = [(epoch, rows.numpy()) for rows in chunks]
        try:
            for batch in self.loader:
                if isinstance(batch, DataError):
                    raise DataError(str(batch))  # a copy: `batch` would hold its own traceback, and that the workers
                yield tuple(batch)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that reads images died ({error}); try --num_workers 0") from None
