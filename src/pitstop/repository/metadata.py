"""The TUF roles of a repository: read back and verified, changed in memory, written so that the last file counts.

    root ─┬─ timestamp ─ snapshot          what is newest, and which versions belong together
          └─ targets ─┬─ channels          channels/*       who gets what
                      └─ bundles           bundles/*/*/*    what a bundle is

Nothing in the folder changes before a real TUF client has verified the whole new state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater

from pitstop.errors import BrokenInput, Untrusted
from pitstop.files import write_bytes
from pitstop.repository.keys import Keys

LIFETIME = {"root": 730, "targets": 365, "snapshot": 30, "timestamp": 7, "channels": 90, "bundles": 365}  # days
DELEGATED = {"channels": ["channels/*"], "bundles": ["bundles/*/*/*"]}  # a glob's * does not cross a slash
ISSUED = "x-issued"  # signed into the timestamp: the earliest time it can be, for devices without a clock

_FOLDER_URL = "folder:/"  # prefix the verifying client puts before every path


@dataclass
class Repository:
    """A repository's signed metadata with the changes not yet written."""

    folder: Path
    keys: Keys
    roles: dict[str, Metadata[Any]]
    changed: set[str] = field(default_factory=set)  # roles to sign again
    pending: dict[str, bytes] = field(default_factory=dict)  # path in the repository -> new content, in writing order

    def targets(self, role: str) -> dict[str, TargetFile]:
        """Return what a delegated role signs, by path."""
        signed: Targets = self.roles[role].signed
        return signed.targets

    def content(self, path: str, role: str) -> bytes:
        """Return the bytes of a signed file of the repository.

        Raises:
            Untrusted: the file is missing or is not the one that was signed.
        """
        target = self.targets(role)[path]
        stored = stored_path(target)
        try:
            data = self.pending.get(stored) or (self.folder / stored).read_bytes()
            target.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise _damaged(f"{path} is missing or was changed", self.folder / stored) from error
        return data

    def add(self, path: str, role: str, data: bytes, custom: dict[str, Any] | None = None) -> None:
        """Let a delegated role sign a small file, in place of any other of that path."""
        extra = {"custom": custom} if custom else None
        target = TargetFile.from_data(path, data, ["sha256"])
        self.targets(role)[path] = TargetFile(target.length, target.hashes, path, extra)
        self.pending[stored_path(target)] = data
        self.changed.add(role)

    def sign(self) -> bool:
        """Sign the changed roles, and those with less than half of their lifetime left; tell whether there were any."""
        now = datetime.now(UTC).replace(microsecond=0)
        due = self.changed | {name for name, role in self.roles.items() if _half_over(name, role, now)}
        if not due:
            return False
        for name in ("root", "targets", *DELEGATED):
            if name in due:
                data = self._sign(name, now)
                self.pending[f"metadata/{self.roles[name].signed.version}.{name}.json"] = data
                if name != "root":
                    self._snapshot.meta[f"{name}.json"] = _meta(self.roles[name], data)
        if due - {"root", "timestamp"}:
            data = self._sign("snapshot", now)
            self._timestamp.snapshot_meta = _meta(self.roles["snapshot"], data)
            self.pending[f"metadata/{self._snapshot.version}.snapshot.json"] = data
        self._timestamp.unrecognized_fields[ISSUED] = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.pending["metadata/timestamp.json"] = self._sign("timestamp", now)
        return True

    def verify(self, paths: list[str]) -> None:
        """Read everything back, pending changes included, as a device will.

        Raises:
            Untrusted: a device would refuse this; nothing was written.
        """
        first = sorted(self.folder.glob("metadata/1.root.json"))
        bootstrap = first[0].read_bytes() if first else self.pending["metadata/1.root.json"]
        with TemporaryDirectory() as home:
            client = Updater(
                home, f"{_FOLDER_URL}metadata/", fetcher=_Folder(self.folder, self.pending), bootstrap=bootstrap
            )
            try:
                for path in paths:
                    target = client.get_targetinfo(path)
                    if target is None:
                        raise Untrusted(f"{path} is signed by nobody who may", where=self.folder)
                    client.download_target(target, str(Path(home, "file")), f"{_FOLDER_URL}targets/")
            except (RepositoryError, DownloadError) as error:
                raise Untrusted(f"a device would refuse this repository: {error}", where=self.folder) from error

    def write(self) -> None:
        """Write the pending files durably; the timestamp, last, makes them count.

        Raises:
            StorageError: the disk refused; devices still see what they saw before.
        """
        timestamp = self.pending.pop("metadata/timestamp.json")
        for path, data in self.pending.items():
            write_bytes(self.folder / path, data)
        write_bytes(self.folder / "metadata/timestamp.json", timestamp)
        self.pending.clear()
        self.changed.clear()

    def _sign(self, name: str, now: datetime) -> bytes:
        role = self.roles[name]
        # A role that was never signed keeps version 1.
        role.signed.version += bool(role.signatures)
        role.signed.expires = now + timedelta(days=LIFETIME[name])
        role.sign(self.keys.signers[name])
        return role.to_bytes()

    @property
    def _snapshot(self) -> Snapshot:
        signed: Snapshot = self.roles["snapshot"].signed
        return signed

    @property
    def _timestamp(self) -> Timestamp:
        signed: Timestamp = self.roles["timestamp"].signed
        return signed


