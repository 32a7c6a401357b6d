"""`pitstop bench` measures the release that is here, and says what to do with the figures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pitstop.cli import app
from pitstop.device.bench import MEANING, bench
from pitstop.errors import UsageError
from serving import ALPHA, BETA, Board, install


@pytest.mark.slow
def test_the_command_prints_figures_and_advice(board: Board, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "--device", str(board.root), "--threads", "1", "--json", str(target)])
    assert done.exit_code == 0, done.output
    found = json.loads(target.read_text())
    assert (found["attached"], found["merged"]) == (ALPHA, None)
    assert {key for key in MEANING if not key.startswith("merged")} <= set(found["figures"])
    assert all(value > 0 for value in found["figures"].values())
    assert found["figures"]["attached_mb"] == pytest.approx(board.adapters[ALPHA].stat().st_size / 1e6, rel=1e-3)
    assert found["advice"][0] == "serve with --threads 1, which make most tokens per second"
    assert "attached" in found["advice"][1]
    assert "[measured]" in done.output
    assert "base_mb = " in done.output


@pytest.mark.slow
def test_a_release_without_adapters_is_measured_too(board: Board, tmp_path: Path) -> None:
    measured = bench(install(tmp_path, board.base, {}), [1])
    assert (measured.attached, measured.merged) == (None, None)
    assert measured.figures["base_decode_tokens_per_second"] > 0
    assert len(measured.advice) == 1


@pytest.mark.slow
def test_attached_and_merged_are_both_measured(
    board: Board, merge_gguf: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    merged = merge_gguf(board.adapters[ALPHA], tmp_path / "merged.gguf")
    files = {ALPHA: merged, BETA: board.adapters[BETA]}
    measured = bench(install(tmp_path / "root", board.base, files, merged=[ALPHA]), [1])
    assert (measured.attached, measured.merged) == (BETA, ALPHA)
    assert set(MEANING) <= set(measured.figures)
    assert measured.figures["merged_memory_mb"] > 200, "its weights and its conversations"
    assert 0 < measured.figures["attached_memory_mb"] < 100
    assert "merged" in measured.advice[1]
    merged.unlink()


def test_nothing_to_measure_is_said(board: Board, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no number of threads"):
        bench(board.release, [])
    done = CliRunner().invoke(app, ["bench", "--device", str(tmp_path)])
    assert done.exit_code == 2
