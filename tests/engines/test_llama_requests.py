"""What a request may ask of the llama engine: several at once, stacks, grammars, bias, penalties, log-probabilities."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitstop.engines.base import PLAIN_BASE, Piece, Sampling, Stream, Usage, Use, log_softmax
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.llama.native import Context, Part
from pitstop.engines.llama.pace import FIRST, LEAST, STALL, Pace
from pitstop.engines.sessions import COPY_WORTH
from pitstop.errors import Busy, UsageError

Make = Callable[..., Path]
ROUNDING = 0.1  # as in test_contract: what evaluation in other portions may move a logit by
SHORT = Sampling(max_tokens=6)


def prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def text_of(engine: LlamaEngine, question: str, sampling: Sampling, use: Use = PLAIN_BASE) -> str:
    return "".join(piece.text for piece in engine.generate(engine.tokenize(prompt(question)), use, sampling))


def pieces_of(engine: LlamaEngine, question: str, sampling: Sampling, use: Use = PLAIN_BASE) -> list[Piece]:
    return list(engine.generate(engine.tokenize(prompt(question)), use, sampling))


def run(engine: LlamaEngine, streams: list[Stream]) -> list[list[int]]:
    """Advance streams together until all are finished."""
    said: list[list[int]] = [[] for _ in streams]
    while not all(stream.finished for stream in streams):
        for tokens, piece in zip(said, engine.advance(streams), strict=True):
            tokens += [piece.token] if piece else []
    return said


def assert_likely(engine: LlamaEngine, tokens: list[int], said: list[int], use: Use) -> None:
    """Every token is what a cold evaluation would say, but for ties within rounding."""
    row = engine.logits([*tokens, *said], use, first=len(tokens) - 1)
    for at, token in enumerate(said):
        assert row[at].max() - row[at][token] < ROUNDING


def test_answers_made_together_are_those_made_alone(open_llama: Any, gguf_adapter: Make) -> None:
    engine = open_llama(sequences=4)
    engine.load_adapter("one", gguf_adapter(seed=1))
    questions = ("Name three colours.", "What is the capital of France?", "Count to five. " * 12, "Hi")
    for use in (PLAIN_BASE, Use("one")):
        prompts = [engine.tokenize(prompt(question)) for question in questions]
        usages = [Usage() for _ in prompts]
        started = [engine.start(p, use, SHORT, usage) for p, usage in zip(prompts, usages, strict=True)]
        for tokens, said in zip(prompts, run(engine, started), strict=True):
            assert len(said) == 6
            assert_likely(engine, tokens, said, use)
        assert {usage.finish_reason for usage in usages} == {"length"}
    engine.close()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the machine is, it reads FIRST tokens of a prompt at once."""
    monkeypatch.setattr(Pace, "took", lambda *_: None)


def test_the_pace_is_what_the_machine_reads_in_a_moment() -> None:
    pace = Pace()
    assert pace.tokens == FIRST
    pace.took(1, 10.0)
    assert pace.tokens == FIRST, "one token says nothing of many"
    for speed in (1000, 200):  # tokens/s
        for _ in range(40):
            pace.took(64, 64 / speed)
        assert pace.tokens == pytest.approx(STALL * speed, abs=LEAST)
    for _ in range(40):
        pace.took(16, 60.0)
    assert pace.tokens == LEAST


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("others_wait", [True, False])
def test_a_long_prompt_is_read_in_pieces_only_while_others_wait(open_llama: Any, others_wait: bool) -> None:
    engine = open_llama(sequences=2)
    prompt = engine.tokenize("word " * (3 * FIRST))[: 3 * FIRST]
    stream, steps = engine.start(prompt, PLAIN_BASE, SHORT, Usage()), 1
    while engine.advance([stream], others_wait=others_wait) == [None]:
        steps += 1
    assert steps == (3 if others_wait else 1)
    stream.close()
    engine.close()


