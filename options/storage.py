"""Where image files lie: in folders, or in a .zip or .tar that is read in place.

A storage has the functions `scandir`, `stat` and `open` of the file system. Members of an archive have the path ARCHIVE/NAME.
"""

import functools
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from options.reading import is_hidden, open_regular

MEMBER = [("offset", np.uint64), ("stored", np.uint64), ("size", np.uint64), ("method", np.uint8)]


class Status(NamedTuple):
    """Part of the result of `os.stat`."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int


class Entry(NamedTuple):
    """File or folder in a folder of an archive."""

    name: str
    path: str
    has_entries: bool

    def is_dir(self) -> bool:
        return self.has_entries


class FileSystem:
    """The file system as a storage."""

    open = staticmethod(open_regular)
    scandir = staticmethod(os.scandir)
    stat = staticmethod(os.stat)


DISK = FileSystem()


class Archive:
    """Members of a .zip or .tar as a storage. Worker processes share its index, two arrays, and its open file.

    Raises ValueError for an archive that is damaged, or whose members cannot be read one by one.
    """

    def __init__(self, path: str):
        self.path, self._file = path, open_regular(path)
        list_members = _list_zip if path.endswith(".zip") else _list_tar
        names, members = [], []
        try:
            for name, member in list_members(self._file):
                parts = [part for part in name.split("/") if part not in ("", ".")]
                names.append(os.fsencode("/".join(parts) + "/" * name.endswith("/")))
                members.append(member)
        except (OSError, tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
            raise ValueError(
                f"{path}: cannot be read as a {path[-4:]} archive ({error}); pack the class folders again"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found = np.array(names, dtype=None if names else "S1")
        order = np.argsort(found, kind="stable")
        found = found[order]
        last = np.append(found[1:] != found[:-1], [True] * bool(names))  # of the members of one name: it replaces the others
        self._names, self._members = found[last], np.array(members, MEMBER)[order][last]

    def scandir(self, folder: str | os.PathLike) -> list[Entry]:
        """List a folder as `os.scandir` does."""
        path = os.fspath(folder)
        prefix = os.fsencode(path)[len(os.fsencode(self.path)) + 1 :]
        first, end = 0, len(self._names)
        if prefix:
            prefix += b"/"
            first, end = self._names.searchsorted(np.array([prefix, prefix[:-1] + b"0"]))  # "0" comes after "/"
        below = (name[len(prefix) :].partition(b"/") for name in self._names[first:end].tolist())
        found = {os.fsdecode(name): bool(slash) for name, slash, _ in below if name}
        return [Entry(name, f"{path}/{name}", has_entries) for name, has_entries in found.items()]

    def stat(self, path: str | bytes) -> Status:
        archive, member = os.fstat(self._file.fileno()), self._find(path)
        return Status(archive.st_ino, int(member["offset"]), int(member["size"]), archive.st_mtime_ns)

    def open(self, path: str) -> BinaryIO:
        """Read a member into memory. Raises OSError, ValueError and zlib.error for a damaged one."""
        offset, stored, size, method = self._find(path).tolist()
        descriptor = self._file.fileno()
        if self.path.endswith(".zip"):
            header = os.pread(descriptor, 30, offset)  # its last bytes are the lengths of the name and of another field
            offset += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(descriptor, stored, offset)  # at this place, wherever threads and forks read
        if method:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if len(data) != size:
            raise ValueError(f"{self.path} is damaged: {len(data)} of {size} bytes")
        return io.BytesIO(data)

    def _find(self, path: str | bytes):
        name = os.fsencode(path)[len(os.fsencode(self.path)) + 1 :]
        return self._members[self._names.searchsorted(np.array(name, self._names.dtype))]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _file=open_regular(state["path"]))


def _list_tar(file: BinaryIO) -> Iterator[tuple[str, tuple]]:
    """Yield name and `MEMBER` of each file; names of folders end in /."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # else an object for each stays in memory
            if member.issym() or member.islnk():
                raise ValueError(f"{member.name} is a link; pack the files themselves, by tar --dereference --hard-dereference")
            yield member.name + "/" * member.isdir(), (member.offset_data, member.size, member.size, 0)


def _list_zip(file: BinaryIO) -> Iterator[tuple[str, tuple]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is encrypted, or not compressed by deflate; pack it again, by zip -0")
            yield member.filename, (member.header_offset, member.compress_size, member.file_size, member.compress_type)


@functools.lru_cache(2)
def _open_archive(path: str, *_status: int) -> Archive:
    return Archive(path)


def find_part(root: Path, part: str) -> tuple[FileSystem | Archive, Path] | None:
    """Return the storage and the path of a folder of class folders: `part`/, or the top of `part`.zip or `part`.tar.

    In an archive, one folder around the class folders is skipped. Returns None where there is neither. Raises ValueError for
    an archive that cannot be read in place.
    """
    if os.path.isdir(root / part):  # False for names that are too long, where Path.is_dir raises
        return DISK, root / part
    for path in (root / f"{part}.zip", root / f"{part}.tar"):
        if os.path.isfile(path):
            status = path.stat()
            archive = _open_archive(str(path), status.st_ino, status.st_size, status.st_mtime_ns)
            return archive, _skip_outer_folders(archive, path)
    compressed = (f"{root / part}{end}" for end in (".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst", ".tgz"))
    for path in filter(os.path.isfile, compressed):
        raise ValueError(
            f"{path}: images in a compressed .tar cannot be read one by one; decompress it, as by gunzip, to {part}.tar"
        )
    return None


def _skip_outer_folders(archive: Archive, folder: Path) -> Path:
    entries = [entry for entry in archive.scandir(folder) if not is_hidden(entry.name)]
    if len(entries) == 1 and any(entry.is_dir() for entry in archive.scandir(entries[0].path)):
        return _skip_outer_folders(archive, Path(entries[0].path))
    return folder
