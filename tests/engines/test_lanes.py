"""Contexts of their own for adapters, and parked conversations: nothing that is said depends on them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitstop.demo.smollm2 import SHA256
from pitstop.engines.base import PLAIN_BASE, Sampling, Usage, Use
from pitstop.engines.llama import LlamaEngine, lanes
from pitstop.engines.llama import engine as engine_module
from pitstop.engines.llama.native import Context
from pitstop.engines.llama.threads import Threads
from pitstop.engines.parking import Parking
from pitstop.errors import BrokenInput, UsageError

Make = Callable[..., Path]
Open = Callable[..., LlamaEngine]
ONE, TWO = Use("one"), Use("two")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant who answers in one short sentence.<|im_end|>\n"
TEXT = SYSTEM * 4 + "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def files(gguf_adapter: Make) -> dict[str, Path]:
    return {"one": gguf_adapter(seed=1, size=3.0), "two": gguf_adapter(seed=2, size=3.0)}  # they answer differently


@pytest.fixture
def opened(f16_gguf: Path, files: dict[str, Path]) -> Iterator[Open]:
    """Open an engine with two adapters."""
    engines: list[LlamaEngine] = []

    def make(**options: Any) -> LlamaEngine:
        options = {"sequences": 2, "context_length": 256, "threads": 1, **options}
        engines.append(LlamaEngine(f16_gguf, base_sha256=SHA256, **options))
        for name, path in files.items():
            engines[-1].load_adapter(name, path)
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def settle(engine: LlamaEngine) -> int:
    """Let an idle engine do all it can; return how many things that were."""
    count = 0
    while engine.settle():
        count += 1
    return count


def answer(engine: LlamaEngine, text: str, use: Use, usage: Usage | None = None, steps: int = 4) -> list[int]:
    sampling = Sampling(max_tokens=steps)
    return [piece.token for piece in engine.generate(engine.tokenize(text), use, sampling, usage)]


def test_adapters_with_lanes_answer_as_they_do_without(opened: Open) -> None:
    plain, laned = opened(), opened(own_lanes=2)
    for _ in range(2):
        for use in (ONE, TWO, PLAIN_BASE):
            assert answer(laned, TEXT, use) == answer(plain, TEXT, use)
        settle(laned)
    assert len(list(laned._lanes)) == 3


def test_a_conversation_moves_to_the_new_lane_and_goes_on_there(opened: Open) -> None:
    engine, usage = opened(own_lanes=1), Usage()
    made = answer(engine, TEXT, ONE)
    assert settle(engine) == 1
    answer(engine, TEXT + engine.detokenize(made), ONE, usage)
    assert usage.reused_tokens >= len(engine.tokenize(TEXT))
    assert engine._lanes.of(engine._tag(ONE, [1])) is not engine._lanes.shared


def test_answers_of_one_adapter_stay_together_while_they_are_made(opened: Open) -> None:
    engine = opened(own_lanes=1)
    first = engine.start(engine.tokenize(TEXT), ONE, Sampling(max_tokens=8), Usage())
    engine.advance([first])
    assert settle(engine) == 0
    second = engine.start(engine.tokenize(TEXT), ONE, Sampling(max_tokens=8), Usage())
    engine.advance([first, second])
    for stream in (first, second):
        stream.close()
    assert settle(engine) == 1


def test_often_changed_adapters_get_lanes_however_busy_the_engine_is(opened: Open) -> None:
    engine = opened(own_lanes=2)
    expected = {use: answer(engine, TEXT, use) for use in (ONE, TWO, PLAIN_BASE)}
    assert expected[ONE] != expected[TWO]
    for _ in range(lanes.EARNED):
        for use, tokens in expected.items():
            assert answer(engine, TEXT, use) == tokens
    assert len(list(engine._lanes)) == 3


def test_a_lane_goes_to_another_adapter_only_after_long_disuse(opened: Open) -> None:
    engine = opened(own_lanes=1)
    expected = answer(engine, TEXT, TWO)
    answer(engine, TEXT, ONE)
    assert settle(engine) == 1
    own = engine._lanes.of(engine._tag(ONE, [1]))
    answer(engine, TEXT, TWO)
    assert settle(engine) == 0
    for _ in range(lanes.PATIENCE):
        answer(engine, TEXT, PLAIN_BASE, steps=1)
    assert answer(engine, TEXT, TWO) == expected
    assert settle(engine) == 1
    assert engine._lanes.of(engine._tag(TWO, [1])) is own
    assert answer(engine, TEXT, TWO) == expected


def test_an_adapter_takes_its_lane_with_it(opened: Open, files: dict[str, Path]) -> None:
    engine = opened(own_lanes=2)
    other = answer(engine, TEXT, TWO)
    answer(engine, TEXT, ONE)
    settle(engine)
    engine.unload_adapter("one")
    assert len(list(engine._lanes)) == 2
    engine.load_adapter("one", files["two"])  # other weights under the same name
    assert answer(engine, TEXT, ONE) == other


def test_without_memory_for_a_lane_adapters_share_one(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(own_lanes=2)
    expected = answer(engine, TEXT, ONE)

    def no_memory(*_: Any) -> None:
        raise UsageError("no context for 2 sequences of 256 tokens")

    monkeypatch.setattr(Context, "__init__", no_memory)
    assert settle(engine) == 0
    assert answer(engine, TEXT, ONE) == expected


@pytest.mark.parametrize("disk", [False, True])
def test_a_parked_conversation_comes_back_as_it_was(opened: Open, tmp_path: Path, disk: bool) -> None:
    parking = Parking(0, 1 << 30, tmp_path) if disk else Parking(1 << 30)
    engine, usage = opened(sequences=1, parking=parking), Usage()
    tokens = engine.tokenize(TEXT)
    made = answer(engine, TEXT, ONE)
    answer(engine, "Something else.", TWO)
    assert len(parking) == 1
    again = answer(engine, TEXT + engine.detokenize(made[:2]), ONE, usage)
    assert usage.reused_tokens >= len(tokens)  # nothing of it was evaluated again
    assert again[: len(made) - 2] == made[2:]


def test_what_is_parked_is_exactly_what_the_session_held(opened: Open) -> None:
    engine = opened(sequences=1, parking=Parking(1 << 30))
    answer(engine, TEXT, ONE)
    context = engine._lanes.shared.context
    before = context.state(0)
    answer(engine, "Something else.", TWO)
    common, parked = engine._beginnings.parking.longest(engine._tag(ONE, [1]), engine.tokenize(TEXT))
    assert common == len(engine.tokenize(TEXT))
    assert parked is not None
    assert np.array_equal(parked.state, before)
    assert context.restore(0, before)
    assert np.array_equal(context.state(0), before)


def test_parked_conversations_leave_with_their_adapter(opened: Open, files: dict[str, Path]) -> None:
    engine, usage = opened(sequences=1, parking=Parking(1 << 30)), Usage()
    answer(engine, TEXT, ONE)
    answer(engine, TEXT, PLAIN_BASE)
    engine.unload_adapter("one")
    engine.load_adapter("one", files["two"])
    assert answer(engine, TEXT, ONE, usage) == answer(engine, TEXT, TWO)
    assert usage.reused_tokens == 0


@pytest.fixture
def unyielding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do not give way, whatever else runs on this machine."""
    monkeypatch.setattr(Threads, "end", lambda _: None)


