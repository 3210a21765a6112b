"""Lock of an output folder: one run at a time writes into it, on this machine and on others that see the folder.

The lock is an flock on the file `.lock`, which the kernel releases however its process ends; the file names the holder. On a
file system without flock the file alone is the lock.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from runs import RunError

NAME = ".lock"
VARIABLE = "CONVNN_LOCK"  # device:inode of a lock that the parent of this process, a sweep, holds for it
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # descriptors of this process


class LockedError(RunError):
    """Another process holds the lock."""


def _forget() -> None:
    """Close what a fork has copied: a process that reads images must not hold the lock of a run that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def identity(descriptor: int) -> str:
    """Return the value of `VARIABLE` that passes a lock on to a child."""
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"


def _flock(descriptor: int) -> bool | None:
    """Return whether this process has the lock now, or None if the file system has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return None


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _read_holder(descriptor: int) -> tuple[int, str] | None:
    """Return process id and host of the last holder, if the file names one."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdecimal() else None


def _has_ended(holder: tuple[int, str]) -> bool:
    """Return whether the process is known to have ended, which cannot be known of another machine's."""
    process, host = holder
    if host != socket.gethostname():
        return False
    if process == os.getpid():
        return True  # of an earlier run of this process, or of one that had its number
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _warn_of_takeover(path: Path, holder: tuple[int, str]) -> None:
    print(f"warning: {path} was left by process {holder[0]} on {holder[1]}, which has ended; it is taken over", file=sys.stderr)


def _locked(path: Path, holder: tuple[int, str] | None, more: str = "") -> LockedError:
    who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
    return LockedError(
        f"--output_dir {path.parent} is in use by {who}, which writes its run there; wait for it, or use another{more}"
    )


def take(folder: Path) -> int | None:
    """Lock the folder, which must exist; return a descriptor to `release`, or None if the parent of this process holds it.

    Raises LockedError, which names the process and machine that hold it, and OSError.
    """
    path = folder / NAME
    while True:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_NOFOLLOW), False
            except FileNotFoundError:  # removed since
                continue
        is_ours = False
        try:
            is_ours = _take(descriptor, path, is_new)
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            _held.add(descriptor)
            return descriptor
        if is_ours is None:
            return None


def _take(descriptor: int, path: Path, is_new: bool) -> bool | None:
    """Return True for a file that is locked now, None if the parent holds it, False if it was removed meanwhile."""
    is_parents = os.environ.get(VARIABLE) == identity(descriptor)
    holder, has_lock = _read_holder(descriptor), _flock(descriptor)
    if has_lock is None:
        return _take_without_flock(descriptor, path, is_new, is_parents)
    if not has_lock:
        if is_parents:
            return None
        raise _locked(path, holder)
    # A holder removes the file before it releases the lock: then this one is of a file without a name.
    if not _is_file(descriptor, path):
        return False
    if holder is not None and not is_parents:
        _warn_of_takeover(path, holder)
    with contextlib.suppress(OSError):  # on a full disk nobody can read who holds it, but it is held
        _write_holder(descriptor)
    return True


def _take_without_flock(descriptor: int, path: Path, is_new: bool, is_parents: bool) -> bool | None:
    if is_parents:
        _write_holder(descriptor)  # this process may outlive its parent
        return None
    if is_new:
        _write_holder(descriptor)
        print(
            f"warning: the file system of {path.parent} has no locks (flock); {path} says instead that a run writes here, "
            "and must be removed by hand after a crash of another machine",
            file=sys.stderr,
        )
        return True
    for _ in range(20):  # its maker may be about to write
        if holder := _read_holder(descriptor):
            break
        time.sleep(0.05)
    if holder is not None and not _has_ended(holder):
        raise _locked(path, holder, f"; if that has ended, remove {path}")
    if holder is not None:
        _warn_of_takeover(path, holder)
    path.unlink(missing_ok=True)
    return False


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def release(folder: Path, descriptor: int) -> None:
    """Remove the file, then release the lock."""
    if _is_file(descriptor, folder / NAME):
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
    _held.discard(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder. Folders made for it are removed again if nothing is written into them.

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
