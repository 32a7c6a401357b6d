"""Progress: plain lines off a terminal, a bar on one, nothing for scripts."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pitstop import progress


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PITSTOP_PROGRESS", raising=False)
    progress.be_quiet(False)  # a test of a command with --json may have come before
    yield
    progress.be_quiet(False)


def test_off_a_terminal_it_prints_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 20.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("train", 100, "steps") as advance:
        advance(20)  # after 4 s: too early for a line
        advance(20, "loss 1.25")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 40/100 steps, 2.0 steps/s, 30 s left  loss 1.25",
        "train: 40 steps in 25.0 s",
    ]


def test_nothing_is_shown_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress.be_quiet()
    with progress.progress("train", 2, "steps") as advance:
        advance()
        advance(1, note="x")
    assert capsys.readouterr() == ("", "")


def test_a_part_of_something_shown_shows_nothing_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("repair", 1, "scales") as advance:
        with progress.quietly(), progress.progress("retention", 9, "tokens") as inner:
            inner(9)
        advance()
    with pytest.raises(KeyError), progress.quietly():
        raise KeyError
    with progress.progress("after", 1, "steps"):
        pass
    shown = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["repair", "after"]


def test_another_process_reads_events(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PITSTOP_PROGRESS", "events")
    with progress.progress("train", 2, "steps") as advance:
        advance()
        advance(1, note="loss 1.25")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert events == [
        {"progress": "train", "done": 1, "total": 2, "unit": "steps", "note": ""},
        {"progress": "train", "done": 2, "total": 2, "unit": "steps", "note": "loss 1.25"},
    ]


def test_a_failure_passes_through_and_no_finish_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress.progress("train", 2, "steps"):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_draws_a_bar() -> None:
    script = (
        "from pitstop.progress import progress\n"
        "with progress('train', 2, 'steps') as advance:\n    advance(2, 'loss 1.25')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", script], stderr=theirs, check=False, env=environment)
    os.close(theirs)
    shown = b""
    while b"2/2" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert done.returncode == 0
    assert b"train" in shown
