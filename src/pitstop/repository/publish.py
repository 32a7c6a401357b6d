"""Publish bundles: blobs by digest, manifests signed, and a channel that says which of them devices get.

A repository is a folder of plain files; any static host, CDN or USB stick serves it. Order of writing: blobs, signed
files, metadata, and `timestamp.json` last, so that a device sees the old state or the new one.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pitstop import records
from pitstop.bundle.channel import Channel, Pin, channel_path, check_release, is_channel_name, manifest_path
from pitstop.bundle.manifest import PIECE, Artifact, Bundle, check_bundle
from pitstop.errors import BrokenInput, Busy, UsageError
from pitstop.files import CHUNK, replacing, storage_error
from pitstop.progress import Advance, progress
from pitstop.repository.keys import load
from pitstop.repository.metadata import Repository, open_repository

MANIFEST = "bundle.json"
MEGA = 1e6  # bytes; progress counts in MB


@dataclass(frozen=True)
class Offer:
    """One bundle a channel offers."""

    name: str
    version: str
    counter: int


@dataclass(frozen=True)
class Published:
    """What a channel offers after publishing."""

    channel: str
    changed: bool  # False: it offered exactly this before
    bundles: tuple[Offer, ...]  # everything the channel offers, by name
    root: Path  # the file a new device needs to trust this repository


def publish(bundle_folders: Sequence[Path], repository: Path, keys: Path, channel: str = "stable") -> Published:
    """Offer bundles on a channel, beside those it offers already; the repository is made on first use.

    Raises:
        UsageError: nothing to publish, a bad channel name, a counter that does not rise, missing keys.
        Busy: another process publishes to this repository.
        RecordError: a malformed manifest, or a channel without exactly one base.
        BaseMismatch: an adapter whose base file the channel does not offer.
        BrokenInput: an artifact is missing or is not what its manifest says.
        Untrusted: these keys did not sign the repository, or it was tampered with.
        StorageError: the disk refused; devices see what they saw before.
    """
    if not is_channel_name(channel):
        raise UsageError(f"{channel!r} cannot name a channel", cure="use a-z, 0-9, '_' and '-', such as stable")
    bundles = _read_bundles(bundle_folders)
    signers = load(keys)
    with _alone_in(repository):
        state = open_repository(repository, signers)
        for bundle in bundles:
            _sign_manifest(state, bundle)
        pinned = _pin(state, channel, bundles)
        changed = bool(state.changed)
        _add_blobs(repository, bundle_folders, bundles)
        if state.sign():
            state.verify([channel_path(channel), *(pin.path for pin in pinned.bundles.values())])
            state.write()
    offers = [Offer(name, _version(pin), pin.counter) for name, pin in sorted(pinned.bundles.items())]
    return Published(channel, changed, tuple(offers), repository / "metadata" / "1.root.json")


def _read_bundles(folders: Sequence[Path]) -> list[Bundle]:
    if not folders:
        raise UsageError("there is no bundle to publish", cure="name at least one bundle folder")
    found: dict[str, Bundle] = {}
    for folder in folders:
        path = folder / MANIFEST
        bundle = check_bundle(records.load_json(Bundle, path), where=path)
        if bundle.name in found:
            raise UsageError(f"two bundles are named {bundle.name!r}", where=folder, cure="publish one of them")
        found[bundle.name] = bundle
    return list(found.values())


@contextmanager
def _alone_in(repository: Path) -> Iterator[None]:
    """Hold the repository's folder; one made here goes again if nothing came into it."""
    is_new = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error(error, repository) from error
    try:
        _lock(descriptor, repository)
        yield
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):
                repository.rmdir()


