"""A blob on its way into the store: resumed where it stopped, capped at its size, in place once its digest is right."""

import hashlib
from functools import partial
from pathlib import Path

from pitstop.bundle.manifest import Artifact
from pitstop.device.durable import Disk
from pitstop.errors import StorageError, Untrusted
from pitstop.files import CHUNK

SYNC_EVERY = 16 << 20  # bytes of a partial file that a power cut may cost


class Incoming:
    """A blob on its way into the store."""

    def __init__(self, disk: Disk, artifact: Artifact, path: Path, blob: Path) -> None:
        self._disk = disk
        self._artifact = artifact
        self._path = path
        self._blob = blob
        self._unsynced = 0
        self._hash = hashlib.sha256()
        self.size = 0  # bytes here
        self._read_partial()

    def append(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            Untrusted: these are more than the artifact has; none of them was written.
            StorageError: the disk refused; what was written stays for a later run.
        """
        if self.size + len(data) > self._artifact.size:
            raise Untrusted(f"{self._artifact.name}: more than the {self._artifact.size} bytes that were signed for")
        self._disk.append(self._path, data)
        self._hash.update(data)
        self.size += len(data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_EVERY:
            self._disk.sync(self._path)
            self._unsynced = 0

    def restart(self) -> None:
        """Forget what is here."""
        self._disk.remove(self._path)
        self._hash = hashlib.sha256()
        self.size = self._unsynced = 0

    def finish(self) -> None:
        """Move the complete blob into the store, durably.

        Raises:
            Untrusted: the bytes are not those of this digest; they are gone.
        """
        if self._hash.hexdigest() != self._artifact.sha256:
            found = self._hash.hexdigest()
            self.restart()
            raise Untrusted(f"{self._artifact.name} has SHA-256 {found}, {self._artifact.sha256} was signed for")
        self._disk.sync(self._path)
        self._disk.seal(self._path)
        self._disk.rename(self._path, self._blob)
        self._disk.sync_folder(self._blob.parent)

    def _read_partial(self) -> None:
        if self._path.is_symlink() or partial_size(self._path) > self._artifact.size:
            self.restart()
        if not self._path.exists():
            return
        try:
            with self._path.open("rb") as file:
                for chunk in iter(partial(file.read, CHUNK), b""):
                    self._hash.update(chunk)
                    self.size += len(chunk)
        except OSError as error:
            raise StorageError(f"cannot read {self._path.name}: {error.strerror}", where=self._path) from error


def partial_size(path: Path) -> int:
    """Return how many bytes of a blob are here already."""
    return path.stat().st_size if path.is_file() else 0
