"""Writing that survives a power cut: one seam to the file system, and small records kept in two copies.

Everything the store promises to keep goes through `Disk`, so that a test can record the steps and cut the power after
each of them.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pitstop import records
from pitstop.errors import PitstopError, StorageError
from pitstop.files import storage_error, sync_folder

Record = TypeVar("Record")
Result = TypeVar("Result")

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_COPY_LIMIT = 1 << 20  # bytes read of a record


class Disk:
    """The only way the store changes anything on disk.

    A name is durable after `sync_folder` of its folder, content after `sync` of its file, and nothing before. A path
    whose last part is a symbolic link is refused.

    Raises:
        StorageError: the disk refused; from every method.
    """

    def new_folder(self, path: Path) -> None:
        """Make one folder, if it is not there."""
        self._do(path, lambda: path.mkdir(exist_ok=True))

    def write(self, path: Path, data: bytes) -> None:
        """Make the file hold exactly these bytes; in between it may hold anything."""
        self._do(path, lambda: _write(path, os.O_TRUNC, data))

    def append(self, path: Path, data: bytes) -> None:
        """Add bytes at the end of a file, which need not exist."""
        self._do(path, lambda: _write(path, os.O_APPEND, data))

    def truncate(self, path: Path, size: int) -> None:
        """Forget the bytes of a file from there on."""
        self._do(path, lambda: os.truncate(path, size))

    def sync(self, path: Path) -> None:
        """Make the content of a file durable."""
        self._do(path, lambda: _sync(path))

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        self._do(path, lambda: sync_folder(path))

    def seal(self, path: Path) -> None:
        """Forbid writing to a file."""
        self._do(path, lambda: path.chmod(0o444))

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name at once, in place of any file of that name."""
        self._do(new, lambda: old.replace(new))

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        self._do(path, lambda: path.unlink(missing_ok=True))

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes can still be written to the disk of this folder."""
        return self._do(path, lambda: shutil.disk_usage(path).free)

    def make_folder(self, path: Path) -> None:
        """Make a folder, and those above it, durably."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self.new_folder(folder)
            self.sync_folder(folder.parent)

    def replace(self, path: Path, data: bytes) -> None:
        """Put a whole file in place, durably: a reader finds the old one or the new one."""
        fresh = path.with_name(f".{path.name}.new")
        self.write(fresh, data)
        self.sync(fresh)
        self.rename(fresh, path)
        self.sync_folder(path.parent)

    def _do(self, path: Path, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except OSError as error:
            if error.errno == errno.ELOOP:
                what = "there is a symbolic link where a file must be"
                raise StorageError(what, where=path, cure="remove it") from error
            raise storage_error(error, path) from error


class TwoCopies(Generic[Record]):
    """A small record in two files: the valid one that was written last counts.

    A write goes to the file that does not count, so a torn write or a flipped bit leaves the record before it.
    No rename is needed: this holds on FAT too.
    """

    def __init__(self, disk: Disk, stem: Path, kind: type[Record], empty: Record) -> None:
        self._disk = disk
        self._files = (stem.with_name(f"{stem.name}.a"), stem.with_name(f"{stem.name}.b"))
        self._kind = kind
        self._empty = empty

    def read(self) -> Record:
        """Return the newest valid copy, or the empty record if nothing was ever written.

        Raises:
            StorageError: both copies are there and neither is valid.
        """
        return self._newest()[1]

    def read_all(self) -> tuple[Record, ...]:
        """Return every valid copy, the newest first."""
        found = sorted((copy for copy in map(self._read, self._files) if copy), key=lambda copy: -copy[0])
        return tuple(record for _, record in found)

    def write(self, record: Record) -> None:
        """Make this the record that counts, durably.

        Raises:
            StorageError: the disk refused; the record before it counts.
        """
        number, _, newest = self._newest()
        path = self._files[1] if newest == self._files[0] else self._files[0]
        is_new = not path.exists()
        self._disk.write(path, _seal(number + 1, records.to_mapping(record)))
        self._disk.sync(path)
        if is_new:
            self._disk.sync_folder(path.parent)

    def _newest(self) -> tuple[int, Record, Path | None]:
        copies = [(copy, path) for path in self._files if (copy := self._read(path))]
        if copies:
            (number, record), path = max(copies, key=lambda found: found[0][0])
            return number, record, path
        if all(path.exists() for path in self._files):
            names = " and ".join(path.name for path in self._files)
            raise StorageError(
                f"{names} are both damaged",
                where=self._files[0].parent,
                cure="check the disk, remove both files and run `pitstop update`: what was downloaded is kept",
            )
        return 0, self._empty, None

    def _read(self, path: Path) -> tuple[int, Record] | None:
        """Return number and record of one copy, or None if it is missing, torn or damaged."""
        try:
            with path.open("rb") as file:
                number, data = _open(file.read(_COPY_LIMIT))
            return number, records.from_mapping(self._kind, data)
        except PermissionError as error:
            raise storage_error(error, path) from error
        except (OSError, ValueError, PitstopError):
            return None


def _seal(number: int, data: Any) -> bytes:
    text = json.dumps({"number": number, "record": data}, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _open(data: bytes) -> tuple[int, Any]:
    checksum, _, text = data.removesuffix(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("checksum")
    parsed = json.loads(text)
    return int(parsed["number"]), parsed["record"]


def _write(path: Path, flag: int, data: bytes) -> None:
    descriptor = os.open(path, _FLAGS | flag, 0o644)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