@pytest.mark.usefixtures("unyielding")
def test_lanes_are_evaluated_at_the_same_time(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(own_lanes=2, threads=2)
    for use in (ONE, TWO):
        answer(engine, TEXT, use)
        settle(engine)
    expected = {use: answer(engine, TEXT, use) for use in (ONE, TWO)}
    streams = [engine.start(engine.tokenize(TEXT), use, Sampling(max_tokens=4), Usage()) for use in (ONE, TWO)]
    assert len({stream.place for stream in streams}) == engine.parallel == 2
    both, evaluate = threading.Barrier(2, timeout=60), Context.decode

    def meet(context: Context, parts: Any, threads: int) -> int:
        assert threads == 1, "they share the threads"
        both.wait()  # for ever, if one came after the other
        return evaluate(context, parts, threads)

    monkeypatch.setattr(Context, "decode", meet)
    made: dict[Use, list[int]] = {ONE: [], TWO: []}
    while not all(stream.finished for stream in streams):
        for stream, piece in zip(streams, engine.advance(streams), strict=True):
            made[stream.use] += [piece.token] if piece else []
    assert made == expected


@pytest.mark.usefixtures("unyielding")
def test_a_lane_that_fails_is_no_matter_of_the_others(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(own_lanes=2, threads=2)
    for use in (ONE, TWO):
        answer(engine, TEXT, use)
        settle(engine)
    one, two = (engine.start(engine.tokenize(TEXT), use, Sampling(max_tokens=4), Usage()) for use in (ONE, TWO))
    evaluate = Context.decode
    broken = one.lane.context
    monkeypatch.setattr(
        Context,
        "decode",
        lambda context, parts, threads: 1 if context is broken else evaluate(context, parts, threads),
    )
    pieces = engine.advance([one, two])
    assert pieces[0] is None
    assert pieces[1] is not None
    assert isinstance(one.error, BrokenInput)
    assert (one.finished, two.finished) == (True, False)


def test_an_adapter_gets_no_context_that_the_machine_cannot_spare(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(own_lanes=2)
    monkeypatch.setattr(engine_module, "available_bytes", lambda: 3 * engine.context_bytes)
    answer(engine, TEXT, ONE)
    assert settle(engine) == 0
    assert len(list(engine._lanes)) == 1
    assert "are too much of the" in caplog.text
