"""Adapters that come, go and add up while others generate: all or nothing, and never another one's answer."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.device.adapters import Catalogue
from pitstop.device.request import Event, Finished, Request, Said, ServedModel, Stopped, UnknownModel
from pitstop.device.runtime import Runtime
from pitstop.engines.base import Sampling
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import BaseMismatch, BrokenInput, Busy, FormatError, NoEffect, PitstopError, Untrusted, UsageError
from serving import (
    ALPHA,
    BASE,
    BETA,
    ENDLESS,
    LIMITS,
    QUESTIONS,
    SAMPLING,
    SCALES,
    Board,
    ask,
    cold_stack,
    damage,
    install,
    wait_for,
)

QUESTION = QUESTIONS[0]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def shared(board: Board) -> Iterator[Runtime]:
    with Runtime.from_release(board.release, LIMITS) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared: Runtime) -> Iterator[Runtime]:
    """A runtime that is left as it was found."""
    unload_local(shared)
    yield shared
    unload_local(shared)
    shared.set_default_scales({})


def unload_local(runtime: Runtime) -> None:
    """Unload what is not of the release."""
    for model in runtime.models:
        if model.local:
            runtime.unload_adapter(model.name)


@pytest.fixture(scope="module")
def third(board: Board, make_adapter: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is not of the release."""
    path = tmp_path_factory.mktemp("local") / "third.gguf"
    return make_adapter(path, 7, base_sha256=board.release.base.base_sha256)


def text_of(runtime: Runtime, model: str, question: str = QUESTION) -> str:
    return "".join(runtime.ask(model, ask(question), SAMPLING))


def stacked(runtime: Runtime, model: str, scales: dict[int, float] | None, question: str = QUESTION) -> str:
    """Answer with adapters named by number."""
    return wait(queued(runtime, model, scales, question))


def queued(
    runtime: Runtime, model: str, scales: dict[int, float] | None, question: str = QUESTION
) -> tuple[Request, list[Any], threading.Event]:
    events: list[Any] = []
    done = threading.Event()

    def deliver(event: Event) -> None:
        events.append(event)
        if not isinstance(event, str | Said):
            done.set()

    request = runtime.chat_request(model, ask(question), SAMPLING, deliver, scales=scales)
    runtime.queue([request])
    return request, events, done


def wait(asked: tuple[Request, list[Any], threading.Event]) -> str:
    _, events, done = asked
    assert done.wait(600)
    *texts, last = events
    if isinstance(last, PitstopError):
        raise last
    assert isinstance(last, Finished)
    return "".join(texts)


def number(runtime: Runtime, name: str) -> int:
    return runtime.model(name).id


def test_numbers_are_never_given_twice(board: Board, third: Path) -> None:
    bundle = board.release.base
    catalogue = Catalogue([ServedModel(BASE, bundle), ServedModel("a", bundle, third)])
    first = catalogue.model("a")
    assert (catalogue.model(BASE).id, first.id) == (-1, 0)
    catalogue.remove(first)
    again = catalogue.number(ServedModel("a", bundle, third))
    catalogue.add(again)
    assert again.id == 1
    assert again.key != first.key
    with pytest.raises(UnknownModel, match="no adapter with the number 0"):
        catalogue.stack(catalogue.model(BASE), {0: 1.0})
    with pytest.raises(UsageError, match="served already"):
        catalogue.number(ServedModel("a", bundle, third))


def test_a_stack_has_one_order(board: Board, third: Path) -> None:
    bundle = replace(board.release.base, scale=0.5)
    catalogue = Catalogue([ServedModel(BASE, bundle), *(ServedModel(name, bundle, third) for name in "ab")])
    base, a = catalogue.model(BASE), catalogue.model("a")

    def names(stack: Any) -> list[tuple[str, float]]:
        return [(model.name, scale) for model, scale in stack]

    assert names(catalogue.stack(base, None)) == []
    assert names(catalogue.stack(a, None)) == [("a", 0.5)]
    assert names(catalogue.stack(base, {1: 2.0, 0: 1.0})) == [("a", 1.0), ("b", 2.0)]
    assert names(catalogue.stack(a, {1: 2.0})) == [("a", 0.5), ("b", 2.0)]
    assert names(catalogue.stack(a, {0: 0.0, 1: 2.0})) == [("b", 2.0)]
    catalogue.set_default_scales({1: 3.0})
    assert names(catalogue.stack(base, None)) == [("b", 3.0)]
    assert names(catalogue.stack(base, {})) == []
    assert names(catalogue.stack(a, None)) == [("a", 0.5)]


