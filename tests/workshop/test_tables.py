"""A table's rows become sentences that lose nothing, and its label an answer that can be scored."""

import contextlib
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pitstop.cli import app
from pitstop.errors import DatasetError, RecordError
from pitstop.workshop import dataset
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import check
from pitstop.workshop.recipe import Data
from pitstop.workshop.tables import Table, problems, told
from pitstop.workshop.train import train
from workbench import Project

FLOWER = {"petal length (cm)": 1.4, "petal_width": "0.20", "species": "0"}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_names_and_units_are_told_and_the_label_is_asked_for() -> None:
    table = Table("species", units={"petal_width": "cm"}, words={"0": "setosa"})
    row = told(table, FLOWER)
    assert row == {
        "prompt": "Petal length is 1.4 cm, petal width is 0.2 cm. What is the species?",
        "completion": "setosa",
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1001.0, "1001"),
        (123456, "123500"),
        (0.000123456, "0.0001235"),
        ("1e-3", "0.001"),
        (-0.0, "0"),
        ("007", "007"),
        (True, "yes"),
        ("  two   words ", "two words"),
        ("inf", "inf"),
        ("E5", "E5"),  # a grade
        (".5", "0.5"),
        (1.79e308, "1.79e+308"),
    ],
)
def test_a_cell_is_told_as_people_write_it(value: Any, said: str) -> None:
    assert told(Table("y"), {"x": value, "y": "a"})["prompt"] == f"X is {said}. What is the y?"


@pytest.mark.parametrize("value", [None, "", " ", "NA", "NaN", "?", math.nan])
def test_an_empty_cell_says_nothing(value: Any) -> None:
    assert told(Table("y"), {"x": value, "z": 1, "y": "a"})["prompt"] == "Z is 1. What is the y?"
    with pytest.raises(ValueError, match="every cell is empty"):
        told(Table("y"), {"x": value, "y": "a"})
    with pytest.raises(ValueError, match="nothing stands under 'y'"):
        told(Table("y"), {"x": 1, "y": value})


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2]])
def test_a_cell_holds_one_thing(value: Any) -> None:
    with pytest.raises(ValueError, match="not several"):
        told(Table("y"), {"x": value, "y": "a"})


@given(st.text() | st.floats() | st.integers())
def test_any_cell_is_told_or_refused(value: Any) -> None:
    with contextlib.suppress(ValueError):
        assert told(Table("y", digits=1), {"x": value, "z": 1, "y": "a"})["prompt"].endswith("What is the y?")


@given(st.floats(-1e9, 1e9), st.integers(1, 9))
def test_a_number_is_told_to_as_many_digits_as_were_asked(value: float, digits: int) -> None:
    said = told(Table("y", digits=digits), {"x": value, "y": "a"})["prompt"]
    number = said.removeprefix("X is ").removesuffix(". What is the y?")
    assert "e" not in number
    assert float(number) == pytest.approx(value, rel=0.5000001 * 10 ** (1 - digits), abs=1e-300)


@given(st.lists(st.floats(-50, 400), min_size=2, max_size=2), st.integers(0, 3))
def test_numbers_to_answer_have_one_width_and_say_their_value(values: list[float], decimals: int) -> None:
    table = Table("y", range=(-50.0, 400.0), decimals=decimals)
    answers = [told(table, {"x": 1, "y": value})["completion"] for value in values]
    assert len(answers[0]) == len(answers[1])
    for answer, value in zip(answers, values, strict=True):
        assert float(answer) == pytest.approx(value, abs=0.5001 * 10**-decimals)


def test_a_label_outside_of_its_range_is_named_by_its_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"x": 1, "y": 30}, {"x": 2, "y": 400}, {"x": 3, "y": "many"}])
    with pytest.raises(DatasetError) as caught:
        dataset.load_rows(path, table=Table("y", range=(25.0, 346.0)))
    assert "2 of 3 rows" in str(caught.value)
    assert "line 3: 'y' is 400, which is no number from 25 to 346" in str(caught.value)
    assert "line 4: 'y' is many" in str(caught.value)
    assert "a row has a cell under 'y'" in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"x": 1, "y": "a"}])
    with pytest.raises(DatasetError, match="no column 'mass'; there are: x, y"):
        dataset.load_rows(path, table=Table("y", units={"mass": "g"}))


def test_rows_are_grouped_and_named_by_columns_that_are_not_told(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"island": "Dream", "nr": 7, "mass": 3750, "species": "Adelie"}])
    (row,) = dataset.load_rows(path, {"group": "island", "id": "nr"}, Table("species", units={"mass": "g"}))
    assert (row.id, row.group) == ("7", "Dream")
    assert row.prompt[0]["content"] == "Mass is 3750 g. What is the species?"


