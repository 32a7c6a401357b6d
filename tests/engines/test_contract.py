"""What every engine promises, on every engine: the same cases over llama.cpp and torch, on the same real model."""

from collections.abc import Callable
from itertools import chain, product, zip_longest
from pathlib import Path

import numpy as np
import pytest

from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Usage, Use
from pitstop.errors import BaseMismatch, BrokenInput, FormatError, UsageError

Make = Callable[..., Path]
OTHER_BASE = "0" * 64
# Measured: evaluating the same tokens in other portions (a reused prefix, one by one, padded) moves a logit by up to
# 0.036 on these engines, by rounding alone; an adapter of these tests moves some by more than 1.
ROUNDING = 0.1
SHORT = Sampling(max_tokens=6)
COLOURS = "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"
FRANCE = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def answer(engine: Engine, text: str, use: Use = PLAIN_BASE, sampling: Sampling = SHORT) -> str:
    return "".join(piece.text for piece in engine.generate(engine.tokenize(text), use, sampling))


def tokens(engine: Engine, text: str, use: Use = PLAIN_BASE, sampling: Sampling = SHORT) -> list[int]:
    return [piece.token for piece in engine.generate(engine.tokenize(text), use, sampling)]


def last_logits(engine: Engine, text: str, use: Use = PLAIN_BASE) -> np.ndarray:
    prompt = engine.tokenize(text)
    return engine.logits(prompt, use, first=len(prompt) - 1)[0]


