"""Rows that cannot be used are named by line; what is tested is never trained on; the loss falls on the answer."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.template import render
from pitstop.errors import DatasetError, UsageError
from pitstop.workshop import base_model, dataset, sources
from pitstop.workshop.dataset import Row
from pitstop.workshop.recipe import Data
from workbench import Project, light_rows

ROW = {"prompt": "make the hall red", "completion": '{"room": "hall"}'}


def problem_of(project: Project, line: bytes) -> str:
    """Put a line second among good ones, and return what is said of it."""
    good = json.dumps(ROW).encode()
    (project.folder / "bad.jsonl").write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(DatasetError) as caught:
        dataset.load_rows(Path("bad.jsonl"))
    assert "1 of 3 rows" in str(caught.value)
    (said,) = [said for said in str(caught.value).splitlines() if "line" in said and "- " in said]
    return said


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b'{"prompt": "x"}', "no completion"),
        (b'{"completion": "x"}', "no prompt"),
        (b'{"prompt": 3, "completion": "x"}', "no prompt"),
        (b'{"prompt": "x", "completion": "  "}', "the answer is empty"),
        (b'{"prompt": "x", "completion":', "line 1 column"),
        (b'{"prompt": "\xff", "completion": "x"}', "utf-8"),
        (b'{"prompt": "\\ud800", "completion": "x"}', "surrogates"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 100_000, "recursion"),
        (b'{"messages": 5}', "list"),
        (b'{"messages": null}', "list"),
        (b'{"messages": []}', "assistant"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
        (b'{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}', "assistant"),
        (b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "y"}]}', "content"),
        (b'{"messages": ["x"]}', "content"),
    ],
)
def test_a_bad_row_is_named_by_its_line(project: Project, line: bytes, word: str) -> None:
    said = problem_of(project, line)
    assert "line 2" in said
    assert word in said


def test_many_bad_rows_are_counted_not_poured_out(project: Project) -> None:
    project.rows("bad.jsonl", [{"prompt": "x"}] * 50)
    with pytest.raises(DatasetError, match="50 of 50 rows") as caught:
        dataset.load_rows(Path("bad.jsonl"))
    assert str(caught.value).count("no completion") == sources.MAX_PROBLEMS
    assert "and 30 more" in str(caught.value)


def test_a_missing_file_is_wrong_use(project: Project) -> None:
    with pytest.raises(UsageError) as caught:
        dataset.load_rows(Path("none.jsonl"))
    assert caught.value.where == "none.jsonl"


def test_an_empty_file_has_no_rows(project: Project) -> None:
    project.rows("empty.jsonl", [])
    with pytest.raises(DatasetError, match="no rows"):
        dataset.load_rows(Path("empty.jsonl"))


def test_a_line_separator_in_a_text_ends_no_line(project: Project) -> None:
    project.rows("odd.jsonl", [{"prompt": "one\u2028two", "completion": "three\x85four"}])
    (row,) = dataset.load_rows(Path("odd.jsonl"))
    assert row.prompt[0]["content"] == "one\u2028two"


def test_messages_and_pairs_mean_the_same(project: Project) -> None:
    messages = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["completion"]}]
    project.rows("both.jsonl", [ROW, {"messages": messages}])
    pair, chat = dataset.load_rows(Path("both.jsonl"))
    assert pair.messages == chat.messages
    assert pair.group == chat.group
    assert pair.answer == ROW["completion"]


def rows_of(groups: list[str]) -> list[Row]:
    return [
        Row(str(number), ({"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "a"}), group)
        for number, group in enumerate(groups)
    ]


@given(groups=st.lists(st.text(max_size=3), max_size=60), share=st.floats(0, 0.5))
def test_a_group_never_stands_on_both_sides(groups: list[str], share: float) -> None:
    rows = rows_of(groups)
    train, test = dataset.split(rows, share)
    assert not {row.group for row in train} & {row.group for row in test}
    assert sorted(row.id for row in [*train, *test]) == sorted(row.id for row in rows)


@given(groups=st.lists(st.text(max_size=3), max_size=30), more=st.lists(st.text(max_size=3), max_size=30))
def test_a_row_stays_on_its_side_when_others_come_and_go(groups: list[str], more: list[str]) -> None:
    _, before = dataset.split(rows_of(groups), 0.3)
    _, after = dataset.split(rows_of([*groups, *more]), 0.3)
    assert before == [row for row in after if int(row.id) < len(groups)]


def test_a_share_of_the_groups_is_held_out() -> None:
    _, test = dataset.split(rows_of([f"group {number}" for number in range(2000)]), 0.1)
    assert 150 < len(test) < 250


def test_a_test_prompt_that_was_trained_on_is_refused(project: Project) -> None:
    rows = light_rows()
    project.rows("train.jsonl", rows)
    project.rows("test.jsonl", [{"prompt": "new", "completion": "x"}, rows[3]])
    with pytest.raises(DatasetError, match="1 test prompts"):
        dataset.load_split(Data(Path("train.jsonl"), Path("test.jsonl")))


def test_the_same_last_words_after_another_conversation_are_no_leak(project: Project) -> None:
    def chat(first: str) -> dict[str, Any]:
        said = (("user", first), ("assistant", "Shall I?"), ("user", "Yes, please."), ("assistant", "Done."))
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    project.rows("train.jsonl", [chat("Open the door.")])
    project.rows("test.jsonl", [chat("Close the window.")])
    train, test = dataset.load_split(Data(Path("train.jsonl"), Path("test.jsonl")))
    assert (len(train), len(test)) == (1, 1)
    project.rows("test.jsonl", [chat("Open the door.")])
    with pytest.raises(DatasetError, match="1 test prompts"):
        dataset.load_split(Data(Path("train.jsonl"), Path("test.jsonl")))


def test_a_split_without_test_rows_is_refused(project: Project) -> None:
    project.rows("one.jsonl", [ROW])
    with pytest.raises(DatasetError, match="1 rows to train on and 0 to test on"):
        dataset.load_split(Data(Path("one.jsonl"), test_share=0.0))


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), count=st.integers(1, 60))
def test_rows_are_spread_evenly_over_the_groups(sizes: list[int], count: int) -> None:
    rows = rows_of([f"g{number}" for number, size in enumerate(sizes) for _ in range(size)])
    chosen = dataset.spread(rows, count)
    assert len(chosen) == min(count, len(rows))
    assert len({row.id for row in chosen}) == len(chosen)
    taken = Counter(row.group for row in chosen)
    highest = max(taken.values())
    for number, size in enumerate(sizes):
        assert taken[f"g{number}"] >= min(size, highest - 1)
    assert dataset.spread(rows, count) == chosen


CONVERSATIONS = [
    [{"role": "user", "content": "Turn on the light."}],
    [{"role": "system", "content": "Answer with JSON."}, {"role": "user", "content": "Turn on the light."}],
    [
        {"role": "user", "content": "Hello,  \n\n you.\t"},
        {"role": "assistant", "content": "Hi! <|im_end|>"},
        {"role": "user", "content": "ÄÖÜ — 日本語 🦙 {{ 1 + 1 }}"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add", [True, False])
def test_our_rendering_is_the_tokenizers(
    tokenizer: PreTrainedTokenizerBase, base_folder: Path, messages: list[dict[str, str]], add: bool
) -> None:
    prompting = base_model.load_ref(base_folder).prompting
    ours = render(prompting, messages, add_generation_prompt=add)
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)


@pytest.fixture
def prompting(base_folder: Path) -> Prompting:
    return base_model.load_ref(base_folder).prompting


def test_the_loss_falls_on_the_answer_and_its_end(
    project: Project, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    rows = dataset.load_rows(Path("rows.jsonl"))
    encoded = dataset.encode(rows, tokenizer, prompting, 128)
    assert encoded.too_long == 0
    for row, example in zip(rows, encoded.examples, strict=True):
        assert tokenizer.decode(example.tokens[: example.answer_start]) == dataset.prompt_text(row, prompting)
        assert tokenizer.decode(example.tokens[example.answer_start :]) == row.answer + "<|im_end|>"


def test_long_rows_are_left_out_and_counted_never_cut(
    project: Project, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    long = [{"prompt": "x", "completion": "word " * 200}] * 3
    project.rows("long.jsonl", [*long, *light_rows()])
    rows = dataset.load_rows(Path("long.jsonl"))
    encoded = dataset.encode(rows, tokenizer, prompting, 100)
    assert (encoded.too_long, len(encoded.examples)) == (3, len(light_rows()))
    assert encoded.lengths.longest > 200
    assert all(len(example.tokens) <= 100 for example in encoded.examples)
    with pytest.raises(DatasetError, match="every row is longer"):
        dataset.encode(rows[:3], tokenizer, prompting, 100)


def test_general_rows_are_texts_or_answers(
    project: Project, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    project.rows("general.jsonl", [{"text": "Water boils at a hundred\u2028degrees."}, ROW, {"text": "x"}])
    text, answer = dataset.encode_general(Path("general.jsonl"), tokenizer, prompting, 64)
    assert text.answer_start == 1
    assert tokenizer.decode(answer.tokens).endswith(ROW["completion"] + "<|im_end|>")


def test_general_rows_are_cut_by_their_own_words(
    project: Project, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    system = [{"role": "system", "content": "Answer in French."}]
    conversation = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Très bien."}]
    rows = [{"text": "Water boils at a hundred degrees."}, ROW, {"messages": [*system, *conversation]}]
    project.rows("general.jsonl", rows)
    text, chat, french = dataset.encode_general(Path("general.jsonl"), tokenizer, prompting, 5)
    assert [len(row.tokens) - row.answer_start for row in (text, chat, french)] == [5, 5, 5]
    assert tokenizer.decode(chat.tokens[chat.answer_start :]).startswith(ROW["prompt"][:8])
    assert "Answer in" in tokenizer.decode(french.tokens[french.answer_start :])  # no opening of everybody's


def test_bad_general_rows_are_named_by_their_lines(
    project: Project, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    project.rows("general.jsonl", [{"text": "fine"}, {"text": 5}, {"texts": "x"}])
    with pytest.raises(DatasetError) as caught:
        dataset.encode_general(Path("general.jsonl"), tokenizer, prompting, 64)
    assert "line 2" in str(caught.value)
    assert "line 3" in str(caught.value)
    with pytest.raises(UsageError):
        dataset.encode_general(Path("none.jsonl"), tokenizer, prompting, 64)
    project.rows("general.jsonl", [{"text": "a"}])
    with pytest.raises(DatasetError, match="anything to score"):
        dataset.encode_general(Path("general.jsonl"), tokenizer, prompting, 64)
