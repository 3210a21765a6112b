"""Decode image files in worker processes, which live for all epochs."""

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from options.machine import cpu_cores
from options.reading import open_regular
from readers.augmentation import WORKER, seeded
from readers.images import decode_image
from runs import DataError
from runs.endings import is_of_worker, lost_worker
from runs.processes import Signals
from utils import keys

PREFETCHED = 2  # batches that each worker prepares
warnings.filterwarnings("ignore", message="This DataLoader will create")  # see `warnings_of_workers`


class _Packed:
    """A batch pickled by a worker's main thread, which can catch the errors: no shared memory, socket or file descriptor.

    The thread of the worker's queue would print the error and send nothing, and the main process would wait for ever.
    """

    def __init__(self, batch: tuple[Tensor, ...]):
        self._pickled = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self):
        return pickle.loads, (self._pickled,)


class _ImageFiles(Dataset):
    """(epoch, rows (B,)) -> images (B, 3, H, W) uint8, labels (B,) and index (B,), or the DataError that prevents it."""

    def __init__(
        self, files: np.ndarray, labels: np.ndarray, index: np.ndarray, seed: int, transform: Callable, sides, open_file
    ):
        self.files, self.labels, self.index, self.open_file = files, labels, index, open_file
        self.seed, self.transform, self.sides = seed, transform, sides

    def __getitem__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor] | _Packed | DataError:
        epoch, rows = batch
        index = torch.from_numpy(self.index[rows])
        images = torch.empty(len(rows), 3, *self.sides, dtype=torch.uint8)
        for image, row in seeded(zip(images, rows, strict=True), keys(self.seed, epoch, index, WORKER)):
            try:
                image.copy_(self.transform(decode_image(os.fsdecode(self.files[row]), self.open_file)))
            except DataError as error:
                return DataError(str(error))  # a copy without traceback, which would keep this frame alive
        found = images, torch.from_numpy(self.labels[rows]), index
        try:
            return found if get_worker_info() is None else _Packed(found)
        except (RuntimeError, OSError) as error:
            return lost_worker(error)


def start_worker(worker: int) -> None:
    """Ignore signals, which clusters send to all processes: the main process needs its workers to finish a step."""
    for number in Signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(loader: weakref.ref) -> None:
    """End the workers at exit, before multiprocessing sends them SIGTERM and waits."""
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def warnings_of_workers(num_workers: int, batch_bytes: int) -> list[str]:
    """Return warnings if worker processes outnumber the cores, or may fill the shared memory with batches of this size."""
    lines = []
    if num_workers > cpu_cores():
        lines.append(f"--num_workers {num_workers} exceeds the number of CPU cores, {cpu_cores()}; reading may slow down")
    with contextlib.suppress(OSError):  # no /dev/shm, as on macOS
        need, free = num_workers * PREFETCHED * batch_bytes, shutil.disk_usage("/dev/shm").free
        if need > free:
            lines.append(
                f"/dev/shm has {free / 2**20:,.0f} MiB free, and batches of --num_workers {num_workers} may need "
                f"{need / 2**20:,.0f}: enlarge it (docker --shm-size), or use fewer workers or a smaller --batch_size"
            )
    return lines


class ImageStream:
    """Batches of image files, decoded and transformed by `num_workers` processes, or in this one if there are none.

    The workers start with the first epoch. Only one iterator at a time can be in use.

    Args:
        files: Paths (n,) as byte strings.
        labels: (n,) int64.
        index: Number of each image in the whole data set, (n,) int64; with `seed` and epoch it seeds `transform`.
        transform: PIL image -> (3, *sides) uint8, drawing from torch's CPU generator.
        open_file: `open` of the storage that holds the files.
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
        open_file: Callable[[str], BinaryIO] = open_regular,
    ):
        # The batches of an epoch. A sampler that refers back to the loader would delay the end of its workers by seconds.
        self._plan: list[tuple[int, np.ndarray]] = []
        self.loader = DataLoader(
            _ImageFiles(files, labels, index, seed, transform, sides, open_file),
            batch_size=None,  # an item is a batch
            sampler=self._plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCHED if num_workers else None,
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
            iterator = iter(self.loader)
            for worker in getattr(iterator, "_workers", ()):
                worker.terminate = worker.kill  # it ignores SIGTERM; stuck, it would hold up the exit for ever
            for batch in iterator:
                if isinstance(batch, DataError):
                    raise DataError(str(batch))  # a copy: `batch` would hold its own traceback, and that the workers
                yield tuple(batch)
        except (RuntimeError, OSError) as error:
            if not is_of_worker(error):
                raise
            raise lost_worker(error) from None
