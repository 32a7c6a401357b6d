import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetting import chats, choices, texts
from pitstop.errors import BrokenInput, DatasetError, PitstopError, RecordError
from pitstop.records import save_json
from pitstop.retention.suite import ChatItem, ChoiceItem, Suite, TextItem, load, load_all, make, save


def _damage(folder: Path, lines: list[bytes]) -> None:
    (folder / "items.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("suite", [choices(), texts(), chats()], ids=lambda suite: suite.name)
def test_a_saved_suite_is_loaded_as_it_was(tmp_path: Path, suite: Suite) -> None:
    save(suite, tmp_path / "one")
    assert load(tmp_path / "one") == suite


def test_the_same_items_give_the_same_digest_and_other_items_another() -> None:
    assert choices().digest == choices().digest
    assert choices(29).digest != choices(30).digest


def test_everything_wrong_with_the_items_is_said_at_once(tmp_path: Path) -> None:
    save(choices(3), tmp_path)
    good = (tmp_path / "items.jsonl").read_bytes().splitlines()
    item = json.loads(good[0])
    bad = [
        good[0],
        json.dumps({**item, "answer": 7}).encode(),
        json.dumps({**item, "id": "x1", "options": ["one", " "]}).encode(),
        json.dumps({**item, "id": "x2", "options": []}).encode(),
        json.dumps({**item, "id": "x3", "options": ["same", "same "]}).encode(),
        json.dumps({**item, "id": "x4", "anser": 1}).encode(),
        b'{"id": "x5", "group": "\xff"}',
        b"not json",
        b"[1]",
        json.dumps({**item, "id": "x6", "prompt": "\ud800"}).encode(),
        json.dumps({**item, "id": "x7", "group": " "}).encode(),
    ]
    _damage(tmp_path, bad)
    with pytest.raises(DatasetError) as refusal:
        load(tmp_path)
    said = str(refusal.value)
    for words in (
        "line 2: answer 7 is out of range",
        "id 'c0' is used 2 times",
        "line 3: an option is empty",
        "line 4: a choice needs two options or more",
        "line 5: two options are the same",
        "line 6: anser: no such key; did you mean 'answer'?",
        "line 7: not UTF-8 (byte ",
        "line 8: not JSON",
        "line 9: not a JSON object",
        "line 10: holds half a surrogate pair",
        "line 11: id and group must not be empty",
        "suite.json says",
    ):
        assert words in said, words


def test_items_that_are_not_those_of_the_record_are_refused(tmp_path: Path) -> None:
    save(choices(5), tmp_path)
    data = (tmp_path / "items.jsonl").read_bytes()
    (tmp_path / "items.jsonl").write_bytes(data.replace(b"the cat", b"the bat"))
    with pytest.raises(DatasetError, match="SHA-256"):
        load(tmp_path)


def test_a_record_that_lies_about_its_items_is_refused(tmp_path: Path) -> None:
    suite = choices(5)
    save(suite, tmp_path)
    save_json(replace(suite.record, count=6, chance=0.3), tmp_path / "suite.json")
    with pytest.raises(DatasetError) as refusal:
        load(tmp_path)
    assert "5 items, suite.json says 6" in str(refusal.value)
    assert "chance is 0.3, by the items it is 0.5" in str(refusal.value)


def test_a_chat_suite_can_only_measure_drift(tmp_path: Path) -> None:
    suite = chats()
    save(suite, tmp_path)
    save_json(replace(suite.record, purpose="retention"), tmp_path / "suite.json")
    with pytest.raises(DatasetError, match="drift"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match="no retention suites"):
        load_all(tmp_path)
    save(texts(), tmp_path / "corpus")
    (tmp_path / "corpus" / "items.jsonl").unlink()
    with pytest.raises(BrokenInput, match=r"cannot read items\.jsonl of suite corpus"):
        load_all(tmp_path)


def test_all_suites_come_in_the_order_of_their_folders_and_names_are_unique(tmp_path: Path) -> None:
    save(texts(), tmp_path / "b")
    save(choices(), tmp_path / "a")
    assert [suite.name for suite in load_all(tmp_path)] == ["words", "corpus"]
    save(texts(), tmp_path / "c")
    with pytest.raises(RecordError, match="two suites are named 'corpus'"):
        load_all(tmp_path)


def test_making_a_suite_out_of_the_wrong_items_is_refused() -> None:
    with pytest.raises(DatasetError, match="1 items are not of kind 'choice'"):
        make("x", "choice", [TextItem("a", "a", "b")], license="", source="", description="")
    with pytest.raises(DatasetError, match="no items"):
        make("x", "text", [], license="", source="", description="")


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_any_text_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]
) -> None:
    items = [ChatItem(*row[:2], row[2], row[2]) for row in rows]
    suite = make("any", "chat", items, license="", source="", description="", purpose="drift")
    folder = tmp_path_factory.mktemp("suite")
    save(suite, folder)
    assert load(folder) == suite


@given(st.binary(max_size=200))
def test_any_bytes_are_a_suite_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("suite")
    save(make("x", "choice", [ChoiceItem("a", "a", "b", ("c", "d"), 0)], license="", source="", description=""), folder)
    (folder / "items.jsonl").write_bytes(data)
    with pytest.raises(PitstopError):
        load(folder)
