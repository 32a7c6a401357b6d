"""A release is tried in a child process: what is wrong with it becomes an error here, and this process lives on."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pitstop.device import health
from pitstop.errors import BrokenInput, FormatError
from serving import ALPHA, BASE, BETA, Board, damage, install

PATIENCE = 600.0  # seconds; what takes this long hangs, however busy the machine is


def children() -> set[int]:
    """Return the child processes of this one."""
    listed = [task / "children" for task in Path("/proc/self/task").iterdir()]
    return {int(number) for path in listed if path.exists() for number in path.read_text().split()}


def signal_next_child(number: int, before: set[int]) -> threading.Thread:
    """Send a signal to the next child of this process, as soon as it is Python running the probe."""

    def send() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for child in children() - before:
                if b"pitstop.device.health" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, number)
                    return
            time.sleep(0.001)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_good_release_is_found_good(board: Board) -> None:
    found = health.probe(board.release, timeout=PATIENCE)
    assert [model.name for model in found.models] == [BASE, ALPHA, BETA]
    assert found.models[0].change == 0
    assert all(model.change > 0.1 for model in found.models[1:])
    assert all(0 < model.tokens <= health.TOKENS for model in found.models)
    assert found.peak_memory > board.base.stat().st_size / 2


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the child process in /proc")


@needs_proc
@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGSEGV, "crashed the engine: SIGSEGV"), (signal.SIGKILL, "too little memory")]
)
def test_crash_of_the_child_is_an_error_here(board: Board, number: int, says: str) -> None:
    killer = signal_next_child(number, children())
    with pytest.raises(BrokenInput, match=says):
        health.probe(board.release, timeout=PATIENCE)
    killer.join()


@needs_proc
def test_hang_of_the_child_is_an_error_here(board: Board) -> None:
    before = children()
    stopper = signal_next_child(signal.SIGSTOP, before)
    with pytest.raises(BrokenInput, match="did not answer within 10 s"):
        health.probe(board.release, timeout=10)
    stopper.join()
    assert children() == before


@pytest.mark.parametrize("memory", [40_000_000, 130_000_000])
def test_hunger_for_memory_is_an_error_here(board: Board, memory: int) -> None:
    with pytest.raises(BrokenInput, match="memory"):
        health.probe(board.release, memory=memory, timeout=PATIENCE)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20, 90_000_000])
def test_truncated_base_is_refused(board: Board, tmp_path: Path, size: int) -> None:
    release = install(tmp_path / "root", damage(board.base, tmp_path / "base.gguf", size), {})
    with pytest.raises(FormatError):
        health.probe(release, timeout=PATIENCE)


def test_truncated_adapter_is_refused(board: Board, tmp_path: Path) -> None:
    bad = damage(board.adapters[ALPHA], tmp_path / "alpha.gguf", 100_000)
    with pytest.raises(FormatError):
        health.probe(install(tmp_path / "root", board.base, {ALPHA: bad}), timeout=PATIENCE)


def test_adapter_without_effect_is_refused(board: Board, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    idle = make_adapter(tmp_path / "idle.gguf", 0, strength=0, base_sha256=board.release.base.base_sha256)
    with pytest.raises(BrokenInput, match="changes nothing"):
        health.probe(install(tmp_path / "root", board.base, {"idle": idle}), timeout=PATIENCE)


def test_adapter_that_computes_no_numbers_is_refused(
    board: Board, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    bad = make_adapter(tmp_path / "bad.gguf", 0, strength=float("inf"), base_sha256=board.release.base.base_sha256)
    with pytest.raises(BrokenInput, match=r"finite|numbers"):
        health.probe(install(tmp_path / "root", board.base, {"bad": bad}), timeout=PATIENCE)


def test_base_that_computes_no_numbers_is_refused(board: Board, tmp_path: Path) -> None:
    bad = tmp_path / "base.gguf"
    bad.write_bytes(board.base.read_bytes())
    with bad.open("r+b") as file:
        tensor = next(one for one in gguf.GGUFReader(board.base).tensors if one.name == "output_norm.weight")
        file.seek(int(tensor.data_offset))
        file.write(np.full(int(tensor.n_elements), np.nan, np.float32).tobytes())
    with pytest.raises(BrokenInput, match="values that are no numbers"):
        health.probe(install(tmp_path / "root", bad, {}), timeout=PATIENCE)
