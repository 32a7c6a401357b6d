import os
from pathlib import Path

import pytest

from delivery import Publisher, artifact_of, bundle_of, change_bundle
from pitstop import records
from pitstop.device import store as store_module
from pitstop.device.activation import State
from pitstop.device.durable import Disk
from pitstop.device.store import Release, Store
from pitstop.errors import BaseMismatch, Busy, RecordError, Refused, StorageError, Untrusted, UsageError, WrongPiece


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "device")


def release_of(store: Store, *folders: Path) -> Release:
    return store.release({bundle_of(folder).name: records.to_json(bundle_of(folder)) for folder in folders})


def fill(store: Store, *folders: Path) -> Release:
    """Bring a release's files in, without a repository."""
    release = release_of(store, *folders)
    with store.locked():
        for folder in folders:
            artifact = bundle_of(folder).artifacts[0]
            incoming = store.add_blob(artifact)
            incoming.append(artifact_of(folder).read_bytes()[incoming.size :])
            incoming.finish()
    return release


def confirmed(store: Store, *folders: Path) -> Release:
    release = fill(store, *folders)
    store.install(release)
    store.activate()
    store.confirm()
    return release


def test_a_root_that_does_not_exist(store: Store) -> None:
    assert store.state == State()
    assert store.active() is None
    assert not store.root.exists()


