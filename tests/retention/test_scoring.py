"""Options that compete by PMI, clozes, and texts of which a part is given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetting import CORPUS, BigramEngine, inverted
from pitstop.retention.gate import gate
from pitstop.retention.measure import measure, pair
from pitstop.retention.suite import ChoiceItem, ClozeItem, Item, Suite, TextItem, make

SOURCE = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}


def suite(kind: str, *items: Item, **more: str) -> Suite:
    return make("mine", kind, items, **SOURCE, **more)  # type: ignore[arg-type]


def logprob(engine: BigramEngine, prompt: str, text: str) -> float:
    return float(engine.score(engine.tokenize(prompt), engine.tokenize(text)).sum())


def test_pmi_takes_off_what_an_option_has_without_the_question(engine: BigramEngine) -> None:
    # "the" is likelier than "dog" after any prompt, and a bigram model knows no more of the prompt than its space.
    item = ChoiceItem("a", "a", "cat sat", ("the", "dog"), 1)
    whole = measure(engine, [suite("choice", item, scoring="whole")])[0].choices[0]
    pmi = measure(engine, [suite("choice", item, scoring="pmi", neutral="so:")])[0].choices[0]
    margin = [
        logprob(engine, "cat sat", f" {option}") - logprob(engine, "so:", f" {option}") for option in item.options
    ]
    assert not whole.correct
    assert pmi.margin == pytest.approx(margin[1] - margin[0], abs=1e-4)
    assert pmi.logprobs == whole.logprobs, "what is written down stays ln p of the option itself"


def test_equal_options_are_scored_apart_once(engine: BigramEngine) -> None:
    items = [ChoiceItem(str(at), str(at), f"{at} is", ("paris", "house"), 0) for at in range(5)]
    measure(engine, [suite("choice", *items, scoring="whole")])
    alone = engine.evaluated
    engine.evaluated = 0
    measure(engine, [suite("choice", *items, scoring="pmi", neutral="so:")])
    assert engine.evaluated == alone + 2 * len("so: pari")


def test_an_option_that_does_not_fit_after_the_neutral_prompt_excludes_its_item(engine: BigramEngine) -> None:
    items = [
        ChoiceItem("long", "long", "a", ("x" * 100, "y"), 0),
        ChoiceItem("short", "short", "a", ("x", "y"), 0),
    ]
    (result,) = measure(engine, [suite("choice", *items, scoring="pmi", neutral="n" * 120)])
    assert result.excluded == ("long",)
    assert [choice.id for choice in result.choices] == ["short"]


def test_a_cloze_is_right_if_every_token_is_the_likeliest(engine: BigramEngine) -> None:
    greedy = engine.tokenize("the ")
    while len(greedy) < 8:
        greedy.append(int(np.argmax(engine.logits(greedy)[-1])))
    said = engine.detokenize(greedy[4:])
    items = [
        ClozeItem("right", "right", "the", said),
        ClozeItem("almost", "almost", "the", said[:-1] + "z"),
        ClozeItem("wrong", "wrong", "the", "qqqq"),
    ]
    (result,) = measure(engine, [suite("cloze", *items)])
    assert result.chance == 0.0
    assert [choice.correct for choice in result.choices] == [True, False, False]
    assert [choice.margin > 0 for choice in result.choices] == [True, False, False]
    assert result.choices[0].logprobs == (pytest.approx(logprob(engine, "the", f" {said}"), abs=1e-4),)


def test_a_cloze_pairs_as_right_and_wrong_and_is_gated(engine: BigramEngine) -> None:
    greedy = engine.tokenize("the ")
    greedy.append(int(np.argmax(engine.logits(greedy)[-1])))
    items = [ClozeItem(str(at), str(at), "the" if at else "on the", engine.detokenize(greedy[4:])) for at in range(40)]
    mine = suite("cloze", *(replace(item, prompt=f"{at} the") for at, item in enumerate(items)))
    use = engine.add("forgetful", inverted(engine))
    paired = pair(measure(engine, [mine])[0], measure(engine, [mine], use)[0])
    assert (paired.kind, paired.chance, paired.score) == ("choice", 0.0, (1.0, 0.0))
    assert gate([paired], None, {}).outcome == "fail"


def test_what_is_given_is_not_scored(engine: BigramEngine) -> None:
    given, text = CORPUS[:20], CORPUS[20:40]
    (score,) = measure(engine, [suite("text", TextItem("a", "a", text, given))])[0].texts
    assert score.nats == pytest.approx(-logprob(engine, given, text), abs=1e-4)
    assert score.bytes == len(text)


def test_what_does_not_fit_is_excluded_and_counted_in_every_kind(engine: BigramEngine) -> None:
    long = "x" * 300
    for kind, items in {
        "choice": (ChoiceItem("long", "long", long, ("yes", "no"), 0), ChoiceItem("ok", "ok", "a", ("yes", "no"), 0)),
        "cloze": (ClozeItem("long", "long", long, "yes"), ClozeItem("ok", "ok", "a", "yes")),
        "text": (TextItem("long", "long", long), TextItem("ok", "ok", "yes", "a")),
    }.items():
        (result,) = measure(engine, [suite(kind, *items)])
        assert result.excluded == ("long",), kind
        assert len(result.choices) + len(result.texts) == 1, kind


def test_what_decides_the_scores_decides_what_is_kept(engine: BigramEngine, tmp_path: Path) -> None:
    item = ChoiceItem("a", "a", "cat sat", ("the", "dog"), 1)
    for neutral in ("so:", "well:"):
        measure(engine, [suite("choice", item, scoring="pmi", neutral=neutral)], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
