import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetting import BigramEngine, noise
from pitstop.errors import DatasetError, UsageError
from pitstop.retention.task import JSON_OPENING, TaskRow, compare, measure_task, pair_task


def row(expected: str, name: str = "r", group: str = "g", prompt: str = "p") -> TaskRow:
    return TaskRow(name, group, prompt, expected)


@pytest.mark.parametrize(
    ("expected", "answer", "exact"),
    [
        ('{"a": 90}', '{"a": 90.0}', True),
        ('{"a": 90}', ' {"a":9e1}\n', True),
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 0}', '{"a": -0.0}', True),
        ('{"a": 0}', '{"a": false}', False),
        ('{"a": null}', "{}", False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1}', '{"a": 1, "a": 1}', False),
        ('{"a": 1}', '{"a": 1} and more', False),
        ('{"a": 1}', "```json\n{}\n```", False),
        ('{"a": 12345678901234567890123456789012345}', '{"a": 12345678901234567890123456789012346}', False),
    ],
)
def test_json_is_compared_by_meaning(expected: str, answer: str, exact: bool) -> None:
    assert compare(row(expected), answer, "json").exact is exact


@pytest.mark.parametrize("answer", ["", "NaN", "[Infinity]", "1e999999999999999999999", "[" * 100_000, "{", "\ud800"])
def test_what_is_no_json_is_wrong_and_no_crash(answer: str) -> None:
    found = compare(row('{"a": 1}'), answer, "json")
    assert (found.exact, found.parsed, found.found, found.expected, found.matched) == (False, False, 0, 1, 0)


def test_deep_and_huge_values_are_no_crash() -> None:
    assert compare(row('{"a": 1}'), "[" * 900 + "]" * 900, "json").exact is False
    assert compare(row('{"a": 1}'), "1" * 100_000, "json").exact is False
    assert compare(row('{"a": 1}'), '{"a": 1e9999999}', "json").exact is False


def test_pairs_are_counted_by_key_and_value() -> None:
    found = compare(
        row('{"intent": "on", "slots": {"area": "attic", "level": 90}}'),
        '{"intent": "on", "slots": {"area": "x", "level": 90.0, "n": 1}}',
        "json",
    )
    assert (found.exact, found.found, found.expected, found.matched) == (False, 4, 3, 2)


def test_text_is_compared_without_space_at_its_ends() -> None:
    assert compare(row("yes "), "\nyes", "text").exact
    assert not compare(row("yes"), "Yes", "text").exact


@given(st.text(max_size=60))
def test_any_answer_can_be_compared(answer: str) -> None:
    compare(row('{"a": 1}'), answer, "json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_every_value_equals_itself_however_it_is_written(value: object) -> None:
    found = compare(row(json.dumps(value)), json.dumps(value, indent=3, sort_keys=True, ensure_ascii=False), "json")
    assert found.exact
    assert found.found == found.expected == found.matched


@given(values, st.integers(0, 3), st.integers(0, 200))
def test_whatever_begins_a_json_value_may_become_one(value: object, spaces: int, length: int) -> None:
    assert JSON_OPENING.fullmatch((" " * spaces + json.dumps(value, indent=1))[:length])


@pytest.mark.parametrize("text", ["The", "4228 SW Dawson Street", "12a", "`", "-5, 6"])
def test_what_begins_otherwise_is_not_heard_out(text: str) -> None:
    assert not JSON_OPENING.fullmatch(text)


def test_rows_are_answered_in_their_order_and_scored() -> None:
    rows = [row('{"a": 1}', f"r{at}", f"g{at // 2}", f"say {'x' * at}") for at in range(40)]
    engine = BigramEngine({one.prompt: '{"a": 1}' if at < 30 else '{"a": 2}' for at, one in enumerate(rows)})
    use = engine.add("task", noise(0.0))
    base, adapted = measure_task(engine, rows, metric="json"), measure_task(engine, rows, use, metric="json")
    assert [answer.id for answer in adapted.answers] == [one.id for one in rows]
    assert (base.exact, base.parse_rate, base.f1, base.precision) == (0.0, 0.0, 0.0, 0.0)
    assert (adapted.exact, adapted.parse_rate, adapted.f1) == (0.75, 1.0, 0.75)
    paired = pair_task(base, adapted)
    assert paired.score == (0.0, 0.75)
    assert len(set(paired.groups)) == 20


def test_a_prompt_that_fills_the_context_is_excluded_and_named(engine: BigramEngine) -> None:
    rows = [row("x", "short"), row("x", "long", prompt="y" * 200)]
    assert measure_task(engine, rows, metric="text").excluded == ("long",)
    with pytest.raises(UsageError, match="no row's prompt fits"):
        measure_task(engine, rows[1:], metric="text")


def test_rows_that_cannot_be_scored_are_all_named(engine: BigramEngine) -> None:
    with pytest.raises(DatasetError) as refusal:
        measure_task(engine, [row("{", "a"), row("1", "b"), row("nope", "b")], metric="json")
    for words in ("3 problems", "id 'b' is used 2 times", "a: the expected answer", "b: the expected answer"):
        assert words in str(refusal.value)
    with pytest.raises(DatasetError, match="no rows"):
        measure_task(engine, [], metric="text")


def test_answers_to_other_rows_are_not_compared(engine: BigramEngine) -> None:
    one, other = (measure_task(engine, [row("x", name)], metric="text") for name in "ab")
    with pytest.raises(UsageError, match="same rows"):
        pair_task(one, other)


def test_a_key_given_twice_is_two_fields_and_never_exact() -> None:
    row = TaskRow("1", "g", "prompt", '{"a":1,"b":2}')
    answer = compare(row, '{"a":1,"b":2,"b":2}', "json")
    assert (answer.parsed, answer.exact) == (True, False)
    assert (answer.found, answer.expected, answer.matched) == (3, 2, 2)


@pytest.mark.parametrize(
    ("answer", "exact", "off"),
    [("031", True, 1.0), (" 29\n", True, 1.0), ("41.5", False, 11.5), ("about 30", False, None), ("", False, None),
     ("NaN", False, None), ("1e999", False, None), ("9" * 5000, False, None)],
)  # fmt: skip
def test_a_number_is_right_within_the_tolerance(answer: str, exact: bool, off: float | None) -> None:
    found = compare(TaskRow("r", "g", "p", "030", tolerance=1.0), answer, "number")
    assert (found.exact, found.off, found.parsed) == (exact, off, off is not None)


def test_how_far_off_numbers_are_is_told_by_the_median(engine: BigramEngine) -> None:
    answers = {"one": "10", "two": "40", "three": "none"}
    talker = BigramEngine(answers)
    use = talker.add("a", noise(0.0))
    rows = [row("30", name, prompt=name) for name in answers]
    found = measure_task(talker, rows, use, metric="number")
    assert (found.off, found.exact, found.parse_rate) == (15.0, 0.0, pytest.approx(2 / 3))
    assert measure_task(talker, rows, metric="number").off is None
    with pytest.raises(DatasetError, match="no number"):
        measure_task(talker, [row("many")], metric="number")
