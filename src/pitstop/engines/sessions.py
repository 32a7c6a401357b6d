"""Which conversation's KV a request may continue: pure bookkeeping, no model.

KV belongs to (base, adapter, scale, tokens). A session is one sequence of the engine's KV with the tokens in it and the
tag they were computed under; a session of another tag is never continued, only emptied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pitstop.errors import Busy


@dataclass(frozen=True)
class Tag:
    """Under what KV was computed. A new load of the same name is another generation."""

    adapter: str | None = None
    generation: int = 0
    scale: float = 0.0


BASE_TAG = Tag()


@dataclass
class Session:
    """One sequence of the KV."""

    sequence: int
    tag: Tag | None = None  # None: nothing in it that may be continued
    tokens: list[int] = field(default_factory=list)  # exactly those whose KV the sequence holds
    used: int = 0  # when, in requests
    busy: bool = False  # an answer is being made in it


class Sessions:
    """A fixed number of sequences, handed out by tag and common prefix."""

    def __init__(self, count: int) -> None:
        self._all = [Session(sequence) for sequence in range(count)]
        self._requests = 0

    def take(self, tag: Tag, tokens: Sequence[int]) -> tuple[Session, int]:
        """Return a session for a prompt, marked busy, and how many of its first tokens may stay.

        The one of the same tag with the longest common prefix, if it continues that conversation; else a free one;
        else the least recently used.

        Raises:
            Busy: every session is in the middle of an answer.
        """
        idle = [session for session in self._all if not session.busy]
        if not idle:
            raise Busy(
                f"all {len(self._all)} conversations are in the middle of an answer",
                cure="finish or close one, or open the engine with more sequences",
            )
        continued = [session for session in idle if _continues(session, tag, tokens)]
        if continued:
            chosen = max(continued, key=lambda session: (common_prefix(session, tag, tokens), session.used))
        else:
            chosen = min(idle, key=lambda session: (session.tag is not None, session.used))
        self._requests += 1
        chosen.used, chosen.busy = self._requests, True
        return chosen, common_prefix(chosen, tag, tokens)

    def tagged(self, adapter: str) -> list[Session]:
        """Return the sessions that hold anything computed under an adapter of this name."""
        return [session for session in self._all if session.tag is not None and session.tag.adapter == adapter]


def common_prefix(session: Session, tag: Tag, tokens: Sequence[int]) -> int:
    """Return how many tokens of the prompt the session holds, computed under this tag."""
    if session.tag != tag:
        return 0
    length = min(len(session.tokens), len(tokens))
    if session.tokens[:length] == list(tokens[:length]):
        return length
    return next(index for index in range(length) if session.tokens[index] != tokens[index])


def _continues(session: Session, tag: Tag, tokens: Sequence[int]) -> bool:
    # Conversations share a system message: a new one must not throw away most of an old one for the sake of that.
    common = common_prefix(session, tag, tokens)
    return common > 0 and (common == len(tokens) or 2 * common >= len(session.tokens))
