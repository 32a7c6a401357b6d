"""Requests over one engine: right however they interleave, cancelled, bounded; a bad adapter harms only its own."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.device.runtime import (
    Event,
    Finished,
    Limits,
    PromptTooLong,
    QueueFull,
    Runtime,
    ServedModel,
    Stopped,
    UnknownModel,
)
from pitstop.engines.base import Piece, Sampling
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.llama.engine import LlamaStream
from pitstop.engines.llama.pace import FIRST, Pace
from pitstop.errors import BaseMismatch, BrokenInput, FormatError, UsageError
from serving import ALPHA, BASE, BETA, ENDLESS, LIMITS, QUESTIONS, SAMPLING, Board, ask, damage, published

LONG = Sampling(max_tokens=400)
MODELS = (BASE, ALPHA, BETA)


@pytest.fixture(scope="module")
def shared(board: Board) -> Iterator[Runtime]:
    with Runtime.from_release(board.release, LIMITS) as runtime:
        yield runtime


def limited(board: Board, **changes: int) -> Runtime:
    return Runtime.from_release(board.release, dataclasses.replace(LIMITS, **changes))


def text_of(runtime: Runtime, model: str, question: str, sampling: Sampling = SAMPLING) -> str:
    return "".join(runtime.ask(model, ask(question), sampling))


def test_models_differ(board: Board) -> None:
    assert len({board.expected[model, QUESTIONS[0]] for model in MODELS}) == len(MODELS)


def test_models_in_turn_answer_as_when_cold(board: Board, shared: Runtime) -> None:
    for question in QUESTIONS:
        for model in MODELS:
            assert text_of(shared, model, question) == board.expected[model, question]


def test_a_long_prompt_of_another_model_is_read_in_pieces(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    evaluate = LlamaEngine._step

    def watched(engine: LlamaEngine, lane: Any, tag: Any, pointers: Any, taken: Any, threads: int) -> Any:
        read.extend(len(portion.tokens) for portion in taken)
        return evaluate(engine, lane, tag, pointers, taken, threads)

    monkeypatch.setattr(LlamaEngine, "_step", watched)
    monkeypatch.setattr(Pace, "took", lambda *_: None)
    text = "word " * 300
    with limited(board) as runtime:
        text_of(runtime, BETA, text)
        assert max(read) > 2 * FIRST, "nobody waits"
        runtime.unload_adapter(BETA)
        with runtime.ask(*ENDLESS, LONG) as live:
            next(live)
            read.clear()
            text_of(runtime, BETA, text)
            assert max(read) == FIRST
            next(live)


def test_models_at_the_same_time_answer_as_when_cold(board: Board, shared: Runtime) -> None:
    answers = [
        (model, question, shared.ask(model, ask(question), SAMPLING)) for model in MODELS for question in QUESTIONS
    ]
    for model, question, answer in answers:
        assert "".join(answer) == board.expected[model, question]


@given(
    st.lists(st.tuples(st.sampled_from(MODELS), st.sampled_from(QUESTIONS), st.none() | st.integers(0, 6)), max_size=6)
)
@settings(max_examples=6)
def test_any_interleaving_with_cancels_answers_as_when_cold(
    board: Board, shared: Runtime, requests: list[tuple[str, str, int | None]]
) -> None:
    answers = [shared.ask(model, ask(question), SAMPLING) for model, question, _ in requests]
    for (model, question, cancel_after), answer in zip(requests, answers, strict=True):
        if cancel_after is None:
            assert "".join(answer) == board.expected[model, question]
        else:
            read = "".join(piece for _, piece in zip(range(cancel_after), answer, strict=False))
            answer.close()
            assert board.expected[model, question].startswith(read)


def test_two_threads_hammer(board: Board, shared: Runtime) -> None:
    def hammer(offset: int) -> None:
        for index in range(6):
            model, question = MODELS[(index + offset) % 3], QUESTIONS[(index * offset) % 3]
            assert text_of(shared, model, question) == board.expected[model, question]

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(hammer, (1, 2)))


def test_requests_take_turns_token_by_token(board: Board) -> None:
    order: list[str] = []
    done = threading.Semaphore(0)

    def note(name: str) -> Callable[[Event], None]:
        return lambda event: order.append(name) if isinstance(event, str) else done.release()

    with limited(board) as runtime:
        for name in (BASE, ALPHA):
            runtime.submit(
                name,
                ask("Tell me everything about the sea, the sky and the stars."),
                dataclasses.replace(LONG, max_tokens=40),
                note(name),
            )
        for _ in range(2):
            assert done.acquire(timeout=600)
    turns = sum(before != after for before, after in itertools.pairwise(order))
    assert turns > 10


def test_finished_tells_cost_and_swap(shared: Runtime) -> None:
    swaps, costs = [], []
    for model in (BASE, ALPHA, ALPHA, BETA, BASE):
        answer = shared.ask(model, ask(QUESTIONS[1]), SAMPLING)
        list(answer)
        assert answer.finished is not None
        swaps.append(answer.finished.swapped)
        costs.append(answer.finished.usage)
    assert swaps[1:] == [True, False, True, True]
    assert all(cost.first_token_seconds > 0 and cost.completion_tokens and cost.finish_reason for cost in costs)
    assert costs[2].reused_tokens == costs[2].prompt_tokens - 1  # the same question again


def test_first_token_time_counts_the_wait(board: Board) -> None:
    with limited(board, sequences=1) as runtime:
        before, after = (runtime.ask(BASE, ask(question), SAMPLING) for question in QUESTIONS[:2])
        list(after)
        list(before)
    assert before.finished is not None
    assert after.finished is not None
    assert after.finished.usage.first_token_seconds > before.finished.usage.first_token_seconds


def test_unknown_model_lists_those_served(shared: Runtime) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'gamma'[\s\S]*smollm2, alpha, beta"):
        shared.ask("gamma", ask("hello"))


def test_long_prompt_is_refused(shared: Runtime) -> None:
    with pytest.raises(PromptTooLong, match="a conversation holds 512"):
        list(shared.ask(BASE, ask("word " * 600)))


def test_answer_ends_where_the_context_ends(board: Board) -> None:
    with limited(board, context_length=64) as runtime:
        answer = runtime.ask(BASE, ask("Count from one to a hundred."), Sampling(max_tokens=10_000))
        list(answer)
    assert answer.finished is not None
    cost = answer.finished.usage
    assert cost.prompt_tokens + cost.completion_tokens == 64
    assert cost.finish_reason == "length"


def test_stop_texts_of_bundle_and_request_end_an_answer(board: Board) -> None:
    whole = board.expected[BASE, QUESTIONS[0]]
    word = whole.split()[3]
    served = board.release.base
    prompting = dataclasses.replace(served.prompting, stop=(word,))
    engine = LlamaEngine(board.base, base_sha256=served.base_sha256, context_length=256, sequences=1, threads=1)
    models = [ServedModel(BASE, served), ServedModel("short", dataclasses.replace(served, prompting=prompting))]
    with Runtime(engine, models) as runtime:
        assert text_of(runtime, "short", QUESTIONS[0]) == whole[: whole.index(word)]
        stopping = dataclasses.replace(SAMPLING, stop=(word,))
        assert text_of(runtime, BASE, QUESTIONS[0], stopping) == whole[: whole.index(word)]


def test_closed_answer_frees_its_place(board: Board) -> None:
    with limited(board, sequences=1) as runtime:
        answer = runtime.ask(*ENDLESS, LONG)
        next(answer)
        answer.close()
        assert list(answer) == []
        assert text_of(runtime, BETA, QUESTIONS[0]) == board.expected[BETA, QUESTIONS[0]]


def test_cancelled_request_is_not_finished_first(board: Board) -> None:
    spoke = threading.Event()
    with limited(board, sequences=1) as runtime:
        request = runtime.submit(*ENDLESS, LONG, lambda event: spoke.set())
        spoke.wait()
        runtime.cancel(request)
        assert text_of(runtime, BETA, QUESTIONS[0]) == board.expected[BETA, QUESTIONS[0]]
    assert not request.usage.finish_reason


def test_queue_has_an_end(board: Board) -> None:
    with limited(board, sequences=1, waiting=1) as runtime:
        live = runtime.ask(*ENDLESS, LONG)
        next(live)
        waiting = runtime.ask(BASE, ask(QUESTIONS[0]), SAMPLING)
        with pytest.raises(QueueFull):
            runtime.ask(BASE, ask(QUESTIONS[1]), SAMPLING)
        waiting.close()
        other = runtime.ask(BASE, ask(QUESTIONS[1]), SAMPLING)
        live.close()
        assert "".join(other) == board.expected[BASE, QUESTIONS[1]]


def test_adapters_stay_within_their_budget(board: Board) -> None:
    with limited(board, adapter_budget=board.adapters[ALPHA].stat().st_size) as runtime:
        for model in (ALPHA, BETA, ALPHA):
            assert text_of(runtime, model, QUESTIONS[0]) == board.expected[model, QUESTIONS[0]]
            assert runtime.loaded == (model,)
        together = {model: runtime.ask(model, ask(QUESTIONS[1]), SAMPLING) for model in (BETA, ALPHA, BASE)}
        for model, answer in together.items():
            assert "".join(answer) == board.expected[model, QUESTIONS[1]]


def test_least_recently_used_adapter_leaves(board: Board, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    third = make_adapter(tmp_path / "third.gguf", 7, base_sha256=board.release.base.base_sha256)
    bundle = board.release.adapters()[ALPHA][0]
    models = [published(name, bundle, path) for name, path in {**board.adapters, "third": third}.items()]
    engine = LlamaEngine(board.base, base_sha256=bundle.base_sha256, context_length=256, sequences=2, threads=1)
    with Runtime(engine, models, Limits(adapter_budget=2 * third.stat().st_size)) as runtime:
        for name in (ALPHA, BETA, ALPHA, "third"):
            text_of(runtime, name, QUESTIONS[0], Sampling(max_tokens=1))
        assert set(runtime.loaded) == {ALPHA, "third"}


def test_adapter_beyond_the_budget_is_refused_alone(board: Board) -> None:
    with limited(board, adapter_budget=1000) as runtime:
        with pytest.raises(UsageError, match="all adapters together may have"):
            text_of(runtime, ALPHA, QUESTIONS[0])
        assert text_of(runtime, BASE, QUESTIONS[0]) == board.expected[BASE, QUESTIONS[0]]


def test_bad_adapters_harm_only_their_own_requests(board: Board, tmp_path: Path) -> None:
    base, alpha = board.release.base, board.release.adapters()[ALPHA][0]
    truncated = damage(board.adapters[ALPHA], tmp_path / "truncated.gguf", 100_000)
    other_base = dataclasses.replace(alpha, base_sha256="0" * 64)
    models = [
        ServedModel(BASE, base),
        ServedModel(BETA, *board.release.adapters()[BETA]),
        published("truncated", alpha, truncated),
        ServedModel("missing", alpha, tmp_path / "missing.gguf"),
        ServedModel("other-base", other_base, board.adapters[ALPHA]),
    ]
    engine = LlamaEngine(board.base, base_sha256=base.base_sha256, context_length=512, sequences=3, threads=1)
    with Runtime(engine, models, LIMITS) as runtime:
        answer = runtime.ask(BETA, ask(QUESTIONS[0]), SAMPLING)
        for name, error in (("truncated", FormatError), ("missing", BrokenInput), ("other-base", BaseMismatch)):
            with pytest.raises(error):
                text_of(runtime, name, QUESTIONS[0])
        assert "".join(answer) == board.expected[BETA, QUESTIONS[0]]
        assert runtime.loaded == (BETA,)


class Faulty(LlamaEngine):
    """An engine with a fault of its own under one question."""

    def _say(self, stream: LlamaStream, row: np.ndarray) -> Piece:
        if stream.usage.completion_tokens == 3 and QUESTIONS[1] in self.detokenize(stream.prompt):
            raise ZeroDivisionError("a fault")
        return super()._say(stream, row)


def test_a_fault_of_the_engine_ends_only_its_request(board: Board) -> None:
    base = board.release.base
    engine = Faulty(board.base, base_sha256=base.base_sha256, context_length=512, sequences=2, threads=1)
    with Runtime(engine, [ServedModel(BASE, base)], Limits(sequences=2)) as runtime:
        good = runtime.ask(BASE, ask(QUESTIONS[0]), SAMPLING)
        with pytest.raises(BrokenInput, match="the engine failed: a fault"):
            text_of(runtime, BASE, QUESTIONS[1])
        assert "".join(good) == board.expected[BASE, QUESTIONS[0]]


def test_close_ends_every_answer(board: Board) -> None:
    runtime = limited(board, sequences=1)
    live = runtime.ask(*ENDLESS, LONG)
    next(live)
    waiting = runtime.ask(BASE, ask(QUESTIONS[0]), SAMPLING)
    assert runtime.close(grace=0)
    for answer in (live, waiting):
        with pytest.raises(Stopped):
            list(answer)
    with pytest.raises(Stopped):
        runtime.ask(BASE, ask(QUESTIONS[0]))
    assert runtime.close()


def test_close_lets_answers_finish_within_the_grace(board: Board) -> None:
    runtime = limited(board)
    answer = runtime.ask(ALPHA, ask(QUESTIONS[0]), SAMPLING)
    first = next(answer)
    assert runtime.close(grace=600)
    assert first + "".join(answer) == board.expected[ALPHA, QUESTIONS[0]]
    assert isinstance(answer.finished, Finished)
