"""Files that are whole or not there: atomic writes, tables as CSV, figures as PNG, checks before a run begins."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from options.reading import path_problem
from runs import RunError


class WriteError(Exception):
    """An output that cannot be written, in one line; the file it would have replaced is unchanged."""


class ReadError(Exception):
    """An input that could not be read once a run had begun, in one line."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write that replaces `path` once it is complete: a reader sees the old file or the new one, never a part.

    It is a temporary file in the same folder, flushed to disk, then renamed. Raises WriteError.
    """
    # The process id keeps two processes that write the same file from sharing a temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power failure may leave the new name with no content
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError (a full disk) into a RuntimeError that has it as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise WriteError(f"{path} cannot be written ({cause.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Flush the folder's own entries, so that a rename survives a power failure; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Delete what `atomic_file` leaves when a process is killed while it writes the file `name`, or any file."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a complete file as `atomic_file` does. Raises WriteError."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def as_csv(rows: list[dict], columns: list[str] | None = None) -> str:
    """A table with a header; its columns are those of the first row unless they are given."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_png(figure, dpi: int = 110) -> bytes:
    """A matplotlib figure, encoded."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def is_same_file(one: str | None, other: str | None) -> bool:
    """Whether both names are given and are of one file that exists."""
    try:
        return one is not None and other is not None and os.path.samefile(one, other)
    except OSError:
        return False


def check_writable(folder: Path, flag: str) -> None:
    """Raise RunError, which names `flag`, if a folder cannot be created or written to. Leaves nothing behind."""
    if wrong := path_problem(str(folder)):
        raise RunError(f"{flag} {folder}: {wrong}")
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    # Permission bits do not tell (root, read-only mounts, quotas): create something.
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise RunError(f"{flag} {folder}: {existing} cannot be written to ({error.strerror})") from None
