"""Read data sets that are folders of images: `train/` and `val/` with one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from options.data import DATASETS, DataConfig
from readers.files import Images, Source, find_folder
from readers.images import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jpe")
FOLDERS = {"train": "train", "test": "val"}


def read_folders(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """List the files of ImageNet, Imagenette or any folder; a label is the index of its training class.

    The test images are those of `val/`, which may lack classes. To test, `train/` is not needed if `val/` has every class.
    """
    root, is_imagenette = Path(config.data_path), config.dataset == "imagenette"
    places = [root, root / config.dataset] + [root / "imagenette2"] * is_imagenette
    needed = [f"{FOLDERS[part]}/" for part in parts]
    root = find_folder(config, places, needed, "Imagenette" if is_imagenette else None)
    listed = root / ("train" if (root / "train").is_dir() else "val")
    classes = _class_folders(listed)
    expected = DATASETS[config.dataset].classes
    if not classes or len(classes) != (expected or len(classes)):
        raise DataError(
            f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {expected or 'at least 1'}"
        )
    read = {}
    for part in parts:
        folder = root / FOLDERS[part]
        found = {name: _files_below(folder / name) for name in _class_folders(folder)}
        for name, below in found.items():
            if name not in classes:
                raise DataError(f"{folder / name}: this class folder is missing in {root / 'train'}")
            if not below:
                raise DataError(f"{folder / name}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        if not found:
            raise DataError(f"{folder}: has no class folders")
        files = [found.get(name, []) for name in classes]
        # Workers share an array of bytes. A list would be copied into each as soon as its references are counted.
        paths = np.array([os.fsencode(path) for below in files for path in below])
        read[part] = Images(paths, np.repeat(np.arange(len(classes)), [len(below) for below in files]))
    return Source(read, classes)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _files_below(folder: Path | str) -> list[str]:
    """Return the image files of a folder, sorted, then those of each folder below it."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    files = [entry.path for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            files += _files_below(entry.path)
    return files
