"""`pitstop bench` measures the release that is here, and says what to do with the figures.

It runs in a process of its own, as it does for its users: what a process did before shows in what memory it takes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pitstop.cli import app
from pitstop.device.bench import MEANING, bench
from pitstop.errors import UsageError
from serving import ALPHA, BETA, Board, install


def measured(root: Path, target: Path) -> tuple[dict[str, Any], str]:
    """Run the command; return what it wrote and what it printed."""
    command = [sys.executable, "-m", "pitstop", "bench", "--device", str(root), "--threads", "1", "--json", str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


@pytest.mark.slow
def test_the_command_prints_figures_and_advice(board: Board, tmp_path: Path) -> None:
    found, printed = measured(board.root, tmp_path / "bench.json")
    assert (found["attached"], found["merged"]) == (ALPHA, None)
    assert {key for key in MEANING if not key.startswith("merged")} <= set(found["figures"])
    assert {name: value for name, value in found["figures"].items() if value <= 0} == {}
    assert found["figures"]["attached_mb"] == pytest.approx(board.adapters[ALPHA].stat().st_size / 1e6, rel=1e-3)
    assert found["advice"][0] == "serve with --threads 1, which make most tokens per second"
    assert "attached" in found["advice"][1]
    assert "[measured]" in printed
    assert "base_mb = " in printed


@pytest.mark.slow
def test_a_release_without_adapters_is_measured_too(board: Board, tmp_path: Path) -> None:
    found = bench(install(tmp_path, board.base, {}), [1])
    assert (found.attached, found.merged) == (None, None)
    assert found.figures["base_decode_tokens_per_second"] > 0
    assert len(found.advice) == 1


@pytest.mark.slow
def test_attached_and_merged_are_both_measured(
    board: Board, merge_gguf: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    merged = merge_gguf(board.adapters[ALPHA], tmp_path / "merged.gguf")
    files = {ALPHA: merged, BETA: board.adapters[BETA]}
    install(tmp_path / "root", board.base, files, merged=[ALPHA])
    found, _ = measured(tmp_path / "root", tmp_path / "bench.json")
    assert (found["attached"], found["merged"]) == (BETA, ALPHA)
    assert set(MEANING) <= set(found["figures"])
    assert found["figures"]["merged_memory_mb"] > 200, "its weights and its conversations"
    assert 0 < found["figures"]["attached_memory_mb"] < 100
    assert "merged" in found["advice"][1]
    merged.unlink()


def test_nothing_to_measure_is_said(board: Board, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no number of threads"):
        bench(board.release, [])
    done = CliRunner().invoke(app, ["bench", "--device", str(tmp_path)])
    assert done.exit_code == 2
