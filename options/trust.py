"""Decide which custom mixers may run when a checkpoint or a run folder names them, not the user.

The hashes of files that this user has trained with are kept in the user's cache folder.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.machinery import PathFinder

from options.custom_mixer import check_unchanged, file_of, is_address
from options.layers import layers_of
from options.machine import cache_folder
from options.reading import open_regular, sha256_of

_everything: ContextVar[bool] = ContextVar("everything", default=False)


@contextlib.contextmanager
def trusting(everything: bool) -> Iterator[None]:
    """Let `check_trusted` accept every file within the block, as --trust_code asks."""
    token = _everything.set(everything)
    try:
        yield
    finally:
        _everything.reset(token)


def check_trusted(layer: str, sha256: str | None = None) -> None:
    """Raise ValueError, which names the file, if a layer would run a file that this user has not trained with.

    Args:
        sha256: Noted with the layer. Of a file that has changed since, the error says that instead.
    """
    files = [] if _everything.get() else _files_of(layer)
    known = _known() if files else set()
    for file in files:
        try:
            is_known = sha256_of(file) in known
        except FileNotFoundError:
            continue  # no code that could run: its import says so
        except OSError:
            is_known = False
        if not is_known:
            if sha256 and files == [file]:
                check_unchanged(layer, sha256, sha256_of(file))
            raise ValueError(f"the code in {file} would run, and you have not trained with it; read it, then add --trust_code")


def remember(layer: str) -> None:
    """Note that this user trains with the files of a layer; without a cache folder that can be written, nothing is noted."""
    with contextlib.suppress(OSError):
        files = {sha256_of(file): file for file in _files_of(layer)}
        lines = [f"{sha256}  {file}\n" for sha256, file in files.items() if sha256 not in _known()]
        if lines:
            path = _notes()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as notes:
                notes.write("".join(lines))


def _notes() -> str:
    return str(cache_folder() / "trained_code.txt")


def _known() -> set[str]:
    """Return the hashes of the files that this user has trained with."""
    with contextlib.suppress(OSError), open_regular(_notes()) as notes:
        if os.fstat(notes.fileno()).st_uid == os.getuid():  # the folder may be one for everybody's temporary files
            return {line[:64].decode("ascii", "replace") for line in notes}
    return set()


def _files_of(layer: str) -> list[str]:
    """Return the files that importing the classes of a layer runs, those that they import in turn left out."""
    files = []
    for address in filter(is_address, layers_of(layer)):
        file = file_of(address)
        files += [file] if file else _files_of_module(address.rpartition(":")[0])
    return files


def _files_of_module(name: str) -> list[str]:
    """Return the files of a module and the packages it lies in, found without importing any of them."""
    files, folders = [], [*sys.path, os.getcwd()]
    parts = name.split(".")
    for number in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), folders)
        if spec is None:
            raise ValueError(f"the module {name} cannot be found as a file; name it with --layer")
        files += [spec.origin] * spec.has_location
        folders = list(spec.submodule_search_locations or ())
    return files
