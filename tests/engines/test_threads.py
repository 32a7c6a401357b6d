"""Threads give way to other programs, and come back when those have gone."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pitstop.demo.smollm2 import SHA256
from pitstop.engines.base import Sampling, Usage
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.llama.threads import LONGEST_PAUSE, PAUSE, Threads, Used
from pitstop.engines.machine import cores

STEP = 0.12  # seconds of an evaluation here: longer than what is judged together
PATIENCE = 120  # seconds


@dataclass
class Machine:
    """Clocks of a machine on which others use some cores, and evaluations that share the rest."""

    cores: float
    others: float = 0.0
    known: bool = True  # whether it has counters
    wall: float = 100.0
    own: float = 0.0
    busy: float = 50.0

    def pass_by(self, seconds: float, threads: int = 0) -> None:
        mine = min(threads, self.cores - self.others)
        self.wall += seconds
        self.own += seconds * mine
        self.busy += seconds * (mine + self.others)

    def threads(self, most: int) -> Threads:
        return Threads(most, lambda: Used(self.wall, self.own), lambda: self.busy if self.known else None)

    def evaluate(self, threads: Threads, seconds: float = STEP) -> int:
        """Evaluate for some time; return the most threads it had."""
        end, most = self.wall + seconds, 0
        while self.wall < end:
            threads.begin()
            most = max(most, threads.count)
            self.pass_by(STEP, threads.count)
            threads.end()
        return most


def test_alone_all_threads_go_on() -> None:
    machine = Machine(cores=4)
    threads = machine.threads(4)
    machine.evaluate(threads, 10)
    assert threads.count == 4


def test_one_shared_moment_is_enough_to_give_way() -> None:
    machine = Machine(cores=2, others=1)
    threads = machine.threads(2)
    machine.evaluate(threads)
    assert threads.count == 1


@pytest.mark.parametrize(("others", "left"), [(1.0, 3), (2.0, 2), (3.5, 1), (0.2, 4)])
def test_as_many_go_on_as_others_leave_cores(others: float, left: int) -> None:
    machine = Machine(cores=4, others=others)
    threads = machine.threads(4)
    machine.evaluate(threads, 10)
    assert threads.count == left


def test_they_come_back_when_the_others_have_gone_even_without_work_meanwhile() -> None:
    machine = Machine(cores=2, others=2)
    threads = machine.threads(2)
    machine.evaluate(threads, 5)
    assert threads.count == 1
    machine.others = 0
    machine.pass_by(20)
    machine.evaluate(threads, 2 * PAUSE + STEP)
    assert threads.count == 2


def test_without_counters_it_tries_ever_more_rarely() -> None:
    machine = Machine(cores=2, others=1, known=False)
    threads = machine.threads(2)
    tries = sum(machine.evaluate(threads) == 2 for _ in range(round(300 / STEP)))
    assert 1 < tries < 12
    machine.others = 0
    machine.evaluate(threads, LONGEST_PAUSE + STEP)
    assert threads.count == 2


def test_the_same_is_computed_with_any_number(f16_gguf: Path) -> None:
    rows = []
    for count in (1, 2, 3):
        with LlamaEngine(f16_gguf, base_sha256=SHA256, context_length=256, sequences=1, threads=count) as engine:
            rows.append(engine.logits(engine.tokenize("The capital of France is Paris. " * 9)))
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Let other processes use so many cores."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(cores() < 2 or not Path("/proc/stat").exists(), reason="needs two cores and Linux")
def test_an_engine_beside_busy_programs_gives_way(f16_gguf: Path) -> None:
    with LlamaEngine(f16_gguf, base_sha256=SHA256, context_length=512, sequences=1, threads=cores()) as engine:
        threads = engine._crew.threads
        with busy(cores()):
            until(engine, lambda: threads.count == 1)


def until(engine: LlamaEngine, done: Callable[[], bool]) -> None:
    """Let an engine answer until something is the case."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        list(engine.generate([1, 2, 3], sampling=Sampling(max_tokens=4), usage=Usage()))
