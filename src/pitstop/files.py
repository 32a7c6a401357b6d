"""Writing files so that a reader finds the old one or the new one, never half of either."""

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pitstop.errors import BrokenInput, PitstopError, StorageError, Untrusted

CHUNK = 1 << 20  # bytes read at a time while hashing


def sha256_file(path: Path) -> str:
    """Return the lower-case hex SHA-256 of a file.

    Raises:
        BrokenInput: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _sha256(file)
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error


def sha256_pieces(path: Path, length: int) -> tuple[str, tuple[str, ...]]:
    """Return the digest of a file and that of each piece of this length, a multiple of `CHUNK`; it is read once.

    Raises:
        BrokenInput: the file is missing or cannot be read.
    """
    whole, pieces = hashlib.sha256(), []
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if (file.tell() - len(chunk)) % length == 0:
                    pieces.append(hashlib.sha256())
                whole.update(chunk)
                pieces[-1].update(chunk)
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
    return whole.hexdigest(), tuple(piece.hexdigest() for piece in pieces)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def open_verified(path: Path, sha256: str | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file that has this digest; what is read from it is what was hashed, whatever takes its name later.

    Args:
        sha256: None: any.

    Raises:
        BrokenInput: the file is missing, not regular or cannot be read.
        Untrusted: it has another digest.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            raise BrokenInput(f"{path.name} is no regular file", where=path)
        file = path.open("rb")
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
    with file:
        try:
            found = None if sha256 is None else _sha256(file)
            file.seek(0)
        except OSError as error:
            raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
        if found != sha256:
            raise Untrusted(f"{path.name} is not what was verified: its SHA-256 is {found}, not {sha256}", where=path)
        yield file


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is not until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path``; on success it is synced and takes the name, else it is removed.

    Raises:
        StorageError: the disk is full, read-only or otherwise refuses; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(name).replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, PitstopError):
            raise storage_error(error, path) from error
        raise


def place_folder(made: Path, target: Path) -> None:
    """Give a finished folder its name; if another process made the same one first, that one stays.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        made.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise storage_error(error, target) from error
    sync_folder(target.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, durably and at once.

    Raises:
        StorageError: the disk refused; ``path`` is as it was.
    """
    with replacing(path) as file:
        file.write(data)


def storage_error(error: OSError, path: Path) -> StorageError:
    """Translate an operating-system error into one that names the cure."""
    cures = {
        errno.ENOSPC: "free some space on this disk, or choose another folder, and run it again",
        errno.EDQUOT: "free some of your quota, and run it again",
        errno.EROFS: "choose a folder on a disk that can be written",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to, on a file system that allows this",
    }
    return StorageError(
        f"cannot write {path.name}: {error.strerror or error}", where=path, cure=cures.get(error.errno or 0)
    )