def open_repository(folder: Path, keys: Keys) -> Repository:
    """Read a repository's metadata, or begin a new one.

    Raises:
        Untrusted: metadata that these keys did not sign: another's repository, or one that was tampered with.
    """
    roots = sorted((folder / "metadata").glob("*.root.json"), key=_version)
    roles: dict[str, Metadata[Any]] = {"root": _load(roots[-1], "root", keys) if roots else Metadata(_new_root(keys))}
    if not (folder / "metadata/timestamp.json").exists():
        fresh = {"targets": _new_targets(keys), "channels": Targets(), "bundles": Targets()}
        roles |= {name: Metadata(signed) for name, signed in fresh.items()}
        roles |= {"snapshot": Metadata(Snapshot()), "timestamp": Metadata(Timestamp())}
        return Repository(folder, keys, roles)
    roles["timestamp"] = _load(folder / "metadata/timestamp.json", "timestamp", keys)
    version = roles["timestamp"].signed.snapshot_meta.version
    roles["snapshot"] = _load(folder / f"metadata/{version}.snapshot.json", "snapshot", keys)
    for name in ("targets", *DELEGATED):
        version = roles["snapshot"].signed.meta[f"{name}.json"].version
        roles[name] = _load(folder / f"metadata/{version}.{name}.json", name, keys)
    return Repository(folder, keys, roles)


def stored_path(target: TargetFile) -> str:
    """Return where a consistent snapshot keeps a signed file, from the repository's folder."""
    parent, _, name = target.path.rpartition("/")
    return f"targets/{parent}/{target.hashes['sha256']}.{name}"


class _Folder(FetcherInterface):
    """Lets a TUF client read a folder, with files that are not written yet on top."""

    def __init__(self, folder: Path, pending: dict[str, bytes]) -> None:
        self.folder = folder
        self.pending = pending

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(_FOLDER_URL)
        try:
            return iter([self.pending.get(path) or (self.folder / path).read_bytes()])
        except FileNotFoundError as error:
            raise DownloadHTTPError(f"no {path}", 404) from error


def _new_root(keys: Keys) -> Root:
    root = Root(consistent_snapshot=True)
    for name in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(keys.signers[name].public_key, name)
    return root


def _new_targets(keys: Keys) -> Targets:
    roles = {name: DelegatedRole(name, [], 1, True, paths=paths) for name, paths in DELEGATED.items()}
    targets = Targets(delegations=Delegations(keys={}, roles=roles))
    for name in DELEGATED:
        targets.add_key(keys.signers[name].public_key, name)
    return targets


def _load(path: Path, name: str, keys: Keys) -> Metadata[Any]:
    """Read a role that will be signed again: whoever can write to the host must not have a say in it."""
    try:
        role: Metadata[Any] = Metadata.from_file(str(path))
    except (DeserializationError, OSError) as error:
        raise _damaged(f"{path.name} cannot be read", path) from error
    except RepositoryError as error:
        raise _damaged(f"{path.name} is not metadata", path) from error
    public = keys.signers[name].public_key
    signature = role.signatures.get(public.keyid)
    if signature is None or role.signed.type != ("targets" if name in DELEGATED else name):
        raise Untrusted(
            f"{path.name} is not signed by the {name} key in {keys.folder}",
            where=path,
            cure="use the keys this repository was made with",
        )
    try:
        public.verify_signature(signature, role.signed_bytes)
    except (UnverifiedSignatureError, VerificationError) as error:
        raise _damaged(f"{path.name} was changed after it was signed", path) from error
    return role


def _damaged(what: str, where: Path) -> Untrusted:
    return Untrusted(what, where=where, cure="restore the repository from a copy you trust")


def _half_over(name: str, role: Metadata[Any], now: datetime) -> bool:
    if not role.signatures:
        return True
    left: timedelta = role.signed.expires - now
    return left < timedelta(days=LIFETIME[name]) / 2


def _meta(role: Metadata[Any], data: bytes) -> MetaFile:
    return MetaFile.from_data(role.signed.version, data, ["sha256"])


def _version(path: Path) -> int:
    number = path.name.partition(".")[0]
    if not number.isdecimal():
        raise BrokenInput(f"{path.name} is not a version of root.json", where=path)
    return int(number)
