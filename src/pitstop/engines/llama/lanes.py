"""Contexts of llama.cpp, so that a swap costs nothing.

llama.cpp lays out its compute graph anew whenever the adapters of a context change: with SmolLM2-135M that takes 44 %
of the time of a token. So an adapter gets a context of its own, as long as there are any to give: a lane. There its
graph stays, and naming another adapter is nothing but an evaluation in another context (0 %). The base, what is scored,
activated adapters, which share the base's KV, and adapters without a lane of their own share one, and change its
adapters by turns.

A lane is memory, and opening it takes as long as some tokens. So an adapter begins in the shared lane; it gets its own,
its conversations with it, when the engine has nothing to do, or when it has changed the shared lane often.

A merged model is other weights, and so always another context: its lane is there from its load to its unload.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pitstop.engines.llama.native import BATCH, Context, Part
from pitstop.engines.sessions import BASE_TAG, Session, Sessions, Tag
from pitstop.errors import UsageError

EARNED = 8  # changes of the shared lane to an adapter that earn it one of its own, however busy the engine is
REMEMBERED = 256  # adapters, each scale of one counted, whose changes are counted
PATIENCE = 32  # requests without one for its owner, and a lane goes to an adapter that has none

_log = logging.getLogger(__name__)


class Lane:
    """A context with the conversations in it."""

    def __init__(self, context: Context, conversations: int, tag: Tag = BASE_TAG) -> None:
        self.context = context
        self.sessions = Sessions(conversations)
        self.used = 0  # when, in requests
        self.tag: Tag | None = tag  # what the context evaluates under

    def evaluate(
        self,
        tag: Tag,
        adapters: Sequence[tuple[Any, float]],
        portions: Sequence[tuple[Session, Sequence[int], int]],
        threads: int,
    ) -> int:
        """Evaluate tokens at the ends of sessions, under one tag and no other; return llama.cpp's status, 0 is success.

        Args:
            adapters: (pointer, scale) of the tag's.
            portions: session, tokens, and for how many of the last tokens logits are wanted.
        """
        if self.tag != tag:
            self.tag = None  # should that fail
            self.context.set_adapters(adapters)
            self.tag = tag
        parts = [Part(session.sequence, len(session.tokens), tokens, last) for session, tokens, last in portions]
        status = self.context.decode(parts, threads)
        for session, tokens, _ in portions:
            if status != 0:
                self.empty(session)
            else:
                session.tokens.extend(tokens)
        return status

    def empty(self, session: Session) -> None:
        """Leave nothing in a session."""
        self.context.cut(session.sequence, 0)
        session.tag, session.tokens = None, []

    def heal(self, session: Session) -> None:
        """Empty a session that may hold values that are not finite, and overwrite them.

        What a sequence is emptied of stays in its buffer, masked: attention takes it times 0, and 0 times NaN is NaN.
        Whoever gets the sequence next would compute nothing else.
        """
        count = len(session.tokens)
        self.empty(session)
        for at in range(0, count, BATCH):
            self.evaluate(BASE_TAG, (), [(session, [0] * min(BATCH, count - at), 0)], 1)
        self.empty(session)

    def forget(self, adapter: str) -> None:
        """Leave nothing that was computed under an adapter of this name, and let go of the adapter."""
        for session in self.sessions.tagged(adapter):
            self.empty(session)
        # A later adapter can get the same address, and would count as "unchanged".
        self.context.set_adapters(())
        self.tag = BASE_TAG


class Lanes:
    """The shared lane, and those that belong to one tag each."""

    def __init__(
        self,
        shared: Context,
        open_context: Callable[[], Context],
        sequences: int,
        own: int,
        leave: Callable[[Lane, Session], None],
    ) -> None:
        """Begin with the shared lane.

        Args:
            shared: its context.
            open_context: returns one more, just alike, for only then one takes another's state; raises UsageError if
                there is no memory for it.
            sequences: of each lane. The last one of the shared lane is for what is evaluated from nothing.
            own: lanes there may be beside the shared one.
            leave: called with a session that is to be emptied because its lane goes to another adapter.
        """
        self._open = open_context
        self._sequences = sequences
        self._limit = own
        self._leave = leave
        self._own: dict[Tag, Lane] = {}
        self._merged: dict[Tag, Lane] = {}
        self._changes: Counter[Tag] = Counter()  # of the shared lane, to each tag without a lane of its own
        self._requests = 0
        self.shared = Lane(shared, sequences - 1)

    def __iter__(self) -> Iterator[Lane]:
        yield self.shared
        yield from self._own.values()
        yield from self._merged.values()

    def add(self, tag: Tag, context: Context) -> None:
        """Take in the context of a merged model: what has its tag is evaluated there, and nothing else is."""
        self._merged[tag] = Lane(context, self._sequences - 1, tag)

    def merged(self, tag: Tag) -> Lane | None:
        """Return the lane of a merged model; None: the tag is of the base or of attached adapters."""
        return self._merged.get(tag)

    def of(self, tag: Tag) -> Lane:
        """Return the lane a request goes to."""
        self._requests += 1
        if tag in self._merged:
            return self._merged[tag]
        if tag not in self._own and _may_own(tag) and tag != self.shared.tag:
            if len(self._changes) > REMEMBERED:
                self._changes.clear()
            self._changes[tag] += 1
            if self._changes[tag] >= EARNED:
                self._grant(tag)
        lane = self._own.get(tag) or self.shared
        lane.used = self._requests
        return lane

    def settle(self) -> bool:
        """Give a lane to the adapter that was asked last of those that have none; tell whether that was possible."""
        sessions = sorted(self.shared.sessions, key=lambda session: -session.used)
        tags = dict.fromkeys(session.tag for session in sessions if session.tag is not None)
        return any(self._grant(tag) for tag in tags if _may_own(tag))

    def _grant(self, tag: Tag) -> bool:
        """Move the conversations of a tag to a lane of its own, if there is one to be had."""
        moving = [session for session in self.shared.sessions if session.tag == tag]
        if any(session.busy for session in moving):
            return False  # answers of one tag are evaluated together, and these are in the shared lane
        lane = self._new_lane() or self._lane_of_another()
        if lane is None:
            return False
        self._own[tag] = lane
        lane.used = self._requests
        for source, session in zip(moving, lane.sessions, strict=False):
            if lane.context.restore(session.sequence, self.shared.context.state(source.sequence)):
                session.tag, session.tokens, session.used = tag, source.tokens, source.used
            self.shared.empty(source)
        del self._changes[tag]
        return True

    def _new_lane(self) -> Lane | None:
        if len(self._own) >= self._limit:
            return None
        try:
            return Lane(self._open(), self._sequences)
        except UsageError as error:
            self._limit = len(self._own)
            _log.warning("no further adapter gets a context of its own: %s", error.what)
            return None

    def _lane_of_another(self) -> Lane | None:
        owner = min(self._own, key=lambda tag: self._own[tag].used, default=None)
        if owner is None or self._requests - self._own[owner].used < PATIENCE or self._own[owner].sessions.busy:
            return None
        lane = self._own.pop(owner)
        for session in lane.sessions:
            self._leave(lane, session)
            lane.empty(session)
        return lane

    def forget(self, adapter: str) -> None:
        """Leave nothing that was computed under an adapter of this name; its own lanes are closed."""
        for lanes in (self._own, self._merged):
            for tag in [tag for tag in lanes if adapter in tag.names]:
                lanes.pop(tag).context.free()
        for tag in [tag for tag in self._changes if adapter in tag.names]:
            del self._changes[tag]
        self.shared.forget(adapter)

    def close(self) -> None:
        """Free every context."""
        for lane in self:
            lane.context.free()


def _may_own(tag: Tag) -> bool:
    # An activated adapter lives beside the base: what that has read is copied within a context only.
    return bool(tag.adapters) and not tag.active_from
