"""Answers on their way on llama.cpp, and what of each is evaluated next."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pitstop.engines.answer import Wording
from pitstop.engines.base import Sampling, Stream, Usage, Use
from pitstop.engines.llama.lanes import Lane
from pitstop.engines.llama.native import BATCH
from pitstop.engines.llama.sampler import Sampler
from pitstop.engines.sessions import BASE_TAG, COPY_WORTH, Session, Tag, common_prefix


@dataclass(eq=False)
class LlamaStream(Stream):
    """An answer in its session."""

    use: Use
    usage: Usage
    tag: Tag
    lane: Lane
    session: Session
    prompt: list[int]
    sampling: Sampling
    sampler: Sampler
    wording: Wording
    waiting: list[int]  # tokens that the session must still take in: the rest of the prompt, or the last token
    behind: "LlamaStream | None" = None  # another one that reads the same beginning now: it is copied then
    awaited: int = 0  # tokens of the prompt that it reads for both
    finished: bool = False
    error: Exception | None = None

    def close(self) -> None:
        if not self.finished:
            self.finished = True
            self.session.busy = False
            self.sampler.close()

    @property
    def waits(self) -> bool:
        """Whether the one that reads for both is at it still."""
        reader = self.behind
        return reader is not None and not reader.finished and len(reader.session.tokens) < self.awaited

    def fail(self, error: Exception) -> None:
        """Close it, and say why; other answers go on."""
        self.error = error
        self.close()

    @property
    def place(self) -> Lane:  # type: ignore[override]
        """Its lane: lanes are evaluated at the same time."""
        return self.lane

    @property
    def plain(self) -> int:
        """How many tokens wait for the plain base, because an activated adapter does not act there yet."""
        return max(0, min(len(self.waiting), self.tag.active_from - len(self.session.tokens)))


@dataclass(frozen=True)
class Portion:
    """What of a stream is evaluated now."""

    stream: LlamaStream
    tokens: list[int]
    last: bool  # its next token follows


def portions(streams: Sequence[LlamaStream], most: int, *, others_wait: bool) -> dict[Tag, list[Portion]]:
    """Return what of each stream is evaluated now, and under what; prompts share what is left.

    Streams of one use have one tag, but for those in which an activated adapter does not act, or not yet.

    Args:
        most: tokens of prompts that are read while others wait for their next token, these or some of another use.
    """
    taken: dict[Tag, list[Portion]] = {}
    speaking = [stream for stream in streams if len(stream.waiting) == 1][:BATCH]
    for stream in speaking:
        taken.setdefault(Tag(stream.tag.adapters), []).append(Portion(stream, stream.waiting[:], True))
    room = min(most, BATCH - len(speaking)) if speaking or others_wait else BATCH
    for stream in streams:
        if len(stream.waiting) > 1 and room:
            plain = stream.plain
            tokens = stream.waiting[: min(room, plain or room)]
            room -= len(tokens)
            tag = BASE_TAG if plain else Tag(stream.tag.adapters)
            taken.setdefault(tag, []).append(Portion(stream, tokens, len(tokens) == len(stream.waiting)))
    return taken


def reader_of(stream: LlamaStream, others: Iterable[LlamaStream]) -> tuple[LlamaStream | None, int]:
    """Return who reads much of the same prompt in the same lane just now, and how many tokens of it."""
    found: LlamaStream | None = None
    most = len(stream.session.tokens) + COPY_WORTH - 1
    for other in others:
        if other.lane is stream.lane and not other.finished and len(other.waiting) > 1:
            reading = Session(other.session.sequence, other.tag, other.prompt)
            shared = min(common_prefix(reading, stream.tag, stream.prompt), len(stream.prompt) - 1)
            if shared > most:
                found, most = other, shared
    return found, most
