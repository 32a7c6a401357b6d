"""Of a few answers the likeliest is picked, and its probability is worth what it says."""

import numpy as np
import pytest

from forgetting import BigramEngine
from pitstop.engines.base import PLAIN_BASE
from pitstop.errors import DatasetError
from pitstop.retention.classes import calibration_error, classes_of, likeliest
from pitstop.retention.task import TaskRow, measure_task

WORDS = ("cat", "dog")


def test_the_likeliest_class_is_the_one_a_sum_over_its_tokens_says(engine: BigramEngine) -> None:
    prompt = engine.tokenize("the ")
    (pick,) = likeliest(engine, [prompt], [WORDS], PLAIN_BASE)
    logprobs = []
    for word in WORDS:
        tokens = [*prompt, *engine.tokenize(word)]
        table = engine.table[tokens[len(prompt) - 1 : -1]]
        table = table - np.log(np.exp(table).sum(-1, keepdims=True))
        logprobs.append(float(table[range(len(word)), tokens[len(prompt) :]].sum()))
    assert pick.word == WORDS[int(np.argmax(logprobs))]
    assert pick.probability == pytest.approx(np.exp(max(logprobs)) / np.exp(logprobs).sum(), rel=1e-5)


def test_an_adapter_that_prefers_a_class_is_seen(engine: BigramEngine) -> None:
    table = np.zeros((256, 256))
    table[ord(" "), ord("d")] = 9.0
    use = engine.add("dogs", table)
    rows = [TaskRow(str(at), str(at), "the ", word, WORDS) for at, word in enumerate(("cat", "dog", "dog", "dog"))]
    found = measure_task(engine, rows, use, metric="class")
    assert [answer.answer for answer in found.answers] == ["dog"] * 4
    assert found.exact == 0.75
    assert found.calibration_error == pytest.approx(0.25, abs=0.01)
    assert found.off is None


def test_a_row_that_leaves_no_room_for_its_classes_is_left_out(engine: BigramEngine) -> None:
    rows = [TaskRow(str(length), "g", "a" * length, "cat", WORDS) for length in (198, 199)]
    assert measure_task(engine, rows, metric="class").excluded == ("199",)


def test_a_test_answer_that_was_never_trained_is_refused(engine: BigramEngine) -> None:
    with pytest.raises(DatasetError, match="no answer of the training rows"):
        measure_task(engine, [TaskRow("a", "a", "the ", "cow", WORDS)], metric="class")


@pytest.mark.parametrize(
    ("answers", "word"),
    [(["a"], "1 different answers"), ([str(n) for n in range(100, 200)], "100 different"), (["mat", "mate"], "begins")],
)
def test_answers_that_are_no_classes_are_refused(answers: list[str], word: str) -> None:
    with pytest.raises(DatasetError, match=word):
        classes_of(answers)


def test_classes_have_a_fixed_order() -> None:
    assert classes_of(["dog ", "cat", "dog"]) == WORDS


def test_calibration_is_perfect_where_shares_are_as_the_probabilities_say() -> None:
    assert calibration_error([0.75] * 4, [True, True, True, False]) == 0
    assert calibration_error([1.0] * 4, [True, True, True, False]) == 0.25
    assert calibration_error([0.55, 0.95], [True, False]) == pytest.approx((0.45 + 0.95) / 2)
