"""Image files: decode them upright, and find damaged ones before training."""

import contextlib
import hashlib
import io
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from options.machine import cache_folder
from options.reading import open_regular
from options.storage import DISK, Archive, FileSystem
from runs import DataError, Stopped
from runs.files import write_atomically
from runs.progress import Progress

# Formats that cameras and scanners write. PIL reads more; for EPS it would start another program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGE = Image.MAX_IMAGE_PIXELS  # PIL warns above this, and raises above twice as many
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


warnings.filterwarnings("ignore", module="PIL")  # one for each image, of metadata that is not read

PNG = b"\x89PNG\r\n\x1a\n"
PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # chunks of a PNG that decide its pixels and orientation


def _open(raw: BinaryIO, load: bool):
    """Open an image; a PNG with other chunks that PIL does not accept, as damaged or large texts, without these."""
    try:
        image = Image.open(raw, formats=FORMATS)
        if load:
            image.load()
        return image
    except Exception:
        raw.seek(0)
        data = raw.read()
        if not data.startswith(PNG):
            raise
        kept, place = [PNG], len(PNG)
        while place < len(data):
            end = place + 12 + int.from_bytes(data[place : place + 4])
            kept += [data[place:end]] * (data[place + 4 : place + 8] in PIXELS)
            place = end
        return Image.open(io.BytesIO(b"".join(kept)), formats=("PNG",))


@contextlib.contextmanager
def _opened(path: str, open_file: Callable[[str], BinaryIO], load: bool = False) -> Iterator[tuple]:
    """Open an image and read its header, or all of it: (PIL image, file). Raises DataError, also for errors in the block."""
    try:
        with open_file(path) as raw, _open(raw, load) as image:
            # PIL opens 16-bit grayscale as I or I;16. In a TIFF, I has 32 bits, and the value of white is unknown.
            is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode not in MODES and not is_16_bit:
                raise ValueError(f"pixels of mode {image.mode} have an unknown range; use 8 or 16 bits")
            yield image, raw
    except UnidentifiedImageError:
        raise DataError(f"{path}: cannot be read as an image (its content is none of {', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {reason})") from None


def decode_image(path: str, open_file: Callable[[str], BinaryIO] = open_regular):
    """Return the upright image in a file as PIL's RGB; transparency is dropped, not composited.

    open_file: `open` of the storage that holds the file.

    Raises:
        DataError: The file cannot be read. The message names it.
    """
    with _opened(path, open_file, load=True) as (image, raw):
        if image.format in ("JPEG", "MPO") and _ends_gray(image):
            raw.seek(0)
            if _lacks_data(raw.read()):
                raise ValueError("its data ends early; the rest would be gray")
        # In place, so that the image is turned before PIL rewrites its EXIF, which fails where other tags are damaged.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # PIL would clip 16-bit grayscale to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def _ends_gray(image) -> bool:
    """Check for the color that libjpeg silently gives to missing data in the last corner of an image."""
    width, height = image.size
    corner = np.asarray(image.crop((max(width - 2, 0), max(height - 2, 0), width, height)))
    return bool(((corner == 128) | (corner == 127)).all())  # 127: CMYK is stored inverted


PADDING = bytes(range(1, 255)) * 16  # decodes to another color than gray


def _lacks_data(raw: bytes) -> bool:
    """Check whether more data changes the image in a JPEG, which it does not if the data is complete."""
    end = _end_of_scan(raw)
    first, second = (
        np.asarray(Image.open(io.BytesIO(raw[:end] + more + b"\xff\xd9"), formats=("JPEG",))) for more in (b"", PADDING)
    )
    return not np.array_equal(first, second)


IN_SCANS = {b"\x00", b"\xff", *(bytes([number]) for number in range(0xD0, 0xD8))}  # after 0xFF: data, filling, restarts


def _end_of_scan(raw: bytes) -> int:
    """Return the position at which the compressed data of a JPEG's first scan ends."""
    place = 2
    while raw[place + 1] != 0xDA:  # segments, up to the start of the scan
        place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    while (place := raw.find(b"\xff", place + 2)) >= 0:
        if raw[place + 1 : place + 2] not in IN_SCANS:
            return place
    return len(raw)


