"""Safe reading of files: regular files only, with limits on their size; and descriptions of invalid paths."""

import hashlib
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
    """Open a regular file for reading bytes.

    Raises OSError with a `strerror`, also for a folder, a pipe (reading it may never return) or a device (it may be endless).
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


def sha256_of(path: str | os.PathLike) -> str:
    """Hash the content of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Read up to `limit` bytes in parts, so that memory grows with the file and not with a size that its header claims."""
    parts = []
    while limit > 0 and (part := file.read(min(limit, 2**24))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def read_text(path: str | os.PathLike, limit: int) -> str:
    """Read a UTF-8 file of at most `limit` bytes. Raises OSError, also for a larger file, and UnicodeDecodeError."""
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise OSError(0, f"is larger than {limit:,} bytes")
    return raw.decode("utf-8")


def path_problem(path: str) -> str | None:
    """Describe why a path cannot be read or written; return None if it exists or can be created."""
    try:
        os.stat(path)
        return None
    except FileNotFoundError:
        # Missing folders can be created, but not at a dangling link.
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
