"""The power goes after every step of installing, activating and collecting: what is then on disk must be old or new.

A recording disk notes every step. For each prefix of them, every state the disk may be in is built: names that were not
synced are there or not (in their order), content that was not synced is lost, empty, torn, full of zeros, or whole.
Then the store is opened on it. A disk that never syncs goes through the same test and has to fail it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from delivery import Publisher, artifact_of, tree
from pitstop.device import download, incoming
from pitstop.device.activation import State
from pitstop.device.durable import Disk
from pitstop.device.store import Store
from pitstop.device.updater import activate, update
from pitstop.errors import PitstopError, Refused

MODES = ("lost", "empty", "half", "zeros", "all")  # what became of content that was not synced
CONVERGE_EVERY = 25  # of the states, one goes through a whole update as well


@dataclass
class Step:
    """One step on disk, or (``what`` is "done") a promise: this state is durable now."""

    what: str
    path: Path = Path()
    data: bytes = b""
    to: Path = Path()
    state: State | None = None


@dataclass
class RecordingDisk(Disk):
    """Notes what is done to the disk, and does it."""

    syncs_files: bool = True
    syncs_folders: bool = True
    steps: list[Step] = field(default_factory=list)

    def new_folder(self, path: Path) -> None:
        self.steps.append(Step("new_folder", path))
        super().new_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        self.steps.append(Step("write", path, data))
        super().write(path, data)

    def append(self, path: Path, data: bytes) -> None:
        self.steps.append(Step("append", path, data))
        super().append(path, data)

    def truncate(self, path: Path, size: int) -> None:
        self.steps.append(Step("write", path, path.read_bytes()[:size]))
        super().truncate(path, size)

    def sync(self, path: Path) -> None:
        if self.syncs_files:
            self.steps.append(Step("sync", path))

    def sync_folder(self, path: Path) -> None:
        if self.syncs_folders:
            self.steps.append(Step("sync_folder", path))

    def rename(self, old: Path, new: Path) -> None:
        self.steps.append(Step("rename", old, to=new))
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        if path.exists() or path.is_symlink():
            self.steps.append(Step("remove", path))
        super().remove(path)


@dataclass(eq=False)
class Content:
    """The content of a file: what is durable, and what was written since."""

    synced: bytes = b""
    truncated: bool = False
    unsynced: list[bytes] = field(default_factory=list)

    def after_cut(self, mode: str) -> bytes:
        kept = b"" if self.truncated else self.synced
        rest = b"".join(self.unsynced)
        last = self.unsynced[-1] if len(self.unsynced) > 1 else rest[len(rest) // 2 :]
        return {
            "lost": self.synced,
            "empty": kept,
            "half": kept + rest[: len(rest) // 2],
            "zeros": kept + bytes(len(rest) - len(last)) + last,
            "all": kept + rest,
        }[mode]


class CutDisk:
    """A disk as it can be found after the power went: what is durable, and what may be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[Path, Content | None] = {root: None}  # None: a folder
        self.durable: dict[Path, Content | None] = {root: None}
        self.pending: list[tuple[Path, Path | None, Path | None, Content | None]] = []  # folder, gone, new, what

    def do(self, step: Step) -> None:
        if step.what == "new_folder" and step.path not in self.names:
            self._name(step.path.parent, None, step.path, None)
        elif step.what in ("write", "append"):
            if step.path not in self.names:
                self._name(step.path.parent, None, step.path, Content())
            content = self._content(step.path)
            if step.what == "write":
                content.truncated, content.unsynced = True, []
            content.unsynced.append(step.data)
        elif step.what == "sync":
            content = self._content(step.path)
            content.synced, content.truncated, content.unsynced = content.after_cut("all"), False, []
        elif step.what == "rename":
            self._name(step.to.parent, step.path, step.to, self.names[step.path])
        elif step.what == "remove":
            self._name(step.path.parent, step.path, None, None)
        elif step.what == "sync_folder":
            for change in [change for change in self.pending if change[0] == step.path]:
                _apply(self.durable, change)
                self.pending.remove(change)

    def states(self) -> Iterator[dict[Path, bytes]]:
        """Yield the files of every state this disk may be in."""
        for count in range(len(self.pending) + 1):
            names = dict(self.durable)
            for change in self.pending[:count]:
                _apply(names, change)
            files = {path: content for path, content in names.items() if content and self._is_reachable(path, names)}
            for mode in MODES:
                yield {path: content.after_cut(mode) for path, content in files.items()}

    def _is_reachable(self, path: Path, names: dict[Path, Content | None]) -> bool:
        return all(folder in names for folder in path.parents if self.root in folder.parents)

    def _content(self, path: Path) -> Content:
        content = self.names[path]
        assert content is not None
        return content

    def _name(self, folder: Path, gone: Path | None, new: Path | None, what: Content | None) -> None:
        change = (folder, gone, new, what)
        _apply(self.names, change)
        self.pending.append(change)


