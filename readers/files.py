"""Find and download data sets, and read those that fit into memory: digits, MNIST, Fashion-MNIST and CIFAR.

A reader takes the options and the parts wanted (train, test) and returns a `Source`. Nothing in a file can run code.
"""

import contextlib
import gzip
import math
import os
import pickle
import shutil
import socket
import sys
import tempfile
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from options.data import DataConfig
from runs import DataError

DIGIT_NAMES = [str(digit) for digit in range(10)]
FASHION_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
""".split()


class Images(NamedTuple):
    """One part of a data set: pixels (n, C, H, W) uint8 or files (n,) as byte strings, and labels (n,) int64."""

    data: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    """A data set as its reader returns it."""

    parts: dict[str, Images]  # train and test, or test only; val where the data set has one
    class_names: list[str]
    warnings: tuple[str, ...] = ()  # for the user, one line each
    hashes: Mapping[str, str] = MappingProxyType({})  # of the list of files of each part, or of generated images
    storages: Mapping[str, object] = MappingProxyType({})  # that hold the files of each part; by default the file system


# ---------------------------------------------------------------------------------------------------------------
# Finding and downloading
# ---------------------------------------------------------------------------------------------------------------


def import_torchvision():
    """Import torchvision. Raises DataError with the command to install it if it is missing or does not fit torch."""
    try:
        import torchvision.transforms.v2
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        import torch

        raise DataError(
            f"torchvision cannot be imported ({error}); run `pip install --upgrade torch torchvision`, or install the "
            f"torchvision release made for torch {torch.__version__}"
        ) from None
    return torchvision


def find_folder(config: DataConfig, folders: list[Path], names: list[str], download: str | None = None) -> Path:
    """Return the first folder that holds all `names` (files or folders, also packed), after a download if need be.

    Args:
        download: Class of torchvision.datasets that downloads the data set.

    Raises:
        DataError: No folder holds them.
    """

    def find() -> Path | None:
        packed = ("", ".gz", ".zip", ".tar")
        holding = (f for f in folders if all(any(os.path.exists(f"{f / name}{end}") for end in packed) for name in names))
        return next(holding, None)

    found, reason = find(), "" if download else " (it has to be downloaded by hand)"
    if found is None and download and config.download:
        reason = download_to(
            Path(config.data_path), lambda aside: getattr(import_torchvision().datasets, download)(root=aside, download=True)
        )
        found = find()
    if found is None:
        raise DataError(
            f"--data_path {config.data_path} does not hold --dataset {config.dataset}: expected {', '.join(names)} in "
            f"{' or '.join(map(str, folders))}{reason}; put it there, or use --dataset digits, which needs no files"
        )
    return found


def download_to(root: Path, fetch: Callable[[str], object]) -> str:
    """Download into a folder by `fetch`, which takes its path; return why it failed, or "".

    Files are moved into place when all are there, so that a failure leaves nothing behind.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # behind a firewall, a compute node would wait for minutes
    try:
        parent = next(folder for folder in (root, *root.parents) if folder.exists())
        # torchvision prints; stdout is for results.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as aside, contextlib.redirect_stdout(sys.stderr):
            fetch(aside)
            shutil.copytree(aside, root, dirs_exist_ok=True, copy_function=os.replace)
    except Exception as error:
        return f", and the download failed ({type(error).__name__}: {error})"
    finally:
        socket.setdefaulttimeout(timeout)
    return ""


# ---------------------------------------------------------------------------------------------------------------
# Data sets that fit into memory
# ---------------------------------------------------------------------------------------------------------------


def checked_labels(path: Path, labels: np.ndarray, classes: int, images: int) -> np.ndarray:
    """Return the labels as int64. Raises DataError unless there is one from 0 to classes - 1 for each image."""
    if not 0 < images == len(labels):
        raise DataError(f"{path}: has {len(labels)} labels for {images} images")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(f"{path}: label {outside[0]} is out of range, 0 to {classes - 1}")
    return labels.astype(np.int64)


