"""From a repository to an installed release: metadata verified by python-tuf, blobs by digest, one change of state.

    trusted root -> refresh -> floor -> channel -> manifests -> space -> blobs -> format check -> on trial
    -> activate: one try used up -> the caller's check -> confirmed, or rejected

Nothing serves before `activate`; whatever fails here leaves the release that serves as it is.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadError, DownloadLengthMismatchError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater, UpdaterConfig

from pitstop import records
from pitstop.bundle.channel import Channel, Pin, channel_path, check_channel, is_channel_name, manifest_path
from pitstop.bundle.manifest import Bundle, check_bundle
from pitstop.device import activation
from pitstop.device.download import BASE, Source, fetch_blob, open_source, unreachable
from pitstop.device.durable import Disk, TwoCopies
from pitstop.device.engine import check_files, check_formats
from pitstop.device.floor import EXPIRED_CURE, Floor, Seen, rise, rise_counters
from pitstop.device.store import Release, Store
from pitstop.errors import Untrusted, UsageError
from pitstop.files import storage_error
from pitstop.progress import progress

TRUSTED_ROOT = "trusted-root.json"  # what this device was told to trust, once
SMALL = 1 << 20  # bytes a channel or a manifest may have
ISSUED = "x-issued"
MEGA = 1e6  # bytes; progress counts in MB


@dataclass(frozen=True)
class Updated:
    """What an update did."""

    release: str  # sha256
    changed: bool  # True: it is on trial now, and waits for `activate`
    fetched_bytes: int
    bundles: tuple[Bundle, ...]


def update(
    root: Path,
    url: str,
    *,
    root_json: bytes | None = None,
    channel: str = "stable",
    disk: Disk | None = None,
) -> Updated:
    """Fetch, verify and install what a channel offers; it is on trial afterwards and does not serve yet.

    Args:
        root: the device root; made if it does not exist.
        url: http(s) address, file address or folder of the repository.
        root_json: the publisher's `1.root.json`, got by a way you trust; needed the first time only.
        channel: the name the publisher gave it.
        disk: how to write; another one only in tests.

    Raises:
        UsageError: nothing is trusted yet, no such channel, or the repository cannot be reached.
        Busy: another process is at work on this root.
        Untrusted: metadata or bytes that fail verification, expired or older than seen before.
        RecordError: a signed manifest that is malformed.
        BaseMismatch: an adapter that does not belong to the base.
        FormatError: a model file that is damaged or of a format this device does not run.
        Refused: the release failed or was rolled back here before.
        StorageError: the disk is full or refuses; what was fetched is kept.
    """
    if not is_channel_name(channel):
        raise UsageError(f"{channel!r} cannot name a channel", cure="use the name the publisher gave, such as stable")
    source = open_source(url)
    store = Store(root, disk)
    with store.locked():
        release = _offered(store, source, root_json, channel)
        check_formats(release)
        activation.install(store.state, release.sha256)  # a bad release is refused before it is fetched
        store.collect_garbage(keep=release)
        store.require_space(release)
        fetched = _fetch(store, source, release)
        check_files(release)
        changed = store.install(release)
    return Updated(release.sha256, changed, fetched, tuple(release.bundles.values()))


def activate(store: Store, check: Callable[[Release], None]) -> Release | None:
    """Try the release on trial, if there is one, and return the release that serves afterwards.

    One try is used up durably before ``check`` runs: a release that takes the machine down with it cannot do so for
    ever. If ``check`` returns, the release is confirmed; if it raises, the release is bad and the exception passes on.
    A `UsageError` (or Ctrl-C) says that the check could not be made: the release stays on trial.
    """
    with store.locked():
        if store.state.trial is None:
            return store.active()
        release = store.activate()
        if release is None:
            return store.active()
        try:
            check(release)
        except (UsageError, KeyboardInterrupt):
            store.untried()
            raise
        except Exception:
            store.reject()
            raise
        store.confirm()
        store.collect_garbage()
        return release


def _offered(store: Store, source: Source, root_json: bytes | None, channel: str) -> Release:
    """Verify what the channel offers, and remember that it was offered."""
    floors = TwoCopies(store.disk, store.root / "floor", Floor, Floor())
    with _translated(source, store):
        trusted, is_new = _trusted_root(store, root_json)
        client = _client(store, source, trusted)
        client.refresh()
        floor = rise(floors.read(), _seen(store.root / "tuf"), time.time())
        data = _signed_file(client, source, channel_path(channel))
        if data is None:
            raise UsageError(f"the repository has no channel {channel!r}", where=source.where, cure="ask the publisher")
        offer = check_channel(records.from_json(Channel, data, where=channel_path(channel)))
        if offer.name != channel:
            raise Untrusted(f"{channel_path(channel)} is the channel {offer.name!r}", where=source.where)
        floor = rise_counters(floor, {name: pin.counter for name, pin in offer.bundles.items()})
        manifests = {name: _manifest(client, source, pin) for name, pin in offer.bundles.items()}
    release = store.release(manifests)
    if is_new:
        store.disk.replace(store.root / TRUSTED_ROOT, trusted)
    if floor != floors.read():
        floors.write(floor)
    return release


def _trusted_root(store: Store, given: bytes | None) -> tuple[bytes, bool]:
    """Return the root this device trusts, and whether it is yet to be stored."""
    path = store.root / TRUSTED_ROOT
    stored = path.read_bytes() if path.is_file() else None
    if stored is None and given is None:
        raise UsageError(
            "this device trusts no repository yet",
            where=store.root,
            cure="get the publisher's 1.root.json by a way you trust: pitstop update --root 1.root.json …",
        )
    if stored is not None and given not in (None, stored):
        raise UsageError(
            "this device root trusts another root.json already",
            where=path,
            cure="leave the root file out; or use a new device root for another publisher",
        )
    trusted = stored or given or b""
    return trusted, stored is None


def _client(store: Store, source: Source, trusted: bytes) -> Updater:
    folder = store.root / "tuf"
    folder.mkdir(exist_ok=True)
    for left_over in folder.glob("tmp*"):
        left_over.unlink()
    config = UpdaterConfig(targets_max_length=SMALL)
    return Updater(str(folder), f"{BASE}metadata/", fetcher=source, config=config, bootstrap=trusted)


def _seen(folder: Path) -> Seen:
    """Read what python-tuf has just verified and stored."""
    root, timestamp, snapshot = (_metadata(folder / f"{name}.json") for name in ("root", "timestamp", "snapshot"))
    keyids = {keyid for role in ("timestamp", "snapshot") for keyid in root.roles[role].keyids}
    issued = timestamp.unrecognized_fields.get(ISSUED)
    try:
        issued_at = int(datetime.fromisoformat(issued).timestamp()) if issued else 0
    except (ValueError, TypeError, OverflowError) as error:
        raise Untrusted(f"timestamp.json has {issued!r} as {ISSUED}") from error
    return Seen(
        root=root.version,
        timestamp=timestamp.version,
        snapshot=snapshot.version,
        keyids=tuple(sorted(keyids)),
        issued=issued_at,
        expires=int(timestamp.expires.timestamp()),
    )


def _metadata(path: Path) -> Any:
    return Metadata.from_file(str(path)).signed


def _signed_file(client: Updater, source: Source, path: str) -> bytes | None:
    """Fetch a small signed file into memory; None if nobody who may signed it."""
    target = client.get_targetinfo(path)
    if target is None:
        return None
    if target.length > SMALL or "sha256" not in target.hashes:
        raise Untrusted(f"{path} is signed with {target.length} bytes, at most {SMALL} and a SHA-256 are allowed")
    parent, _, name = path.rpartition("/")
    data = source.download_bytes(f"{BASE}targets/{parent}/{target.hashes['sha256']}.{name}", target.length)
    target.verify_length_and_hashes(data)
    return data


def _manifest(client: Updater, source: Source, pin: Pin) -> bytes:
    """Fetch the manifest a channel pinned; channel and bundle key must agree on it."""
    data = _signed_file(client, source, pin.path)
    if data is None:
        raise Untrusted(f"the channel offers {pin.path}, which no bundle key signed")
    if hashlib.sha256(data).hexdigest() != pin.sha256:
        raise Untrusted(f"the channel offers {pin.path} with another digest than the bundle key signed")
    bundle = check_bundle(records.from_json(Bundle, data, where=pin.path), where=pin.path)
    if (manifest_path(bundle), bundle.counter) != (pin.path, pin.counter):
        raise Untrusted(f"{pin.path} is the manifest of {manifest_path(bundle)} with counter {bundle.counter}")
    return data


def _fetch(store: Store, source: Source, release: Release) -> int:
    """Bring in the blobs that are missing; return how many bytes came."""
    missing = store.missing(release)
    if not missing:
        return 0
    fetched = 0
    blobs = [(artifact, store.add_blob(artifact)) for artifact in missing]
    with progress("update", sum(artifact.size - incoming.size for artifact, incoming in blobs) / MEGA, "MB") as advance:
        for artifact, incoming in blobs:

            def count(size: int, name: str = artifact.name) -> None:
                nonlocal fetched
                fetched += size
                advance(size / MEGA, name)

            fetch_blob(source, artifact, incoming, count)
    return fetched


@contextmanager
def _translated(source: Source, store: Store) -> Iterator[None]:
    """Say in pitstop's words what python-tuf found."""
    try:
        yield
    except ExpiredMetadataError as error:
        what = f"what the repository offers is out of date: {error}"
        raise Untrusted(what, where=source.where, cure=EXPIRED_CURE) from error
    except (RepositoryError, DownloadLengthMismatchError) as error:
        raise Untrusted(
            f"the repository fails verification: {error}",
            where=source.where,
            cure="the installed release stays; ask the publisher, or use another address of the repository",
        ) from error
    except DownloadError as error:
        raise unreachable(source, error) from error
    except OSError as error:
        raise storage_error(error, store.root / "tuf") from error
