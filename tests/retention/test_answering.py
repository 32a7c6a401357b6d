"""Answers generated in the base's chat format, and held against a rule."""

from pathlib import Path

import pytest

from forgetting import BigramEngine
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import Use
from pitstop.errors import UsageError
from pitstop.retention.gate import gate
from pitstop.retention.measure import measure, pair
from pitstop.retention.suite import AnswerItem, Suite, make

PROMPTING = Prompting("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>", "", "")


def asked(*items: AnswerItem) -> Suite:
    return make("format", "answer", items, license="CC0-1.0", source="here", description="form", guards="format")


def speaking(answers: dict[str, str]) -> tuple[BigramEngine, Use]:
    """An engine whose adapter answers so; its base says "?" to everything."""
    engine = BigramEngine({f"<user>{prompt}<a>": said for prompt, said in answers.items()})
    return engine, engine.add("home", engine.table * 0)


def test_an_answer_is_right_if_it_keeps_its_rule() -> None:
    mine = asked(
        AnswerItem("one", "one", "Name a dog.", "at_most_words", ("1",)),
        AnswerItem("two", "two", "Name a cat, in lower case.", "lower_case"),
        AnswerItem("three", "three", "Say nothing.", "at_most_words", ("3",)),
    )
    engine, use = speaking({"Name a dog.": "Rex", "Name a cat, in lower case.": "Tom", "Say nothing.": ""})
    (result,) = measure(engine, [mine], use, prompting=PROMPTING)
    assert [(one.id, one.correct, one.said) for one in result.choices] == [
        ("one", True, "Rex"),
        ("two", False, "Tom"),
        ("three", False, ""),
    ]
    assert (result.kind, result.guards, result.chance) == ("answer", "format", 0.0)


def test_it_pairs_as_right_and_wrong() -> None:
    items = [AnswerItem(str(at), str(at), f"Say no. {at}", "contains", ("no",)) for at in range(60)]
    engine, use = speaking({item.prompt: "no" if int(item.id) < 20 else "yes" for item in items})
    mine = asked(*items)
    base, adapted = (measure(engine, [mine], which, prompting=PROMPTING)[0] for which in (use, Use()))
    paired = pair(base, adapted)
    assert (paired.kind, paired.guards, paired.score) == ("choice", "format", (20 / 60, 0.0))
    assert gate([paired], None, {}).outcome == "fail"


def test_a_prompt_that_leaves_no_room_for_the_answer_is_excluded() -> None:
    mine = asked(
        AnswerItem("long", "long", "x" * 150, "lower_case"),
        AnswerItem("short", "short", "x" * 150, "lower_case", (), 10),
    )
    (result,) = measure(BigramEngine(), [mine], prompting=PROMPTING)
    assert result.excluded == ("long",)
    assert [one.id for one in result.choices] == ["short"]


def test_without_a_template_nothing_is_asked(engine: BigramEngine) -> None:
    mine = asked(AnswerItem("one", "one", "Name a dog.", "lower_case"))
    with pytest.raises(UsageError, match="suite format needs the base's chat template"):
        measure(engine, [mine])


def test_another_template_is_another_measurement(engine: BigramEngine, tmp_path: Path) -> None:
    mine = asked(AnswerItem("one", "one", "Name a dog.", "lower_case"))
    for template in (PROMPTING, PROMPTING, Prompting("{{ messages[0].content }}", "", "")):
        measure(engine, [mine], cache=tmp_path, prompting=template)
    assert len(list(tmp_path.iterdir())) == 2