def test_the_same_table_is_read_from_csv_json_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"length (mm)": 39.1, "sex": "male", "species": "Adelie"},
        {"length (mm)": 50, "sex": "", "species": "Gentoo"},
    ]
    written = write_csv(tmp_path / "t.csv", rows)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist([row | {"length (mm)": float(row["length (mm)"])} for row in rows]),
                        tmp_path / "t.parquet")  # fmt: skip
    table = Table("species")
    one = dataset.load_rows(written, table=table)
    assert one == dataset.load_rows(tmp_path / "t.jsonl", table=table)
    assert one == dataset.load_rows(tmp_path / "t.parquet", table=table)
    assert one[1].prompt[0]["content"] == "Length is 50 mm. What is the species?"


def test_what_a_table_cannot_mean_is_said_at_once() -> None:
    found = problems(Table("y", words={"0": "a", "1": "a"}, range=(3.0, 3.0), decimals=9, digits=0, leave_out=("y",)))
    assert len(found) == 6
    assert "decimals: only a number has them; give its range" in problems(Table("y", decimals=2))


def test_further_rows_are_told_as_those_of_the_training_were(project: Project) -> None:
    rows = [{"nr": at, "size (cm)": at, "y": "ab"[at % 2]} for at in range(4)]
    write_csv(project.folder / "t.csv", rows)
    write_csv(project.folder / "more.csv", [{key: row[key] for key in ("nr", "size (cm)")} for row in rows])
    data = {"train": "t.csv", "columns": {"id": "nr"}, "table": {"label": "y"}}
    recipe = project.recipe(data=data, check={"metric": "class"})
    done = CliRunner().invoke(app, ["tell", str(recipe), "more.csv"])
    assert done.exit_code == 0, done.output
    trained = dataset.load_rows(Path("t.csv"), {"id": "nr"}, Table("y"))
    assert done.stdout.splitlines() == [row.prompt[0]["content"] for row in trained]
    scripted = CliRunner().invoke(app, ["tell", str(recipe), "more.csv", "--json", "-"])
    assert [one["prompt"] for one in json.loads(scripted.stdout)] == done.stdout.splitlines()
    plain = CliRunner().invoke(app, ["tell", str(project.recipe()), "more.csv"])
    assert plain.exit_code == 2
    assert "no table" in plain.output


def test_further_rows_have_the_columns_of_the_training(project: Project) -> None:
    write_csv(project.folder / "t.csv", [{"size (cm)": at, "color": "red", "y": "ab"[at % 2]} for at in range(4)])
    recipe = project.recipe(data={"train": "t.csv", "table": {"label": "y"}}, check={"metric": "class"})
    lines = [{"size (cm)": 1}, {"size (cm)": 1, "color": "", "width": 2}, {"size (cm)": 1, "color": "red"}]
    (project.folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(app, ["tell", str(recipe), "more.jsonl"])
    said = " ".join(done.output.split())
    assert done.exit_code == 3
    assert "line 1: no column 'color'; there are: size (cm)" in said
    assert "line 2: column 'width' is none of the training table's: color, size (cm)" in said
    assert "line 3" not in said


def test_a_recipe_says_how_a_table_is_scored(project: Project) -> None:
    write_csv(project.folder / "t.csv", [{"x": 1, "y": "a"}])
    data = {"train": "t.csv", "columns": {"prompt": "x"}, "table": {"label": "y", "digits": 99}}
    with pytest.raises(RecordError) as caught:
        recipes.load(project.recipe(data=data))
    said = str(caught.value)
    assert "data.table.digits: 99 must be from 1 to 9" in said
    assert "data.columns.prompt" in said
    assert 'check.metric: a table with this label is scored by "class", not "json"' in said


def test_halves_of_a_table_never_share_a_row(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"x": at % 40, "y": "ab"[at % 2]} for at in range(80)])
    found = dataset.load_split(Data(path, test_share=0.3, table=Table("y")))
    assert found.duplicates == 40
    assert not {row.prompt[0]["content"] for row in found.train} & {row.prompt[0]["content"] for row in found.test}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "number"])
def test_a_table_is_learned_and_scored(project: Project, kind: str) -> None:
    rows = [{"size (cm)": at, "shade": "dark" if at % 2 else "light", "y": at % 2} for at in range(60)]
    write_csv(project.folder / "t.csv", rows)
    table = {"label": "y", "words": {"0": "even", "1": "odd"}} if kind == "class" else {"label": "y", "range": [0, 1]}
    recipe = project.recipe(
        data={"train": "t.csv", "table": table},
        train={"steps": 100, "batch": 8, "learning_rate": 1e-2},
        check={"metric": kind, "rows": 12, "max_new_tokens": 4},
    )
    train(recipe)
    report = check(recipe)
    assert report.task is not None
    assert report.task.adapted.exact > 0.9
    page = (project.run / "retention.html").read_text()
    if kind == "class":
        assert report.task.adapted.calibration_error is not None
        assert "calibration error" in page
    else:
        assert report.task.adapted.off == 0
        assert "answers that are numbers" in page
