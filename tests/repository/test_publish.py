import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from delivery import Forger, Publisher, artifact_of, bundle_of, change_bundle, tree
from pitstop.bundle.manifest import PIECE
from pitstop.errors import BaseMismatch, BrokenInput, Busy, RecordError, Untrusted, UsageError
from pitstop.files import sha256_file
from pitstop.repository import keys, metadata
from pitstop.repository.publish import publish


def channel_of(publisher: Publisher, name: str = "stable") -> dict[str, dict[str, object]]:
    """What a channel pins, read as the publisher reads it."""
    state = metadata.open_repository(publisher.repository, keys.load(publisher.keys))
    content: dict[str, dict[str, dict[str, object]]] = json.loads(state.content(f"channels/{name}.json", "channels"))
    return content["bundles"]


def test_a_new_repository(publisher: Publisher) -> None:
    base = publisher.base()
    adapter = publisher.adapter(base)
    published = publisher.publish(base, adapter)
    assert published.changed
    assert [(offer.name, offer.version, offer.counter) for offer in published.bundles] == [
        ("home", "1.0.1", 1),
        ("tiny", "1.0.1", 1),
    ]
    assert published.root == publisher.repository / "metadata/1.root.json"
    files = tree(publisher.repository)
    for folder in (base, adapter):
        artifact = artifact_of(folder)
        assert files[f"blobs/sha256/{sha256_file(artifact)}"] == artifact.read_bytes()
    assert channel_of(publisher)["home"]["path"] == "bundles/adapter/home/1.0.1.json"
    assert channel_of(publisher)["tiny"]["path"] == "bundles/base/tiny/1.0.1.json"
    assert {name for name in files if name.startswith("metadata/")} == {
        f"metadata/{name}.json"
        for name in ("1.root", "1.targets", "1.channels", "1.bundles", "1.snapshot", "timestamp")
    }
    assert datetime.fromisoformat(json.loads(files["metadata/timestamp.json"])["signed"]["x-issued"])


