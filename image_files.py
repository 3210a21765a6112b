"""Image files: decoded as a camera held them, checked before training, refused where they cannot be right."""

from __future__ import annotations

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from reading import open_regular
from runs.progress import Progress


class DataError(Exception):
    """Data that is missing or wrong, said in one line: a program prints it and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


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

    with _opened(path) as (file, _):
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


def check_image(path: str) -> None:
    """Raise DataError if the image cannot be read: by its header and its end, or by decoding it where they do not tell."""
    with _opened(path) as (file, raw):
        raw.seek(max(os.fstat(raw.fileno()).st_size - 12, 0))
        end = raw.read(12)
        whole = {
            "JPEG": end.endswith(b"\xff\xd9"),
            "MPO": end.endswith(b"\xff\xd9"),
            "PNG": end[4:8] == b"IEND",
            "GIF": end.endswith(b";"),
        }.get(file.format, False)
    if not whole:
        decode_image(path)


def check_images(files: np.ndarray, *, threads: int, quiet: bool) -> None:
    """Check image files (byte strings) side by side and with progress. Raises DataError for the first that is broken."""
    from PIL import Image

    Image.init()  # which imports the decoders: once, not by several threads

    def check(some: np.ndarray) -> None:
        for file in some:
            check_image(os.fsdecode(file))

    with Progress("checking images", len(files), quiet=quiet) as progress, ThreadPoolExecutor(threads) as pool:
        # By hundreds: a task for every file would take longer than the file.
        parts = [files[start : start + 100] for start in range(0, len(files), 100)]
        tasks = [pool.submit(check, part) for part in parts]
        try:
            for part, task in zip(parts, tasks, strict=True):
                task.result()
                progress.advance(len(part))
                if progress.due:
                    progress.show()
        finally:
            pool.shutdown(cancel_futures=True)
