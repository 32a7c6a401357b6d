"""How many threads evaluate: all that may, unless other programs use the cores too.

The threads of llama.cpp wait for each other about a thousand times a token, and spin while they wait. When one has lost
its core to another program, the others spin until it comes back. Two engines of two threads on two cores made one token
a second each (SmolLM2-135M in Q8_0), where one alone makes 157; with one thread each they made 132.

What spins uses its core all the time: threads that together had less processor time than that had to share. Then fewer
go on, and more again when the machine's counters say that there are cores to be had. What is computed is the same, but
for the rounding of attention beyond 512 tokens (see `native.Context`).
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WINDOW = 0.1  # seconds of evaluation that are judged together
SHARE = 0.8  # of their cores' time that threads have when they have them for themselves
PAUSE = 1.0  # seconds before more threads are tried again; doubled whenever that was wrong
LONGEST_PAUSE = 64.0  # seconds
NEARLY = 0.25  # of a core that others may use and still leave it to a thread

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Used:
    """Time that passed, and what was used of it."""

    wall: float  # seconds
    own: float  # core-seconds of this process


def used_now() -> Used:
    """Read this process' clocks."""
    return Used(time.monotonic(), time.process_time())


def busy_now() -> float | None:
    """Return the core-seconds that all programs together have used since the machine started; None: not known."""
    with suppress(OSError, ValueError):
        with _STAT.open() as file:
            fields = file.readline().split()
        user, nice, system, _, _, irq, softirq, stolen = map(int, fields[1:9])
        return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
    return None


class Threads:
    """A number of threads that gives way to other programs."""

    def __init__(
        self, most: int, used: Callable[[], Used] = used_now, busy: Callable[[], float | None] = busy_now
    ) -> None:
        self.count = self.most = most
        self._clocks = used, busy
        self._begun = Used(0.0, 0.0)
        self._window = Used(0.0, 0.0)
        self._looked: tuple[Used, float | None] = Used(0.0, 0.0), None
        self._pause = PAUSE

    def begin(self) -> None:
        """Say that an evaluation begins."""
        if self.most == 1:
            return
        now = self._clocks[0]()
        if self.count < self.most and now.wall - self._looked[0].wall >= self._pause:
            self._look(now)
        self._begun = now

    def end(self) -> None:
        """Say that it has ended: the next one may have fewer threads."""
        if self.count == 1:
            return
        now = self._clocks[0]()
        window = self._window
        window = Used(window.wall + now.wall - self._begun.wall, window.own + now.own - self._begun.own)
        if window.wall >= WINDOW:
            if window.own < SHARE * window.wall * self.count:
                self._give_way(now)
            window = Used(0.0, 0.0)
        self._window = window

    def _give_way(self, now: Used) -> None:
        soon = now.wall - self._looked[0].wall < 2 * self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if soon else PAUSE
        self.count = max(1, self.count // 2)
        self._looked = now, self._clocks[1]()

    def _look(self, now: Used) -> None:
        """Take as many threads as other programs have left cores since the last look."""
        (before, busy_before), busy = self._looked, self._clocks[1]()
        free = float(self.most)
        if busy is not None and busy_before is not None:
            free -= max(0.0, busy - busy_before - (now.own - before.own)) / (now.wall - before.wall)
        self.count = min(self.most, max(self.count, int(free + NEARLY)))
        self._looked, self._window = (now, busy), Used(0.0, 0.0)
