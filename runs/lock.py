"""The lock on an output folder: one run at a time writes into it, on this machine and on others that see the folder.

It is an flock on the file `.lock`, which the kernel gives back however its process ends; the file says who holds it. Where a
file system has no flock, the file alone is the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from runs import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
VARIABLE = "CONVNN_LOCK"  # in the environment of a run whose starter, a sweep, holds the lock of its folder: device:inode
UNSUPPORTED = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL") if hasattr(errno, name)}

_held: dict[int, str] = {}  # descriptors of this process, with the `identity` of their files


class LockedError(RunError):
    """Another process holds the lock."""


class _NoFlockError(Exception):
    """The file system has no flock."""


def _forget() -> None:
    """Close what a fork has copied: a process that reads images must not hold the lock of a run that was killed."""
    for descriptor, file in _held.items():
        with contextlib.suppress(OSError):
            if identity(descriptor) == file:
                os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def identity(descriptor: int) -> str:
    """What `VARIABLE` says of a lock that its holder passes on."""
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"


def _flock(descriptor: int) -> bool:
    """Whether we have it now. Raises _NoFlockError."""
    if fcntl is None:
        raise _NoFlockError
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise _NoFlockError from None
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _read_holder(descriptor: int) -> tuple[int, str] | None:
    """Process id and host of the last holder, if the file names one."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdecimal() else None


def _has_ended(holder: tuple[int, str]) -> bool:
    """Whether the process is known not to run any more; of another machine's that cannot be known."""
    process, host = holder
    if host != socket.gethostname() or os.name == "nt":
        return False
    if process == os.getpid():
        return True  # of an earlier run of this process, or of one that had its number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _taken_over(path: Path, holder: tuple[int, str]) -> None:
    _say(f"warning: {path} was left by process {holder[0]} on {holder[1]}, which has ended; it is taken over")


def _locked(path: Path, holder: tuple[int, str] | None) -> LockedError:
    who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
    return LockedError(
        f"--output_dir {path.parent} is in use by {who}, which writes its run there; wait for it, or use another"
    )


def take(folder: Path) -> int | None:
    """Lock the folder, which must exist: a descriptor to `release`, or None where the process that started this one holds it.

    Raises LockedError, which names the process and machine that holds it, RunError for a link to nothing, and OSError.
    """
    path = folder / NAME
    while True:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:
                if path.is_symlink():
                    raise RunError(f"{path} is a link to nothing, where the lock of the folder should be; remove it") from None
                continue
        try:
            is_ours = _take(descriptor, path, is_new)
        except BaseException:
            os.close(descriptor)
            raise
        if is_ours:
            _held[descriptor] = identity(descriptor)
            return descriptor
        os.close(descriptor)
        if is_ours is None:
            return None


def _take(descriptor: int, path: Path, is_new: bool) -> bool | None:
    """True: it is locked; None: it is our starter's; False: try again, the file was removed meanwhile. Raises LockedError."""
    is_starters = os.environ.get(VARIABLE) == identity(descriptor)
    holder = _read_holder(descriptor)
    try:
        if not _flock(descriptor):
            if is_starters:
                return None
            raise _locked(path, holder)
    except _NoFlockError:
        return _take_without_flock(descriptor, path, is_new, is_starters)
    # A holder removes the file before it gives the lock back: then this one is of a file without a name.
    if not _is_file(descriptor, path):
        return False
    if holder is not None and not is_starters:
        _taken_over(path, holder)
    with contextlib.suppress(OSError):  # on a full disk nobody can read who holds it, but it is held
        _write_holder(descriptor)
    return True


def _take_without_flock(descriptor: int, path: Path, is_new: bool, is_starters: bool) -> bool | None:
    if is_starters:
        _write_holder(descriptor)  # we may outlive it
        return None
    if is_new:
        _write_holder(descriptor)
        _say(
            f"warning: the file system of {path.parent} has no locks (flock); {path} says instead that a run writes here, "
            "and must be removed by hand after a crash of another machine"
        )
        return True
    for _ in range(20):  # who has just made it is about to write
        if holder := _read_holder(descriptor):
            break
        time.sleep(0.05)
    if holder is not None and not _has_ended(holder):
        error = _locked(path, holder)
        raise LockedError(f"{error}; if that has ended, remove {path}")
    if holder is not None:
        _taken_over(path, holder)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return False


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def release(folder: Path, descriptor: int) -> None:
    """Remove the file and give the lock back."""
    if _is_file(descriptor, folder / NAME):
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
    _held.pop(descriptor, None)
    os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that holds the lock of the folder. Folders made for it are removed again if nothing is written into them.

    Raises LockedError and OSError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = take(folder)
        yield
    finally:
        if descriptor is not None:
            release(folder, descriptor)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
