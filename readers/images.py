"""Image files: decoded as a camera held them, checked before training, refused where they cannot be right."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from options.reading import open_regular
from runs import DataError, Stopped
from runs.files import write_atomically
from runs.progress import Progress

# Of what PIL reads. Left out is what cameras do not write, such as EPS, for which it would start another program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
LONGEST = 100  # times the short side: beyond it, resizing the short side makes an image that no memory holds
TRANSPOSED = {  # by the number in EXIF's tag Orientation, the image as the camera was held (1: as it is)
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@contextlib.contextmanager
def _opened(path: str):
    """A PIL image whose header has been read. Raises DataError, also for what the block raises."""
    from PIL import Image, UnidentifiedImageError

    try:
        with open_regular(path) as raw, Image.open(raw, formats=FORMATS) as file:
            short, long = sorted(file.size)
            if long > LONGEST * short:
                raise ValueError(f"{file.width} x {file.height} pixels are a strip, not an image")
            if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:  # MPO: a photograph and its previews
                raise ValueError(f"{file.n_frames} images in one file")
            # PIL opens 16 bits of grey as I, or as I;16; in a TIFF, I is 32 bits, of which nobody knows which are white.
            if not (
                file.mode in PIXELS or file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM"))
            ):
                raise ValueError(f"pixels of mode {file.mode}, whose range is not known; 8 or 16 bits are read")
            yield file, raw
    except UnidentifiedImageError:
        raise DataError(f"{path}: cannot be read as an image (it begins like none of {', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise nearly anything on a damaged file
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {why})") from None


def decode_image(path: str):
    """The image in a file as PIL's RGB, as the camera was held; transparency dropped, not composited.

    Raises DataError that names the file.
    """
    from PIL import Image

    with _opened(path) as (file, raw):
        if file.format in ("JPEG", "MPO") and _ends_grey(file):
            raw.seek(0)
            if _lacks_data(raw.read()):
                raise ValueError("its data ends in the middle; the rest would be grey")
        image = file
        if file.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to white
            image = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        try:
            with warnings.catch_warnings(action="ignore"):
                turned = TRANSPOSED.get(file.getexif().get(0x0112))
        except Exception:  # EXIF that is damaged, in an image that is sound
            turned = None
        image = image.convert("RGB")
        return image.transpose(Image.Transpose[turned]) if turned else image


def _ends_grey(image) -> bool:
    """Whether the last corner has the color that libjpeg, without a word, gives to what the data of an image lacks."""
    width, height = image.size
    corner = np.asarray(image.crop((max(width - 2, 0), max(height - 2, 0), width, height)))
    return bool(((corner == 128) | (corner == 127)).all())  # 127: of CMYK, which is stored inverted


# For a decoder that runs out of data, codes of something else than grey.
PADDING = bytes(range(1, 255)) * 16


def _lacks_data(raw: bytes) -> bool:
    """Whether a JPEG becomes another image if more data follows: a whole one has no use for it."""
    from PIL import Image

    end = _end_of_scan(raw)
    first, second = (
        np.asarray(Image.open(io.BytesIO(raw[:end] + more + b"\xff\xd9"), formats=("JPEG",))) for more in (b"", PADDING)
    )
    return not np.array_equal(first, second)


def _end_of_scan(raw: bytes) -> int:
    """Where the compressed data of a JPEG's first scan ends."""
    place = 2
    while raw[place + 1] != 0xDA:  # segments, up to the start of the scan
        place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    while (place := raw.find(b"\xff", place + 2)) >= 0:
        if raw[place + 1 : place + 2] not in IN_SCANS:
            return place
    return len(raw)


IN_SCANS = {b"\x00", b"\xff", *(bytes([number]) for number in range(0xD0, 0xD8))}  # after 0xFF: data, filling, restarts


def _is_plain_jpeg(raw: BinaryIO) -> bool:
    """Whether this is a grey or color JPEG of a sound shape, from the first marker to the last; False if PIL has to look.

    PIL needs many times as long, which shows with a million images.
    """
    head, place, is_image = raw.read(8192), 2, False
    if head[:2] != b"\xff\xd8":
        return False
    while True:
        if place + 10 > len(head):  # a profile of colors, a preview
            head += raw.read(2**20)
        if place + 10 > len(head) or head[place] != 0xFF:
            return False
        kind = head[place + 1]
        if kind == 0xDA:  # the image itself
            return is_image and _last(raw, 2) == b"\xff\xd9"
        if 0xC0 <= kind <= 0xC2:  # baseline, extended, progressive
            bits, height, width, components = struct.unpack_from(">BHHB", head, place + 4)
            is_image = bits == 8 and components in (1, 3) and 0 < max(height, width) <= LONGEST * min(height, width)
        place += 2 + int.from_bytes(head[place + 2 : place + 4])


