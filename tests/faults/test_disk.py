"""A disk that is full, breaks or loses bits at any step: a clear error, the good release stays, a later run goes on."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from delivery import Publisher, artifact_of, bundle_of
from pitstop.device.durable import Disk
from pitstop.device.store import Store
from pitstop.device.updater import activate, update
from pitstop.errors import PitstopError, StorageError

Result = TypeVar("Result")


class FailingDisk(Disk):
    """Fails with an error at the step of a number, and at all after it."""

    def __init__(self, steps: int, code: int) -> None:
        self.left = steps
        self.code = code

    def _do(self, path: Path, action: Callable[[], Result]) -> Result:
        def fail() -> Result:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code), str(path))
            return action()

        return super()._do(path, fail)


class FullDisk(Disk):
    """Takes some bytes, the last of them in the middle of a write."""

    def __init__(self, space: int) -> None:
        self.space = space

    def append(self, path: Path, data: bytes) -> None:
        super().append(path, data[: self.space])
        if len(data) > self.space:
            self._do(path, self._refuse)
        self.space -= len(data)

    def _refuse(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_in_the_middle_of_a_download(publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base(rows=4096)
    publisher.publish(base)
    device, url = tmp_path / "device", str(publisher.repository)
    with pytest.raises(StorageError, match="No space left") as caught:
        update(device, url, root_json=publisher.root_json, disk=FullDisk(100_000))
    assert "free some space" in str(caught.value)
    assert (device / "partial" / bundle_of(base).base_sha256).stat().st_size == 100_000
    updated = update(device, url, root_json=publisher.root_json)
    assert updated.fetched_bytes == artifact_of(base).stat().st_size - 100_000


def test_too_little_space_is_said_before_anything_comes(publisher: Publisher, tmp_path: Path) -> None:
    class Small(Disk):
        def free_bytes(self, path: Path) -> int:
            return 1000

    base = publisher.base()
    publisher.publish(base)
    device = tmp_path / "device"
    with pytest.raises(StorageError, match="to keep free"):
        update(device, str(publisher.repository), root_json=publisher.root_json, disk=Small())
    assert not list((device / "partial").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["ENOSPC", "EIO", "EROFS"])
def test_failing_at_every_step(publisher: Publisher, tmp_path: Path, code: int) -> None:
    base = publisher.base()
    publisher.publish(base)
    before, url = tmp_path / "before", str(publisher.repository)
    old = update(before, url, root_json=publisher.root_json).release
    activate(Store(before), lambda _: None)
    publisher.publish(publisher.adapter(base))
    for steps in itertools.count():
        device = tmp_path / f"device-{steps}"
        shutil.copytree(before, device, symlinks=True)
        said = failing_update(device, url, FailingDisk(steps, code))
        assert said is None or os.strerror(code) in said
        active = Store(device).active()
        assert active is not None
        new = update(device, url).release
        assert active.sha256 in (old, new)
        activate(Store(device), lambda _: None)
        assert Store(device).state.good == new
        if said is None:
            break
    assert steps > 20


def failing_update(device: Path, url: str, disk: Disk) -> str | None:
    """Update and activate on this disk; return what went wrong with it."""
    try:
        update(device, url, disk=disk)
        activate(Store(device, disk), lambda _: None)
    except StorageError as error:
        return str(error)
    return None


def test_any_flipped_bit_of_the_small_files(publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base()
    device, url = tmp_path / "device", str(publisher.repository)
    for folder in (base, publisher.adapter(base)):
        publisher.publish(folder)
        update(device, url, root_json=publisher.root_json)
        activate(Store(device), lambda _: None)
    goods = {Store(device).state.good, Store(device).state.previous}
    for name in ("state.a", "state.b"):
        data = (device / name).read_bytes()
        for index in range(len(data)):
            (device / name).write_bytes(flip(data, index))
            state = Store(device).state
            assert state.good in goods
            assert Store(device).active() is not None
        (device / name).write_bytes(data)
    for path in (device / "releases").iterdir():
        data = path.read_bytes()
        for index in range(0, len(data), 7):
            path.write_bytes(flip(data, index))
            with pytest.raises(StorageError, match="damaged"):
                Store(device).load(path.stem)
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["floor.a", "floor.b", "state.a", "state.b", "tuf/timestamp.json", "tuf/snapshot.json"]
)
def test_an_update_after_a_flipped_bit(publisher: Publisher, tmp_path: Path, name: str) -> None:
    base = publisher.base()
    device, url = tmp_path / "device", str(publisher.repository)
    for folder in (base, publisher.adapter(base)):
        publisher.publish(folder)
        update(device, url, root_json=publisher.root_json)
        activate(Store(device), lambda _: None)
    data = (device / name).read_bytes()
    (device / name).write_bytes(flip(data, len(data) // 2))
    updated = update(device, url)
    activate(Store(device), lambda _: None)
    assert Store(device).state.good == updated.release


def test_a_file_system_without_symbolic_links(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    publisher.publish(publisher.base())
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(PitstopError, match="tuf") as caught:
        update(tmp_path / "device", str(publisher.repository), root_json=publisher.root_json)
    assert "file system" in str(caught.value)


def flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :]
