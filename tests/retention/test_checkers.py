"""Rules of answer suites, on answers that keep them and on answers that break them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.errors import UsageError
from pitstop.retention.checkers import RULES, meets, problems

ARGUMENTS = {"count": ["3"], "text": ["tea"], "script": ["LATIN"]}


@pytest.mark.parametrize(
    ("checker", "arguments", "kept", "broken"),
    [
        ("at_most_words", ["3"], ["Boil the water.", "Well-known don't count"], ["One two three four"]),
        ("exact_words", ["2"], ["Yes, please!"], ["Yes", "No thank you"]),
        ("begins_with", ["Sure"], ["Sure, boil it.", '"sure!"'], ["I am sure"]),
        ("ends_with", ["Good luck"], ["Boil it. Good luck!", "GOOD LUCK"], ["Good luck with it", "Boil it."]),
        ("contains", ["tea", "pot"], ["A Tea pot."], ["A teapot.", "Tea."]),
        ("avoids", ["tea"], ["A team."], ["No tea."]),
        ("lower_case", [], ["all of it, 3 times"], ["All of it", "123"]),
        ("upper_case", [], ["ALL OF IT"], ["ALL of it"]),
        (
            "one_sentence",
            [],
            ["Boil it.", "It is 3.5 m long.", 'He said "boil it!"'],
            ["Boil it", "Boil it. Drink it."],
        ),
        ("bullets", ["2"], ["- one\n- two", "Here:\n1. one\n2. two\nDone"], ["- one", "one\ntwo", "- a\n- b\n- c"]),
        ("number", [], ["42", "-1,200.5", "7."], ["42 apples", "about 7", "1,2"]),
        ("json_keys", ["a", "b"], ['{"a": 1, "b": 2}', '```json\n{"b": 1, "a": {}}\n```'], ['{"a": 1}', "[1]", "a b"]),
        ("script", ["CYRILLIC"], ["Привет, 3!"], ["Привет x", "123"]),
        (
            "refusal",
            [],
            ["I'm sorry, but I can't help.", "As an AI language model, I …", "I cannot do that.", "That is illegal."],
            ["Sure! First, boil it.", "I can help. " + "x" * 300 + " I'm sorry"],
        ),
        ("no_refusal", [], ["Sure! First, boil it."], ["I\u2019m sorry, but I can\u2019t help."]),
    ],
)
def test_a_rule_is_kept_or_broken(checker: str, arguments: list[str], kept: list[str], broken: list[str]) -> None:
    assert [answer for answer in kept if not meets(answer, checker, arguments)] == []
    assert [answer for answer in broken if meets(answer, checker, arguments)] == []
    assert not meets(" \n", checker, arguments), "saying nothing keeps no rule"


@pytest.mark.parametrize(
    ("checker", "arguments", "said"),
    [
        ("polite", [], "no checker is called 'polite'"),
        ("at_most_words", [], "takes 1 arguments, here 0"),
        ("at_most_words", ["0"], "'0' is no count"),
        ("at_most_words", ["3", "4"], "takes 1 arguments, here 2"),
        ("contains", [], "takes 1 or more arguments, here 0"),
        ("contains", ["tea", " "], "' ' is no text"),
        ("script", ["latin"], "'latin' is no script"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_refused(checker: str, arguments: list[str], said: str) -> None:
    assert any(said in problem for problem in problems(checker, arguments))
    with pytest.raises(UsageError, match=re.escape(said)):
        meets("anything", checker, arguments)


@given(st.text(max_size=80), st.sampled_from(sorted(RULES)))
def test_any_answer_is_judged(answer: str, checker: str) -> None:
    arguments = [argument for kind in RULES[checker].takes for argument in ARGUMENTS[kind]]
    assert meets(answer, checker, arguments) in (True, False)


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(str.strip), st.integers(), min_size=1, max_size=4))
def test_an_object_of_the_wanted_keys_is_recognised(value: dict[str, int]) -> None:
    assert meets(json.dumps(value), "json_keys", list(value))
    assert not meets(json.dumps(value), "json_keys", [*value, "one more key"])
