"""What every engine checks before and does with the text of an answer."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from pitstop.engines.base import Piece, Sampling, Usage, Use
from pitstop.errors import UsageError


def check_use(use: Use, loaded: Collection[str]) -> bool:
    """Tell whether the adapter changes anything; ``Use()`` and a scale of 0 are the plain base.

    Raises:
        UsageError: no such adapter, or a scale that is no finite number.
    """
    if use.adapter is None:
        return False
    if use.adapter not in loaded:
        have = ", ".join(loaded) or "none"
        raise UsageError(f"no adapter {use.adapter!r} is loaded", cure=f"load it, or name one of: {have}")
    if not math.isfinite(use.scale):
        raise UsageError(f"the scale of an adapter must be a finite number, not {use.scale}")
    return use.scale != 0.0


def check_tokens(tokens: Sequence[int], context_length: int, vocabulary_size: int, *, answer: int = 0) -> None:
    """Refuse a prompt the model cannot take, or that leaves less than ``answer`` tokens of room.

    Raises:
        UsageError: no tokens, more than there is room for, or a number that is no token.
    """
    if not tokens:
        raise UsageError("the prompt is empty", cure="give at least one token")
    if len(tokens) + answer > context_length:
        rest = f", {answer} of them for the answer" if answer else ""
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, the context holds {context_length}{rest}",
            cure="shorten the prompt, or open the engine with a larger context_length",
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary_size:
        raise UsageError(f"a token lies outside of the vocabulary of {vocabulary_size}")


def check_sampling(sampling: Sampling) -> None:
    """Refuse sampling settings that mean nothing.

    Raises:
        UsageError: a temperature, top_p or top_k out of its range, or an empty stop text.
    """
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise UsageError(f"temperature must be 0 or more, not {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, not {sampling.top_p}")
    if sampling.top_k < 0:
        raise UsageError(f"top_k must be 0 (all tokens) or more, not {sampling.top_k}")
    if "" in sampling.stop:
        raise UsageError("a stop text must not be empty")


class StopText:
    """Passes an answer's text on as far as no stop text can begin in it.

    The stop text that is complete first ends the answer, wherever the borders of the tokens lie.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # the end of the text, where a stop text may have begun

    def feed(self, text: str) -> str:
        """Take more text and return what is certain now; nothing after a stop."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [(begin + len(stop), begin) for stop in self._stop if (begin := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return what was held back: no stop text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text are a beginning of the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def pieces(
    room: int,
    sampling: Sampling,
    usage: Usage,
    begun: float,
    next_token: Callable[[int | None], int],
    text_of: Callable[[int | None], str],
    ends: Callable[[int], bool],
) -> Iterator[Piece]:
    """Make the steps of one answer, the same way for every engine.

    Args:
        room: tokens the context still has for the answer.
        begun: when the request came, by `time.perf_counter`.
        next_token: evaluates the token before (None: the prompt) and chooses the next one.
        text_of: the text that became certain with a token; None: what is left at the end.
        ends: whether a token ends the answer.
    """
    stop = StopText(sampling.stop)
    token = None
    usage.finish_reason = "length" if min(room, sampling.max_tokens) < 1 else ""
    for count in range(1, min(room, sampling.max_tokens) + 1):
        token = next_token(token)
        usage.completion_tokens = count
        if count == 1:
            usage.first_token_seconds = time.perf_counter() - begun
        ended = ends(token)
        text = "" if ended else stop.feed(text_of(token))
        if ended or stop.stopped:
            usage.finish_reason = "stop"
        elif count == min(room, sampling.max_tokens):
            usage.finish_reason = "length"
        if usage.finish_reason:
            text += stop.feed(text_of(None))
            usage.finish_reason = "stop" if stop.stopped else usage.finish_reason
            text += stop.finish()
        yield Piece(token, text)
        if usage.finish_reason:
            return