def test_the_same_again_changes_nothing(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    before = tree(publisher.repository)
    assert not publisher.publish(base).changed
    assert tree(publisher.repository) == before


def test_the_channel_keeps_what_it_offered(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    publisher.publish(publisher.adapter(base))
    published = publisher.publish(publisher.adapter(base, name="address", seed=2))
    assert [offer.name for offer in published.bundles] == ["address", "home", "tiny"]


def test_a_new_version_replaces_the_old_pin(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base, publisher.adapter(base))
    publisher.publish(publisher.adapter(base, seed=2, counter=2))
    assert channel_of(publisher)["home"]["counter"] == 2


@pytest.mark.parametrize("counter", [1, 2])
def test_a_counter_must_rise(publisher: Publisher, counter: int) -> None:
    base = publisher.base()
    publisher.publish(base, publisher.adapter(base, counter=2))
    other = publisher.adapter(base, seed=3)
    change_bundle(other, version="7", counter=counter)
    before = tree(publisher.repository)
    with pytest.raises(UsageError, match="with counter 3"):
        publisher.publish(other)
    assert tree(publisher.repository) == before


def test_the_same_version_with_other_content(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base, publisher.adapter(base))
    with pytest.raises(UsageError, match="with other content"):
        publisher.publish(publisher.adapter(base, seed=9))


def test_a_channel_does_not_go_back(publisher: Publisher) -> None:
    base = publisher.base()
    first = publisher.adapter(base)
    publisher.publish(base, first)
    publisher.publish(publisher.adapter(base, seed=2, counter=2))
    with pytest.raises(UsageError, match="higher counter"):
        publisher.publish(first)


def test_one_bundle_on_two_channels(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base, channel="beta")
    assert publisher.publish(base).changed
    assert channel_of(publisher) == channel_of(publisher, "beta")


def test_an_adapter_needs_its_base_in_the_channel(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    other = publisher.adapter(publisher.base(seed=5))
    before = tree(publisher.repository)
    with pytest.raises(BaseMismatch, match=bundle_of(base).base_sha256):
        publisher.publish(other)
    assert tree(publisher.repository) == before


def test_a_new_base_may_not_orphan_adapters(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base, publisher.adapter(base))
    newer = publisher.base(seed=8, counter=2)
    with pytest.raises(BaseMismatch, match="home"):
        publisher.publish(newer)
    publisher.publish(newer, publisher.adapter(newer, counter=2))


def test_a_channel_without_a_base_or_with_two(publisher: Publisher) -> None:
    base = publisher.base()
    with pytest.raises(RecordError, match="exactly one base"):
        publisher.publish(publisher.adapter(base))
    assert not publisher.repository.exists()
    with pytest.raises(RecordError, match="exactly one base"):
        publisher.publish(base, publisher.base(name="other"))


def test_pieces_that_are_not_the_artifacts(publisher: Publisher) -> None:
    base = publisher.base(rows=PIECE // 128 + 1)
    artifact = bundle_of(base).artifact
    change_bundle(base, artifacts=(replace(artifact, pieces=artifact.pieces[::-1]),))
    with pytest.raises(BrokenInput, match="the pieces of tiny"):
        publisher.publish(base)
    change_bundle(base, artifacts=(artifact,))
    assert publisher.publish(base).changed


def test_an_artifact_that_is_not_the_manifests(publisher: Publisher) -> None:
    base = publisher.base()
    path = artifact_of(base)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(BrokenInput, match="its manifest says"):
        publisher.publish(base)
    path.write_bytes(data + b"x")
    with pytest.raises(BrokenInput, match="its manifest says"):
        publisher.publish(base)
    path.unlink()
    with pytest.raises(BrokenInput, match="cannot read the artifact"):
        publisher.publish(base)
    assert not publisher.repository.exists() or not tree(publisher.repository)
    path.write_bytes(data)
    publisher.publish(base)


def test_malformed_manifests(publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match=r"bundle\.json"):
        publisher.publish(tmp_path)
    base = publisher.base()
    change_bundle(base, version="../1", counter=0)
    with pytest.raises(RecordError) as caught:
        publisher.publish(base)
    assert len(caught.value.problems) == 2


def test_wrong_use(publisher: Publisher) -> None:
    base = publisher.base()
    with pytest.raises(UsageError, match="no bundle"):
        publisher.publish()
    with pytest.raises(UsageError, match="cannot name a channel"):
        publisher.publish(base, channel="../stable")
    with pytest.raises(UsageError, match="two bundles"):
        publisher.publish(base, base)


def test_two_publishers_at_once(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    descriptor = os.open(publisher.repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            publisher.publish(base)
    finally:
        os.close(descriptor)
    publisher.publish(base)


def test_another_ones_repository(publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    keys.create(tmp_path / "other")
    with pytest.raises(Untrusted, match="not signed by the root key"):
        publish([base], publisher.repository, tmp_path / "other")


@pytest.mark.parametrize("name", ["1.root", "1.targets", "1.channels", "1.bundles", "1.snapshot", "timestamp"])
def test_nothing_tampered_is_signed_again(publisher: Publisher, name: str) -> None:
    base = publisher.base()
    publisher.publish(base)
    path = publisher.repository / f"metadata/{name}.json"
    data = json.loads(path.read_bytes())
    data["signed"]["x-planted"] = "by whoever can write to the host"
    path.write_text(json.dumps(data))
    with pytest.raises(Untrusted, match="was changed after it was signed"):
        publisher.publish(publisher.adapter(base))


def test_a_planted_manifest_is_not_signed_again(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    (manifest,) = (publisher.repository / "targets/bundles/base/tiny").iterdir()
    manifest.write_bytes(manifest.read_bytes().replace(b"Apache-2.0", b"Planted-00"))
    with pytest.raises(Untrusted, match="missing or was changed"):
        publisher.publish(publisher.adapter(base))


def test_metadata_is_signed_again_before_it_ends(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    forger = Forger(publisher.repository, publisher.keys)
    forger.roles["timestamp"].signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    forger.sign()
    assert not publisher.publish(base).changed
    signed = json.loads((publisher.repository / "metadata/timestamp.json").read_bytes())["signed"]
    assert datetime.fromisoformat(signed["expires"]) > datetime.now(UTC) + timedelta(days=6)
    before = tree(publisher.repository)
    publisher.publish(base)
    assert tree(publisher.repository) == before


def test_the_root_is_renewed_by_the_root(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    base = publisher.base()
    monkeypatch.setitem(metadata.LIFETIME, "root", 100)
    publisher.publish(base)
    monkeypatch.undo()
    publisher.publish(base)
    assert (publisher.repository / "metadata/2.root.json").exists()
    publisher.publish(publisher.adapter(base))
    assert not (publisher.repository / "metadata/3.root.json").exists()


def test_an_interrupted_publish_is_invisible_and_can_be_repeated(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publisher.base()
    publisher.publish(base)
    adapter = publisher.adapter(base)
    timestamp = (publisher.repository / "metadata/timestamp.json").read_bytes()
    write = metadata.write_bytes
    for stop in range(5):
        left = iter(range(stop))

        def interrupted(path: Path, data: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(path, data)

        monkeypatch.setattr(metadata, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(adapter)
        assert (publisher.repository / "metadata/timestamp.json").read_bytes() == timestamp
        monkeypatch.undo()
    assert publisher.publish(adapter).changed
    assert [offer.name for offer in publisher.publish(adapter).bundles] == ["home", "tiny"]


def test_what_a_device_would_refuse_is_not_written(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    base = publisher.base()
    publisher.publish(base)
    before = {path: data for path, data in tree(publisher.repository).items() if not path.startswith("blobs/")}
    monkeypatch.setitem(metadata.LIFETIME, "timestamp", -1)
    with pytest.raises(Untrusted, match="a device would refuse"):
        publisher.publish(publisher.adapter(base))
    after = {path: data for path, data in tree(publisher.repository).items() if not path.startswith("blobs/")}
    assert after == before


def test_python_tuf_alone_reads_it(publisher: Publisher, tmp_path: Path) -> None:
    class Files(FetcherInterface):
        def _fetch(self, url: str):  # type: ignore[no-untyped-def]
            path = Path(url.removeprefix("file://"))
            if not path.exists():
                raise DownloadHTTPError("no", 404)
            return iter([path.read_bytes()])

    publisher.publish(publisher.base())
    home = f"file://{publisher.repository}"
    client = Updater(
        str(tmp_path),
        f"{home}/metadata/",
        fetcher=Files(),
        bootstrap=publisher.root_json,
        target_base_url=f"{home}/targets/",
    )
    target = client.get_targetinfo("channels/stable.json")
    assert target is not None
    assert json.loads(Path(client.download_target(target, str(tmp_path / "got"))).read_bytes())["name"] == "stable"
    assert client.get_targetinfo("bundles/base/tiny/1.0.1.json") is not None
    assert client.get_targetinfo("bundles/base/1.0.1.json") is None
