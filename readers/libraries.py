"""Read data sets of torchvision and of Hugging Face's `datasets`, as lists of image files or of images by number."""

import functools
import hashlib
import inspect
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from options.data import DataConfig
from options.libraries import TORCHVISION, open_hub
from options.reading import open_regular
from options.storage import DISK, FileSystem, Status
from readers.files import Images, Source, checked_labels, download_to, import_torchvision
from readers.folders import hash_of, look_at, relative_names
from readers.splits import stratified_split
from runs import DataError

HELD_OUT = 0.2  # share of the images for tests, where a data set has no test images


class Numbered:
    """Images of another library as a storage: the path of an image is NAME/NUMBER.

    digest: of the images in hexadecimal digits; a file has a time of change in its place.
    """

    def __init__(self, read: Callable[[int], BinaryIO], digest: str):
        self.read, self.digest = read, digest

    def open(self, path: str) -> BinaryIO:
        return self.read(int(path.rpartition("/")[2]))

    def stat(self, path: bytes) -> Status:
        return Status(0, 0, 0, int(self.digest, 16))


class Listed(NamedTuple):
    """Images of one part, the storage that holds them, and the hash of their list."""

    images: Images
    storage: FileSystem | Numbered
    digest: str


def _numbered(name: str, labels: np.ndarray, read: Callable[[int], BinaryIO], digest: str) -> Listed:
    paths = np.array([f"{name}/{number}".encode() for number in range(len(labels))])
    return Listed(Images(paths, labels), Numbered(read, digest), digest)


def _as_source(read: Callable[[str], Listed], parts: tuple[str, ...], has_test: bool, names: list[str]) -> Source:
    """Read the parts by `read`; hold test images out of the training images where there are none."""
    if has_test:
        listed = {part: read(part) for part in parts}
        images = {part: one.images for part, one in listed.items()}
    else:
        listed = dict.fromkeys(parts, read("train"))
        everything = listed["test"].images
        rows = dict(zip(("train", "test"), stratified_split(everything.labels, HELD_OUT), strict=True))
        images = {part: Images(*(array[rows[part]] for array in everything)) for part in parts}
    storages = {part: one.storage for part, one in listed.items()}
    return Source(images, names, hashes={part: one.digest for part, one in listed.items()}, storages=storages)


# ---------------------------------------------------------------------------------------------------------------
# torchvision
# ---------------------------------------------------------------------------------------------------------------


# Data sets that would decode each image to tell its label.
PATHS = {
    "GTSRB": lambda dataset: dataset._samples,
    "OxfordIIITPet": lambda dataset: zip(dataset._images, dataset._labels, strict=True),
}


def read_torchvision(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Read a classification data set of torchvision, after a download if need be."""
    name = config.dataset.partition(":")[2]
    row = TORCHVISION[name]
    make = getattr(import_torchvision().datasets, name)
    accepted = inspect.signature(make).parameters
    root = os.path.abspath(config.data_path)  # so that names relative to it do not depend on the working folder
    arguments = {part: getattr(row, part) or row.train for part in parts}
    more = {"loader": str} if "loader" in accepted or name == "ImageNet" else {}  # paths in place of decoded images
    more |= {"download": False} if "download" in accepted else {}

    def open_all() -> dict:
        return {part: make(root=root, **values, **more) for part, values in arguments.items()}

    def fetch(aside: str) -> None:
        for values in arguments.values():
            make(root=aside, **values, download=True)

    try:
        try:
            made = open_all()
        except ImportError:
            raise
        except Exception as error:  # each data set raises others
            if "download" not in accepted or not config.download:
                raise
            if failed := download_to(Path(root), fetch):
                raise DataError(f"{error}{failed}") from None
            made = open_all()
    except ImportError as error:
        raise DataError(f"--dataset {config.dataset} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:
        reason = " ".join(str(error).replace("You can use download=True to download it", "").split())
        remedy = "" if config.download else "; leave out --no-download to download it"
        remedy = remedy if "download" in accepted else "; it has to be downloaded by hand"
        raise DataError(f"--data_path {config.data_path} does not hold --dataset {config.dataset} ({reason}{remedy})") from None

    def read(part: str) -> Listed:
        dataset, place = made.get(part, made["test"]), f"{config.dataset}/{part}"
        return _list_torchvision(dataset, PATHS.get(name, _pairs)(dataset), place, root, row.classes)

    return _as_source(read, parts, row.test is not None, _class_names(made["test"], row.classes))


def _pairs(dataset):
    return (dataset[number] for number in range(len(dataset)))


def _list_torchvision(dataset, pairs, place: str, root: str, classes: int) -> Listed:
    """List a data set; pairs: (path or image, label) of each image."""
    paths, labels, digest = [], [], hashlib.blake2b(digest_size=16)
    for image, label in pairs:
        path = getattr(image, "filename", image if isinstance(image, (str, Path)) else "")  # of an image not yet decoded
        if path:
            paths.append(str(path).encode(errors="surrogateescape"))
        else:
            digest.update(image.tobytes())
        labels.append(label)
    if None in labels:
        raise DataError(f"{place}: has images without labels")
    labels = checked_labels(Path(place), np.array(labels), classes, len(labels))
    if paths:
        files = np.array(paths)
        names = relative_names(files, Path(root))
        return Listed(Images(files, labels), DISK, hash_of(names, look_at(files, DISK)["size"]))
    digest.update(labels.tobytes())
    return _numbered(place, labels, functools.partial(_encode, dataset), digest.hexdigest())


def _encode(dataset, number: int) -> BinaryIO:
    """Return image `number` as an uncompressed file."""
    file = io.BytesIO()
    dataset[number][0].convert("RGB").save(file, "PPM")
    file.seek(0)
    return file


def _class_names(dataset, classes: int) -> list[str]:
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(dataset, attribute, ())
        if len(names) == classes:
            return [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return [str(number) for number in range(classes)]


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face
# ---------------------------------------------------------------------------------------------------------------


def read_hub(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Read a data set of Hugging Face's `datasets`: encoded images and labels in two columns."""
    hub = open_hub(config.dataset, config.image_column, config.label_column, config.download)

    def read(part: str) -> Listed:
        dataset, place = getattr(hub, part), f"{config.dataset}/{part}"
        values = dataset[hub.label][:]
        unknown = next((value for value in values if value not in hub.numbers), None)
        if unknown is not None or None in values:
            raise DataError(f"{place}: --label_column {hub.label} holds {unknown!r}, which is no class of the training images")
        labels = np.array([hub.numbers[value] for value in values], np.int64)
        return _numbered(place, labels, functools.partial(_encoded, dataset, hub.image), _digest(dataset, hub.image, labels))

    return _as_source(read, parts, hub.test is not None, hub.class_names)


def _encoded(dataset, column: str, number: int) -> BinaryIO:
    image = dataset[number][column]
    return open_regular(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


def _digest(dataset, column: str, labels: np.ndarray) -> str:
    """Hash names, sizes and labels in order."""
    import pyarrow.compute as compute

    images = dataset.with_format("arrow")[:][column]
    names = compute.struct_field(images, "path").to_pylist()
    sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
    lines = [f"{row}\0{name}\0{label}".encode() for row, (name, label) in enumerate(zip(names, labels.tolist(), strict=True))]
    return hash_of(lines, np.array([size or 0 for size in sizes]))
