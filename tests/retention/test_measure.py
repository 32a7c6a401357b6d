import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetting import BigramEngine, chats, choices, inverted, noise, probe, texts
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import Use, log_softmax
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.retention import builders
from pitstop.retention.drift import drift
from pitstop.retention.gate import gate
from pitstop.retention.measure import measure, pair, pair_all
from pitstop.retention.suite import ChoiceItem, TextItem, make

PROMPTING = Prompting(
    chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>",
    bos_token="",
    eos_token="",
)
ALL = [choices(), texts(), probe(), chats()]


def _of(item: ChoiceItem | TextItem, kind: str = "choice", **more: str) -> object:
    return make("one", kind, [item], license="", source="", description="", **more)  # type: ignore[arg-type]


def test_choices_are_scored_by_their_own_tokens(engine: BigramEngine) -> None:
    suite = choices(6)
    result = measure(engine, [suite])[0]
    for item, score in zip(suite.of(ChoiceItem), result.choices, strict=True):
        for option, found, size in zip(item.options, score.logprobs, score.bytes, strict=True):
            expected = engine.score(engine.tokenize(item.prompt), engine.tokenize(f" {option}")).sum()
            assert found == pytest.approx(expected, abs=1e-4)
            assert size == len(option)
    assert np.mean([score.correct for score in result.choices]) == 1.0


def test_picking_per_byte_and_whole_options_differ(engine: BigramEngine) -> None:
    # Two unlikely bytes are worse than the whole sentence per byte, and better in sum.
    item = ChoiceItem("a", "a", "it is", ("the cat sat on the mat.", "qz"), 0)
    per_byte = measure(engine, [_of(item)])[0].choices[0]
    whole = measure(engine, [_of(item, scoring="whole")])[0].choices[0]
    assert (per_byte.correct, whole.correct) == (True, False)
    assert per_byte.margin > 0 > whole.margin


def test_texts_are_scored_after_their_first_token(engine: BigramEngine) -> None:
    result = measure(engine, [_of(TextItem("t", "t", "the cat"), "text")])[0].texts[0]
    tokens = engine.tokenize("the cat")
    assert result.nats == pytest.approx(-engine.score(tokens[:1], tokens[1:]).sum(), abs=1e-4)
    assert result.bytes == 6


def test_a_row_that_begins_another_is_not_evaluated_twice(engine: BigramEngine) -> None:
    options = ("paris", "parisian", "pariz")
    measure(engine, [_of(ChoiceItem("a", "a", "it is", options, 0))])
    # "… parisia" holds "… pari" of both others.
    assert engine.evaluated == len("it is parisia")


def test_items_that_do_not_fit_are_excluded_and_named(engine: BigramEngine) -> None:
    items = [TextItem("short", "a", "the cat"), TextItem("long", "b", "x" * 300), TextItem("one", "c", "x")]
    suite = make("t", "text", items, license="", source="", description="")
    result = measure(engine, [suite])[0]
    assert result.excluded == ("long", "one")
    assert [score.id for score in result.texts] == ["short"]
    long = ChoiceItem("long", "a", "x" * 195, ("yes", "no, never ever"), 0)
    assert measure(engine, [_of(long)])[0].excluded == ("long",)