def test_a_stack_answers_as_when_cold(board: Board, runtime: Runtime) -> None:
    scales = {ALPHA: 0.75, BETA: 0.25}
    by_number = {number(runtime, name): scale for name, scale in scales.items()}
    asked = [queued(runtime, BASE, by_number, question) for question in QUESTIONS]
    alone = [queued(runtime, name, None) for name in (BASE, ALPHA, BETA)]
    for question, one in zip(QUESTIONS, asked, strict=True):
        assert wait(one) == cold_stack(board, scales, question)
    for name, one in zip((BASE, ALPHA, BETA), alone, strict=True):
        assert wait(one) == board.expected[name, QUESTION]


def test_the_scale_of_one_adapter_changes_for_one_request(board: Board, runtime: Runtime) -> None:
    alpha = number(runtime, ALPHA)
    expected = cold_stack(board, {ALPHA: 0.25}, QUESTION)
    assert stacked(runtime, BASE, {alpha: 0.25}) == expected
    assert stacked(runtime, BASE, {alpha: 0.0}) == board.expected[BASE, QUESTION]
    assert text_of(runtime, ALPHA) == board.expected[ALPHA, QUESTION]


def test_default_scales_reach_the_plain_base_alone(board: Board, runtime: Runtime) -> None:
    before = queued(runtime, BASE, None)
    runtime.set_default_scales({number(runtime, BETA): SCALES[BETA]})
    expected = cold_stack(board, {BETA: SCALES[BETA]}, QUESTION)
    assert text_of(runtime, BASE) == expected
    assert wait(before) == board.expected[BASE, QUESTION], "who asked before is answered as before"
    assert stacked(runtime, BASE, {}) == board.expected[BASE, QUESTION], "an empty list is the base itself"
    assert text_of(runtime, ALPHA) == board.expected[ALPHA, QUESTION]
    with pytest.raises(UnknownModel):
        runtime.set_default_scales({99: 1.0})
    assert text_of(runtime, BASE) == expected, "what was refused changed nothing"
    runtime.set_default_scales({})
    assert text_of(runtime, BASE) == board.expected[BASE, QUESTION]


SCALED = {"half": {ALPHA: 0.5}, "both": {ALPHA: 0.75, BETA: 0.25}}  # case -> adapters, beside the plain base
CASES = st.sampled_from((BASE, ALPHA, BETA, "same", *SCALED))
STEPS = st.tuples(CASES, st.sampled_from(QUESTIONS[:2]), st.booleans()) | st.sampled_from((ALPHA, BETA))


@given(st.lists(STEPS, max_size=8))
@settings(max_examples=8)
def test_any_interleaving_of_requests_and_orders_answers_as_when_cold(
    board: Board, shared: Runtime, steps: list[Any]
) -> None:
    """A step asks one of the cases, perhaps to cancel it; or loads other weights under the name "same"."""
    unload_local(shared)
    asked = []
    inside: str | None = None
    for step in steps:
        if isinstance(step, str):
            if inside is not None:
                shared.unload_adapter("same")
            shared.load_adapter("same", board.adapters[step])
            inside = step
            continue
        case, question, cancel = step
        if case == "same" and inside is None:
            with pytest.raises(UnknownModel):
                shared.model(case)
            continue
        scales = {number(shared, name): scale for name, scale in SCALED.get(case, {}).items()} or None
        one = queued(shared, BASE if scales else case, scales, question)
        if cancel:
            shared.cancel(one[0])
        else:
            asked.append((cold(board, case, question, inside), one))
    for expected, one in asked:
        assert wait(one) == expected
    unload_local(shared)


_cold: dict[tuple[str, str], str] = {}


def cold(board: Board, case: str, question: str, inside: str | None) -> str:
    """Return what a cold engine answers in a case."""
    if (case, question) in board.expected:
        return board.expected[case, question]
    scales = {inside: 1.0} if case == "same" and inside else SCALED[case]
    key = (str(scales), question)
    if key not in _cold:
        _cold[key] = cold_stack(board, scales, question)
    return _cold[key]


def test_an_adapter_comes_and_goes_while_others_generate(board: Board, runtime: Runtime, third: Path) -> None:
    with runtime.ask(*ENDLESS, Sampling(max_tokens=400)) as live:
        next(live)
        model = runtime.load_adapter("third", third)
        assert model in runtime.models
        answer = text_of(runtime, "third")
        runtime.unload_adapter("third")
        next(live)
    with pytest.raises(UnknownModel):
        runtime.ask("third", ask(QUESTION))
    assert "third" not in runtime.loaded
    assert answer != board.expected[BASE, QUESTION]
    for name in (BASE, ALPHA):
        assert text_of(runtime, name) == board.expected[name, QUESTION]