@pytest.mark.usefixtures("steady")
def test_a_long_prompt_does_not_stall_an_answer_that_has_begun(open_llama: Any) -> None:
    engine = open_llama(sequences=2)
    first = engine.start(engine.tokenize(prompt("Count to five.")), PLAIN_BASE, Sampling(max_tokens=8), Usage())
    while not any(engine.advance([first])):
        pass
    long = engine.tokenize("word " * (3 * FIRST))[: 3 * FIRST]
    second = engine.start(long, PLAIN_BASE, SHORT, Usage())
    for _ in range(2):
        spoken, read = engine.advance([first, second])
        assert spoken is not None, "whoever speaks goes on"
        assert read is None
    assert engine.advance([first, second])[1] is not None
    for stream in (first, second):
        stream.close()
    engine.close()


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each evaluation had."""
    counts: list[int] = []
    decode = Context.decode

    def counted(context: Context, parts: Sequence[Part], threads: int) -> int:
        counts.append(sum(len(part.tokens) for part in parts))
        return decode(context, parts, threads)

    monkeypatch.setattr(Context, "decode", counted)
    return counts


def test_one_reads_for_all_that_ask_about_the_same(open_llama: Any, evaluated: list[int]) -> None:
    engine = open_llama(sequences=3)
    text = engine.tokenize("word " * 100)
    questions = [[*text, *engine.tokenize(question)] for question in ("One?", "Two?", "Two?")]
    expected = [run(engine, [engine.start(question, PLAIN_BASE, SHORT, Usage())])[0] for question in questions]
    engine.close()
    engine = open_llama(sequences=3)
    evaluated.clear()
    usages = [Usage() for _ in questions]
    streams = [engine.start(tokens, PLAIN_BASE, SHORT, usage) for tokens, usage in zip(questions, usages, strict=True)]
    said = run(engine, streams)
    assert sum(evaluated) < len(text) + 3 * (SHORT.max_tokens + 4), "read once, not three times"
    for tokens, pieces, alone in zip(questions, said, expected, strict=True):
        assert len(pieces) == len(alone)
        assert_likely(engine, tokens, pieces, PLAIN_BASE)
    assert [usage.reused_tokens >= len(text) for usage in usages] == [False, True, True]
    engine.close()


def test_who_reads_for_others_may_leave(open_llama: Any, evaluated: list[int]) -> None:
    engine = open_llama(sequences=2)
    tokens = engine.tokenize("word " * 100)
    first, second = (engine.start(tokens, PLAIN_BASE, SHORT, Usage()) for _ in range(2))
    assert second.waits
    first.close()
    assert run(engine, [second])[0]
    third = engine.start([1, *tokens], PLAIN_BASE, SHORT, Usage())
    fourth = engine.start([1, *tokens], PLAIN_BASE, SHORT, Usage())
    evaluated.clear()
    assert engine.advance([fourth], others_wait=True) == [None]
    assert not evaluated, "the third reads for both, when its turn comes"
    assert run(engine, [fourth])[0], "but alone it waits for nobody"
    third.close()
    engine.close()


def test_answers_of_two_adapters_are_not_evaluated_together(open_llama: Any, gguf_adapter: Make) -> None:
    engine = open_llama(sequences=2)
    engine.load_adapter("one", gguf_adapter(seed=1))
    streams = [engine.start([1, 2], use, SHORT, Usage()) for use in (PLAIN_BASE, Use("one"))]
    with pytest.raises(UsageError, match="different adapters"):
        engine.advance(streams)
    for stream in streams:
        stream.close()
    engine.close()


def test_a_shared_beginning_is_copied_and_computes_the_same(open_llama: Any, gguf_adapter: Make) -> None:
    engine = open_llama(sequences=3)
    engine.load_adapter("one", gguf_adapter(seed=1))
    system = engine.tokenize("You are a helpful assistant who knows the house. " * 12)[: COPY_WORTH + 20]
    use = Use("one")
    ends = [engine.tokenize(prompt(question)) for question in ("Name three colours.", "Hi", "Hi")]
    conversation = [*system, *ends[0], *range(300, 300 + 2 * len(system))]
    next(iter(engine.generate(conversation[:250], use, Sampling(max_tokens=1))))
    usage = Usage()
    said = [piece.token for piece in engine.generate([*system, *ends[1]], use, SHORT, usage)]
    assert usage.reused_tokens >= len(system)
    assert_likely(engine, [*system, *ends[1]], said, use)
    usage = Usage()
    next(iter(engine.generate([*system, *ends[2]], PLAIN_BASE, SHORT, usage)))
    assert usage.reused_tokens == 0, "nothing is copied across adapters"
    engine.close()


def test_a_stack_adds_the_effects(llama: LlamaEngine, gguf_adapter: Make) -> None:
    one, two = gguf_adapter(seed=1), gguf_adapter(seed=2)
    for name, path in (("one", one), ("same", one), ("two", two)):
        llama.load_adapter(name, path)
    tokens = llama.tokenize(prompt("Name three colours."))

    def last(use: Use) -> np.ndarray:
        return llama.logits(tokens, use, first=len(tokens) - 1)[0]

    halves = Use("one", 0.5, (("same", 0.5),))
    assert np.abs(last(halves) - last(Use("one"))).max() < ROUNDING
    assert np.abs(last(Use("one", 1.0, (("two", 1.0),))) - last(Use("one"))).max() > 1
    assert np.array_equal(last(Use("one", 1.0, (("two", 0.0),))), last(Use("one")))
    for use, words in (
        (Use("one", 1.0, (("one", 1.0),)), "twice"),
        (Use("one", 1.0, (("no", 1.0),)), "no adapter 'no'"),
    ):
        with pytest.raises(UsageError, match=words):
            llama.logits(tokens, use)


def test_unloading_one_of_a_stack_ends_its_answer(llama: LlamaEngine, gguf_adapter: Make) -> None:
    llama.load_adapter("one", gguf_adapter(seed=1))
    llama.load_adapter("two", gguf_adapter(seed=2))
    answer = llama.generate([1, 2, 3], Use("one", 1.0, (("two", 1.0),)), SHORT)
    next(answer)
    llama.unload_adapter("two")
    with pytest.raises(UsageError, match="'two' was unloaded"):
        next(answer)


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_json_schema_is_followed(llama: LlamaEngine, temperature: float) -> None:
    for seed in range(3):
        sampling = Sampling(max_tokens=60, temperature=temperature, seed=seed, json_schema=json.dumps(SCHEMA))
        answer = json.loads(text_of(llama, "What is the capital of France?", sampling))
        assert answer.keys() == {"city", "people"}
        assert isinstance(answer["people"], int)


def test_a_grammar_is_followed_from_the_first_token_to_the_last(llama: LlamaEngine) -> None:
    rules = 'root ::= ("yes" | "no") " " [0-9] [0-9]'
    for temperature in (0.0, 1.5):
        text = text_of(llama, "Is it?", Sampling(max_tokens=20, temperature=temperature, grammar=rules))
        assert text[:-3] in ("yes", "no")
        assert text[-2:].isdigit()


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(grammar="root ::= ("), "grammar"),
        (Sampling(json_schema='{"type": "nonsense"}'), "schema"),
        (Sampling(json_schema="no json"), "schema"),
        (Sampling(json_schema="{}", grammar="root ::= [a]"), "both"),
        (Sampling(min_p=2.0), "min_p"),
        (Sampling(repeat_penalty=0.0), "penalties"),
        (Sampling(logit_bias=((10**6, 1.0),)), "logit_bias"),
        (Sampling(logprobs=-1), "logprobs"),
    ],
)
def test_what_cannot_be_followed_is_refused(llama: LlamaEngine, sampling: Sampling, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        next(llama.generate([1, 2], sampling=sampling))
    assert len(pieces_of(llama, "Hi", SHORT)) == 6, "and leaves its place free"


def test_bias_forbids_and_forces_words(llama: LlamaEngine) -> None:
    question = "What is the capital of France?"
    plain = pieces_of(llama, question, SHORT)
    forbidden = plain[0].token
    without = pieces_of(llama, question, Sampling(max_tokens=6, logit_bias=((forbidden, -1e9),)))
    assert forbidden not in [piece.token for piece in without]
    (wanted,) = llama.tokenize(" Berlin")
    forced = pieces_of(llama, question, Sampling(max_tokens=3, logit_bias=((wanted, 1e9),)))
    assert {piece.token for piece in forced} == {wanted}


def test_penalties_keep_an_answer_from_repeating_itself(llama: LlamaEngine) -> None:
    (echo,) = llama.tokenize(" la")
    stuck = ((echo, 12.0),)
    for penalty in ({"repeat_penalty": 100.0}, {"presence_penalty": 100.0}, {"frequency_penalty": 100.0}):
        tokens = [
            piece.token for piece in pieces_of(llama, "Sing.", Sampling(max_tokens=8, logit_bias=stuck, **penalty))
        ]
        assert tokens.count(echo) < 8
    assert [piece.token for piece in pieces_of(llama, "Sing.", Sampling(max_tokens=8, logit_bias=stuck))].count(
        echo
    ) > 4


def test_min_p_of_one_is_the_likeliest_token(llama: LlamaEngine) -> None:
    hot = Sampling(max_tokens=6, temperature=3.0, min_p=1.0, seed=4)
    assert text_of(llama, "Count to five.", hot) == text_of(llama, "Count to five.", SHORT)


def test_log_probabilities_are_those_of_the_model(llama: LlamaEngine) -> None:
    tokens = llama.tokenize(prompt("What is the capital of France?"))
    pieces = list(llama.generate(tokens, sampling=Sampling(max_tokens=5, logprobs=4)))
    said = [piece.token for piece in pieces]
    expected = log_softmax(llama.logits([*tokens, *said], first=len(tokens) - 1))
    for piece, row in zip(pieces, expected, strict=False):
        assert piece.logprob == pytest.approx(row[piece.token], abs=ROUNDING)
        assert piece.likeliest[0][0] == piece.token
        assert [value for _, value in piece.likeliest] == sorted((value for _, value in piece.likeliest), reverse=True)
        assert len(piece.likeliest) == 4
    (bare,) = llama.generate(tokens, sampling=Sampling(max_tokens=1))
    assert (bare.logprob, bare.likeliest) == (None, ())


def test_every_token_of_a_prompt_is_scored_as_alone(llama: LlamaEngine, gguf_adapter: Make) -> None:
    llama.load_adapter("one", gguf_adapter(seed=1))
    tokens = llama.tokenize("The quick brown fox jumps over the lazy dog. " * 16)[:150]
    for use in (PLAIN_BASE, Use("one")):
        blocks = list(llama.score_each(tokens, use, 3))
        assert len(blocks) == 2, "in blocks: a long prompt is not all in memory, and others may speak between two"
        pieces = [piece for block in blocks for piece in block]
        assert [piece.token for piece in pieces] == tokens[1:]
        expected = llama.score(tokens[:1], tokens[1:], use)
        assert np.allclose([piece.logprob for piece in pieces], expected, atol=1e-3)
        assert all(len(piece.likeliest) == 3 for piece in pieces)
    assert list(llama.score_each(tokens[:1])) == []


def test_answers_advance_between_two_blocks_of_a_score(llama: LlamaEngine) -> None:
    tokens = llama.tokenize("one two three " * 80)[:200]
    alone = [piece for block in llama.score_each(tokens) for piece in block]
    answer = llama.start(llama.tokenize(prompt("Hi")), PLAIN_BASE, SHORT, Usage())
    scored = []
    scoring = llama.score_each(tokens)
    for block in scoring:
        scored += block
        llama.advance([answer])
        with pytest.raises(Busy):
            llama.logits(tokens)
    assert scored == alone
    scoring = llama.score_each(tokens)
    next(scoring)
    scoring.close()
    assert len(llama.logits(tokens)) == len(tokens), "a closed evaluation frees its place"
    answer.close()


def test_tokens_as_they_are_written(llama: LlamaEngine) -> None:
    text = "<|im_start|>user\nnaïve 🙂<|im_end|>"
    assert b"".join(map(llama.token_text, llama.tokenize(text))).decode() == text
