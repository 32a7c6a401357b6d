"""Which conversation's KV a request may continue: pure bookkeeping, no model.

KV belongs to (base, adapters, scales, tokens). A session is one sequence of the engine's KV with the tokens in it and
the tag they were computed under; a session of another tag is never continued, only emptied. But what stands before the
invocation of an activated adapter was computed by the plain base, and whoever else begins so may have a copy of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pitstop.engines.invocation import NEVER
from pitstop.errors import Busy

COPY_WORTH = 48  # tokens; evaluating fewer costs less than copying a sequence's whole buffer


@dataclass(frozen=True)
class Tag:
    """Under what KV was computed: the adapters with their scales. A new load of a name is another generation."""

    adapters: tuple[tuple[str, int, float], ...] = ()  # (name, generation, scale)
    active_from: int = 0  # the position from which on they act; above 0 only for an activated adapter

    @property
    def plain_until(self) -> int:
        """Where what the plain base computes ends."""
        return self.active_from if self.adapters else NEVER

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(name for name, _, _ in self.adapters)


BASE_TAG = Tag()


@dataclass
class Session:
    """One sequence of the KV."""

    sequence: int
    tag: Tag | None = None  # None: nothing in it that may be continued
    tokens: list[int] = field(default_factory=list)  # exactly those whose KV the sequence holds
    used: int = 0  # when, in requests
    busy: bool = False  # an answer is being made in it


@dataclass(frozen=True)
class Place:
    """Where a prompt goes, and what of it is there already."""

    session: Session
    displaces: bool  # the session holds another conversation, which has to make room
    common: int  # tokens of the prompt that the session holds
    donor: Session | None = None  # another session that holds more of it, to copy from
    lent: int = 0  # tokens that the donor holds


class Held(Protocol):
    """Tokens with their KV, wherever that is."""

    @property
    def tag(self) -> Tag | None:
        """Under what it was computed."""

    @property
    def tokens(self) -> list[int]:
        """Whose KV it is."""


class Sessions:
    """A fixed number of sequences, handed out by tag and common prefix."""

    def __init__(self, count: int) -> None:
        self._all = [Session(sequence) for sequence in range(count)]
        self._requests = 0

    def __iter__(self) -> Iterator[Session]:
        return iter(self._all)

    @property
    def busy(self) -> bool:
        """Whether an answer is being made in any of them."""
        return any(session.busy for session in self._all)

    def take(self, tag: Tag, tokens: Sequence[int]) -> Place:
        """Return a session for a prompt, marked busy.

        The one of the same tag with the longest common prefix, if it continues that conversation; else a free one;
        else the least recently used. Where another session of the tag shares a long beginning (a system message), it
        is named as the donor.

        Raises:
            Busy: every session is in the middle of an answer.
        """
        idle = [session for session in self._all if not session.busy]
        if not idle:
            raise Busy(
                f"all {len(self._all)} conversations are in the middle of an answer",
                cure="finish or close one, or open the engine with more sequences",
            )
        common = {session.sequence: common_prefix(session, tag, tokens) for session in self._all}
        continued = [session for session in idle if _continues(session, tag, common[session.sequence], len(tokens))]
        if continued:
            chosen = max(continued, key=lambda session: (common[session.sequence], session.used))
        else:
            chosen = min(idle, key=lambda session: (session.tag is not None, session.used))
        displaces = not continued and chosen.tag is not None
        self._requests += 1
        chosen.used, chosen.busy = self._requests, True
        kept = common[chosen.sequence]
        donor = max(self._all, key=lambda session: common[session.sequence])
        lent = common[donor.sequence]
        if lent - kept < COPY_WORTH:
            return Place(chosen, displaces, kept)
        return Place(chosen, displaces, kept, donor, lent)

    def restart(self) -> None:
        """Forget in what order sessions were used."""
        self._requests = 0
        for session in self._all:
            session.used = 0

    def tagged(self, adapter: str) -> list[Session]:
        """Return the sessions that hold anything computed under an adapter of this name."""
        return [session for session in self._all if session.tag is not None and adapter in session.tag.names]


def common_prefix(held: Held, tag: Tag, tokens: Sequence[int]) -> int:
    """Return how many tokens of the prompt are held, computed under this tag, or by the base where that computes."""
    if held.tag is None:
        return 0
    length = min(len(held.tokens), len(tokens))
    if held.tag != tag:
        length = min(length, held.tag.plain_until, tag.plain_until)
    if held.tokens[:length] == list(tokens[:length]):
        return length
    return next(index for index in range(length) if held.tokens[index] != tokens[index])


def _continues(session: Session, tag: Tag, common: int, prompt_length: int) -> bool:
    if session.tag is None or session.tag.adapters != tag.adapters:
        return False
    # Conversations share a system message: a new one must not throw away most of an old one for the sake of that.
    return common > 0 and (common == prompt_length or 2 * common >= len(session.tokens))
