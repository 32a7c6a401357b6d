"""The files both demo datasets are written to."""

import json
from pathlib import Path

import pytest

from pitstop.demo import dataset
from pitstop.demo.dataset import DatasetCard, Row
from pitstop.errors import StorageError
from pitstop.files import sha256_file

ABOUT = {
    "name": "n",
    "description": "d",
    "licence": "MIT",
    "source": ["p==1"],
    "builder": "b",
    "seed": 0,
    "split_rule": "r",
}


def write(folder: Path) -> DatasetCard:
    row = Row("r-1", "put the kettle on", dataset.compact({"intent": "Brew", "for": "Zoë"}), "put {thing} on")
    return dataset.write(folder, {"train": [row, row], "valid": [], "test": [row]}, **ABOUT)


def test_rows_are_json_lines_and_the_card_describes_them(tmp_path: Path) -> None:
    card = write(tmp_path)

    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["completion"] for line in lines] == ['{"intent":"Brew","for":"Zoë"}'] * 2
    assert card.counts == {"train": 2, "valid": 0, "test": 1}
    assert card.sha256 == {path.name: sha256_file(path) for path in tmp_path.glob("*.jsonl")}


def test_a_finished_dataset_is_recognised_by_code_source_and_digests(tmp_path: Path) -> None:
    card = write(tmp_path)

    assert dataset.finished(tmp_path, "b", ["p==1"]) == card
    assert dataset.finished(tmp_path, "other code", ["p==1"]) is None
    assert dataset.finished(tmp_path, "b", ["p==2"]) is None


@pytest.mark.parametrize("damage", ["train.jsonl", "test.jsonl", dataset.CARD])
def test_a_missing_or_changed_file_makes_it_unfinished(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    (tmp_path / damage).write_bytes(b"{}\n")
    assert dataset.finished(tmp_path, "b", ["p==1"]) is None

    write(tmp_path)
    (tmp_path / damage).unlink()
    assert dataset.finished(tmp_path, "b", ["p==1"]) is None


def test_the_card_is_written_last(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").mkdir()  # stands in the way of the last row file

    with pytest.raises(StorageError):
        write(tmp_path)

    assert not (tmp_path / dataset.CARD).exists()
