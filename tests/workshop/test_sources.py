"""Rows of every kind of file and of the hub's library are the same rows; what is wrong is named by its place."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pitstop.errors import BrokenInput, DatasetError, UsageError
from pitstop.workshop import dataset
from pitstop.workshop.dataset import load_rows, load_split
from pitstop.workshop.recipe import Data
from workbench import Project, light_rows

CHAT = {"messages": [{"role": "user", "content": "Hällo"}, {"role": "assistant", "content": "a\nb,\u2028c"}]}


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_rows_are_jsonl_rows(project: Project, encoding: str) -> None:
    assert load_rows(write_csv(Path("rows.csv"), light_rows(), encoding)) == load_rows(Path("rows.jsonl"))
    write_csv(Path("chat.csv"), [{"messages": json.dumps(CHAT["messages"])}])
    assert load_rows(Path("chat.csv"))[0].answer == "a\nb,\u2028c"


def test_parquet_rows_are_jsonl_rows(project: Project) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the data part is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(light_rows()), "rows.parquet")
    assert load_rows(Path("rows.parquet")) == load_rows(Path("rows.jsonl"))
    parquet.write_table(pyarrow.Table.from_pylist([CHAT]), "chat.parquet")
    assert load_rows(Path("chat.parquet"))[0].answer == "a\nb,\u2028c"
    Path("bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DatasetError, match="not Parquet"):
        load_rows(Path("bad.parquet"))


def test_the_hubs_library_reads_rows(project: Project) -> None:
    """The same call that reads a data set of the hub reads a folder of files."""
    pytest.importorskip("datasets", reason="the data part is not installed")
    folder = project.folder / "own"
    folder.mkdir()
    (folder / "test.jsonl").write_bytes(Path("rows.jsonl").read_bytes())
    assert load_rows(Path("hub:./own#test")) == load_rows(Path("rows.jsonl"))
    with pytest.raises(UsageError, match="split"):
        load_rows(Path("hub:./own#nothing"))


def test_a_data_set_that_cannot_be_had_says_what_to_do(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the data part is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        load_rows(Path("hub:pitstop-nobody/nothing@main"))
    assert "cannot load the data set" in str(caught.value)
    assert caught.value.where == "hub:pitstop-nobody/nothing@main"
    with pytest.raises(UsageError, match="names no data set"):
        load_rows(Path("hub:@main"))


def test_columns_of_other_names_are_named_in_the_recipe(project: Project) -> None:
    rows = [{"q": f"question {number}", "a": "x", "topic": f"t{number // 4}"} for number in range(8)]
    project.rows("other.jsonl", rows)
    columns = {"prompt": "q", "completion": "a", "group": "topic"}
    found = load_rows(Path("other.jsonl"), columns)
    assert [(row.prompt[0]["content"], row.group) for row in found][::4] == [("question 0", "t0"), ("question 4", "t1")]
    with pytest.raises(DatasetError, match="no prompt among q, a, topic"):
        load_rows(Path("other.jsonl"))
    with pytest.raises(DatasetError, match="no column 'question'; there are: q, a, topic"):
        load_rows(Path("other.jsonl"), {"prompt": "question"})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"prompt,completion\nx,y,z\n", "line 2: more cells"),
        (b"prompt,completion\nx\n", "line 2: no completion"),
        (b"prompt,completion\n\xff,y\n", "not CSV in UTF-8"),
        (b'messages\n"[1"\n', "line 2: Expecting"),
    ],
)
def test_bad_csv_is_named_by_its_place(project: Project, content: bytes, word: str) -> None:
    Path("bad.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=word):
        load_rows(Path("bad.csv"))


def test_rows_count_once_and_prompts_with_two_answers_are_told(project: Project) -> None:
    rows = light_rows()
    project.rows("twice.jsonl", [*rows, *rows[:5], {**rows[0], "completion": "another"}])
    found = load_split(Data(Path("twice.jsonl"), test_share=0.3))
    assert (found.duplicates, len(found.train) + len(found.test)) == (5, len(rows) + 1)
    trained = {row.prompt[0]["content"] for row in found.train}
    assert found.conflicting == (rows[0]["prompt"] in trained)


def test_a_test_prompt_in_other_capitals_is_a_leak(project: Project) -> None:
    rows = light_rows()
    project.rows("test.jsonl", [{**rows[3], "prompt": rows[3]["prompt"].upper().replace(" ", "  ")}])
    with pytest.raises(DatasetError, match="1 test prompts"):
        load_split(Data(Path("rows.jsonl"), Path("test.jsonl")))


def test_the_problems_of_both_files_are_told_at_once(project: Project) -> None:
    project.rows("a.jsonl", [{"prompt": "x"}])
    with pytest.raises(BrokenInput) as caught:
        load_split(Data(Path("a.jsonl"), Path("b.jsonl")))
    assert "2 problems" in str(caught.value)
    assert "no completion" in str(caught.value)
    assert "b.jsonl" in str(caught.value)


def test_lengths_are_those_of_all_rows() -> None:
    examples = [dataset.Example(tuple(range(length)), length - 2) for length in (10, 4, 100, 6)]
    lengths = dataset._lengths(examples)
    assert (lengths.rows, lengths.median, lengths.p95, lengths.longest) == (4, 6, 10, 100)
    assert lengths.answers == pytest.approx(8 / 120, abs=1e-4)
