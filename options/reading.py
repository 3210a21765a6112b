"""The one door for files that others wrote: only regular files, never more than is wanted, and what is wrong with a path."""

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
    """A file open for reading, in bytes. Raises OSError, with a `strerror`, also for a pipe, a device or a folder.

    A pipe would be waited on for ever, and a device can have no end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except ValueError:  # what Python says of a path with a NUL byte
        raise OSError(0, "the path holds a NUL byte") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(0, "Is a directory" if stat.S_ISDIR(mode) else "is not a regular file (a pipe or a device)")
    return open(descriptor, "rb")


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """What there is, up to `most` bytes: memory is taken as they come, not by what a header claims."""
    parts = []
    while most > 0 and (part := file.read(min(most, 2**24))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_text(path: str | os.PathLike, most: int) -> str:
    """The text of a small UTF-8 file. Raises OSError, also for more than `most` bytes, and UnicodeDecodeError."""
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(0, f"is larger than {most:,} bytes")
    return raw.decode("utf-8")


def what_is_wrong_with(path: str) -> str | None:
    """Why nothing can be read from or written to this path, whatever it is to be; None if it is there or can be made."""
    try:
        os.stat(path)
        return None
    except FileNotFoundError:
        # Of the way there, what is not there yet can be made; a link to nothing is there already.
        broken = next((place for place in (Path(path), *Path(path).parents) if place.is_symlink() and not place.exists()), None)
        return broken and f"{broken} is a link to {os.readlink(broken)}, which does not exist"
    except PermissionError:
        return None  # said where it is used, with what is missing
    except NotADirectoryError:
        return "a part of it is a file, not a folder"
    except OSError as error:  # a loop of links, a name that is too long
        return error.strerror
    except ValueError as error:  # a NUL byte, or letters that the locale does not have
        return str(error)