def _apply(names: dict[Path, Content | None], change: tuple[Path, Path | None, Path | None, Content | None]) -> None:
    _, gone, new, what = change
    if gone is not None:
        names.pop(gone, None)
    if new is not None:
        names[new] = what


def live(publisher: Publisher, root: Path, disk: RecordingDisk) -> list[bytes]:
    """The life of a device: first release, second, one that fails, a third, back to the second. Returns all files."""

    def promise() -> None:
        disk.steps.append(Step("done", state=store.state))

    def up(*folders: Path, comes_up: bool = True) -> None:
        publisher.publish(*folders)
        update(root, str(publisher.repository), root_json=publisher.root_json, disk=disk)
        promise()
        store.activate()
        promise()
        store.confirm() if comes_up else store.reject()
        promise()
        store.collect_garbage()

    store = Store(root, disk)
    base = publisher.base(rows=256)
    adapters = [publisher.adapter(base, seed=n, counter=n) for n in (1, 2, 3)]
    up(base)
    up(adapters[0])
    up(adapters[1], comes_up=False)
    up(adapters[2])
    store.roll_back()
    promise()
    store.collect_garbage()
    return [artifact_of(folder).read_bytes() for folder in (base, *adapters)]


def violation(root: Path, allowed: set[State]) -> str | None:
    """Say what an owner would find broken."""
    store = Store(root)
    try:
        state = store.state
        if state not in allowed:
            return f"{state} is neither old nor new"
        releases = [store.load(release) for release in (state.good, state.trial) if release]
    except PitstopError as error:
        return str(error)
    for release in releases:
        for artifact in release.artifacts():
            path = store.blob(artifact.sha256)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != artifact.sha256:
                return f"{artifact.name} of {release.sha256[:8]} is damaged"
    return None


def cut_everywhere(root: Path, steps: list[Step], found: Path) -> Iterator[tuple[str | None, int]]:
    """Build every state of the disk once, and yield what is broken in it."""
    disk, seen, number = CutDisk(root), set(), 0
    promises = [State(), *(step.state for step in steps if step.state is not None)]
    kept = 0  # index of the last promise
    for step in steps:
        if step.what == "done":
            kept += 1
            continue
        disk.do(step)
        allowed = {promises[kept], promises[min(kept + 1, len(promises) - 1)]}
        for files in disk.states():
            print_ = hash((kept, tuple(sorted((path, hash(data)) for path, data in files.items()))))
            if print_ in seen:
                continue
            seen.add(print_)
            number += 1
            place = found / str(number)
            for path, data in files.items():
                target = place / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            yield violation(place, allowed), number


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "SYNC_EVERY", 4096)
    monkeypatch.setattr(download, "CHUNK", 512)


@pytest.mark.usefixtures("small_steps")
def test_old_or_new_after_every_cut(publisher: Publisher, tmp_path: Path) -> None:
    root = tmp_path / "device"
    root.mkdir()
    disk = RecordingDisk()
    live(publisher, root, disk)
    broken, count = [], 0
    for what, number in cut_everywhere(root, disk.steps, tmp_path / "found"):
        count = number
        if what:
            broken.append(f"{number}: {what}")
        elif number % CONVERGE_EVERY == 0:
            converges(publisher, tmp_path / "found" / str(number))
    assert not broken, broken[:5]
    print(f"{len(disk.steps)} steps, {count} states")
    assert count > 300


def converges(publisher: Publisher, root: Path) -> None:
    """After a cut, an ordinary update brings what is offered, unless it was refused here before."""
    store = Store(root)
    before = store.state
    url = str(publisher.repository)
    if before.bad:
        with suppress(Refused):
            update(root, url, root_json=publisher.root_json)
        return
    updated = update(root, url, root_json=publisher.root_json)
    assert updated.release in (store.state.trial, store.state.good)
    activate(store, lambda _: None)
    assert store.state.good == updated.release


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    "disk",
    [RecordingDisk(syncs_files=False), RecordingDisk(syncs_folders=False)],
    ids=["without file syncs", "without folder syncs"],
)
def test_a_disk_that_does_not_sync_fails_this(publisher: Publisher, tmp_path: Path, disk: RecordingDisk) -> None:
    root = tmp_path / "device"
    root.mkdir()
    live(publisher, root, disk)
    assert any(what for what, _ in cut_everywhere(root, disk.steps, tmp_path / "found"))


def test_the_recording_is_complete(publisher: Publisher, tmp_path: Path) -> None:
    """Every file of the store came by the disk's steps, and only by them."""
    root = tmp_path / "device"
    root.mkdir()
    disk = RecordingDisk()
    live(publisher, root, disk)
    replayed = CutDisk(root)
    for step in disk.steps:
        replayed.do(step)
    contents = {str(path.relative_to(root)): content for path, content in replayed.names.items() if content}
    files = {path: content.after_cut("all") for path, content in contents.items()}
    on_disk = {path: data for path, data in tree(root).items() if path != "lock" and not path.startswith("tuf/")}
    assert files == on_disk
