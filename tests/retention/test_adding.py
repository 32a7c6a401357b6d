"""A user's own items become a suite, or a list of everything that is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.errors import BrokenInput, DatasetError, PitstopError, UsageError
from pitstop.retention.adding import add
from pitstop.retention.importing import from_jsonl
from pitstop.retention.sampling import order
from pitstop.retention.suite import ChoiceItem, load

SAID: dict[str, Any] = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}


def jsonl(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_what_can_be_filled_in_is_filled_in(tmp_path: Path) -> None:
    rows = [
        {"prompt": "The sky is", "options": ["blue", "green"], "answer": "blue"},
        {"prompt": "Grass is", "options": ["blue", "green"], "answer": 1, "id": "grass", "group": "colours"},
    ]
    made = add(jsonl(tmp_path / "My-Facts.jsonl", *rows), tmp_path, name=None, kind="choice", **SAID)
    assert load(tmp_path / "my-facts") == made
    assert {item.id: (item.group, item.answer) for item in made.of(ChoiceItem)} == {
        "my-facts-0001": ("my-facts-0001", 0),
        "grass": ("colours", 1),
    }
    assert made.record.chance == 0.5


def test_the_items_come_in_the_order_of_their_hashes(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "texts.jsonl", *({"text": f"text {at}", "id": str(at)} for at in range(50)))
    keys = [order(item.id) for item in add(file, tmp_path, name="mine", kind="text", **SAID).items]
    assert keys == sorted(keys)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    good = {"prompt": "The sky is", "options": ["blue", "green"], "answer": 0, "id": "a"}
    file = jsonl(
        tmp_path / "facts.jsonl",
        good,
        good,
        {**good, "id": "b", "answer": "red"},
        {**good, "id": "c", "group": " "},
        {**good, "id": "d", "answer": 2},
        b'{"id": "\xff"}',
        {**good, "id": "e", "option": 1},
        b"",
        {"prompt": "only this"},
    )
    with pytest.raises(DatasetError) as refusal:
        from_jsonl(file, "choice", "Facts!", license=" ", source="", description="", scoring="pmi")
    said = str(refusal.value)
    for words in (
        "id 'a' is used 2 times",
        "line 3: answer 'red' is none of the options 'blue', 'green'",
        "line 4: id and group must not be empty",
        "line 5: answer 2 is out of range",
        "line 6: not UTF-8",
        "line 7: option: no such key; did you mean 'options'?",
        "line 9: options: missing",
        "line 9: answer: missing",
        "license: it must not be empty",
        "source: it must not be empty",
        "name: 'Facts!' must be",
        "scoring 'pmi' needs a neutral prompt",
    ):
        assert words in said, words


def test_every_kind_can_be_added_and_a_wrong_rule_is_refused(tmp_path: Path) -> None:
    rows = {
        "cloze": {"prompt": "The sky is", "answer": "blue"},
        "answer": {"prompt": "Say no.", "checker": "contains", "arguments": ["no"], "max_tokens": 4},
        "text": {"text": "The sky is blue."},
    }
    for kind, row in rows.items():
        file = jsonl(tmp_path / f"{kind}.jsonl", row)
        assert add(file, tmp_path, name=None, kind=kind, **SAID).record.kind == kind  # type: ignore[arg-type]
    wrong = jsonl(tmp_path / "wrong.jsonl", {**rows["answer"], "checker": "polite"})
    with pytest.raises(DatasetError, match="line 1: no checker is called 'polite'"):
        add(wrong, tmp_path, name=None, kind="answer", **SAID)


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "one.jsonl", {"text": "a text"})
    with pytest.raises(UsageError, match="not said what one"):
        add(file, tmp_path, name=None, kind=None, **SAID)
    add(file, tmp_path, name=None, kind="text", **SAID)
    with pytest.raises(UsageError, match="a suite one is there already"):
        add(file, tmp_path, name=None, kind="text", **SAID)
    with pytest.raises(BrokenInput, match=r"cannot read nothing\.jsonl"):
        add(tmp_path / "nothing.jsonl", tmp_path, name=None, kind="text", **SAID)
    with pytest.raises(DatasetError, match="no items"):
        add(jsonl(tmp_path / "empty.jsonl"), tmp_path, name=None, kind="text", **SAID)


@given(st.binary(max_size=200), st.sampled_from(["choice", "cloze", "answer", "text"]))
def test_any_bytes_are_a_suite_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: Any) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_bytes(data)
    with pytest.raises(PitstopError):
        from_jsonl(file, kind, "rows", **SAID)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4)


@given(st.dictionaries(st.sampled_from(["prompt", "options", "answer", "id", "group", "x"]), values))
def test_any_row_is_an_item_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    file = jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", row)
    try:
        (item,) = from_jsonl(file, "choice", "rows", **SAID).of(ChoiceItem)
    except PitstopError:
        return
    assert item.options[item.answer].strip()