def test_other_weights_under_the_same_name_answer_for_themselves(board: Board, runtime: Runtime, third: Path) -> None:
    for path, expected in ((board.adapters[ALPHA], {ALPHA: 1.0}), (board.adapters[BETA], {BETA: 1.0})) * 2:
        runtime.load_adapter("same", path)
        assert text_of(runtime, "same") == cold_stack(board, expected, QUESTION)
        runtime.unload_adapter("same")


def test_who_was_asked_before_it_left_is_answered(board: Board, runtime: Runtime) -> None:
    runtime.load_adapter("same", board.adapters[ALPHA])
    asked = [queued(runtime, "same", None, question) for question in QUESTIONS * 2]
    runtime.unload_adapter("same")
    runtime.load_adapter("same", board.adapters[BETA])
    assert text_of(runtime, "same") == cold_stack(board, {BETA: 1.0}, QUESTION)
    for question, one in zip(QUESTIONS * 2, asked, strict=True):
        assert wait(one) == cold_stack(board, {ALPHA: 1.0}, question)
    inside = runtime._worker.residents
    wait_for(lambda: [one.model.name for one in inside.inside].count("same") == 1)


def bad_adapters(board: Board, make: Make, folder: Path) -> dict[str, tuple[Path, type[PitstopError], str]]:
    """Return files that must be refused, with the error and a word of it."""
    digest = board.release.base.base_sha256
    (folder / "text.gguf").write_text("no adapter")
    os.mkfifo(folder / "pipe.gguf")
    return {
        "truncated": (damage(board.adapters[ALPHA], folder / "cut.gguf", 100_000), FormatError, "cut.gguf"),
        "other base": (make(folder / "other.gguf", 3, base_sha256="0" * 64), BaseMismatch, "base"),
        "no effect": (make(folder / "zero.gguf", 3, strength=0.0, base_sha256=digest), NoEffect, "changes nothing"),
        "NaN": (make(folder / "nan.gguf", 3, strength=float("nan"), base_sha256=digest), FormatError, "not finite"),
        "no adapter": (folder / "text.gguf", FormatError, "text.gguf"),
        "a base": (board.base, BaseMismatch, "does not say which base"),
        "folder": (folder, FormatError, "no regular file"),
        "pipe": (folder / "pipe.gguf", FormatError, "no regular file"),
        "device": (Path("/dev/zero"), FormatError, "no regular file"),
        "missing": (folder / "missing.gguf", FormatError, "cannot be read"),
        "long": (folder / ("x" * 300), FormatError, "cannot be read"),
    }


def test_bad_adapters_change_nothing(board: Board, runtime: Runtime, make_adapter: Make, tmp_path: Path) -> None:
    before = runtime.models, runtime.loaded, runtime.faults
    with runtime.ask(*ENDLESS, Sampling(max_tokens=400)) as live:
        for path, kind, words in bad_adapters(board, make_adapter, tmp_path).values():
            with pytest.raises(kind, match=words):
                runtime.load_adapter("bad", path)
            next(live)
        loaded = runtime.loaded
    assert (runtime.models, runtime.faults) == (before[0], before[2])
    assert set(loaded) == {*before[1], ALPHA}
    assert text_of(runtime, BETA) == board.expected[BETA, QUESTION]
    assert 'pitstop_refused_adapters_total{adapter="bad",reason="no_effect"} 1' in runtime.metrics.render(0, 0, {})


def test_names_that_are_taken_are_refused(board: Board, runtime: Runtime, third: Path) -> None:
    for name in (BASE, ALPHA):
        with pytest.raises(UsageError, match="served already"):
            runtime.load_adapter(name, third)
    for order in (runtime.load_adapter, runtime.unload_adapter):
        with pytest.raises(UsageError, match="is the base"):
            order(BASE)
        with pytest.raises(UnknownModel):
            order("gamma")


def test_an_adapter_of_the_release_leaves_and_comes_back(board: Board, runtime: Runtime) -> None:
    runtime.load_adapter(ALPHA)
    assert ALPHA in runtime.loaded
    for _ in range(2):
        runtime.unload_adapter(ALPHA)
        assert ALPHA not in runtime.loaded
    assert text_of(runtime, ALPHA) == board.expected[ALPHA, QUESTION]
    assert ALPHA in runtime.loaded


