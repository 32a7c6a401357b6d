"""The home dataset, from the templates of the installed package."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pitstop.demo import dataset, home
from pitstop.demo.dataset import Row
from pitstop.errors import MissingExtra, UsageError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("home_assistant_intents") is None or importlib.util.find_spec("hassil") is None,
    reason="home-assistant-intents and hassil (the demo extra) are not installed",
)
FEW = (  # among them: sentences two intents share, templates in two blocks, overlapping templates, a single template
    "HassGetState",
    "HassTurnOff",
    "HassDecreaseTimer",
    "HassClimateSetTemperature",
    "HassBroadcast",
    "HassShoppingListCompleteItem",
)


def few_templates() -> dict[str, Any]:
    source = home.load_templates()
    return source | {"intents": {name: source["intents"][name] for name in FEW}}


def drawn() -> home.Home:
    made = home.Home(few_templates())
    made.draw()
    return made


@pytest.fixture(scope="module")
def few() -> home.Home:
    """A few intents are enough for what holds for each; the whole dataset is built in the slow test."""
    return drawn()


def rows_of(made: home.Home) -> list[Row]:
    return [row for rows in made.splits().values() for row in rows]


def test_two_draws_are_equal(few: home.Home) -> None:
    assert drawn().splits() == few.splits()


def test_every_split_has_rows_and_no_prompt_or_template_is_in_two(few: home.Home) -> None:
    splits = few.splits()
    assert all(splits.values())
    check_disjoint(splits)


def check_disjoint(splits: dict[str, list[Row]]) -> None:
    for key in ("prompt", "group", "id"):
        where = defaultdict(set)
        for split, rows in splits.items():
            for row in rows:
                where[getattr(row, key)].add(split)
        assert not {value: found for value, found in where.items() if len(found) > 1}
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_no_training_sentence_fits_a_held_out_template(few: home.Home) -> None:
    from hassil import recognize

    for row in few.splits()["train"]:
        held_out = few.held_out.get(json.loads(row.completion)["intent"])
        assert held_out is None or recognize(row.prompt, held_out, slot_lists=few.lists) is None, row.prompt


def test_an_intent_is_never_held_out_whole(few: home.Home) -> None:
    intents = {split: {json.loads(row.completion)["intent"] for row in rows} for split, rows in few.splits().items()}
    assert intents["train"] == set(
        FEW
    )  # both templates of the shopping list fit the same sentences; one hashes to valid


def test_the_parser_reads_what_the_completion_says(few: home.Home) -> None:
    for row in rows_of(few):
        said = json.loads(row.completion)
        assert few.parse(row.prompt) == (said.pop("intent"), said)


def test_completions_are_compact_and_their_keys_in_one_order(few: home.Home) -> None:
    for row in rows_of(few):
        said = json.loads(row.completion)
        assert dataset.compact(said) == row.completion
        assert list(said) == ["intent", *sorted(list(said)[1:], key=home.KEYS.index)]


def test_numbers_are_written_as_people_do(few: home.Home) -> None:
    degrees = [json.loads(row.completion)["temperature"] for row in rows_of(few) if "temperature" in row.completion]
    assert any(isinstance(value, int) for value in degrees)
    assert all(isinstance(value, int) or value % 1 == 0.5 for value in degrees)


def test_templates_that_need_the_listening_room_are_left_out() -> None:
    made = home.Home(home.load_templates())
    assert made.templates
    assert not [template.text for template in made.templates if "area" in template.data.requires_context]


def test_another_version_is_refused_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2025.1.1")
    with pytest.raises(UsageError, match=r"2025\.1\.1 is installed") as caught:
        home.build(tmp_path)
    assert caught.value.cure == 'pip install "home-assistant-intents==2026.10.27"'
    assert not list(tmp_path.iterdir())


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingExtra, match=r"pitstop\[demo\]"):
        home.build(tmp_path)


BUILD = "import sys; from pathlib import Path; from pitstop.demo import home; home.build(Path(sys.argv[1]))"


@pytest.mark.slow
def test_the_whole_dataset_is_the_same_bytes_under_any_hash_seed(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "1").iterdir()} == {
        "train.jsonl",
        "valid.jsonl",
        "test.jsonl",
        dataset.CARD,
    }
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
    check_whole(tmp_path / "1")


def check_whole(folder: Path) -> None:
    splits = {
        split: [
            Row(**json.loads(line)) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in dataset.SPLITS
    }
    check_disjoint(splits)
    assert 3600 <= len(splits["train"]) <= 3900
    assert len(splits["valid"]) >= 250
    assert len(splits["test"]) >= 450
    completions = {split: [json.loads(row.completion) for row in rows] for split, rows in splits.items()}
    trained = {intent["intent"] for intent in completions["train"]}
    assert len(trained) == 42
    assert {intent["intent"] for split in completions.values() for intent in split} == trained
    before = (folder / dataset.CARD).stat().st_mtime_ns
    assert home.build(folder).counts == {split: len(rows) for split, rows in splits.items()}
    assert (folder / dataset.CARD).stat().st_mtime_ns == before  # the second build found it whole