def test_install_activate_confirm(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    adapter = publisher.adapter(base)
    release = release_of(store, base, adapter)
    assert {artifact.name for artifact in store.missing(release)} == {"tiny.gguf", "home.gguf"}
    with pytest.raises(StorageError, match="lacks"):
        store.install(release)
    fill(store, base, adapter)
    assert store.missing(release) == ()
    assert store.install(release)
    assert not store.install(release)
    assert store.active() is None
    tried = store.activate()
    assert tried is not None
    assert tried.sha256 == release.sha256
    assert store.state == State(trial=release.sha256, tries=2)
    store.confirm()
    active = Store(store.root).active()
    assert active is not None
    assert active.base == bundle_of(base)
    assert active.base_path().read_bytes() == artifact_of(base).read_bytes()
    ((name, (bundle, path)),) = active.adapters().items()
    assert (name, bundle) == ("home", bundle_of(adapter))
    assert path.read_bytes() == artifact_of(adapter).read_bytes()
    assert path.stat().st_mode & 0o777 == 0o444


def test_roll_back_and_no_return(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    first = confirmed(store, base)
    second = confirmed(store, base, publisher.adapter(base))
    store.roll_back()
    active = store.active()
    assert active is not None
    assert active.sha256 == first.sha256
    with pytest.raises(Refused):
        store.install(second)
    with pytest.raises(UsageError):
        store.roll_back()


def test_no_way_back_to_what_is_incomplete(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    adapter = publisher.adapter(base)
    confirmed(store, base, adapter)
    second = confirmed(store, base)
    store.blob(bundle_of(adapter).artifacts[0].sha256).unlink()
    with pytest.raises(StorageError, match="lacks home"):
        store.roll_back()
    assert store.state.good == second.sha256


def test_damage_is_found_before_anything_serves(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    release = confirmed(store, base)
    blob = release.base_path()
    blob.chmod(0o644)
    os.truncate(blob, 10)
    with pytest.raises(StorageError, match="pitstop update"):
        store.active()
    fill(store, base)
    assert store.active() is not None
    path = store.root / "releases" / f"{release.sha256}.json"
    path.write_bytes(path.read_bytes().replace(b"Apache", b"Bpache"))
    with pytest.raises(StorageError, match="damaged"):
        store.active()
    store.install(release)
    assert store.active() is not None


def test_garbage(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    releases = [confirmed(store, base, publisher.adapter(base, seed=n, counter=n)) for n in (1, 2, 3, 4)]
    coming = release_of(store, base, publisher.adapter(base, seed=9, counter=9))
    partial = store.root / "partial"
    artifact = next(artifact for artifact in coming.artifacts() if artifact.role == "adapter")
    (partial / artifact.sha256).write_bytes(b"begun")
    (partial / ("0" * 64)).write_bytes(b"forgotten")
    store.collect_garbage(keep=coming)
    blobs = {path.name for path in (store.root / "blobs/sha256").iterdir()}
    # The copy of the state that does not count still names the second release as previous.
    kept = {artifact.sha256 for release in releases[1:] for artifact in release.artifacts()}
    assert blobs == kept
    assert len(list((store.root / "releases").iterdir())) == 3
    assert [path.name for path in partial.iterdir()] == [artifact.sha256]
    assert store.active() is not None
    store.roll_back()
    assert store.active() is not None


def test_garbage_stays_while_a_release_is_unreadable(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    release = confirmed(store, base)
    (store.root / "releases" / f"{release.sha256}.json").write_bytes(b"{}")
    store.collect_garbage()
    assert release.base_path().exists()


def test_either_copy_of_the_state_can_be_lost_after_a_collection(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    for n in (1, 2, 3):
        confirmed(store, base, publisher.adapter(base, seed=n, counter=n))
        store.collect_garbage()
        for name in ("state.a", "state.b"):
            data = (store.root / name).read_bytes()
            (store.root / name).write_bytes(b"\0")
            state = store.state
            assert state.good is None or store.active() is not None
            (store.root / name).write_bytes(data)


def test_one_writer(store: Store, publisher: Publisher) -> None:
    other = Store(store.root)
    with store.locked(), store.locked():
        with pytest.raises(Busy, match=str(os.getpid())), other.locked():
            pass
        assert other.state == State()
    with other.locked():
        pass


def test_space(store: Store, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    base = publisher.base()
    release = release_of(store, base)
    size = bundle_of(base).artifacts[0].size
    with store.locked():
        needed = size + store_module.RESERVE
        monkeypatch.setattr(Disk, "free_bytes", lambda *_: needed)
        store.require_space(release)
        monkeypatch.setattr(Disk, "free_bytes", lambda *_: needed - 5_000_000)
        with pytest.raises(StorageError, match=r"free 5\.0 MB more"):
            store.require_space(release)
        (store.root / "partial" / bundle_of(base).base_sha256).write_bytes(b"x" * (size - 1))
        monkeypatch.setattr(Disk, "free_bytes", lambda *_: store_module.RESERVE + 1)
        store.require_space(release)
    fill_blob = store.blob(bundle_of(base).base_sha256)
    fill_blob.write_bytes(artifact_of(base).read_bytes())
    monkeypatch.setattr(Disk, "free_bytes", lambda *_: 0)
    store.require_space(release)


def test_incoming(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    data = artifact_of(base).read_bytes()
    artifact = bundle_of(base).artifacts[0]
    with store.locked():
        store.add_blob(artifact).append(data[:100])
        incoming = store.add_blob(artifact)
        assert incoming.size == 100
        with pytest.raises(Untrusted, match="more than"):
            incoming.append(data[99:])
        with pytest.raises(WrongPiece, match="was signed for"):
            incoming.append(data[100:-1] + bytes([data[-1] ^ 1]))
        assert store.add_blob(artifact).size == 0
        assert store.missing(release_of(store, base))


def test_a_partial_file_that_is_too_long_or_a_link(store: Store, publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base()
    artifact = bundle_of(base).artifacts[0]
    with store.locked():
        path = store.root / "partial" / artifact.sha256
        path.write_bytes(b"x" * (artifact.size + 1))
        assert store.add_blob(artifact).size == 0
        outside = tmp_path / "outside"
        outside.write_bytes(b"mine")
        path.symlink_to(outside)
        incoming = store.add_blob(artifact)
        incoming.append(artifact_of(base).read_bytes())
        incoming.finish()
    assert outside.read_bytes() == b"mine"
    assert not store.missing(release_of(store, base))


def test_a_blob_that_is_a_link_is_missing(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    with store.locked():
        store.blob(bundle_of(base).base_sha256).symlink_to(artifact_of(base))
    assert store.missing(release_of(store, base))


def test_releases_that_cannot_be(store: Store, publisher: Publisher) -> None:
    base = publisher.base()
    with pytest.raises(RecordError, match="exactly one base"):
        store.release({})
    with pytest.raises(BaseMismatch):
        release_of(store, base, publisher.adapter(publisher.base(seed=3)))
    with pytest.raises(RecordError, match="is for 'tiny'"):
        store.release({"other": records.to_json(bundle_of(base))})
    with pytest.raises(RecordError, match="UTF-8"):
        store.release({"tiny": b"\xff"})
    change_bundle(base, counter=0)
    with pytest.raises(RecordError, match="counter"):
        release_of(store, base)


@pytest.mark.parametrize("text", ["../state.a", "A" * 64, "a" * 63, "a" * 65, "sha256:" + "a" * 57, "a" * 63 + "/"])
def test_a_blob_goes_by_a_digest_only(store: Store, text: str) -> None:
    with pytest.raises(Untrusted):
        store.blob(text)


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError), Store(tmp_path / "file/device").locked():
        pass
