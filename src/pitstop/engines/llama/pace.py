"""How much of a prompt is read at once while others wait: as much as this machine reads in a moment."""

STALL = 0.1  # seconds that others wait for it, about
LEAST, FIRST = 16, 64  # tokens: never fewer, and before anything is known
MEMORY = 0.2  # weight of a new measurement in the running mean


class Pace:
    """Learns how fast prompts are read."""

    def __init__(self) -> None:
        self._seconds = 0.0  # a token

    @property
    def tokens(self) -> int:
        """How many tokens are read at once."""
        return max(LEAST, int(STALL / self._seconds) // LEAST * LEAST) if self._seconds else FIRST

    def took(self, tokens: int, seconds: float) -> None:
        """Learn from an evaluation of so many tokens; few say little of many."""
        if tokens >= LEAST:
            each = seconds / tokens
            self._seconds = self._seconds + MEMORY * (each - self._seconds) if self._seconds else each