def read_digits(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Read the 8 x 8 digits that come with the code."""
    read = {}
    with np.load(Path(__file__).parents[1] / "data" / "digits.npz", allow_pickle=False) as arrays:
        for part in parts:
            pixels = np.rint(arrays[f"{part}_images"][:, None] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
            read[part] = Images(pixels, arrays[f"{part}_labels"].astype(np.int64))
    return Source(read, DIGIT_NAMES)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an idx file of bytes, or the .gz beside it: uint8 (n, *shape). Raises DataError for anything else."""
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except Exception as error:  # a damaged archive raises nearly anything
        raise DataError(f"{path}: cannot be read ({error})") from None
    # Two zeros, the type (8: bytes), the number of axes; then the sizes, big-endian.
    start = 4 + 4 * (1 + len(shape))
    sizes = tuple(int.from_bytes(raw[place : place + 4]) for place in range(4, start, 4))
    if raw[:4] != bytes((0, 0, 8, 1 + len(shape))) or sizes[1:] != shape:
        raise DataError(f"{path}: is not an idx file of {'x'.join(map(str, ('n', *shape)))} bytes")
    if len(raw) - start != math.prod(sizes):
        raise DataError(f"{path}: has {len(raw) - start} bytes of data; its header says {math.prod(sizes)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def read_mnist(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Read the idx files of MNIST or Fashion-MNIST."""
    name, class_names = {"mnist": ("MNIST", DIGIT_NAMES), "fashion_mnist": ("FashionMNIST", FASHION_NAMES)}[config.dataset]
    root = Path(config.data_path)
    prefix = {"train": "train", "test": "t10k"}
    names = [f"{prefix[part]}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
    folder = find_folder(config, [root / name / "raw", root], names, name)
    read = {}
    for part in parts:
        pixels = _read_idx(folder / f"{prefix[part]}-images-idx3-ubyte", (28, 28))
        path = folder / f"{prefix[part]}-labels-idx1-ubyte"
        read[part] = Images(pixels[:, None], checked_labels(path, _read_idx(path, ()), 10, len(pixels)))
    return Source(read, class_names)


# The functions by which NumPy pickles arrays, taken from arrays: their modules are private and have moved.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]


class _ArrayUnpickler(pickle._Unpickler):
    """Unpickler of NumPy arrays and plain values that runs no code from the file.

    A pickle names the functions that it calls; `find_class` is where names become functions. This is the unpickler
    written in Python: ten bytes can make the one in C allocate 64 GB.
    """

    ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of images")
        return self.ALLOWED[module, name]


def _read_cifar_batch(path: Path, key: str, classes: int) -> Images:
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
        pixels, labels = batch["data"], np.array(array("q", batch[key]))  # an array of integers takes nothing else
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ValueError("data must be n x 3072 bytes")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: is not a batch of CIFAR images ({type(error).__name__}: {error})") from None
    return Images(pixels.reshape(-1, 3, 32, 32), checked_labels(path, labels, classes, len(pixels)))


CIFAR = {  # class of torchvision.datasets, folder, key of the labels, names of the classes, files of each part
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py",
        "labels",
        CIFAR10_NAMES,
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    ),
    "cifar100": ("CIFAR100", "cifar-100-python", "fine_labels", CIFAR100_NAMES, {"train": ["train"], "test": ["test"]}),
}


def read_cifar(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Read the Python batches of CIFAR-10 or CIFAR-100."""
    name, folder, key, class_names, files = CIFAR[config.dataset]
    names = [file for part in parts for file in files[part]]
    folder = find_folder(config, [Path(config.data_path) / folder], names, name)
    read = {}
    for part in parts:
        batches = [_read_cifar_batch(folder / file, key, len(class_names)) for file in files[part]]
        read[part] = Images(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    return Source(read, class_names)
