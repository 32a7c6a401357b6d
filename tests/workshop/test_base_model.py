"""What cannot become a base says what it is, and leaves nothing that looks like one."""

from pathlib import Path

import pytest

from pitstop.errors import FormatError, UsageError
from pitstop.workshop import base_model


def test_a_file_that_is_no_model_is_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n' * 20)
    with pytest.raises(FormatError) as caught:
        base_model.prepare(str(file), tmp_path / "bases" / "x")
    assert caught.value.where == str(file)
    assert not (tmp_path / "bases" / "x" / base_model.BASE_FILE).exists()


@pytest.mark.parametrize("source", ["nothing.gguf", "no/such folder at all"])
def test_a_source_that_is_not_there_says_what_can_be_given(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError, match="GGUF file"):
        base_model.prepare(source, tmp_path / "x")


def test_another_base_does_not_take_a_folder_that_is_taken(tiny_base: Path, smollm2_gguf: Path) -> None:
    with pytest.raises(UsageError, match="holds another base"):
        base_model.prepare(str(smollm2_gguf), tiny_base)
