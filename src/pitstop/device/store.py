"""The releases installed on a device: blobs by digest, and one small record that says which release serves.

    <root>/lock                     held by the one process that writes; readers need no lock
    <root>/state.a|b                which release is good, on trial, previous, bad: activation happens here only
    <root>/floor.a|b  tuf/          what was trusted last (pitstop.device.floor, python-tuf)
    <root>/releases/<sha256>.json   the manifests of one release, byte for byte
    <root>/blobs/sha256/<hex>       complete and verified, or not there; read-only
    <root>/partial/<hex>            on its way in; a later run goes on where it stops
    <root>/parked/                  conversations that `pitstop serve` parks: files without names, gone when it ends

The power may go at any moment: afterwards the release that was good is good still, or the new one is.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pitstop import records
from pitstop.bundle.channel import check_release
from pitstop.bundle.manifest import Artifact, Bundle, check_bundle, is_sha256
from pitstop.device import activation
from pitstop.device.activation import State
from pitstop.device.durable import Disk, TwoCopies
from pitstop.device.incoming import Incoming, partial_size
from pitstop.errors import Busy, PitstopError, RecordError, StorageError, Untrusted
from pitstop.files import storage_error

RESERVE = 64 << 20  # bytes that stay free on the disk, or:
PIECE = 4 << 20  # bytes of the base hashed at once
ROTTEN = "delete it and run `pitstop update`, which fetches it again"
RESERVE_SHARE = 0.05  # of what is to be fetched, if that is more


@dataclass(frozen=True)
class _ReleaseFile:
    manifests: dict[str, str]  # by bundle name, as they were signed


@dataclass(frozen=True)
class Release:
    """The bundles a channel offered together: one base and the adapters that run on it."""

    data: bytes = field(repr=False)  # of the release file
    bundles: Mapping[str, Bundle]  # by name
    blobs: Path  # folder of the blobs

    @property
    def sha256(self) -> str:
        """The name of the release."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def base(self) -> Bundle:
        """The base bundle."""
        return check_release(dict(self.bundles))

    def base_path(self) -> Path:
        """Return the base file that runs."""
        return self.blobs / self.base.base_sha256

    def check_base(self) -> Iterator[None]:
        """Hash the files of the base a piece at a time; they were hashed when they came, and disks rot.

        Raises:
            Untrusted: one is not what was installed, or it cannot be read.
        """
        for artifact in (self.base.artifact, *self.base.parts):
            yield from self._check_blob(artifact)

    def _check_blob(self, artifact: Artifact) -> Iterator[None]:
        path = self.blobs / artifact.sha256
        found = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    found.update(piece)
                    del piece  # it is not held while others work
                    yield
        except OSError as error:
            raise Untrusted(f"the base cannot be read: {error.strerror}", where=path, cure=ROTTEN) from error
        if found.hexdigest() != artifact.sha256:
            raise Untrusted("the file of the base has changed since it was installed", where=path, cure=ROTTEN)

    def adapters(self) -> dict[str, tuple[Bundle, Path]]:
        """Return every adapter bundle, attached or merged, with its file, by name."""
        return {
            name: (bundle, self.blobs / bundle.artifact.sha256)
            for name, bundle in self.bundles.items()
            if bundle.kind == "adapter"
        }

    def artifacts(self) -> tuple[Artifact, ...]:
        """Return the files this device needs, each once."""
        needed = [one for bundle in self.bundles.values() for one in (bundle.artifact, *bundle.parts)]
        return tuple({artifact.sha256: artifact for artifact in needed}.values())


