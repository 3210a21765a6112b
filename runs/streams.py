"""Standard streams whose failure does not end a program, and the lines that begin with its name."""

import contextlib
import os
import sys
from collections.abc import Callable


class Stream:
    """A text stream that discards everything after the first write that fails: `| head -1`, a closed terminal, a full disk."""

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
        # The descriptor is replaced, not only the object: what is left in the buffer must be writable too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def run_program(main: Callable[[], int]) -> int:
    """Return the exit status of `main`; a write to its standard streams cannot fail.

    A closed stream (`2>&-`) is opened to the null device first. Otherwise the next file that is opened takes its number, and
    what libraries print goes into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  as long as the program lasts
        stream.reconfigure(errors="backslashreplace")  # a locale may lack the letters of a name
        setattr(sys, name, Stream(stream))
    try:
        return main()
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()


def announce(kind: str, text: str) -> None:
    """Print `program: kind: text` on stderr; kind: "error" or "warning"."""
    print(f"{os.path.basename(sys.argv[0])}: {kind}: {' '.join(text.split())}", file=sys.stderr)
