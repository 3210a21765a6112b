"""Read files that others wrote: regular files only, with a limit on their size; and describe the problem of a path."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

# Folders and files of operating systems and network drives, in lower case.
SYSTEM_ENTRIES = set("__macosx thumbs.db ehthumbs.db desktop.ini @eadir #recycle #snapshot $recycle.bin lost+found".split())
SYSTEM_ENTRIES.add("system volume information")


def is_hidden(name: str) -> bool:
    """Return True for the name of a hidden or system entry of a folder, such as .ipynb_checkpoints or __MACOSX."""
    return name.startswith(".") or name.lower() in SYSTEM_ENTRIES


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes. Raises OSError, with a `strerror`, also for a pipe, a device or a folder.

    Reading a pipe may never return, and a device may have no end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except ValueError:  # a NUL byte in the path
        raise OSError(0, "the path holds a NUL byte") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(0, "Is a directory" if stat.S_ISDIR(mode) else "is not a regular file (a pipe or a device)")
    return open(descriptor, "rb")


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """Read up to `most` bytes; memory grows with the bytes that arrive, not with the claim of a header."""
    parts = []
    while most > 0 and (part := file.read(min(most, 2**24))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_text(path: str | os.PathLike, most: int) -> str:
    """Read a small UTF-8 file. Raises OSError, also for more than `most` bytes, and UnicodeDecodeError."""
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(0, f"is larger than {most:,} bytes")
    return raw.decode("utf-8")


def path_problem(path: str) -> str | None:
    """Describe why nothing can be read from or written to a path; None if it exists or can be made."""
    try:
        os.stat(path)
        return None
    except FileNotFoundError:
        # Missing folders can be made, but a dangling link is in the way.
        broken = next((place for place in (Path(path), *Path(path).parents) if place.is_symlink() and not place.exists()), None)
        return broken and f"{broken} is a link to {os.readlink(broken)}, which does not exist"
    except PermissionError:
        return None  # reported on use, with the permission that is missing
    except NotADirectoryError:
        return "a part of it is a file, not a folder"
    except OSError as error:  # a loop of links, a name that is too long
        return error.strerror
    except ValueError as error:  # a NUL byte, or characters that cannot be encoded
        return str(error)
