"""Read data sets that are class folders of images: in `train/` and `val/`, or in an archive in place of either."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from options.data import DATASETS, DataConfig
from options.reading import is_hidden
from options.storage import Archive, Entry, FileSystem, find_part
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
    try:
        places = {part: place for part in FOLDERS if (place := find_part(root, FOLDERS[part]))}
    except ValueError as error:  # of an archive
        raise DataError(str(error)) from None
    storage, listed = places.get("train") or places["test"]
    classes = list(_class_folders(storage, listed, Counter()))
    expected = DATASETS[config.dataset].classes
    if not classes or len(classes) != (expected or len(classes)):
        raise DataError(
            f"{listed}: has {len(classes)} class folders; --dataset {config.dataset} has {expected or 'at least 1'}"
        )
    read, warnings, hashes = {}, [], {}
    files: dict[str, np.ndarray] = {}
    for part in parts:
        (storage, folder), left_out = places[part], Counter()
        entries = _class_folders(storage, folder, left_out)
        found = {name: _files_below(storage, entry, left_out) for name, entry in entries.items()}
        for name, below in found.items():
            if name not in classes:
                raise DataError(f"{folder / name}: this class folder is missing in {listed}")
            if not below:
                raise DataError(f"{folder / name}: a class folder without images ({' '.join(IMAGE_SUFFIXES)})")
        if not found:
            raise DataError(f"{folder}: has no class folders")
        by_class = [found.get(name, []) for name in classes]
        # Workers share an array of bytes. A list would be copied into each as soon as its references are counted.
        paths = np.array([os.fsencode(path) for below in by_class for path in below])
        read[part] = Images(paths, np.repeat(np.arange(len(classes)), [len(below) for below in by_class]))
        files[part] = look_at(paths, storage)
        hashes[part] = hash_of(relative_names(paths, folder), files[part]["size"])
        warnings += _describe(folder, left_out, [name for name in classes if name not in found], len(classes))
    if len(read) == 2:
        warnings += _shared_images(places, {part: read[part].data for part in read}, files)
    return Source(read, classes, tuple(warnings), hashes, {part: storage for part, (storage, _) in places.items()})


# ---------------------------------------------------------------------------------------------------------------
# Listing
# ---------------------------------------------------------------------------------------------------------------


def _entries(storage: FileSystem | Archive, folder: Path | str, left_out: Counter) -> list[os.DirEntry | Entry]:
    """Return the entries of a folder, sorted, without hidden and system entries, which are counted."""
    entries = sorted(storage.scandir(folder), key=lambda entry: entry.name)
    visible = [entry for entry in entries if not is_hidden(entry.name)]
    left_out["hidden"] += len(entries) - len(visible)
    return visible


def _class_folders(storage: FileSystem | Archive, folder: Path, left_out: Counter) -> dict[str, str]:
    """Return the paths of the class folders by name."""
    entries = _entries(storage, folder, left_out)
    folders = {entry.name: entry.path for entry in entries if entry.is_dir()}
    left_out["beside"] += sum(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries if not entry.is_dir())
    return folders


def _files_below(storage: FileSystem | Archive, folder: str, left_out: Counter) -> list[str]:
    """Return the image files of a folder, sorted, then those of each folder below it; count other entries."""
    files, folders = [], []
    for entry in _entries(storage, folder, left_out):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            folders.append(entry.path)
        elif suffix in IMAGE_SUFFIXES:
            files.append(entry.path)
        elif suffix in UNREAD_SUFFIXES:
            left_out[suffix] += 1
    for path in folders:
        files += _files_below(storage, path, left_out)
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


def look_at(paths: np.ndarray, storage: FileSystem | Archive) -> np.ndarray:
    """Return device, inode and size of each file, zeros for a missing one."""

    def look(chunk: np.ndarray) -> list[tuple[int, int, int]]:
        found = []
        for path in chunk:
            try:
                status = storage.stat(path)
                found.append((status.st_dev, status.st_ino, status.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found

    chunks = np.array_split(paths, len(paths) // 1000 + 1)
    with ThreadPoolExecutor(16) as pool:  # network drives answer late, but many at once
        return np.array([status for found in pool.map(look, chunks) for status in found], LOOKED_AT)


def relative_names(paths: np.ndarray, folder: Path) -> list[bytes]:
    """Return the paths relative to the folder."""
    start = len(os.fsencode(folder)) + 1
    return [path[start:] for path in paths.tolist()]


def hash_of(names: list[bytes], sizes: np.ndarray) -> str:
    """Hash the sorted names and sizes of files."""
    lines = sorted(b"%s\0%d\n" % pair for pair in zip(names, sizes.tolist(), strict=True))
    return hashlib.blake2b(b"".join(lines), digest_size=16).hexdigest()


def _shared_images(
    places: dict[str, tuple[FileSystem | Archive, Path]], paths: dict[str, np.ndarray], files: dict[str, np.ndarray]
) -> list[str]:
    """Return a warning if test images are training images: links to them, or copies under the same names."""
    train, val = (places[part][1] for part in FOLDERS)
    linked = np.isin(files["test"][["device", "inode"]], files["train"][["device", "inode"]]).sum()
    if linked:
        return [f"{val}: {linked} of {len(paths['test'])} images are files of {train} too: tests are on training images"]
    sizes = dict(zip(relative_names(paths["test"], val), files["test"]["size"].tolist(), strict=True))
    names = zip(relative_names(paths["train"], train), files["train"]["size"].tolist(), strict=True)
    alike = [os.fsdecode(name) for name, size in names if sizes.get(name) == size]
    for name in alike[:: len(alike) // 20 + 1]:
        first, second = (_content(storage, f"{folder}/{name}") for storage, folder in places.values())
        if first == second:
            return [f"{val / name}: is a copy of {train / name}, and others may be: tests are on training images"]
    return []


def _content(storage: FileSystem | Archive, path: str) -> bytes:
    with storage.open(path) as file:
        return file.read()
