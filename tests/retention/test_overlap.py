"""Items that stand in the training rows do not count: they show what was memorised."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetting import BigramEngine, choices, inverted, probe, texts
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import PLAIN_BASE
from pitstop.errors import DatasetError
from pitstop.retention.drift import drift
from pitstop.retention.measure import measure
from pitstop.retention.overlap import OVERLAP, SHORT, grams, set_aside, set_documents_aside, trained_on
from pitstop.retention.report import Measured, make_report
from pitstop.retention.suite import AnswerItem, ChoiceItem, ClozeItem, Suite, TextItem, make

LONG = "The river rises in the mountains and reaches the sea after three hundred slow and muddy miles."
SOURCE = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}


def suite(*items: TextItem | ChoiceItem) -> Suite:
    return make("mine", "text" if isinstance(items[0], TextItem) else "choice", items, **SOURCE)


def found(suite: Suite, *texts: str) -> set[str]:
    return set(trained_on([suite], texts)["mine"])


def test_thirteen_words_in_a_row_are_the_same_text() -> None:
    mine = suite(TextItem("one", "one", LONG), TextItem("two", "two", "Bread is made of flour, water, salt and time."))
    words = LONG.split()
    assert found(mine, "And so: " + " ".join(words[2 : 2 + OVERLAP]) + ", or not.") == {"one"}
    assert found(mine, LONG.upper().replace(" ", "  ,")) == {"one"}, "case, spaces and punctuation are no difference"
    assert found(mine, " ".join(words[2 : 1 + OVERLAP])) == set()
    assert found(mine, LONG.replace("sea", "lake")) == set()


def test_a_short_item_counts_if_all_of_it_stands_there() -> None:
    mine = suite(
        ChoiceItem("right", "right", "The capital of France is", ("Paris", "Rome"), 0),
        ChoiceItem("wrong", "wrong", "The capital of Italy is", ("Oslo", "Rome"), 1),
        ChoiceItem("tiny", "tiny", "Two is", ("even", "odd"), 0),
    )
    assert found(mine, "We know: the capital of France is Paris.", "Two is even.") == {"right"}
    assert found(mine, "The capital of Italy is Oslo") == set(), "only the right answer gives anything away"
    assert SHORT == 6


@given(st.lists(st.text("ab c", max_size=60), max_size=4), st.lists(st.text("ab c", max_size=60), max_size=4))
def test_what_is_found_shares_words_in_a_row(items: list[str], texts: list[str]) -> None:
    mine = suite(*(TextItem(str(at), str(at), text + "x") for at, text in enumerate(items)), TextItem("z", "z", "zz"))
    expected = set()
    for item in mine.of(TextItem):
        length = min(OVERLAP, len(item.text.split()))
        if length >= SHORT and any(grams(item.text, length) & grams(text, length) for text in texts):
            expected.add(item.id)
    assert found(mine, *texts) == expected


def test_they_are_left_out_of_what_is_judged() -> None:
    engine = BigramEngine()
    suites = [choices(), texts()]
    use = engine.add("home", inverted(engine))
    first = {suites[0].name: frozenset([suites[0].items[0].id]), suites[1].name: frozenset()}
    results = [set_aside(measure(engine, suites, use), first) for use in (PLAIN_BASE, use)]
    assert results[0][0].trained_on == (suites[0].items[0].id,)
    assert len(results[0][0].choices) == len(suites[0].items) - 1
    report = make_report(engine, Measured(suites, *results, []), adapter="home", adapter_sha256="a" * 64)
    assert [summary.trained_on for summary in report.suites] == [1, 0]
    assert report.suites[0].items == len(suites[0].items) - 1
    every = {suites[1].name: frozenset(item.id for item in suites[1].items)}
    with pytest.raises(DatasetError, match=f"every item of the suite {suites[1].name}"):
        set_aside(measure(engine, suites), every)


def test_drift_on_documents_that_were_trained_on_does_not_count() -> None:
    engine = BigramEngine()
    use, mine = engine.add("home", inverted(engine)), probe()
    (found,) = drift(engine, [mine], use, Prompting("{{ messages }}", "", ""))
    gone = found.documents[0].id
    (left,) = set_documents_aside([found], {mine.name: frozenset([gone])})
    assert left == replace(found, documents=found.documents[1:])


def test_every_kind_of_item_is_recognised_by_what_it_says() -> None:
    cloze = make("mine", "cloze", [ClozeItem("a", "a", "In winter the river carries", "ice")], **SOURCE)
    assert found(cloze, "We saw that in winter the river carries ice.") == {"a"}
    assert found(cloze, "In winter the river carries boats.") == set()
    asked = make("mine", "answer", [AnswerItem("a", "a", "Name the longest river of Asia.", "lower_case")], **SOURCE)
    assert found(asked, "name the longest river of asia") == {"a"}
    given = suite(TextItem("a", "a", "and the sea is far away", "The river rises in the mountains "))
    assert found(given, "The river rises in the mountains and the sea is far away.") == {"a"}
    assert found(given, "and the sea is far away") == set()


def test_items_right_or_wrong_of_any_kind_are_left_out_of_what_is_judged() -> None:
    engine = BigramEngine()
    items = [ClozeItem(str(at), str(at), f"{at} it is the", "cat") for at in range(12)]
    (result,) = set_aside(
        measure(engine, [make("mine", "cloze", items, **SOURCE)]), {"mine": frozenset(["3", "not in it"])}
    )
    assert (result.trained_on, len(result.choices)) == (("3",), 11)
