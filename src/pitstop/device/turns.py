"""Whose turn it is on the one engine, and for how many steps: pure bookkeeping, no engine, no clock of its own.

Requests under the same adapters advance together, in one evaluation; others at the same time, where the engine keeps
them in different places. The rest waits for its turn, and a change of adapters costs time, so a turn lasts until that
cost is a small share of it. Who has not been told a first word yet goes before the others, but never twice in a row:
neither those who wait nor those who listen starve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pitstop.engines.base import Use

SHARE = 0.1  # of a turn's time that the change to it may cost
LONGEST = 16  # steps of a turn, whatever a change costs: others wait for it
MEMORY = 0.2  # weight of a new measurement in the running means


class Waiting(Protocol):
    """What is asked of a request here."""

    @property
    def use(self) -> Use:
        """What it is evaluated under; equal ones can be evaluated together."""

    @property
    def begun(self) -> bool:
        """Whether its first token is out."""

    @property
    def place(self) -> object:
        """Where it is evaluated; those in different places can be at the same time, but not with one that has None."""


@dataclass
class Turns:
    """Takes turns between groups of requests, and learns what a change costs."""

    _order: dict[Use, int] = field(default_factory=dict)  # use -> when it had its last turn
    _count: int = 0
    _favoured: bool = False  # the last turn went to somebody who had no first word
    _change: float = 0.0  # seconds more that the first step after a change takes
    _step: float = 0.0  # seconds of a step without one

    def choose(self, live: Sequence[Waiting], most: int = 1) -> list[Use]:
        """Return the uses whose turn it is, of a list of requests that is in order of arrival and not empty.

        Args:
            most: so many may be evaluated at the same time; only such do that all have their first word, for reading a
                prompt takes long and is shared by all threads.
        """
        uses = list(dict.fromkeys(request.use for request in live))
        # Who comes now, or comes back, stands behind all who wait.
        self._order = {use: self._order.get(use, self._count) for use in uses}
        fresh = dict.fromkeys(request.use for request in live if not request.begun)
        self._favoured = bool(fresh) and not self._favoured
        waiting = sorted(uses, key=lambda use: self._order[use])
        chosen = [next(iter(fresh)) if self._favoured else waiting[0]]
        places = {request.use: request.place for request in live}
        taken = {None, places[chosen[0]]}
        beside = waiting if chosen[0] not in fresh and places[chosen[0]] is not None else ()
        for use in beside:
            if len(chosen) < most and use not in fresh and places[use] not in taken:
                chosen.append(use)
                taken.add(places[use])
        for use in chosen:
            self._count += 1
            self._order[use] = self._count
        return chosen

    @property
    def steps(self) -> int:
        """Steps of a turn while somebody else waits for theirs."""
        if not self._step:
            return 1
        return max(1, min(LONGEST, round(self._change / (SHARE * self._step))))

    def took(self, seconds: float, *, changed: bool) -> float:
        """Learn from a step in which every request got one token; return the seconds that a change cost in it."""
        if not changed:
            self._step = _mean(self._step, seconds)
            return 0.0
        cost = max(seconds - self._step, 0.0) if self._step else 0.0
        if self._step:
            self._change = _mean(self._change, cost)
        return cost


def _mean(before: float, now: float) -> float:
    return now if not before else before + MEMORY * (now - before)
