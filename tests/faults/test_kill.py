"""kill -9 while an update runs, and a release that takes the process down with it."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from delivery import Publisher, Reply, Server, artifact_of, bundle_of
from pitstop.device.activation import TRIES
from pitstop.device.durable import Disk
from pitstop.device.store import Store
from pitstop.device.updater import activate, update
from pitstop.errors import PitstopError

UPDATE = """
import sys
from pathlib import Path
from pitstop.device.updater import update
from pitstop.errors import PitstopError
device, url, root = sys.argv[1:]
try:
    update(Path(device), url, root_json=Path(root).read_bytes())
except PitstopError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def start_update(device: Path, server: Server, publisher: Publisher) -> "subprocess.Popen[str]":
    root = publisher.repository / "metadata/1.root.json"
    command = [sys.executable, "-c", UPDATE, str(device), server.url, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.02)


def stall(server: Server, cut: int) -> threading.Event:
    """Let the server stop in the middle of a blob until the event is set."""
    go_on = threading.Event()

    def hold(reply: Reply) -> None:
        reply.cut, reply.hold = cut, go_on

    server.on_blob = hold
    return go_on


def test_killed_in_the_middle_of_a_download(publisher: Publisher, server: Server, tmp_path: Path) -> None:
    base = publisher.base(rows=4096)
    publisher.publish(base)
    artifact, device = bundle_of(base).artifacts[0], tmp_path / "device"
    partial = device / "partial" / artifact.sha256
    cut = artifact.size // 2
    go_on = stall(server, cut)
    with start_update(device, server, publisher) as child:
        wait_for(lambda: partial.exists() and partial.stat().st_size == cut)
        child.kill()
    go_on.set()
    server.on_blob = None
    store = Store(device)
    assert (store.state.good, store.state.trial) == (None, None)
    updated = update(device, server.url, root_json=publisher.root_json)
    assert updated.fetched_bytes == artifact.size - cut
    assert server.ranges == ["", f"bytes={cut}-"]
    release = activate(store, lambda _: None)
    assert release is not None
    assert release.base_path().read_bytes() == artifact_of(base).read_bytes()


def test_two_at_once(publisher: Publisher, server: Server, tmp_path: Path) -> None:
    base = publisher.base(rows=4096)
    publisher.publish(base)
    device = tmp_path / "device"
    partial = device / "partial" / bundle_of(base).base_sha256
    go_on = stall(server, 1000)
    with start_update(device, server, publisher) as first:
        wait_for(partial.exists)
        with start_update(device, server, publisher) as second:
            said, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert said.startswith(f"Busy process {first.pid} is at work")
        server.on_blob = None
        go_on.set()
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert Store(device).state.trial is not None


class KillingDisk(Disk):
    """Kills the process before the step of a number."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __getattribute__(self, name: str) -> object:
        if name in ("write", "append", "sync", "sync_folder", "rename", "remove", "seal", "new_folder"):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def killed_after(steps: int, publisher: Publisher, device: Path) -> bool:
    """Update and activate in a child that dies before one of its steps; tell whether it did."""
    child = os.fork()
    if child == 0:
        try:
            disk = KillingDisk(steps)
            update(device, str(publisher.repository), root_json=publisher.root_json, disk=disk)
            activate(Store(device, disk), lambda _: None)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_before_every_step(publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    before, url = tmp_path / "before", str(publisher.repository)
    old = update(before, url, root_json=publisher.root_json).release
    activate(Store(before), lambda _: None)
    publisher.publish(publisher.adapter(base))
    killed = 0
    for steps in itertools.count():
        device = tmp_path / f"device-{steps}"
        shutil.copytree(before, device, symlinks=True)
        was_killed = killed_after(steps, publisher, device)
        killed += was_killed
        active = Store(device).active()
        assert active is not None
        new = update(device, url).release
        assert active.sha256 in (old, new)
        activate(Store(device), lambda _: None)
        assert Store(device).state.good == new
        if not was_killed:
            assert active.sha256 == new
            break
    assert killed > 20


BOOT = """
import os, sys
from pathlib import Path
from pitstop.device.store import Store
from pitstop.device.updater import activate
release = activate(Store(Path(sys.argv[1])), lambda release: os.kill(os.getpid(), 9))
print(release.sha256)
"""


def test_a_boot_loop_ends_with_the_good_release(publisher: Publisher, tmp_path: Path) -> None:
    base = publisher.base()
    publisher.publish(base)
    device, url = tmp_path / "device", str(publisher.repository)
    good = update(device, url, root_json=publisher.root_json).release
    activate(Store(device), lambda _: None)
    publisher.publish(publisher.adapter(base))
    bad = update(device, url).release
    ends = []
    for _ in range(TRIES + 2):
        done = subprocess.run([sys.executable, "-c", BOOT, str(device)], capture_output=True, text=True, check=False)
        ends.append((done.returncode, done.stdout.strip()))
    assert ends == [(-signal.SIGKILL, "")] * TRIES + [(0, good)] * 2
    assert Store(device).state.bad == (bad,)
    with pytest.raises(PitstopError, match="failed or was rolled back"):
        update(device, url)
