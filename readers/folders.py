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
    root = Path(config.data_path)
    places, download = [root, root / config.dataset], None
    if config.dataset == "imagenette":
        places, download = [*places, root / "imagenette2"], "Imagenette"
    root = find_folder(config, places, [f"{FOLDERS[part]}/" for part in parts], download)
    listed = root / ("train" if (root / "train").is_dir() else "val")
    classes = _class_folders(listed)
    expected = DATASETS[config.dataset].classes
    if not classes or len(classes) != (expected or len(classes)):
        raise DataError(
            f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {expected or 'at least 1'}"
        )
    for name in _class_folders(root / "val"):
        if name not in classes:
            raise DataError(f"{root / 'val' / name}: this class folder is missing in {root / 'train'}")
    read, warnings = {}, []
    for part in parts:
        folder = root / FOLDERS[part]
        files = [_files_below(folder / name) if (folder / name).is_dir() else [] for name in classes]
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if len(empty) == len(classes) or (empty and part == "train"):
            raise DataError(f"{folder / empty[0]}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        if empty:
            named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            warnings.append(f"{folder} has no images of {len(empty)} of the {len(classes)} classes ({named}): not tested")
        # Workers share an array of bytes. A list would be copied into each as soon as its references are counted.
        paths = np.array([os.fsencode(path) for found in files for path in found])
        read[part] = Images(paths, np.repeat(np.arange(len(classes)), [len(found) for found in files]))
    return Source(read, classes, tuple(warnings))


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