def assert_same(engine: Engine, text: str, use: Use, found: list[int], expected: list[int]) -> None:
    """Two greedy answers are equal, or part at a token where a cold evaluation has a tie but for rounding."""
    if found == expected:
        return
    at = next(index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
    tokens = [*engine.tokenize(text), *expected[:at]]
    row = engine.logits(tokens, use, first=len(tokens) - 1)[0]
    assert row.max() - row[[found[at], expected[at]]].min() < ROUNDING, f"{found} is not {expected} under {use}"


def test_an_adapter_is_loaded_used_and_unloaded(engine: Engine, adapter: Make) -> None:
    base = last_logits(engine, COLOURS)
    engine.load_adapter("one.v1", adapter())
    assert engine.adapters == ("one.v1",)
    assert np.abs(last_logits(engine, COLOURS, Use("one.v1")) - base).max() > 1
    assert np.array_equal(last_logits(engine, COLOURS), base)
    engine.unload_adapter("one.v1")
    assert engine.adapters == ()
    assert np.array_equal(last_logits(engine, COLOURS), base)
    with pytest.raises(UsageError, match="one"):
        engine.logits([1], Use("one.v1"))


def test_an_adapter_for_another_base_is_refused(engine: Engine, adapter: Make) -> None:
    with pytest.raises(BaseMismatch, match=f"{OTHER_BASE[:12]}.*{engine.base_sha256[:12]}") as caught:
        engine.load_adapter("one", adapter(base_sha256=OTHER_BASE))
    assert caught.value.cure
    with pytest.raises(BaseMismatch, match="does not say which base file it was trained on"):
        engine.load_adapter("one", adapter(base_sha256=None))
    assert engine.adapters == ()


def test_names_that_are_taken_or_unknown_are_refused(engine: Engine, adapter: Make) -> None:
    engine.load_adapter("one", adapter())
    with pytest.raises(UsageError, match="already loaded"):
        engine.load_adapter("one", adapter(seed=2))
    with pytest.raises(UsageError, match="two"):
        engine.unload_adapter("two")
    with pytest.raises(UsageError, match=r"two.*is loaded"):
        engine.generate([1], Use("two"))
    with pytest.raises(UsageError, match="finite"):
        engine.logits([1], Use("one", float("nan")))
    assert engine.adapters == ("one",)


def test_a_missing_file_is_refused(engine: Engine, tmp_path: Path) -> None:
    # The torch engine finds no base named there, the llama engine no file.
    with pytest.raises(BrokenInput, match="nothing"):
        engine.load_adapter("one", tmp_path / "nothing")


def test_the_base_answers_and_says_what_it_cost(engine: Engine) -> None:
    usage = Usage()
    prompt = engine.tokenize(FRANCE)
    pieces = list(engine.generate(prompt, sampling=Sampling(max_tokens=40), usage=usage))
    assert "".join(piece.text for piece in pieces) == "The capital of France is Paris."
    assert (usage.prompt_tokens, usage.completion_tokens, usage.finish_reason) == (len(prompt), len(pieces), "stop")
    assert usage.first_token_seconds > 0


def test_an_answer_of_full_length_ends_as_length(engine: Engine) -> None:
    usage = Usage()
    assert len(list(engine.generate(engine.tokenize(FRANCE), sampling=SHORT, usage=usage))) == 6
    assert usage.finish_reason == "length"
    usage = Usage()
    assert list(engine.generate([1], sampling=Sampling(max_tokens=0), usage=usage)) == []
    assert (usage.completion_tokens, usage.finish_reason) == (0, "length")


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    prompt = (engine.tokenize(FRANCE) * 40)[: engine.context_length - 3]
    usage = Usage()
    assert len(list(engine.generate(prompt, usage=usage))) <= 3
    assert usage.finish_reason


@pytest.mark.parametrize("stop", ["Paris", "is Par", "ital of", "of France is", "."])
def test_a_stop_text_ends_the_answer_wherever_tokens_end(engine: Engine, stop: str) -> None:
    usage = Usage()
    sampling = Sampling(max_tokens=40, stop=("never this", stop))
    text = "".join(piece.text for piece in engine.generate(engine.tokenize(FRANCE), sampling=sampling, usage=usage))
    assert text == "The capital of France is Paris."[: "The capital of France is Paris.".index(stop)]
    assert usage.finish_reason == "stop"


def test_pieces_are_whole_characters(engine: Engine) -> None:
    prompt = engine.tokenize("🚀🌍é漢字🚀🌍é漢字🚀🌍é漢字🚀🌍é漢字")
    pieces = list(engine.generate(prompt, sampling=Sampling(max_tokens=24)))
    assert not any("\ufffd" in piece.text for piece in pieces[:-1])
    assert any(ord(character) > 127 for piece in pieces for character in piece.text)
    assert "".join(piece.text for piece in pieces) == engine.detokenize([piece.token for piece in pieces])


def test_text_goes_to_tokens_and_back(engine: Engine) -> None:
    text = "Grüße, 漢字 🚀\n  def f(x): return x\n"
    assert engine.detokenize(engine.tokenize(text)) == text
    assert engine.tokenize("") == []
    assert engine.tokenize("<|im_start|>") == [1]
    assert engine.detokenize([1]) == ""


def test_tokens_are_scored_one_by_one_as_together(engine: Engine) -> None:
    prompt = engine.tokenize("The capital of France is Paris.")
    pieces = list(chain.from_iterable(engine.score_each(prompt, likeliest=2)))
    assert [piece.token for piece in pieces] == prompt[1:]
    assert np.allclose([piece.logprob for piece in pieces], engine.score(prompt[:1], prompt[1:]), atol=1e-3)
    assert all(piece.likeliest[0][1] >= (piece.logprob or 0) for piece in pieces)
    assert b"".join(map(engine.token_text, prompt)).decode() == "The capital of France is Paris."


def test_a_true_fact_scores_above_a_wrong_one(engine: Engine) -> None:
    prompt = engine.tokenize("The capital of France is")
    true, wrong = (engine.score(prompt, engine.tokenize(city)) for city in (" Paris", " Berlin"))
    assert true.sum() > wrong.sum() + 2
    assert np.exp(true).sum() <= 1


def test_logits_from_a_later_position_are_the_same(engine: Engine) -> None:
    prompt = engine.tokenize(COLOURS)
    every = engine.logits(prompt)
    assert every.shape == (len(prompt), engine.vocabulary_size)
    assert every.dtype == np.float32
    assert np.abs(engine.logits(prompt, first=5) - every[5:]).max() <= ROUNDING


def test_two_adapters_in_turn_equal_cold_runs(engine: Engine, adapter: Make, cold: Callable[[], Engine]) -> None:
    files = {"one": adapter(seed=1, rank=4), "two": adapter(seed=2, rank=16)}
    for name, file in files.items():
        engine.load_adapter(name, file)
    texts = (COLOURS, FRANCE)
    turns = list(product(texts, uses(files)))
    warm = {(text, use): (last_logits(engine, text, use), tokens(engine, text, use)) for text, use in turns}
    again = {(text, use): tokens(engine, text, use) for text, use in turns}
    for use in uses(files):
        fresh = cold()
        if use.adapter and use.adapter not in fresh.adapters:
            fresh.load_adapter(use.adapter, files[use.adapter])
        for text in texts:
            logits, made = warm[text, use]
            assert np.abs(last_logits(fresh, text, use) - logits).max() <= 1e-3
            assert_same(fresh, text, use, made, tokens(fresh, text, use))
            assert_same(fresh, text, use, again[text, use], made)
    assert len({tuple(warm[COLOURS, use][1]) for use in uses(files)}) == 3  # the adapters do something


def uses(files: dict[str, Path]) -> list[Use]:
    return [PLAIN_BASE, *map(Use, files)]


def test_answers_that_are_made_at_the_same_time_do_not_mix(engine: Engine, adapter: Make) -> None:
    files = {"one": adapter(seed=1), "two": adapter(seed=2)}
    for name, file in files.items():
        engine.load_adapter(name, file)
    alone = [tokens(engine, COLOURS, use) for use in uses(files)]
    running = [engine.generate(engine.tokenize(COLOURS), use, SHORT) for use in uses(files)]
    together: list[list[int]] = [[] for _ in running]
    for step in zip_longest(*running):
        for made, piece in zip(together, step, strict=True):
            made += [piece.token] if piece else []
    for use, made, expected in zip(uses(files), together, alone, strict=True):
        assert_same(engine, COLOURS, use, made, expected)


def test_another_adapter_of_the_same_name_starts_afresh(
    engine: Engine, adapter: Make, cold: Callable[[], Engine]
) -> None:
    first, second = adapter(seed=1), adapter(seed=2)
    engine.load_adapter("one", first)
    before = tokens(engine, COLOURS, Use("one"))
    engine.unload_adapter("one")
    engine.load_adapter("one", second)
    usage = Usage()
    after = [piece.token for piece in engine.generate(engine.tokenize(COLOURS), Use("one"), SHORT, usage)]
    assert usage.reused_tokens == 0
    assert after != before
    fresh = cold()
    if not fresh.adapters:
        fresh.load_adapter("one", second)
    assert_same(fresh, COLOURS, Use("one"), after, tokens(fresh, COLOURS, Use("one")))


def test_the_scale_belongs_to_the_request(engine: Engine, adapter: Make) -> None:
    engine.load_adapter("one", adapter())
    scales = [1.0, 0.5, 0.0, -1.0, 1.0, 0.5]
    logits = [last_logits(engine, COLOURS, Use("one", scale)) for scale in scales]
    made = [tokens(engine, COLOURS, Use("one", scale)) for scale in scales]
    assert np.array_equal(logits[2], last_logits(engine, COLOURS))
    for early, late in ((0, 4), (1, 5)):
        assert np.array_equal(logits[early], logits[late])
        assert_same(engine, COLOURS, Use("one", scales[early]), made[early], made[late])
    assert len({row.tobytes() for row in logits}) == 4
    assert np.abs(logits[1] - logits[0]).max() > 1


def test_a_null_adapter(engine: Engine, adapter: Make) -> None:
    file = adapter(size=0.0)
    if engine.name != "torch":  # what ships must do something
        with pytest.raises(FormatError, match="changes nothing"):
            engine.load_adapter("null", file)
        assert engine.adapters == ()
    else:  # the gate's own test needs an adapter that is known to change nothing
        engine.load_adapter("null", file)
        assert np.array_equal(last_logits(engine, COLOURS, Use("null")), last_logits(engine, COLOURS))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 256, "256 tokens.* 256"),
        ([1] * 300, "300 tokens.* 256"),
        ([49152], "49152"),
        ([-1], "49152"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_refused(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.generate(prompt)
    if len(prompt) != engine.context_length:
        with pytest.raises(UsageError, match=message):
            engine.logits(prompt)
    with pytest.raises(UsageError, match=message):
        engine.generate_batch([[1], prompt])


@pytest.mark.parametrize("first", [-1, 2])
def test_a_first_position_outside_of_the_tokens_is_refused(engine: Engine, first: int) -> None:
    with pytest.raises(UsageError, match="first"):
        engine.logits([1, 2], first=first)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=-1), Sampling(top_p=0), Sampling(top_p=2), Sampling(top_k=-1), Sampling(stop=("",))],
)
def test_sampling_that_means_nothing_is_refused(engine: Engine, sampling: Sampling) -> None:
    with pytest.raises(UsageError):
        engine.generate([1], sampling=sampling)