def _lock(descriptor: int, repository: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "another process is publishing to this repository"
        raise Busy(what, where=repository, cure="wait until it is done") from error


def _sign_manifest(state: Repository, bundle: Bundle) -> None:
    path, data = manifest_path(bundle), records.to_json(bundle)
    signed = state.targets("bundles")
    if path in signed:
        if state.content(path, "bundles") == data:
            return
        raise UsageError(
            f"{bundle.name} {bundle.version} was published with other content",
            where=state.folder,
            cure="give the changed bundle a new version and a higher counter",
        )
    newest = max((target.custom["counter"] for path, target in signed.items() if _name(path) == bundle.name), default=0)
    if bundle.counter <= newest:
        raise UsageError(
            f"{bundle.name} {bundle.version} has counter {bundle.counter}; counter {newest} was published already",
            where=state.folder,
            cure=f"pack it with counter {newest + 1}: devices never go back to a lower one",
        )
    state.add(path, "bundles", data, {"counter": bundle.counter})


def _pin(state: Repository, name: str, bundles: Sequence[Bundle]) -> Channel:
    """Let the channel offer these bundles too, if all it then offers belongs together."""
    path = channel_path(name)
    before = Channel(name, {})
    if path in state.targets("channels"):
        before = records.from_json(Channel, state.content(path, "channels"), where=path)
    pins = dict(before.bundles)
    for bundle in bundles:
        target = state.targets("bundles")[manifest_path(bundle)]
        if bundle.name in pins and bundle.counter < pins[bundle.name].counter:
            raise UsageError(
                f"channel {name} offers {bundle.name} with counter {pins[bundle.name].counter} already, "
                f"{bundle.version} has {bundle.counter}",
                cure="to go back, publish the old content as a new version with a higher counter",
            )
        pins[bundle.name] = Pin(target.path, target.hashes["sha256"], bundle.counter)
    manifests = {pin.path: state.content(pin.path, "bundles") for pin in pins.values()}
    check_release(
        {path: records.from_json(Bundle, data, where=path) for path, data in manifests.items()}, where=f"channel {name}"
    )
    after = Channel(name, pins)
    if after != before:
        state.add(path, "channels", records.to_json(after))
    return after


def _add_blobs(repository: Path, folders: Sequence[Path], bundles: Sequence[Bundle]) -> None:
    wanted = [
        (folder / artifact.name, artifact)
        for folder, bundle in zip(folders, bundles, strict=True)
        for artifact in bundle.artifacts
    ]
    new = [(source, artifact) for source, artifact in wanted if not _has(repository, artifact)]
    if new:
        with progress("publish", sum(artifact.size for _, artifact in new) / MEGA, "MB") as advance:
            for source, artifact in new:
                _add_blob(repository, source, artifact, advance)


def _add_blob(repository: Path, source: Path, artifact: Artifact, advance: Advance) -> None:
    digest, pieces = hashlib.sha256(), []
    with replacing(_blob(repository, artifact)) as blob:
        for chunk in _read(source):
            if blob.tell() % PIECE == 0:
                pieces.append(hashlib.sha256())
            digest.update(chunk)
            pieces[-1].update(chunk)
            blob.write(chunk)
            advance(len(chunk) / MEGA, artifact.name)
        if digest.hexdigest() != artifact.sha256 or blob.tell() != artifact.size:
            raise BrokenInput(
                f"{artifact.name} has {blob.tell()} bytes and SHA-256 {digest.hexdigest()}; "
                f"its manifest says {artifact.size} and {artifact.sha256}",
                where=source,
                cure="pack the bundle again",
            )
        if artifact.pieces and artifact.pieces != tuple(piece.hexdigest() for piece in pieces):
            what = f"the pieces of {artifact.name} are not those its manifest names"
            raise BrokenInput(what, where=source, cure="pack the bundle again")


def _read(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise BrokenInput(
            f"cannot read the artifact {source.name}: {error.strerror}", where=source, cure="pack the bundle again"
        ) from error


def _has(repository: Path, artifact: Artifact) -> bool:
    blob = _blob(repository, artifact)
    return blob.is_file() and blob.stat().st_size == artifact.size


def _blob(repository: Path, artifact: Artifact) -> Path:
    return repository / "blobs" / "sha256" / artifact.sha256


def _name(path: str) -> str:
    return path.split("/")[2]


def _version(pin: Pin) -> str:
    return pin.path.rpartition("/")[2].removesuffix(".json")