class Store:
    """The releases under one root. An object belongs to one thread; other processes and objects are kept out by a lock.

    Raises:
        StorageError: the disk refused, or holds something damaged; from every method.
    """

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self._states = TwoCopies(self.disk, root / "state", State, State())
        self._held = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out; may be nested.

        Raises:
            Busy: another process is at work on this root.
        """
        if self._held:
            yield
            return
        for folder in (self.root, self.root / "releases", self._blobs, self.root / "partial"):
            self.disk.make_folder(folder)
        descriptor = _lock(self.root / "lock")
        self._held = 1
        try:
            yield
        finally:
            self._held = 0
            os.close(descriptor)

    @property
    def state(self) -> State:
        """What is installed; empty for a root that does not exist yet."""
        return self._states.read()

    def active(self) -> Release | None:
        """Return the release that may serve: the good one, complete.

        Raises:
            StorageError: one of its files is missing or damaged.
        """
        good = self.state.good
        return self._complete(good) if good else None

    def release(self, manifests: Mapping[str, bytes]) -> Release:
        """Make a release of manifests, by bundle name; nothing is written.

        Raises:
            RecordError: a manifest is malformed, or not one base.
            BaseMismatch: an adapter made for another base file.
        """
        try:
            texts = {name: data.decode() for name, data in sorted(manifests.items())}
        except UnicodeDecodeError as error:
            raise RecordError([f"a manifest is not UTF-8: {error}"]) from error
        return self._parse(records.to_json(_ReleaseFile(texts)), "release")

    def load(self, sha256: str) -> Release:
        """Read an installed release.

        Raises:
            StorageError: its file is missing or damaged.
        """
        path = self._release_file(sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _incomplete(f"release {sha256[:12]} cannot be read: {error.strerror}", path) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _incomplete(f"the file of release {sha256[:12]} is damaged", path)
        return self._parse(data, path)

    def blob(self, sha256: str) -> Path:
        """Return where a blob is, or would be.

        Raises:
            Untrusted: this is no SHA-256.
        """
        if not is_sha256(sha256):
            raise Untrusted(f"{sha256!r} is no SHA-256")
        return self._blobs / sha256

    def missing(self, release: Release) -> tuple[Artifact, ...]:
        """Return the files of a release that are not here with their full size."""
        return tuple(artifact for artifact in release.artifacts() if not self._has(artifact))

    def add_blob(self, artifact: Artifact) -> Incoming:
        """Begin a blob, or go on with one that was begun before."""
        return Incoming(self.disk, artifact, self._partial(artifact), self.blob(artifact.sha256))

    def require_space(self, release: Release) -> None:
        """Check that what is missing of a release fits on the disk.

        Raises:
            StorageError: it does not, with how much is lacking.
        """
        missing = self.missing(release)
        needed = sum(max(0, artifact.size - partial_size(self._partial(artifact))) for artifact in missing)
        if not needed:
            return
        reserve = max(RESERVE, int(needed * RESERVE_SHARE))
        free = self.disk.free_bytes(self.root)
        if free < needed + reserve:
            raise StorageError(
                f"{needed / 1e6:,.1f} MB to fetch and {reserve / 1e6:,.1f} MB to keep free, "
                f"only {free / 1e6:,.1f} MB are free",
                where=self.root,
                cure=f"free {(needed + reserve - free) / 1e6:,.1f} MB more on this disk, and run it again",
            )

    def install(self, release: Release) -> bool:
        """Put a complete release on trial; tell whether that changed anything.

        Raises:
            Refused: it failed or was rolled back here before.
            StorageError: a file of it is not here.
        """
        with self.locked():
            self._require_complete(release)
            before = self.state
            after = activation.install(before, release.sha256)
            if not self._holds(release):
                self.disk.replace(self._release_file(release.sha256), release.data)
            self._write(before, after)
            return after.trial is not None and after.trial != before.trial

    def activate(self) -> Release | None:
        """Begin a try of the release on trial, durably; None if it had none left and is now bad.

        Raises:
            UsageError: nothing is on trial.
        """
        state = self._change(activation.begin)
        return self._complete(state.trial) if state.trial else None

    def confirm(self) -> None:
        """Let the release on trial be the good one.

        Raises:
            UsageError: nothing is on trial.
        """
        self._change(activation.confirm)

    def reject(self) -> None:
        """Mark the release on trial bad.

        Raises:
            UsageError: nothing is on trial.
        """
        self._change(activation.reject)

    def untried(self) -> None:
        """Give back the try that `activate` took: it could not be made here.

        Raises:
            UsageError: nothing is on trial.
        """
        self._change(activation.untried)

    def roll_back(self) -> None:
        """Leave the newest release for the one before it.

        Raises:
            UsageError: there is none before it.
            StorageError: the one before it is not complete; nothing changed.
        """
        with self.locked():
            before = self.state
            after = activation.roll_back(before)
            if after.good and after.good != before.good:
                self._complete(after.good)
            self._write(before, after)

    def collect_garbage(self, keep: Release | None = None) -> None:
        """Remove what no installed release needs, except for a release about to be installed."""
        with self.locked():
            # The copy of the state that does not count may count again after a flipped bit.
            needed = {release for state in self._states.read_all() for release in state.releases}
            try:
                releases = [self.load(release) for release in needed]
            except PitstopError:
                return  # what a damaged release needs is unknown: keep everything until an update repairs it
            blobs = {artifact.sha256 for release in releases for artifact in release.artifacts()}
            coming = {artifact.sha256 for artifact in keep.artifacts()} if keep else set()
            self._remove_except(self.root / "releases", {f"{release}.json" for release in needed})
            self._remove_except(self._blobs, blobs | coming)
            self._remove_except(self.root / "partial", coming)

    @property
    def _blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    def _release_file(self, sha256: str) -> Path:
        return self.root / "releases" / f"{sha256}.json"

    def _partial(self, artifact: Artifact) -> Path:
        return self.root / "partial" / artifact.sha256

    def _has(self, artifact: Artifact) -> bool:
        path = self.blob(artifact.sha256)
        return path.is_file() and not path.is_symlink() and path.stat().st_size == artifact.size

    def _parse(self, data: bytes, where: object) -> Release:
        manifests = records.from_json(_ReleaseFile, data, where=where).manifests
        bundles = {}
        for name, text in manifests.items():
            bundles[name] = check_bundle(records.from_json(Bundle, text.encode(), where=name), where=name)
            if bundles[name].name != name:
                raise RecordError([f"the manifest of {name!r} is for {bundles[name].name!r}"], where=where)
        check_release(bundles, where=where)
        return Release(data, bundles, self._blobs)

    def _holds(self, release: Release) -> bool:
        try:
            return self._release_file(release.sha256).read_bytes() == release.data
        except OSError:
            return False

    def _complete(self, sha256: str) -> Release:
        release = self.load(sha256)
        self._require_complete(release)
        return release

    def _require_complete(self, release: Release) -> None:
        if missing := self.missing(release):
            names = ", ".join(artifact.name for artifact in missing)
            raise _incomplete(f"release {release.sha256[:12]} lacks {names}", self._blobs)

    def _change(self, rule: Callable[[State], State]) -> State:
        with self.locked():
            before = self.state
            after = rule(before)
            self._write(before, after)
            return after

    def _write(self, before: State, after: State) -> None:
        if after != before:
            self._states.write(after)

    def _remove_except(self, folder: Path, names: set[str]) -> None:
        for path in sorted(folder.iterdir()):
            if path.name not in names:
                self.disk.remove(path)
        self.disk.sync_folder(folder)


def _lock(path: Path) -> int:
    """Return the descriptor that holds the lock; the file names the process for people."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise Busy(
            f"process {holder or 'unknown'} is at work on this device root",
            where=path,
            cure="wait until it is done, or end that process",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise storage_error(error, path) from error
    return descriptor


def _incomplete(what: str, where: Path) -> StorageError:
    return StorageError(what, where=where, cure="run `pitstop update`: it fetches what is missing or damaged")
