"""How many answers of one lane are evaluated at once: all of them, or one after the other, whichever is faster here.

A row more in a batch should cost little, for the weights are read once. But some of llama.cpp's kernels for a few rows
are far slower than those for one. SmolLM2-135M in Q8_0, one thread of an x86 core with AVX-512: one row takes 6.4 ms,
two take 26 and three 33; in Q4_0, 4.3, 11.6 and 15.8; eight rows are faster together in both. On other machines it is
otherwise, so it is measured while answers are made.
"""

import statistics
from collections import deque

KEPT = 5  # last times of each kind, of which the median counts
AGAIN = 128  # steps after which the slower way is tried once more


class Rows:
    """Learns what a step costs. Any thread may call any method."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int, bool], deque[float]] = {}
        self._steps = 0

    def at_once(self, rows: int, threads: int, adapted: bool) -> int:
        """Return how many of so many rows to evaluate at once: 1, or all of them.

        Args:
            adapted: whether under adapters, which cost time for themselves.
        """
        self._steps += 1
        alone, together = (self._seconds.get((count, threads, adapted)) for count in (1, rows))
        if not together or not alone:
            return 1 if together else rows
        faster, slower = rows, 1
        if rows * statistics.median(alone) < statistics.median(together):
            faster, slower = 1, rows
        return slower if self._steps % AGAIN == 0 else faster

    def took(self, rows: int, threads: int, adapted: bool, seconds: float) -> None:
        """Learn what so many rows took at once."""
        self._seconds.setdefault((rows, threads, adapted), deque(maxlen=KEPT)).append(seconds)
