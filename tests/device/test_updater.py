"""publish -> update -> activate, over loopback HTTP."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from delivery import Publisher, Server, artifact_of, bundle_of, change_bundle, names
from pitstop.device.store import Release, Store
from pitstop.device.updater import TRUSTED_ROOT, activate, update
from pitstop.errors import FormatError, Refused, Untrusted, UsageError
from pitstop.repository import metadata


def good(_: Release) -> None:
    """A release that comes up."""


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return tmp_path / "device"


def test_from_bundles_to_a_release_that_serves(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    adapter = publisher.adapter(base)
    publisher.publish(base, adapter)
    updated = update(device, server.url, root_json=publisher.root_json)
    assert updated.changed
    assert names(list(updated.bundles)) == ["home", "tiny"]
    assert updated.fetched_bytes == artifact_of(base).stat().st_size + artifact_of(adapter).stat().st_size
    store = Store(device)
    assert store.active() is None
    seen = []
    release = activate(store, seen.append)
    assert release is not None
    assert [tried.sha256 for tried in seen] == [updated.release]
    assert store.state.good == release.sha256 == updated.release
    assert release.base_path().read_bytes() == artifact_of(base).read_bytes()
    assert release.adapters()["home"][1].read_bytes() == artifact_of(adapter).read_bytes()


def test_the_same_again_fetches_no_blob(publisher: Publisher, server: Server, device: Path) -> None:
    publisher.publish(publisher.base())
    update(device, server.url, root_json=publisher.root_json)
    assert not update(device, server.url).changed
    activate(Store(device), good)
    server.sent.clear()
    again = update(device, server.url)
    assert (again.changed, again.fetched_bytes) == (False, 0)
    assert [path for path, _ in server.sent] == ["/metadata/timestamp.json"] + [
        path for path, _ in server.sent if path.startswith("/targets/")
    ]


def test_a_second_adapter_costs_its_own_bytes(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    update(device, server.url, root_json=publisher.root_json)
    activate(Store(device), good)
    adapter = publisher.adapter(base)
    publisher.publish(adapter)
    assert update(device, server.url).fetched_bytes == artifact_of(adapter).stat().st_size
    activate(Store(device), good)
    assert Store(device).state.previous is not None


def test_a_release_that_fails_its_check(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    first = update(device, server.url, root_json=publisher.root_json).release
    store = Store(device)
    activate(store, good)
    publisher.publish(publisher.adapter(base))
    second = update(device, server.url).release

    def bad(_: Release) -> None:
        raise FormatError("the model answers nonsense")

    with pytest.raises(FormatError):
        activate(store, bad)
    assert store.state.good == first
    assert store.state.bad == (second,)
    server.sent.clear()
    with pytest.raises(Refused, match="failed or was rolled back"):
        update(device, server.url)
    assert server.blob_bytes == 0
    publisher.publish(publisher.adapter(base, seed=4, counter=2))
    assert update(device, server.url).changed
    activate(store, good)
    assert store.state.previous == first


def test_a_check_that_cannot_be_made_costs_no_try(publisher: Publisher, server: Server, device: Path) -> None:
    publisher.publish(publisher.base())
    update(device, server.url, root_json=publisher.root_json)
    store = Store(device)

    for reason in (UsageError("the engine is not installed"), KeyboardInterrupt()):

        def no_check(_: Release, reason: BaseException = reason) -> None:
            raise reason

        for _ in range(4):
            with pytest.raises(type(reason)):
                activate(store, no_check)
    activate(store, good)
    assert store.state.good is not None


def test_nothing_on_trial(publisher: Publisher, server: Server, device: Path) -> None:
    assert activate(Store(device), good) is None
    publisher.publish(publisher.base())
    updated = update(device, server.url, root_json=publisher.root_json)
    activate(Store(device), good)
    release = activate(Store(device), good)
    assert release is not None
    assert release.sha256 == updated.release


def test_a_damaged_release_is_repaired(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    update(device, server.url, root_json=publisher.root_json)
    release = activate(Store(device), good)
    assert release is not None
    release.base_path().unlink()
    (device / "releases" / f"{release.sha256}.json").write_bytes(b"")
    repaired = update(device, server.url)
    assert (repaired.changed, repaired.fetched_bytes) == (False, artifact_of(base).stat().st_size)
    assert Store(device).active() is not None


def test_a_folder_as_repository(publisher: Publisher, device: Path) -> None:
    publisher.publish(publisher.base())
    assert update(device, str(publisher.repository), root_json=publisher.root_json).changed
    assert not update(device, publisher.repository.as_uri()).changed


def test_trust_comes_once_and_stays(publisher: Publisher, server: Server, device: Path, tmp_path: Path) -> None:
    publisher.publish(publisher.base())
    with pytest.raises(UsageError, match="trusts no repository yet"):
        update(device, server.url)
    other = Publisher(tmp_path)
    other.publish(other.base())
    with pytest.raises(Untrusted, match="fails verification"):
        update(device, server.url, root_json=other.root_json)
    with pytest.raises(Untrusted, match="fails verification"):
        update(device, server.url, root_json=b"no root")
    assert not (device / TRUSTED_ROOT).exists()
    update(device, server.url, root_json=publisher.root_json)
    assert (device / TRUSTED_ROOT).read_bytes() == publisher.root_json
    update(device, server.url, root_json=publisher.root_json)
    with pytest.raises(UsageError, match="another root"):
        update(device, server.url, root_json=other.root_json)


def test_the_root_is_followed(
    publisher: Publisher, server: Server, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publisher.base()
    monkeypatch.setitem(metadata.LIFETIME, "root", 100)
    publisher.publish(base)
    update(device, server.url, root_json=publisher.root_json)
    monkeypatch.undo()
    publisher.publish(publisher.adapter(base))
    assert update(device, server.url).changed
    assert (device / "tuf/root.json").resolve().name == "2.root.json"


def test_a_channel_nobody_offers(publisher: Publisher, server: Server, device: Path) -> None:
    publisher.publish(publisher.base())
    with pytest.raises(UsageError, match="no channel 'beta'"):
        update(device, server.url, root_json=publisher.root_json, channel="beta")
    with pytest.raises(UsageError, match="cannot name a channel"):
        update(device, server.url, root_json=publisher.root_json, channel="../x")


def test_no_repository_at_this_address(publisher: Publisher, server: Server, device: Path) -> None:
    publisher.publish(publisher.base())
    for url in (f"{server.url}/elsewhere", "http://127.0.0.1:9"):
        with pytest.raises(UsageError, match="cannot be read"):
            update(device, url, root_json=publisher.root_json)


def test_a_model_file_no_loader_should_see(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    folder = publisher.adapter(base)
    data = artifact_of(folder).read_bytes().replace(b"lora_b", b"lora_c")
    artifact_of(folder).write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    artifact = replace(bundle_of(folder).artifacts[0], sha256=sha256, pieces=(sha256,))
    change_bundle(folder, artifacts=(artifact,))
    publisher.publish(base, folder)
    with pytest.raises(FormatError):
        update(device, server.url, root_json=publisher.root_json)
    assert Store(device).state.trial is None


def test_a_format_this_device_does_not_run(publisher: Publisher, server: Server, device: Path) -> None:
    base = publisher.base()
    change_bundle(base, artifacts=(replace(bundle_of(base).artifacts[0], format="pickle"),))
    publisher.publish(base)
    with pytest.raises(FormatError, match="pickle"):
        update(device, server.url, root_json=publisher.root_json)
    assert server.blob_bytes == 0


def test_without_cryptography(publisher: Publisher, device: Path) -> None:
    """A board needs no compiled dependency to verify Ed25519."""
    publisher.publish(publisher.base())
    script = f"""
import sys
sys.modules["cryptography"] = None
from pathlib import Path
from pitstop.device.updater import update
root = Path({str(publisher.repository)!r})
update(Path({str(device)!r}), str(root), root_json=(root / "metadata/1.root.json").read_bytes())
assert not {{"torch", "transformers", "peft", "cryptography.hazmat"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert Store(device).state.trial is not None
