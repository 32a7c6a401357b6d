"""A blob on its way into the store: resumed where it stopped, verified piece by piece, in place once it is whole."""

import hashlib
from pathlib import Path

from pitstop.bundle.manifest import PIECE, Artifact
from pitstop.device.durable import Disk
from pitstop.errors import StorageError, Untrusted, WrongPiece
from pitstop.files import CHUNK

SYNC_EVERY = 16 << 20  # bytes of a partial file that a power cut may cost


class Incoming:
    """A blob on its way into the store."""

    def __init__(self, disk: Disk, artifact: Artifact, path: Path, blob: Path) -> None:
        self._disk = disk
        self._artifact = artifact
        self._path = path
        self._blob = blob
        # An older manifest names no pieces: the file is one.
        self._pieces = artifact.pieces or (artifact.sha256,)
        self._piece_size = PIECE if artifact.pieces else artifact.size
        self._verified = 0  # pieces
        self._hash, self._piece = hashlib.sha256(), hashlib.sha256()
        self._before = self._hash.copy()  # of the pieces that are verified
        self._unsynced = 0  # bytes
        self.size = 0  # bytes here
        self._read_partial()

    def append(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            WrongPiece: the piece they complete is not the one that was signed for; it is gone.
            Untrusted: these are more than the artifact has; none of them was written.
            StorageError: the disk refused; what was written stays for a later run.
        """
        if self.size + len(data) > self._artifact.size:
            raise Untrusted(f"{self._artifact.name}: more than the {self._artifact.size} bytes that were signed for")
        while data:
            part, data = data[: self._left], data[self._left :]
            self._disk.append(self._path, part)
            self._unsynced += len(part)
            self._verify(part)
            if self._unsynced >= SYNC_EVERY:
                self._disk.sync(self._path)
                self._unsynced = 0

    def restart(self) -> None:
        """Forget what is here."""
        self._disk.remove(self._path)
        self._verified = self.size = self._unsynced = 0
        self._hash = hashlib.sha256()
        self._begin_piece()

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

    @property
    def _left(self) -> int:
        """Bytes that the piece under way lacks."""
        return min((self._verified + 1) * self._piece_size, self._artifact.size) - self.size

    def _verify(self, part: bytes) -> None:
        """Hash bytes of the piece under way that are in the file; compare it once it is complete."""
        self.size += len(part)
        self._hash.update(part)
        self._piece.update(part)
        if self._left:
            return
        found, expected = self._piece.hexdigest(), self._pieces[self._verified]
        if found != expected:
            self._drop_piece()
            what = f"piece {self._verified + 1} of {len(self._pieces)} of {self._artifact.name}"
            raise WrongPiece(f"{what} has SHA-256 {found}, {expected} was signed for")
        self._verified += 1
        self._begin_piece()

    def _begin_piece(self) -> None:
        self._piece = hashlib.sha256()
        self._before = self._hash.copy()

    def _drop_piece(self) -> None:
        self.size = self._verified * self._piece_size
        self._disk.truncate(self._path, self.size)
        self._hash = self._before
        self._begin_piece()

    def _read_partial(self) -> None:
        """Go on with what an earlier run left, up to a piece that lost bytes since."""
        if self._path.is_symlink() or partial_size(self._path) > self._artifact.size:
            self.restart()
        if not self._path.exists():
            return
        try:
            with self._path.open("rb") as file:
                while part := file.read(min(CHUNK, self._left)):
                    self._verify(part)
        except WrongPiece:
            return
        except OSError as error:
            raise StorageError(f"cannot read {self._path.name}: {error.strerror}", where=self._path) from error


def partial_size(path: Path) -> int:
    """Return how many bytes of a blob are here already."""
    return path.stat().st_size if path.is_file() else 0
