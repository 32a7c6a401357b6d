"""Several chains at once: their words reach the one who started them, and one that fails stops the others."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pitstop.demo import side_by_side
from pitstop.demo.side_by_side import run_chains
from pitstop.errors import PitstopError


def test_a_chain_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PitstopError, match=r"missing: no recipe at missing\.toml") as caught:
        run_chains([Path("missing.toml")], Console(file=io.StringIO()))
    assert caught.value.where == str(tmp_path / "missing.log")


def test_work_that_comes_again_counts_from_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 100.0, 1000.0, 1020.0))
    monkeypatch.setattr(side_by_side, "monotonic", lambda: next(clock))
    said = io.StringIO()
    with side_by_side._picture(Console(file=said)) as picture:
        for done in (0, 200, 0, 50):
            picture.advance("one", {"progress": "check", "done": done, "total": 200, "unit": "rows", "note": ""})
    assert "50/200 rows, 2.5 rows/s, 60 s left" in said.getvalue()


def test_everything_wrong_with_a_recipe_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text('name = "bad"\n[base]\nfolder = "bases/none"\n[data]\ntrain = "none.jsonl"\n')
    with pytest.raises(PitstopError) as caught:
        run_chains([Path("bad.toml")], Console(file=io.StringIO()))
    assert "no file none.jsonl" in caught.value.what
    assert "holds no base.json" in caught.value.what