def test_the_order_of_items_and_batches_changes_no_figure(
    engine: BigramEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = measure(engine, ALL)
    monkeypatch.setattr("pitstop.retention.scoring.BATCH_ROWS", 1)
    assert measure(engine, ALL) == at_once


def test_an_adapter_without_effect_changes_nothing_at_all(engine: BigramEngine) -> None:
    use = engine.add("null", noise(0.0))
    assert measure(engine, ALL, use) == measure(engine, ALL)
    assert [probe.mean for probe in drift(engine, ALL, use, PROMPTING)] == [0.0, 0.0]
    assert [probe.mean for probe in drift(engine, ALL, Use("null", 0.0), PROMPTING)] == [0.0, 0.0]


def test_an_adapter_can_forget_and_the_gate_sees_it(engine: BigramEngine) -> None:
    use = engine.add("forgetful", inverted(engine))
    paired = pair_all(measure(engine, ALL), measure(engine, ALL, use))
    assert [one.kind for one in paired] == ["choice", "text"]
    verdict = gate(paired, None, {})
    assert verdict.outcome == "fail"
    assert {criterion.outcome for criterion in verdict.criteria} == {"fail"}


def test_kl_is_the_mean_over_positions_of_the_whole_vocabulary(engine: BigramEngine) -> None:
    use = engine.add("noisy", noise(0.5))
    general, chat = drift(engine, ALL, use, PROMPTING)
    text = probe().of(TextItem)[0].text
    before = log_softmax(engine.logits(engine.tokenize(text)))
    after = log_softmax(engine.logits(engine.tokenize(text), use))
    expected = float((np.exp(before) * (before - after)).sum(axis=-1).mean())
    assert general.documents[0].kl == pytest.approx(expected, abs=1e-6)
    assert general.documents[0].tokens == len(text)
    assert expected > 0
    # Of a chat only the reply counts: one position per token of it.
    assert [document.tokens for document in chat.documents] == [20] * 5


def test_kl_grows_with_the_scale(engine: BigramEngine) -> None:
    use = engine.add("noisy", noise(0.5))
    sizes = [drift(engine, ALL, replace(use, scale=scale), PROMPTING)[0].mean for scale in (0.0, 0.5, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0.0


def test_a_model_that_gives_no_number_is_an_error(engine: BigramEngine) -> None:
    use = engine.add("broken", np.full((256, 256), np.nan))
    with pytest.raises(BrokenInput, match="no finite probability for item"):
        measure(engine, ALL, use)
    with pytest.raises(BrokenInput, match="no finite probability for item"):
        drift(engine, ALL, use, PROMPTING)


def test_the_bases_figures_are_kept_and_used_again(engine: BigramEngine, tmp_path: Path) -> None:
    first = measure(engine, ALL, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    engine.evaluated = 0
    assert measure(engine, ALL, cache=tmp_path) == first
    assert engine.evaluated == 0


def test_what_is_kept_belongs_to_base_suite_and_no_adapter(engine: BigramEngine, tmp_path: Path) -> None:
    measure(engine, ALL, engine.add("noisy", noise(1.0)), cache=tmp_path)
    assert not list(tmp_path.iterdir())
    measure(engine, ALL, cache=tmp_path)
    engine.base_sha256 = "c" * 64
    engine.evaluated = 0
    measure(engine, ALL, cache=tmp_path)
    assert engine.evaluated > 0
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json"])
def test_damaged_figures_are_measured_again(engine: BigramEngine, tmp_path: Path, damage: bytes) -> None:
    first = measure(engine, ALL, cache=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    assert measure(engine, ALL, cache=tmp_path) == first
    assert all(json.loads(path.read_bytes()) for path in tmp_path.iterdir())


def test_results_of_different_things_are_not_compared(engine: BigramEngine) -> None:
    base = measure(engine, ALL)
    with pytest.raises(UsageError, match="digest is"):
        pair(base[0], measure(engine, [choices(20)])[0])
    with pytest.raises(UsageError, match="base_sha256 is"):
        pair(base[0], replace(base[0], base_sha256="c" * 64))
    with pytest.raises(UsageError, match="not measured on the same suites"):
        pair_all(base, base[:1])


@pytest.mark.slow
def test_on_llama_cpp_an_adapter_without_effect_drops_exactly_nothing(
    smollm2_gguf: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    llama = pytest.importorskip("pitstop.engines.llama", reason="the llama engine is not installed")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base_file = tmp_path / "base.gguf"
    llama.quantize(smollm2_gguf, base_file, "q8_0")  # is read five times as fast as Q4_1, where products are ours
    sha256 = sha256_file(base_file)
    names = ("capitals", "code", "format", "last-words", "kl-chat")
    suites = [suite for suite in builders.build(tmp_path / "suites", 10) if suite.name in names]
    with llama.LlamaEngine(base_file, base_sha256=sha256, context_length=512, threads=1, own_products=True) as engine:
        engine.load_adapter("wild", make_adapter(tmp_path / "wild.gguf", 2, strength=2.0, base_sha256=sha256))
        null = Use("wild", 0.0)  # the engine itself refuses an adapter without effect
        base = measure(engine, suites, prompting=PROMPTING)
        paired = pair_all(base, measure(engine, suites, null, prompting=PROMPTING))
        assert all(one.baseline == one.adapted for one in paired)
        assert [probe.mean for probe in drift(engine, suites, null, PROMPTING)] == [0.0]
        forgot = pair_all(base, measure(engine, suites, Use("wild"), prompting=PROMPTING))
        assert [probe.mean > 0.5 for probe in drift(engine, suites, Use("wild"), PROMPTING)] == [True]
    scores = {one.name: one.score[0] for one in paired}
    assert scores["capitals"] > 0.5
    assert scores["format"] > 0
    assert scores["last-words"] > 0
    assert 0.5 < scores["code"] < 3
    assert gate(forgot, None, {}).outcome == "fail"
    assert all(math.isfinite(criterion.drop) for criterion in gate(paired, None, {}).criteria)
