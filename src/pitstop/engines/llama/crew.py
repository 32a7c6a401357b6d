"""Who evaluates: one lane with all threads, or several lanes at the same time, which share the threads.

Threads that evaluate one lane together wait for each other about a thousand times a token. Lanes wait for nobody: two
of them with one thread each make far more tokens than one with two. Measured with SmolLM2-135M and adapters of r=16 on
two x86 cores, tokens/s of all answers:

    answers of a lane                      1 in Q8_0   1 in Q4_0   2 in Q4_0
    one lane, two threads                  133         169         242
    two lanes at once, one thread each     224         272         311

(Two answers of a lane in Q8_0 are better not evaluated at once: see `rows`.)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pitstop.engines.llama.threads import Threads

T = TypeVar("T")


class Crew:
    """The threads of an engine."""

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(threads.most - 1, "pitstop-lane") if threads.most > 1 else None

    @property
    def lanes(self) -> int:
        """How many lanes can be evaluated at the same time."""
        return self.threads.count

    def evaluate(self, job: Callable[[int], T]) -> T:
        """Have one lane evaluated, with all threads; the job gets their number."""
        self.threads.begin()
        result = job(self.threads.count)
        self.threads.end()
        return result

    def evaluate_all(self, jobs: Sequence[Callable[[int], T]]) -> list[T]:
        """Have several lanes evaluated at the same time, which share the threads."""
        if len(jobs) == 1 or self._others is None:
            return [self.evaluate(job) for job in jobs]
        share = max(1, self.threads.count // len(jobs))
        others = [self._others.submit(job, share) for job in jobs[1:]]
        first = jobs[0](share)
        return [first, *(other.result() for other in others)]

    def close(self) -> None:
        """End the threads."""
        if self._others is not None:
            self._others.shutdown()