def test_a_pinned_adapter_stays(board: Board, third: Path) -> None:
    size = third.stat().st_size
    with Runtime.from_release(board.release, replace(LIMITS, adapter_budget=2 * size)) as runtime:
        runtime.load_adapter(ALPHA, pin=True)
        runtime.load_adapter("third", third)
        for name in (BETA, "third", BETA):
            text_of(runtime, name)
            assert set(runtime.loaded) == {ALPHA, name}
        runtime.load_adapter("third", pin=True)
        with pytest.raises(UsageError, match="are pinned"):
            text_of(runtime, BETA)
        runtime.load_adapter(ALPHA, pin=False)
        assert text_of(runtime, BETA) == board.expected[BETA, QUESTION]
        assert "third" in runtime.loaded
        assert 'pitstop_evictions_total{adapter="beta"}' in runtime.metrics.render(0, 0, {})


def test_adapters_that_answer_do_not_make_room(board: Board, third: Path) -> None:
    size = third.stat().st_size
    with Runtime.from_release(board.release, replace(LIMITS, adapter_budget=size)) as runtime:
        with runtime.ask(*ENDLESS, Sampling(max_tokens=400)) as live:
            next(live)
            with pytest.raises(Busy, match="leave no room for third"):
                runtime.load_adapter("third", third)
        runtime.load_adapter("third", third)
        assert runtime.loaded == ("third",)
        with pytest.raises(UsageError, match="all adapters together"):
            stacked(runtime, BASE, {number(runtime, ALPHA): 1.0, number(runtime, BETA): 1.0})
        assert text_of(runtime, BETA) == board.expected[BETA, QUESTION]


def test_a_file_that_changed_is_not_loaded_again(board: Board, make_adapter: Make, tmp_path: Path) -> None:
    digest = board.release.base.base_sha256
    path = make_adapter(tmp_path / "local.gguf", 8, base_sha256=digest)
    with Runtime.from_release(board.release, replace(LIMITS, adapter_budget=path.stat().st_size)) as runtime:
        runtime.load_adapter("local", path)
        text_of(runtime, ALPHA)
        make_adapter(path, 9, base_sha256=digest)
        with pytest.raises(Untrusted, match="has changed since it was loaded"):
            text_of(runtime, "local")
        assert text_of(runtime, ALPHA) == board.expected[ALPHA, QUESTION]


def test_an_installed_file_that_rots_is_not_loaded(board: Board, tmp_path: Path) -> None:
    release = install(tmp_path, board.base, board.adapters)
    blob = release.adapters()[ALPHA][1]
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")  # a weight is another one, and the file is sound otherwise
    with Runtime.from_release(release, LIMITS) as runtime:
        with pytest.raises(Untrusted, match="has changed since it was installed"):
            text_of(runtime, ALPHA)
        assert text_of(runtime, BETA) == board.expected[BETA, QUESTION]


def test_a_base_that_rots_is_found_while_nothing_is_asked(board: Board, tmp_path: Path) -> None:
    release = install(tmp_path, board.base, {})
    release.base_path().chmod(0o644)
    with release.base_path().open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")
    with Runtime.from_release(release, LIMITS) as runtime:
        wait_for(lambda: bool(runtime.faults))
        assert "has changed since it was installed" in runtime.faults[BASE]
        with pytest.raises(Untrusted, match="the file of the base has changed"):
            text_of(runtime, BASE)


def test_a_sound_base_is_checked_and_answers_go_on(board: Board) -> None:
    steps: list[None] = []

    def check() -> Iterator[None]:
        for _ in range(3):
            steps.append(None)
            yield

    engine = LlamaEngine(board.base, base_sha256=board.release.base.base_sha256, context_length=256, sequences=2)
    with Runtime(engine, [ServedModel(BASE, board.release.base)], base_check=check()) as runtime:
        wait_for(lambda: len(steps) == 3)
        assert text_of(runtime, BASE)
        assert runtime.faults == {}


def test_a_fault_of_the_release_is_remembered_until_it_is_gone(board: Board, tmp_path: Path) -> None:
    good = board.adapters[ALPHA]
    path = tmp_path / "alpha.gguf"
    bundle = board.release.adapters()[ALPHA][0]
    base = board.release.base
    engine = LlamaEngine(board.base, base_sha256=base.base_sha256, context_length=256, sequences=2, threads=1)
    with Runtime(engine, [ServedModel(BASE, base), ServedModel(ALPHA, bundle, path)]) as runtime:
        with pytest.raises(BrokenInput, match="cannot read"):
            text_of(runtime, ALPHA)
        assert set(runtime.faults) == {ALPHA}
        path.write_bytes(good.read_bytes())
        text_of(runtime, ALPHA)
        assert runtime.faults == {}


def test_orders_end_when_the_runtime_closes(board: Board, third: Path) -> None:
    runtime = Runtime.from_release(board.release, LIMITS)
    assert runtime.close()
    for order in (lambda: runtime.load_adapter("third", third), lambda: runtime.unload_adapter(ALPHA)):
        with pytest.raises(Stopped):
            order()
