"""Answers on their way on llama.cpp, and what of each is evaluated next."""

from collections.abc import Sequence
from dataclasses import dataclass

from pitstop.engines.answer import Wording
from pitstop.engines.base import Sampling, Stream, Usage, Use
from pitstop.engines.llama.lanes import Lane
from pitstop.engines.llama.native import BATCH
from pitstop.engines.llama.sampler import Sampler
from pitstop.engines.sessions import Session, Tag

CHUNK = 64  # tokens of a prompt that are read at once while other answers wait for their next token


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
    finished: bool = False
    error: Exception | None = None

    def close(self) -> None:
        if not self.finished:
            self.finished = True
            self.session.busy = False
            self.sampler.close()

    def fail(self, error: Exception) -> None:
        """Close it, and say why; other answers go on."""
        self.error = error
        self.close()


def portions(streams: Sequence[LlamaStream]) -> list[tuple[LlamaStream, list[int], bool]]:
    """Return what each stream evaluates now, and whether its next token follows; prompts share what is left."""
    speaking = [stream for stream in streams if len(stream.waiting) == 1]
    reading = [stream for stream in streams if len(stream.waiting) > 1]
    taken = [(stream, stream.waiting[:], True) for stream in speaking[:BATCH]]
    room = min(CHUNK, BATCH - len(taken)) if speaking else BATCH
    for stream in reading:
        tokens = stream.waiting[:room]
        room -= len(tokens)
        if tokens:
            taken.append((stream, tokens, len(tokens) == len(stream.waiting)))
    return taken
