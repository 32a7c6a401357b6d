"""A run belongs to one process at a time, and is repeated when anything that decides it changed."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pitstop import records
from pitstop.errors import Busy, StorageError, UsageError
from pitstop.workshop.recipe import BaseChoice, Data
from pitstop.workshop.runs import exclusive, finished, inputs_digest, require


@dataclass(frozen=True)
class Result:
    inputs: str
    value: int = 1


@dataclass(frozen=True)
class Other:
    name: str


HOLD = """
import pathlib, sys
from pitstop.workshop.runs import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(Busy) as caught, exclusive(run):
            pass
        assert caught.value.cure
        other.stdin.close()
    with exclusive(run):
        pass


def test_a_run_that_failed_is_free_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), exclusive(tmp_path):
        raise ValueError("broken")
    with exclusive(tmp_path), pytest.raises(Busy), exclusive(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), exclusive(tmp_path / "file" / "run"):
        pass


def test_the_digest_knows_content_records_and_order(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one")
    data, base = Data(rows), BaseChoice(tmp_path)
    before = inputs_digest(data, base, "1.0")
    assert inputs_digest(data, base, "1.0") == before
    assert inputs_digest(base, data, "1.0") != before
    assert inputs_digest(data, base, "1.5") != before
    assert inputs_digest(replace(data, max_tokens=5), base, "1.0") != before
    rows.write_text("two")
    assert inputs_digest(data, base, "1.0") != before


def test_only_a_whole_result_of_the_same_inputs_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert finished(path, Result, "a") is None
    records.save_json(Result("a", 3), path)
    assert finished(path, Result, "a") == Result("a", 3)
    assert finished(path, Result, "b") is None
    path.write_bytes(path.read_bytes()[:10])
    assert finished(path, Result, "a") is None
    records.save_json(Other("a"), path)
    assert finished(path, Result, "a") is None


def test_a_missing_stage_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pitstop train R"):
        require(tmp_path / "none", "trained adapter", "pitstop train R")
    assert require(tmp_path, "folder", "") == tmp_path