def test_sampling_follows_its_seed(engine: Engine) -> None:
    answer(engine, COLOURS, sampling=Sampling(max_tokens=1))  # from here on each prompt is evaluated in equal portions
    made = [
        answer(engine, COLOURS, sampling=Sampling(max_tokens=8, temperature=1.5, seed=seed)) for seed in (1, 1, 2, 3)
    ]
    assert made[0] == made[1]
    assert len(set(made)) > 1
    greedy = answer(engine, COLOURS)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert answer(engine, COLOURS, sampling=Sampling(max_tokens=6, temperature=1.5, **narrow)) == greedy


def test_an_answer_that_was_closed_early_leaves_no_trace(engine: Engine, adapter: Make) -> None:
    engine.load_adapter("one", adapter())
    expected = tokens(engine, COLOURS, Use("one"))
    for steps in range(4):
        started = engine.generate(engine.tokenize(COLOURS), Use("one"), SHORT)
        assert_same(engine, COLOURS, Use("one"), [next(started).token for _ in range(steps)], expected[:steps])
        started.close()
        assert_same(engine, COLOURS, Use("one"), tokens(engine, COLOURS, Use("one")), expected)


def test_batches_equal_single_requests(engine: Engine, adapter: Make) -> None:
    engine.load_adapter("one", adapter())
    prompts = [engine.tokenize(text) for text in (COLOURS, "Once", FRANCE, COLOURS * 3)]
    firsts = [len(prompt) - 1 for prompt in prompts]
    for use in (PLAIN_BASE, Use("one"), Use("one", 0.5)):
        for prompt, rows in zip(prompts, engine.logits_batch(prompts, use), strict=True):
            assert np.abs(rows - engine.logits(prompt, use)).max() <= ROUNDING
        rows = list(engine.logits_batch(prompts, use, firsts=firsts))
        assert [row.shape for row in rows] == [(1, engine.vocabulary_size)] * len(prompts)
    for sampling in (Sampling(max_tokens=6), Sampling(max_tokens=6, stop=("capital", "\n")), Sampling(max_tokens=0)):
        single = ["".join(p.text for p in engine.generate(prompt, Use("one"), sampling)) for prompt in prompts]
        assert engine.generate_batch(prompts, Use("one"), sampling) == single
    assert engine.generate_batch([], PLAIN_BASE) == []


def test_an_adapter_that_goes_away_ends_its_answer(engine: Engine, adapter: Make) -> None:
    engine.load_adapter("one", adapter())
    started = engine.generate(engine.tokenize(COLOURS), Use("one"), SHORT)
    next(started)
    engine.unload_adapter("one")
    engine.load_adapter("one", adapter(seed=2))
    with pytest.raises(UsageError, match="unloaded"):
        next(started)
    assert len(tokens(engine, COLOURS, Use("one"))) == 6


def test_many_answers_one_after_the_other(engine: Engine, adapter: Make) -> None:
    for seed, rank in ((1, 4), (2, 8), (3, 64)):
        engine.load_adapter(f"rank{rank}", adapter(seed=seed, rank=rank))
    alone = {name: tokens(engine, COLOURS, Use(name)) for name in engine.adapters}
    again = [(name, tokens(engine, COLOURS, Use(name))) for name in chain(*[engine.adapters] * 2)]
    for name, made in again:
        assert_same(engine, COLOURS, Use(name), made, alone[name])