def check_image(path: str, open_file: Callable[[str], BinaryIO] = open_regular) -> int:
    """Check an image by its header and its last bytes, or by decoding it where these do not tell; return its pixels.

    Raises DataError.
    """
    with _opened(path, open_file) as (image, raw):
        if image.format == "JPEG":  # decode no data, which gives gray, by the process and the tables in the header
            start = raw.tell()
            raw.seek(0)
            with Image.open(io.BytesIO(raw.read(start) + b"\xff\xd9"), formats=("JPEG",)) as header:
                header.draft(None, (1, 1))
                header.load()
        raw.seek(max(raw.seek(0, os.SEEK_END) - 12, 0))
        end = raw.read()
        is_complete = {"JPEG": end.endswith(b"\xff\xd9"), "PNG": end[4:8] == b"IEND", "GIF": end.endswith(b";")}
    if not is_complete.get(image.format):
        decode_image(path, open_file)
    return math.prod(image.size)


# ---------------------------------------------------------------------------------------------------------------
# Before training
# ---------------------------------------------------------------------------------------------------------------


CHUNK = 1000  # files whose check is remembered together


def check_images(
    files: np.ndarray,
    storage: FileSystem | Archive = DISK,
    *,
    threads: int,
    quiet: bool,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Check image files, except those that an earlier call found sound and that have not changed since.

    Keys of sound chunks are kept in the user's cache folder; if that is not writable, files are checked every time.

    Args:
        files: Paths (n,) in the storage as byte strings, grouped by folder.
        threads: Files to check at the same time.
        quiet: Show no progress.
        rank, world: Check this process's share of the files, one of `world`.

    Raises:
        DataError: A file is damaged. The message names the first one.
    """
    Image.init()  # imports the decoders: once, not in every thread
    by_folder = [list(group) for _, group in itertools.groupby(files.tolist(), os.path.dirname)]
    chunks = [group[start : start + CHUNK] for group in by_folder for start in range(0, len(group), CHUNK)][rank::world]
    cache, root = cache_folder(), os.path.abspath(os.path.dirname(os.path.dirname(files[0])))
    name = f"images-{hashlib.blake2b(root, digest_size=8).hexdigest()}"
    known = set()
    for path in cache.glob(f"{name}-*.txt"):
        with contextlib.suppress(OSError):
            known.update(path.read_bytes().split())
    sound, large = known.copy(), []

    def check(chunk: list[bytes]) -> bytes:
        key = _key(chunk, storage)
        if key not in known:
            for file in chunk:
                if check_image(os.fsdecode(file), storage.open) > LARGE:
                    large.append(file)
        return key

    with Progress("checking images", sum(map(len, chunks)), quiet=quiet) as progress, ThreadPoolExecutor(threads) as pool:
        try:
            for chunk, key in zip(chunks, pool.map(check, chunks), strict=True):
                sound.add(key)
                progress.advance(len(chunk))
                if progress.due:
                    progress.show()
            if large:
                line = f"{len(large)} images have more than {LARGE:,} pixels, which takes seconds to decode, as"
                print(f"warning: {line} {os.fsdecode(min(large))}", file=sys.stderr)
        finally:
            if sound != known:
                with contextlib.suppress(OSError, Stopped):
                    cache.mkdir(parents=True, exist_ok=True)
                    write_atomically(cache / f"{name}-{rank}-of-{world}.txt", b"\n".join(sorted(sound)))


def _key(files: list[bytes], storage: FileSystem | Archive) -> bytes:
    """Hash the paths, times and sizes of files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(os.path.abspath(file) + b"\0")
        with contextlib.suppress(OSError):  # a missing file: left to `check_image`
            status = storage.stat(file)
            digest.update(b"%d\0%d\0" % (status.st_mtime_ns, status.st_size))
    return digest.hexdigest().encode()
