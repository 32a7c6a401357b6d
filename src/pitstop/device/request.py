"""What is asked of a runtime, and the events that answer it."""

import queue
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pitstop.bundle.manifest import Bundle
from pitstop.engines.base import Piece, Sampling, Stream, Usage, Use
from pitstop.errors import PitstopError, UsageError


class UnknownModel(UsageError):
    """A request names a model that is not served."""


class PromptTooLong(UsageError):
    """A prompt leaves no room for an answer."""


class QueueFull(UsageError):
    """More requests wait than may."""


class Starting(UsageError):
    """The base is not in memory yet."""


class Stopped(UsageError):
    """The runtime is closing, or closed."""


@dataclass(frozen=True)
class ServedModel:
    """One name a client may ask for, and what answers under it."""

    name: str
    bundle: Bundle
    path: Path | None = None  # of the adapter or merged model; None: the base as it is
    local: bool = False  # loaded by its path, not from the release
    id: int = -1  # of an adapter, given by the runtime and never twice

    @property
    def scalable(self) -> bool:
        """Whether requests may scale it and add it to others: the base and merged models are what they are."""
        return self.path is not None and not self.bundle.merged

    @property
    def key(self) -> str:
        """Its name in the engine: what is loaded later under the same name is another adapter."""
        return f"{self.name}#{self.id}"


@dataclass(frozen=True)
class Limits:
    """What a runtime may use of its board."""

    context_length: int = 2048  # tokens per conversation; a base that holds less sets its own
    sequences: int = 8  # conversations in memory, and requests answered at the same time
    waiting: int = 64  # requests that may wait beyond those
    threads: int | None = None  # None: the engine's choice
    own_lanes: int = 4  # adapters that may get conversations of their own beside the shared ones: faster swaps
    parked_memory: int = 64 << 20  # bytes for conversations that make room for others
    parked_disk: int = 0  # bytes for those beyond that
    parked_folder: Path | None = None  # where they lie; None: nowhere
    adapter_budget: int | None = None  # bytes of adapters in memory; None: half of what is free once the base is there


@dataclass(frozen=True)
class TokenScore:
    """A token with how likely the model found it."""

    text: bytes  # as it is written; need not be whole UTF-8
    logprob: float | None  # nats; None: nothing came before it
    likeliest: tuple[tuple[bytes, float], ...] = ()  # others at its place, likeliest first


@dataclass(frozen=True)
class Said:
    """Text of an answer, or of its prompt if that was to be repeated, with the tokens it is made of."""

    text: str
    tokens: tuple[TokenScore, ...] = ()  # if log-probabilities were asked for


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    usage: Usage  # its first_token_seconds count from the arrival of the request, waiting and loading included
    swapped: bool  # the request before was answered under other adapters
    seconds: float = 0.0  # from the arrival of the request to its end


Event = str | Said | Finished | PitstopError  # some text, with tokens where asked for; then one of the others, once
Stack = tuple[tuple[ServedModel, float], ...]  # adapters with their scales


@dataclass(eq=False)
class Request:
    """One answer on its way."""

    model: ServedModel
    prompt: str | Sequence[int]  # text, or tokens
    sampling: Sampling
    deliver: Callable[[Event], None]
    stack: Stack = ()  # what it is evaluated under; empty: the plain base
    echo: bool = False  # the answer begins with the prompt
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    usage: Usage = field(default_factory=Usage)
    tokens: list[int] = field(default_factory=list)  # of the prompt, once it is live
    scoring: Generator[list[Piece], None, None] | None = None  # of the prompt's tokens, while that goes on
    scores: list[TokenScore] = field(default_factory=list)
    stream: Stream | None = None  # None until the first token is wanted
    first_token_seconds: float | None = None
    swapped: bool = False
    use: Use = field(init=False)

    def __post_init__(self) -> None:
        named = tuple((adapter.key, scale) for adapter, scale in self.stack)
        self.use = Use(*named[0], named[1:]) if named else Use()

    @property
    def begun(self) -> bool:
        """Whether its first token is out."""
        return self.first_token_seconds is not None

    @property
    def place(self) -> object:
        """Where the engine evaluates it; None: it is not said."""
        return self.stream and self.stream.place

    @property
    def label(self) -> str:
        """Under what it is answered, for people: an adapter, several joined by "+", or the base."""
        return "+".join(adapter.name for adapter, _ in self.stack) or self.model.bundle.base_name

    @property
    def wants_scores(self) -> bool:
        """Whether its prompt's tokens are to be repeated with their log-probabilities."""
        return self.echo and self.sampling.logprobs is not None


class Answer(Iterator[str]):
    """The text of one answer as it comes; closing it early stops the work."""

    def __init__(self, cancel: Callable[[], None], events: "queue.SimpleQueue[Event]") -> None:
        self.finished: Finished | None = None  # once it was read to its end
        self._over = False
        self._cancel = cancel
        self._events = events

    def __next__(self) -> str:
        event = None if self._over else self._events.get()
        if isinstance(event, str):
            return event
        if isinstance(event, Said):
            return event.text
        self._over = True
        if isinstance(event, PitstopError):
            raise event
        self.finished = event or self.finished
        raise StopIteration

    def close(self) -> None:
        """Stop the work, if it still goes on."""
        self._over = True
        self._cancel()

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
