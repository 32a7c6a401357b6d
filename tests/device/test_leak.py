"""A runtime that works for long holds no more than one that has just begun: neither memory nor files."""

import ctypes
import gc
import queue
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from pitstop.device.memory import give_back_freed_memory
from pitstop.device.request import Answer, Event
from pitstop.device.runtime import Runtime
from pitstop.engines.base import Sampling
from pitstop.engines.llama.native import Model
from serving import ALPHA, BASE, BETA, LIMITS, Board, ask

PARTS = 10  # that the cycles are watched in
CYCLES = 1_000  # of load, swap and unload; two requests each
WARM_UP = 100  # cycles until every buffer has been needed once
ALLOWED = 2 << 20  # bytes
PROMPT = (1, 520)  # short: what is computed is not what leaks
ONE = Sampling(max_tokens=1)


@pytest.fixture
def runtime(board: Board) -> Iterator[Runtime]:
    give_back_freed_memory()
    with Runtime.from_release(board.release, LIMITS) as runtime:
        yield runtime


def answer(runtime: Runtime, model: str) -> None:
    """Let a model answer, and wait for the end."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = runtime.text_request(model, PROMPT, ONE, events.put)
    runtime.queue([request])
    "".join(Answer(lambda: runtime.cancel(request), events))


def cycle(runtime: Runtime, path: Path) -> None:
    """Load an adapter, ask it and another model, and unload it."""
    runtime.load_adapter("coming", path)
    for model in ("coming", BETA):
        answer(runtime, model)
    runtime.unload_adapter("coming")


def held() -> tuple[int, int]:
    """Return the resident bytes and the open files of this process, but for memory that was freed already."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()


def growth(runtime: Runtime, path: Path, cycles: int) -> tuple[int, int]:
    """Return by how many bytes and open files so many cycles make this process grow, after it has warmed up.

    What leaks, leaks in every part of the cycles; what is needed once (a thread's first heap, a longer list, a file
    that stays open) shows in some of them. So what three parts of four grow by counts, times the number of parts.
    """
    for _ in range(WARM_UP):
        cycle(runtime, path)
    marks = [held()]
    for _ in range(PARTS):
        for _ in range(cycles // PARTS):
            cycle(runtime, path)
        marks.append(held())
    memory, files = zip(*marks, strict=True)
    return _steady(memory), _steady(files)


def _steady(marks: Sequence[int]) -> int:
    grown = sorted(after - before for before, after in pairwise(marks))
    return grown[len(grown) // 4] * PARTS


@pytest.mark.slow
def test_nothing_grows_with_loads_swaps_and_requests(board: Board, runtime: Runtime) -> None:
    memory, files = growth(runtime, board.adapters[ALPHA], CYCLES)
    assert memory < ALLOWED
    assert files == 0
    assert runtime.loaded == (BETA,)
    assert "".join(runtime.ask(BASE, ask("Hi."), ONE))


@pytest.mark.slow
def test_that_test_can_fail(board: Board, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[Any] = []
    opened: list[Any] = []
    free: Callable[..., None] = lambda model, pointer: leaked.append(pointer)  # noqa: E731
    load = Model.load_adapter

    def load_and_keep_open(model: Model, path: Path, file: Any) -> Any:
        opened.append(path.open("rb"))
        return load(model, path, file)

    monkeypatch.setattr(Model, "free_adapter", free)
    monkeypatch.setattr(Model, "load_adapter", load_and_keep_open)
    memory, files = growth(runtime, board.adapters[ALPHA], 20)
    for file in opened:
        file.close()
    assert memory > ALLOWED
    assert files == 20
