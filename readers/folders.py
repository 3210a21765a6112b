"""Read data sets that are folders of images: `train/` and `val/` with one folder per class."""

import filecmp
import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from options.data import DATASETS, DataConfig
from options.reading import is_hidden
from readers.files import Images, Source, find_folder
from runs import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jpe")
UNREAD_SUFFIXES = tuple(".arw .avif .cr2 .cr3 .dng .heic .heif .j2k .jp2 .jxl .nef .orf .rw2 .svg".split())
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
    classes = _class_folders(listed, Counter())
    expected = DATASETS[config.dataset].classes
    if not classes or len(classes) != (expected or len(classes)):
        raise DataError(
            f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {expected or 'at least 1'}"
        )
    read, warnings, hashes = {}, [], {}
    files: dict[str, np.ndarray] = {}
    for part in parts:
        folder, left_out = root / FOLDERS[part], Counter()
        found = {name: _files_below(folder / name, left_out) for name in _class_folders(folder, left_out)}
        for name, below in found.items():
            if name not in classes:
                raise DataError(f"{folder / name}: this class folder is missing in {root / 'train'}")
            if not below:
                raise DataError(f"{folder / name}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        if not found:
            raise DataError(f"{folder}: has no class folders")
        by_class = [found.get(name, []) for name in classes]
        # Workers share an array of bytes. A list would be copied into each as soon as its references are counted.
        paths = np.array([os.fsencode(path) for below in by_class for path in below])
        read[part] = Images(paths, np.repeat(np.arange(len(classes)), [len(below) for below in by_class]))
        files[part] = _look_at(paths)
        hashes[part] = _hash_of(_names(paths, folder), files[part]["size"])
        warnings += _describe(folder, left_out, [name for name in classes if name not in found], len(classes))
    if len(read) == 2:
        warnings += _shared_images(root, {part: read[part].data for part in read}, files)
    return Source(read, classes, tuple(warnings), hashes)


# ---------------------------------------------------------------------------------------------------------------
# Listing
# ---------------------------------------------------------------------------------------------------------------


def _entries(folder: Path | str, left_out: Counter) -> list[os.DirEntry]:
    """Return the entries of a folder, sorted, without hidden and system entries, which are counted."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    visible = [entry for entry in entries if not is_hidden(entry.name)]
    left_out["hidden"] += len(entries) - len(visible)
    return visible


def _class_folders(folder: Path, left_out: Counter) -> list[str]:
    entries = _entries(folder, left_out)
    folders = [entry.name for entry in entries if entry.is_dir()]
    left_out["beside"] += sum(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries if not entry.is_dir())
    return folders


def _files_below(folder: Path | str, left_out: Counter) -> list[str]:
    """Return the image files of a folder, sorted, then those of each folder below it; count other entries."""
    files, folders = [], []
    for entry in _entries(folder, left_out):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            folders.append(entry.path)
        elif suffix in IMAGE_SUFFIXES:
            files.append(entry.path)
        elif suffix in UNREAD_SUFFIXES:
            left_out[suffix] += 1
    for path in folders:
        files += _files_below(path, left_out)
    return files


def _describe(folder: Path, left_out: Counter, untested: list[str], classes: int) -> list[str]:
    """Return warnings about entries that were left out, and classes without images."""
    lines = []
    if count := left_out.pop("hidden"):
        lines.append(f"{folder}: {count} hidden or system entries are skipped (names such as .ipynb_checkpoints, __MACOSX)")
    if count := left_out.pop("beside"):
        lines.append(f"{folder}: left out, in no class folder: {count} image{'s' * (count > 1)}")
    if left_out:
        counts = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(left_out.items()))
        lines.append(f"{folder}: images in formats that are not read are left out: {counts}")
    if untested:
        names = ", ".join(untested[:5]) + ", ..." * (len(untested) > 5)
        lines.append(f"{folder}: {len(untested)} of {classes} classes have no images and are not tested: {names}")
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------


LOOKED_AT = [("device", np.uint64), ("inode", np.uint64), ("size", np.uint64)]


def _look_at(paths: np.ndarray) -> np.ndarray:
    """Return device, inode and size of each file, zeros for a missing one."""

    def look(chunk: np.ndarray) -> list[tuple[int, int, int]]:
        found = []
        for path in chunk:
            try:
                status = os.stat(path)
                found.append((status.st_dev, status.st_ino, status.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found

    chunks = np.array_split(paths, len(paths) // 1000 + 1)
    with ThreadPoolExecutor(16) as pool:  # network drives answer late, but many at once
        return np.array([status for found in pool.map(look, chunks) for status in found], LOOKED_AT)


def _names(paths: np.ndarray, folder: Path) -> list[bytes]:
    """Return the paths relative to the folder."""
    start = len(os.fsencode(folder)) + 1
    return [path[start:] for path in paths.tolist()]


def _hash_of(names: list[bytes], sizes: np.ndarray) -> str:
    """Hash the sorted names and sizes of files."""
    lines = sorted(b"%s\0%d\n" % pair for pair in zip(names, sizes.tolist(), strict=True))
    return hashlib.blake2b(b"".join(lines), digest_size=16).hexdigest()


def _shared_images(root: Path, paths: dict[str, np.ndarray], files: dict[str, np.ndarray]) -> list[str]:
    """Return a warning if test images are training images: links to them, or copies under the same names."""
    train, val = root / "train", root / "val"
    linked = np.isin(files["test"][["device", "inode"]], files["train"][["device", "inode"]]).sum()
    if linked:
        return [f"{val}: {linked} of {len(paths['test'])} images are files of {train} too: tests are on training images"]
    sizes = dict(zip(_names(paths["test"], val), files["test"]["size"].tolist(), strict=True))
    names = zip(_names(paths["train"], train), files["train"]["size"].tolist(), strict=True)
    alike = [os.fsdecode(name) for name, size in names if sizes.get(name) == size]
    for name in alike[:: len(alike) // 20 + 1]:
        if filecmp.cmp(train / name, val / name, shallow=False):
            return [f"{val / name}: is a copy of {train / name}, and others may be: tests are on training images"]
    return []
