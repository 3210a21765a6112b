"""Data sets as files: finding, downloading, reading and checking them. `READERS` has a function per data set.

What is read is checked before it is used, and nothing in a file can run code. `dataset.py` makes batches of it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import pickle
import socket
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from options.data import DATASETS, DataConfig
from options.reading import open_regular, read_at_most
from readers.images import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jpe")
UNREAD_SUFFIXES = tuple(".arw .avif .cr2 .cr3 .dng .heic .heif .j2k .jp2 .jxl .nef .orf .rw2 .svg".split())
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


def import_torchvision():
    """The torchvision package. Raises DataError, with what to install, if it is absent or made for another torch."""
    try:
        import torchvision
        import torchvision.datasets
        import torchvision.transforms.v2
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        import torch

        release = ".".join(torch.__version__.split(".")[:2])
        raise DataError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); run `pip install --upgrade torch "
            f"torchvision`, or install the torchvision release made for torch {release}"
        ) from None
    return torchvision


# ---------------------------------------------------------------------------------------------------------------
# Finding and downloading
# ---------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """One part of a data set as read: pixels (n, C, H, W) uint8, or files (n,) as byte strings, and labels (n,) int64."""

    data: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    parts: dict[str, Images]  # train and test, or test alone
    class_names: list[str]
    warnings: tuple[str, ...] = ()  # a line each


def _find(config: DataConfig, find: Callable, expected: str, download: str | None = None):
    """What `find()` finds, if need be after a download by the torchvision class of that name. Raises DataError."""
    missing = f"--data_path {config.data_path} does not hold --dataset {config.dataset}: expected {expected}"
    found = find()
    if found is None and config.download and download:
        _download(config, download, missing)
        found = find()
    if found is None:
        why = " (it cannot be downloaded from here)" if config.download and not download else ""
        raise DataError(f"{missing}{why}; put it there, or take --dataset digits, which needs no files")
    return found


def _download(config: DataConfig, name: str, missing: str) -> None:
    """Download through `torchvision.datasets.<name>` to a folder aside, then move: a failure leaves nothing behind."""
    root = Path(config.data_path)
    parent = root  # the folder aside must be on the same file system, or the move below is a copy
    while not parent.exists():
        parent = parent.parent
    timeout = socket.getdefaulttimeout()
    try:
        make = getattr(import_torchvision().datasets, name)
        socket.setdefaulttimeout(30)  # a compute node behind a firewall would wait for minutes
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as aside:
            with contextlib.redirect_stdout(sys.stderr):  # torchvision prints; stdout is for results
                make(root=aside, download=True)
            for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
                target = root / file.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{missing}, and the download failed ({why}); put it there, or take --dataset digits, which needs no files"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _checked(path: Path, labels, classes: int, images: int) -> np.ndarray:
    """The labels as int64. Raises DataError unless there is one for each image, from 0 to classes - 1."""
    if not isinstance(labels, np.ndarray):
        # A list of lists is not looked into: a pickle can hold one list a billion times over.
        plain = isinstance(labels, list) and len(labels) == images and all(type(label) is int for label in labels)
        labels = np.array(labels if plain else [])
    if images == 0:
        raise DataError(f"{path}: holds no images")
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels do not match the {images} images")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise DataError(f"{path}: label {label} is out of range, 0 to {classes - 1}")
    return labels.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# Digits, idx files, CIFAR batches
# ---------------------------------------------------------------------------------------------------------------


def _read_digits(config: DataConfig, parts: tuple[str, ...]) -> Source:
    with np.load(Path(__file__).parents[1] / "data" / "digits.npz", allow_pickle=False) as arrays:
        return Source({part: _digits_part(arrays, part) for part in parts}, DIGIT_NAMES)


def _digits_part(arrays, part: str) -> Images:
    pixels = np.rint(arrays[f"{part}_images"][:, None] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return Images(pixels, arrays[f"{part}_labels"].astype(np.int64))


MOST_IMAGES = 10**7  # in an idx file: beyond it, its header is wrong


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An idx file of bytes, gzipped or not -> uint8 (n, *shape). Raises DataError if it is anything else.

    No more is read, or unpacked, than the header says that there is, and one byte.
    """
    # Two zeros, the type (8: bytes), the number of axes; then the sizes, big-endian.
    length = 4 + 4 * (1 + len(shape))
    try:
        with open_regular(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            header = file.read(length)
            sizes = tuple(np.frombuffer(header[4:], ">u4").tolist()) if len(header) == length else ()
            if header[:4] != bytes((0, 0, 8, 1 + len(shape))) or sizes[1:] != shape:
                raise DataError(f"{path}: is not an idx file of {'x'.join(map(str, ('n', *shape)))} bytes")
            if sizes[0] > MOST_IMAGES:
                raise DataError(f"{path}: its header says {sizes[0]} images; {MOST_IMAGES} is the most that is read")
            data = read_at_most(file, math.prod(sizes) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(data) != math.prod(sizes):
        more = " or more" if len(data) > math.prod(sizes) else ""
        raise DataError(f"{path}: has {len(data)} bytes{more} of data where its header says {math.prod(sizes)}")
    return np.frombuffer(data, np.uint8).reshape(sizes)


# MD5 of the files of both data sets, which have the same names, unpacked: packing them again changes that of the packed ones.
CHECKSUMS = {
    "6bbc9ace898e44ae57da46a324031adb": ("mnist", "train-images-idx3-ubyte"),
    "a25bea736e30d166cdddb491f175f624": ("mnist", "train-labels-idx1-ubyte"),
    "2646ac647ad5339dbf082846283269ea": ("mnist", "t10k-images-idx3-ubyte"),
    "27ae3e4e09519cfbb04c329615203637": ("mnist", "t10k-labels-idx1-ubyte"),
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": ("fashion_mnist", "train-images-idx3-ubyte"),
    "9018921c3c673c538a1fc5bad174d6f9": ("fashion_mnist", "train-labels-idx1-ubyte"),
    "8181f5470baa50b63fa0f6fddb340f0a": ("fashion_mnist", "t10k-images-idx3-ubyte"),
    "15d484375f8d13e6eb1aabb0c3f46965": ("fashion_mnist", "t10k-labels-idx1-ubyte"),
}
# The labels that they begin with, for files that are not whole, or changed.
FIRST_LABELS = {
    (5, 0, 4, 1, 9, 2, 1, 3, 1, 4): ("mnist", "train-labels-idx1-ubyte"),
    (7, 2, 1, 0, 4, 1, 4, 9, 5, 9): ("mnist", "t10k-labels-idx1-ubyte"),
    (9, 0, 0, 3, 0, 2, 7, 2, 5, 5): ("fashion_mnist", "train-labels-idx1-ubyte"),
    (9, 2, 1, 1, 6, 1, 4, 6, 5, 7): ("fashion_mnist", "t10k-labels-idx1-ubyte"),
}


def _identified(array: np.ndarray) -> tuple[str, str] | None:
    """The data set, and the file of it, whose content (without the header) this is; None if it is of neither."""
    digest = hashlib.md5(bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes(), usedforsecurity=False)
    digest.update(array)
    return CHECKSUMS.get(digest.hexdigest()) or (FIRST_LABELS.get(tuple(array[:10].tolist())) if array.ndim == 1 else None)


def _mistaken(paths: dict[str, Path], arrays: dict[str, np.ndarray], dataset: str) -> list[str]:
    """A warning if files are not those of this data set that their names say."""
    found = {name: _identified(array) for name, array in arrays.items()}
    wrong = [name for name, what in found.items() if what not in (None, (dataset, name))]
    if not wrong:
        return []
    others = f" (and {len(wrong) - 1} more like it)" * (len(wrong) > 1)
    of, file = found[wrong[0]]
    if of == dataset:
        return [f"{paths[wrong[0]]}{others} has the content of {file}: tests may be on training images"]
    return [
        f"{paths[wrong[0]]}{others} has the content of --dataset {of}, not of {dataset}: the names of the classes, and mean "
        "and standard deviation, would be wrong"
    ]


def _read_mnist(config: DataConfig, parts: tuple[str, ...]) -> Source:
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[config.dataset]
    root = Path(config.data_path)
    prefix = {"train": "train", "test": "t10k"}
    wanted = [f"{prefix[part]}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]

    def find() -> dict[str, Path] | None:
        for folder in (root / name / "raw", root):
            paths = [path for file in wanted for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
            paths = {path.name.removesuffix(".gz"): path for path in reversed(paths)}  # the plain file, where both are
            if len(paths) == len(wanted):
                return paths
        return None

    paths = _find(config, find, f"{', '.join(wanted)} (or .gz) there or in {root / name / 'raw'}", name)
    arrays = {file: read_idx(paths[file], (28, 28) if "images" in file else ()) for file in wanted}
    read = {}
    for part in parts:
        pixels, file = arrays[f"{prefix[part]}-images-idx3-ubyte"], f"{prefix[part]}-labels-idx1-ubyte"
        read[part] = Images(pixels[:, None], _checked(paths[file], arrays[file], 10, len(pixels)))
    notes = _mistaken(paths, arrays, config.dataset)
    return Source(read, FASHION_NAMES if name == "FashionMNIST" else DIGIT_NAMES, tuple(notes))


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` for the one codec with which Python 2 pickles carry bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


# The functions by which NumPy's arrays are pickled, taken from arrays: their modules are private and have moved.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]


class _ArrayUnpickler(pickle._Unpickler):
    """Reads NumPy arrays and plain values, and nothing that could run code.

    It is the one written in Python: to that in C, ten bytes can say that a table of 64 GB is to be made.
    A pickle names the functions that it calls; `find_class` is where names become functions.
    """

    ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of images")
        return self.ALLOWED[module, name]


def _read_cifar_batch(path: Path, key: str, classes: int) -> Images:
    try:
        with open_regular(path) as file:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
        batch = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in batch.items()}
        pixels, labels = batch["data"], batch[key]
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: is not a batch of CIFAR images ({type(error).__name__}: {error})") from None
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == 3072):
        raise DataError(f"{path}: is not a batch of CIFAR images (data must be n x 3072 bytes)")
    return Images(pixels.reshape(-1, 3, 32, 32), _checked(path, labels, classes, len(pixels)))


def _read_cifar(config: DataConfig, parts: tuple[str, ...]) -> Source:
    if config.dataset == "cifar10":
        name, key, folder = "CIFAR10", "labels", "cifar-10-batches-py"
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    else:
        name, key, folder = "CIFAR100", "fine_labels", "cifar-100-python"
        files = {"train": ["train"], "test": ["test"]}
    paths = {part: [Path(config.data_path) / folder / file for file in files[part]] for part in parts}

    def find() -> dict[str, list[Path]] | None:
        return paths if all(path.is_file() for part in parts for path in paths[part]) else None

    _find(config, find, f"{folder}/ with {', '.join(file for part in parts for file in files[part])}", name)
    class_names = CIFAR10_NAMES if name == "CIFAR10" else CIFAR100_NAMES
    read = {}
    for part in parts:
        batches = [_read_cifar_batch(path, key, len(class_names)) for path in paths[part]]
        read[part] = Images(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    return Source(read, class_names)


# ---------------------------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------------------------


def _identity(path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders of classes, sorted. Raises DataError for two names of one folder, as links can be."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    known = {_identity(folder): folder}
    for name in names:
        same = known.setdefault(_identity(folder / name), folder / name)
        if same != folder / name:
            raise DataError(f"{folder / name}: is a link to {same}; a class needs images of its own")
    return names


def _files_below(top: str, above: frozenset, unread: Counter) -> list[str]:
    """The image files in a folder, then below it, sorted; counts, by suffix, images of formats that are not read."""
    found, pending = [], [(top, above)]
    while pending:
        folder, above = pending.pop()
        above |= {_identity(folder)}
        below = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                if entry.is_symlink() and _identity(entry.path) in above:
                    raise DataError(f"{entry.path}: is a link to a folder that it lies in; remove it")
                below.append((entry.path, above))
            elif suffix in IMAGE_SUFFIXES:
                if not entry.is_file():
                    raise DataError(
                        f"{entry.path}: is not a regular file, but a link to nothing, a pipe or a device; remove it"
                    )
                found.append(entry.path)
            elif suffix in UNREAD_SUFFIXES:
                unread[suffix] += 1
        pending += reversed(below)
    return found


def _scan(folder: Path, classes: list[str], *, may_be_empty: bool) -> tuple[Images, list[str]]:
    """The image files below one folder per class, sorted, and warnings.

    Raises DataError for a class without any, unless it may, and for links that lead back.
    """
    files, labels, empty, unread = [], [], [], Counter()
    resolved = Path(os.path.realpath(folder))
    above = frozenset(map(_identity, (resolved, *resolved.parents)))
    for label, name in enumerate(classes):
        before = len(files)
        if (folder / name).is_dir():
            if _identity(folder / name) in above:
                raise DataError(f"{folder / name}: is a link to a folder that it lies in; remove it")
            files += _files_below(str(folder / name), above, unread)
        if len(files) == before:
            empty.append(name)
            if not may_be_empty:
                raise DataError(f"{folder / name}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        labels += [label] * (len(files) - before)
    if not files:
        raise DataError(f"{folder}: has no images ({' '.join(IMAGE_SUFFIXES)}) in its class folders")
    notes = []
    if beside := sum(entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in os.scandir(folder)):
        notes.append(f"{beside} image{'s' * (beside > 1)} in {folder} itself, in no class folder, are left out")
    if empty:
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{folder} has no images of {len(empty)} of the {len(classes)} classes ({named}): they are not tested")
    if unread:
        what = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(unread.items()))
        notes.append(f"images below {folder} are left out, as their formats are not read: {what}")
    # An array of bytes, which workers share: lists are copied into each as soon as their references are counted.
    return Images(np.array([os.fsencode(file) for file in files]), np.array(labels, dtype=np.int64)), notes


def _read_folders(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """`train/` and `val/` with one folder per class; the test images are those of `val/`."""
    root = Path(config.data_path)
    folders = [root, root / config.dataset] + [root / "imagenette2"] * (config.dataset == "imagenette")
    needed = [{"train": "train", "test": "val"}[part] for part in parts]

    def find() -> Path | None:
        return next((folder for folder in folders if all((folder / name).is_dir() for name in needed)), None)

    expected = f"{'/ and '.join(needed)}/ with one folder per class there or in {' or '.join(map(str, folders[1:]))}"
    folder = _find(config, find, expected, "Imagenette" if config.dataset == "imagenette" else None)
    # A label is the index of its training class. To test, a copy without train/ will do if it has every class.
    listed = folder / ("train" if (folder / "train").is_dir() else "val")
    classes = _class_folders(listed)
    count = DATASETS[config.dataset].classes
    if not classes or len(classes) != (count or len(classes)):
        raise DataError(f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {count or 'at least 1'}")
    for name in _class_folders(folder / "val"):
        if name not in classes:
            raise DataError(f"{folder / 'val' / name}: a class folder that {folder / 'train'} lacks")
    read, notes = {}, []
    for part in parts:
        read[part], more = _scan(folder / {"train": "train", "test": "val"}[part], classes, may_be_empty=part == "test")
        notes += more
    if "train" in parts and _identity(folder / "train") == _identity(folder / "val"):
        notes.append(f"{folder / 'val'} is {folder / 'train'} under another name: tests are on the training images")
    return Source(read, classes, tuple(notes))


READERS = {"digits": _read_digits, "mnist": _read_mnist, "fashion_mnist": _read_mnist}
READERS |= {"cifar10": _read_cifar, "cifar100": _read_cifar}
READERS |= {name: _read_folders for name, info in DATASETS.items() if info.streamed}