def _last(raw: BinaryIO, count: int) -> bytes:
    raw.seek(max(os.fstat(raw.fileno()).st_size - count, 0))
    return raw.read(count)


def check_image(path: str) -> None:
    """Raise DataError if the image cannot be read: by its header and its end, or by decoding it where they do not tell."""
    with contextlib.suppress(OSError), open_regular(path) as raw:  # what is wrong is said below
        if _is_plain_jpeg(raw):
            return
    with _opened(path) as (file, raw):
        end = _last(raw, 12)
        whole = {"PNG": end[4:8] == b"IEND", "GIF": end.endswith(b";")}.get(file.format, False)
        if file.format in ("JPEG", "MPO"):
            whole = end.endswith(b"\xff\xd9")
    if not whole:
        decode_image(path)


# ---------------------------------------------------------------------------------------------------------------
# Before training
# ---------------------------------------------------------------------------------------------------------------


CHECK = "1"  # another one when `check_image` finds more, so that what was found before does not count
TOGETHER = 1000  # files whose check is remembered as one


class Checked:
    """What is known of the image files below a folder: chunks of them, by paths, times and sizes, that were found sound.

    It is kept in the user's cache folder; where that cannot be written, files are checked at every start.
    """

    def __init__(self, folder: str, writer: str):
        self._folder, self._writer = _cache_folder(), writer
        self._name = "images-" + hashlib.blake2b(os.fsencode(os.path.abspath(folder)), digest_size=8).hexdigest()
        self.known = set().union(*map(self._read, self._folder.glob(f"{self._name}-*.json"))) if self._folder else set()
        self._before = len(self.known)

    @staticmethod
    def _read(path: Path) -> set[str]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return set()
        return {one for one in found if isinstance(one, str)} if isinstance(found, list) else set()

    @staticmethod
    def key(files: np.ndarray) -> str:
        """Of a chunk. Raises OSError."""
        digest = hashlib.blake2b(CHECK.encode(), digest_size=16)
        for file in files:
            status = os.stat(file)
            digest.update(b"%s\0%d\0%d\0" % (os.path.abspath(file), status.st_mtime_ns, status.st_size))
        return digest.hexdigest()

    def save(self) -> None:
        if self._folder and len(self.known) > self._before:
            with contextlib.suppress(OSError, Stopped):
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._folder / f"{self._name}-{self._writer}.json", json.dumps(sorted(self.known)))


def _cache_folder() -> Path | None:
    """$CONVNN_CACHE, or convnn in the user's cache folder; None where there is no such place."""
    places = (os.environ.get("CONVNN_CACHE"), os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"))
    own, *caches = (Path(place) if place and os.path.isabs(place) else None for place in places)
    return own or next((cache / "convnn" for cache in caches if cache), None)


def check_images(files: np.ndarray, *, threads: int, quiet: bool, rank: int = 0, world: int = 1) -> None:
    """Check image files (byte strings) that were not found sound before, side by side and with progress.

    Of `world` processes this is number `rank` and takes its share. Raises DataError for the first that is broken.
    """
    from PIL import Image

    Image.init()  # which imports the decoders: once, not by several threads
    chunks = [list(some) for _, some in itertools.groupby(files.tolist(), os.path.dirname)]
    chunks = [some[start : start + TOGETHER] for some in chunks for start in range(0, len(some), TOGETHER)][rank::world]
    if not chunks:
        return
    checked = Checked(os.fsdecode(os.path.dirname(os.path.dirname(files[0]))), f"{rank}-of-{world}")

    def check(some: list[bytes]) -> str:
        try:
            key = Checked.key(some)
        except OSError:  # which `check_image` will say
            key = ""
        if key not in checked.known:
            for file in some:
                check_image(os.fsdecode(file))
        return key

    total = sum(map(len, chunks))
    with Progress("checking images", total, quiet=quiet) as progress, ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(check, some) for some in chunks]
        try:
            for some, task in zip(chunks, tasks, strict=True):
                checked.known |= {task.result()} - {""}
                progress.advance(len(some))
                if progress.due:
                    progress.show()
        finally:
            pool.shutdown(cancel_futures=True)
            checked.save()
