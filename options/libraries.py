"""Data sets of other libraries: `torchvision:NAME`, from a table, and `hf:NAME_OR_FOLDER`, which is opened."""

import functools
from pathlib import Path
from typing import NamedTuple

from options.fields import did_you_mean


class TorchvisionSet(NamedTuple):
    """One classification data set of `torchvision.datasets`."""

    classes: int
    size: int  # default side of the images in pixels
    train: dict  # arguments of its class
    test: dict | None  # None: it has no test images, and a fifth of the others is held out


SPLITS, FLAGS, WHOLE = ({"split": "train"}, {"split": "test"}), ({"train": True}, {"train": False}), ({}, None)
WITH_VAL = {"split": "trainval"}, {"split": "test"}

TORCHVISION = {
    "CIFAR10": TorchvisionSet(10, 32, *FLAGS),
    "CIFAR100": TorchvisionSet(100, 32, *FLAGS),
    "CLEVRClassification": TorchvisionSet(11, 224, {"split": "train"}, {"split": "val"}),  # classes: numbers of objects
    "Caltech101": TorchvisionSet(101, 224, *WHOLE),
    "Caltech256": TorchvisionSet(257, 224, *WHOLE),
    "Country211": TorchvisionSet(211, 224, *SPLITS),
    "DTD": TorchvisionSet(47, 224, *SPLITS),
    "EMNIST": TorchvisionSet(47, 28, *({"split": "balanced"} | flag for flag in FLAGS)),
    "EuroSAT": TorchvisionSet(10, 64, *WHOLE),
    "FER2013": TorchvisionSet(7, 48, *SPLITS),
    "FGVCAircraft": TorchvisionSet(100, 224, *WITH_VAL),
    "FashionMNIST": TorchvisionSet(10, 28, *FLAGS),
    "Flowers102": TorchvisionSet(102, 224, *SPLITS),
    "Food101": TorchvisionSet(101, 224, *SPLITS),
    "GTSRB": TorchvisionSet(43, 32, *SPLITS),
    "INaturalist": TorchvisionSet(10_000, 224, {"version": "2021_train"}, {"version": "2021_valid"}),
    "ImageNet": TorchvisionSet(1000, 224, {"split": "train"}, {"split": "val"}),
    "Imagenette": TorchvisionSet(10, 224, {"split": "train"}, {"split": "val"}),
    "KMNIST": TorchvisionSet(10, 28, *FLAGS),
    "LFWPeople": TorchvisionSet(5749, 224, *WHOLE),
    "MNIST": TorchvisionSet(10, 28, *FLAGS),
    "Omniglot": TorchvisionSet(964, 105, *WHOLE),
    "OxfordIIITPet": TorchvisionSet(37, 224, *WITH_VAL),
    "PCAM": TorchvisionSet(2, 96, *SPLITS),
    "Places365": TorchvisionSet(365, 224, {"split": "train-standard"}, {"split": "val"}),
    "QMNIST": TorchvisionSet(10, 28, *FLAGS),
    "RenderedSST2": TorchvisionSet(2, 224, *SPLITS),
    "SEMEION": TorchvisionSet(10, 16, *WHOLE),
    "STL10": TorchvisionSet(10, 96, *SPLITS),
    "SUN397": TorchvisionSet(397, 224, *WHOLE),
    "SVHN": TorchvisionSet(10, 32, *SPLITS),
    "StanfordCars": TorchvisionSet(196, 224, *SPLITS),
    "USPS": TorchvisionSet(10, 16, *FLAGS),
}


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face
# ---------------------------------------------------------------------------------------------------------------


class HubData(NamedTuple):
    """An opened data set of Hugging Face's `datasets`."""

    train: object  # datasets.Dataset, whose images are not decoded
    test: object | None  # None: it has no test images, and a fifth of the others is held out
    image: str  # column of the images
    label: str  # column of the classes
    class_names: list[str]
    numbers: dict  # class by value in the column


def is_hub(dataset: object) -> bool:
    """Return True for a data set of Hugging Face's `datasets`."""
    return str(dataset).startswith("hf:") and dataset != "hf:"


@functools.lru_cache(1)
def open_hub(dataset: str, image_column: str | None, label_column: str | None, download: bool) -> HubData:
    """Open `hf:NAME_OR_FOLDER`, find its columns and count its classes. Raises ValueError."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"dataset={dataset} needs the package datasets: pip install datasets") from None
    try:
        parts = _load(datasets, dataset.removeprefix("hf:"), download)
    except Exception as error:  # of the network, the file system, or a file's content
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise ValueError(f"dataset={dataset} cannot be opened ({reason})") from None
    train = parts.get("train") or (parts.popitem()[1] if len(parts) == 1 else None)
    if not train:
        raise ValueError(
            f"dataset={dataset} has no training images: its splits are {', '.join(parts)}, and none is named train"
        )
    test = next((parts[name] for name in ("test", "validation", "valid", "val") if name in parts), None)
    columns = train.features
    image = _column(dataset, columns, "image_column", image_column, datasets.Image, ("image",))
    label = _column(dataset, columns, "label_column", label_column, datasets.ClassLabel, ("label", "labels"))
    names = getattr(columns[label], "names", None)
    numbers = range(len(names)) if names else sorted(set(train[label][:]), key=lambda value: (str(type(value)), value))
    if not all(isinstance(number, (int, str)) for number in numbers) or len(numbers) < 2:
        raise ValueError(f"dataset={dataset}: label_column={label} must hold at least two different numbers or texts")
    train, test = (
        part and part.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)) for part in (train, test)
    )
    names = names or [str(number) for number in numbers]
    return HubData(train, test, image, label, names, {number: place for place, number in enumerate(numbers)})


def _load(datasets, name: str, download: bool) -> dict:
    """Return the splits of a data set by name; a data set without splits is named train."""
    path = Path(name).expanduser()
    if path.is_file():
        found = datasets.load_dataset("parquet", data_files=str(path))
    elif any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):  # written by save_to_disk
        found = datasets.load_from_disk(str(path))
    else:
        found = datasets.load_dataset(name, download_config=datasets.DownloadConfig(local_files_only=not download))
    return dict(found) if isinstance(found, dict) else {"train": found}


def _column(dataset: str, columns: dict, option: str, given: str | None, kind: type, usual: tuple[str, ...]) -> str:
    """Return the given column, else the only one of this kind, else the one with a usual name. Raises ValueError."""
    if given is not None and given not in columns:
        hint = f"{', '.join(columns)}{did_you_mean(given, columns)}"
        raise ValueError(f"{option}={given!r} is no column of dataset={dataset}, which has {hint}")
    found = [name for name, column in columns.items() if isinstance(column, kind)]
    found = [given] if given else found or [name for name in usual if name in columns]
    if len(found) != 1:
        raise ValueError(
            f"dataset={dataset} has {len(found)} columns of type {kind.__name__}; choose {option} among {', '.join(columns)}"
        )
    return found[0]
