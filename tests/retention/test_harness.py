"""Tasks of lm-evaluation-harness: those that are understood become suites, the others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.errors import BrokenInput, DatasetError, PitstopError, RecordError
from pitstop.retention.harness import from_task
from pitstop.retention.suite import ChoiceItem, TextItem

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

SAID: dict[str, Any] = {"license": "CC0-1.0", "source": "made here"}
ARC = {
    "task": "arc_mine",
    "tag": ["ai2_arc"],
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.0},
}
ROWS = [
    {"question": "Is it wet?", "choices": {"text": ["yes", "it's not"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "Is it dry?", "choices": {"text": ["no", "yes"], "label": ["1", "2"]}, "answerKey": "1"},
]


def task(folder: Path, changes: dict[str, Any] | None = None, rows: list[dict[str, Any]] = ROWS) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump({**ARC, **(changes or {})}))
    return path


def test_a_task_of_templates_becomes_a_suite(tmp_path: Path) -> None:
    found = from_task(task(tmp_path), **SAID)
    assert (found.name, found.record.kind, found.record.scoring) == ("arc_mine", "choice", "per byte")
    assert [(item.prompt, item.options, item.answer) for item in found.of(ChoiceItem)] == [
        ("Question: Is it wet?\nAnswer:", ("yes", "it's not"), 1),
        ("Question: Is it dry?\nAnswer:", ("no", "yes"), 0),
    ]


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"doc_to_choice": "options", "doc_to_target": "label"}, {"options": ["no", "yes"], "label": 1}),
        ({"doc_to_choice": ["no", "yes"], "doc_to_target": "{{label}}"}, {"label": "yes"}),
        ({"doc_to_choice": ["{{a}}", "{{b}}"], "doc_to_target": 1}, {"a": "no", "b": "yes"}),
        ({"doc_to_choice": ["no", "yes"], "doc_to_target": "label"}, {"label": " yes"}),
    ],
)
def test_fields_templates_and_lists_say_the_same(tmp_path: Path, changes: dict[str, Any], row: dict[str, Any]) -> None:
    changes = {"doc_to_text": "question", "description": "Say.\n", "metric_list": [{"metric": "acc"}], **changes}
    found = from_task(task(tmp_path, changes, [{"question": "Is it?", **row}]), "mine", **SAID)
    (item,) = found.of(ChoiceItem)
    assert (item.prompt, item.options, item.answer) == ("Say.\nIs it?", ("no", "yes"), 1)
    assert (found.name, found.record.scoring) == ("mine", "whole")


def test_rolling_likelihood_becomes_a_text_suite_and_include_lies_beneath(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**ARC, "metric_list": [{"metric": "bits_per_byte"}]}))
    (tmp_path / "rows.json").write_text(json.dumps([{"page": "A text."}]))
    path = tmp_path / "task.yaml"
    changes = {"include": "base.yaml", "task": "wiki", "output_type": "loglikelihood_rolling", "doc_to_target": "page"}
    path.write_text(yaml.safe_dump({**changes, "doc_to_text": "", "dataset_kwargs": {"data_files": "rows.json"}}))
    found = from_task(path, **SAID)
    assert (found.name, [item.text for item in found.of(TextItem)]) == ("wiki", ["A text."])


def test_everything_that_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    changes = {
        "output_type": "generate_until",
        "dataset_path": "allenai/ai2_arc",
        "num_fewshot": 5,
        "target_delimiter": "\n",
        "filter_list": [],
        "process_docs": "x",
    }
    with pytest.raises(RecordError) as refusal:
        from_task(task(tmp_path, changes), license="", source="here")
    for words in (
        "filter_list: pitstop does not do this",
        "process_docs: pitstop does not do this",
        "output_type: 'generate_until' is not done",
        "num_fewshot: 5 examples",
        "target_delimiter: '\\n' is not done",
        "dataset_path: 'allenai/ai2_arc' is not read",
        "license: it must not be empty",
    ):
        assert words in str(refusal.value), words
    with pytest.raises(RecordError, match="metric_list: 'acc_mutual_info' is not done"):
        from_task(task(tmp_path, {"metric_list": [{"metric": "acc_mutual_info"}]}), **SAID)


def test_a_task_of_a_distant_data_set_is_read_with_its_rows_exported(tmp_path: Path) -> None:
    path = task(tmp_path, {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "dataset_kwargs": {}})
    with pytest.raises(RecordError, match="'allenai/ai2_arc' is not read, only 'json'; export its rows"):
        from_task(path, **SAID)
    assert len(from_task(path, data=tmp_path / "rows.jsonl", **SAID).items) == len(ROWS)


def test_without_a_delimiter_the_space_must_stand_in_the_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "It is", "options": [" so", " not so"], "label": 0}]
    changes = {"target_delimiter": "", "doc_to_choice": "options", "doc_to_target": "label"}
    for prompt in ("{{prompt}}", "{{prompt}} "):
        stripped = [{**rows[0], "options": ["so", "not so"]}] if prompt.endswith(" ") else rows
        (item,) = from_task(task(tmp_path, {**changes, "doc_to_text": prompt}, stripped), **SAID).of(ChoiceItem)
        assert (item.prompt, item.options) == ("It is", ("so", "not so"))
    with pytest.raises(DatasetError, match="row 1: target_delimiter: '' without a space"):
        from_task(task(tmp_path, {**changes, "doc_to_text": "prompt"}, [{**rows[0], "options": ["so", "no"]}]), **SAID)


@pytest.mark.parametrize("tag", ["!function utils.process", "!!python/object/apply:os.system ['true']"])
def test_a_tag_that_would_run_code_is_refused(tmp_path: Path, tag: str) -> None:
    path = task(tmp_path)
    path.write_text(path.read_text() + f"process_docs: {tag}\n")
    with pytest.raises(RecordError, match=r"would run code|python/object"):
        from_task(path, **SAID)


def test_a_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DatasetError, match="row 1: doc_to_text: access to attribute '__class__'"):
        from_task(task(tmp_path, {"doc_to_text": escape}), **SAID)


def test_rows_that_give_no_item_are_all_named(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "answerKey": "Z"}, {"question": "no choices"}]
    with pytest.raises(DatasetError) as refusal:
        from_task(task(tmp_path, rows=rows), **SAID)
    assert "row 3: doc_to_target:" in str(refusal.value)
    assert "row 4: doc_to_choice: 'choices' is undefined" in str(refusal.value)


def test_files_that_are_not_there_and_circles_are_named(tmp_path: Path) -> None:
    path = task(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(BrokenInput, match=r"cannot read rows\.jsonl"):
        from_task(path, **SAID)
    with pytest.raises(RecordError, match="none of the split 'dev'"):
        from_task(task(tmp_path, {"test_split": "dev"}), **SAID)
    with pytest.raises(RecordError, match="not on this machine"):
        from_task(task(tmp_path, {"dataset_kwargs": {"data_files": "https://x.org/a.json"}}), **SAID)
    with pytest.raises(RecordError, match=r"task\.yaml includes itself"):
        from_task(task(tmp_path, {"include": "task.yaml"}), **SAID)


@given(st.text(max_size=120))
def test_any_text_is_a_task_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("task") / "task.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(PitstopError):
        from_task(path, **SAID)


@given(st.text("{}%.[]()'ab |+*question", max_size=30), st.sampled_from(["text", "choice", "target"]))
def test_any_template_is_a_suite_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, template: str, key: str
) -> None:
    path = task(tmp_path_factory.mktemp("task"), {f"doc_to_{key}": template})
    try:
        assert from_task(path, **SAID).items
    except PitstopError as error:
        assert "row 1" in str(error)  # noqa: PT017
