"""Answers on their way on ONNX Runtime."""

from collections.abc import Callable
from dataclasses import dataclass

from pitstop.engines.answer import Wording
from pitstop.engines.base import Sampling, Stream, Usage, Use
from pitstop.engines.onnx.sampler import Sampler
from pitstop.engines.sessions import Session, Tag


@dataclass(eq=False)
class OnnxStream(Stream):
    """An answer in its session."""

    use: Use
    usage: Usage
    tag: Tag
    session: Session
    sampling: Sampling
    sampler: Sampler
    wording: Wording
    waiting: list[int]  # tokens that the session must still take in: the rest of the prompt, or the last token
    leave: Callable[[], None]  # called once, when it is over
    guided: bool = False  # its tokens follow a schema: the last one is in the generator already, not evaluated
    finished: bool = False
    error: Exception | None = None

    def close(self) -> None:
        if not self.finished:
            self.finished = True
            self.session.busy = False
            self.leave()

    def fail(self, error: Exception) -> None:
        """Close it, and say why; other answers go on."""
        self.error = error
        self.close()
