"""What a program says must not end it: streams that were closed, or that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable


class Stream:
    """A text stream whose writes go nowhere from the first one on that fails: `| head -1`, a closed terminal, a full disk."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Let the descriptor write to nowhere, which what is left in the buffer then can be written to as well."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def keep_streams() -> None:
    """Make the standard streams such that writing to them cannot fail.

    One that is closed (`2>&-`) is opened to nowhere first: otherwise the next file that is opened takes its number, and what
    libraries say goes into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  as long as the program lasts
        setattr(sys, name, Stream(stream))


def run_program(main: Callable[[], int]) -> int:
    """The exit status of a program that nothing it says can end."""
    keep_streams()
    try:
        return main()
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
