"""A release in memory: one thread owns the engine, many conversations share it, each under its own adapter.

    submit ──► waiting ──► live: those of one adapter together, adapters in turn ──► Finished
                 │           │
                 └── cancel ─┴──► gone, its place is free

A request names its model; naming another one is the swap. The base is loaded once, an adapter when first asked for.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pitstop.bundle.manifest import Bundle
from pitstop.device.store import Release, Store
from pitstop.device.turns import Turns
from pitstop.engines.base import Engine, Sampling, Stream, Usage, Use
from pitstop.engines.template import Message, render
from pitstop.errors import BaseMismatch, BrokenInput, PitstopError, UsageError

TURN_ALONE = 64  # steps before those that wait for anything else are looked at
JOIN_SECONDS = 1.0  # for the last token to end when the runtime closes

_log = logging.getLogger(__name__)


class UnknownModel(UsageError):
    """A request names a model that is not served."""


class PromptTooLong(UsageError):
    """A prompt leaves no room for an answer."""


class QueueFull(UsageError):
    """More requests wait than may."""


class Stopped(UsageError):
    """The runtime is closing, or closed."""


@dataclass(frozen=True)
class ServedModel:
    """One name a client may ask for, and what answers under it."""

    name: str
    bundle: Bundle
    path: Path | None = None  # the adapter's file; None: the base as it is


@dataclass(frozen=True)
class Limits:
    """What a runtime may use of its board."""

    context_length: int = 2048  # tokens per conversation; a base that holds less sets its own
    sequences: int = 8  # conversations in memory, and requests answered at the same time
    waiting: int = 64  # requests that may wait beyond those
    threads: int | None = None  # None: the engine's choice
    adapter_budget: int | None = None  # bytes of adapters in memory; None: all that are asked for


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    usage: Usage  # its first_token_seconds count from the arrival of the request, waiting and loading included
    swapped: bool  # the engine last worked for another model


Event = str | Finished | PitstopError  # some text; then one of the others, once


@dataclass(eq=False)
class Request:
    """One answer on its way."""

    model: ServedModel
    prompt: str
    sampling: Sampling
    deliver: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    usage: Usage = field(default_factory=Usage)
    stream: Stream | None = None  # None until it is live
    first_token_seconds: float | None = None
    swapped: bool = False

    @property
    def use(self) -> Use:
        """What it is evaluated under."""
        return Use() if self.model.path is None else Use(self.model.name, self.model.bundle.scale)

    @property
    def begun(self) -> bool:
        """Whether its first token is out."""
        return self.first_token_seconds is not None


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


class Runtime:
    """The models of one release, ready to answer. Any thread may call any method."""

    def __init__(self, engine: Engine, served: Sequence[ServedModel], limits: Limits | None = None) -> None:
        """Take over an engine: the runtime's own thread uses it from now on, and closes it."""
        self._engine = engine
        self._limits = limits or Limits()
        self._served = {model.name: model for model in served}
        self._changed = threading.Condition()  # guards the four below
        self._waiting: deque[Request] = deque()
        self._live: list[Request] = []
        self._closing = False  # takes no more requests
        self._stopping = False  # ends those it has
        self._resident: dict[str, int] = {}  # loaded adapter -> bytes, least recently used first
        self._last: str | None = None  # the model of the request that came last
        self._turns = Turns()
        self._last_use: Use | None = None  # what the engine last evaluated under
        self._worker = threading.Thread(target=self._work, name="pitstop-engine", daemon=True)
        self._worker.start()

    @classmethod
    def from_release(cls, release: Release, limits: Limits | None = None) -> "Runtime":
        """Load the base of a release; its adapters follow when they are asked for.

        Raises:
            MissingExtra: the engine is not installed.
            FormatError: the base file is damaged.
            BaseMismatch: the base file is not the one the release names.
        """
        from pitstop.engines.llama import LlamaEngine  # only a device that runs models has it installed

        limits = limits or Limits()
        base = release.base
        engine = LlamaEngine(
            release.base_path(),
            base_sha256=base.base_sha256,
            context_length=min(limits.context_length, base.context_length),
            sequences=limits.sequences,
            threads=limits.threads,
        )
        adapters = [ServedModel(name, bundle, path) for name, (bundle, path) in release.adapters().items()]
        return cls(engine, [ServedModel(base.name, base), *adapters], limits)

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models a request may name, the base first."""
        return tuple(self._served.values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """The adapters in memory now."""
        return tuple(self._resident)

    def model(self, name: str) -> ServedModel:
        """Return the served model of a name.

        Raises:
            UnknownModel: there is none, with those there are.
        """
        if name not in self._served:
            raise UnknownModel(f"there is no model {name!r} here", cure=f"ask for one of: {', '.join(self._served)}")
        return self._served[name]

    def submit(
        self, model: str, messages: Sequence[Message], sampling: Sampling, deliver: Callable[[Event], None]
    ) -> Request:
        """Queue a request; ``deliver`` gets its events on the runtime's thread and must neither block nor raise.

        Raises:
            UnknownModel: no model of this name is served.
            UsageError: the chat template refuses the messages.
            QueueFull: too many requests wait.
            Stopped: the runtime is closing.
        """
        served = self.model(model)
        prompting = served.bundle.prompting
        sampling = dataclasses.replace(sampling, stop=(*prompting.stop, *sampling.stop))
        request = Request(served, render(prompting, messages), sampling, deliver)
        with self._changed:
            if self._closing:
                raise Stopped("pitstop is shutting down here", cure="ask again when it is back")
            if len(self._live) + len(self._waiting) >= self._limits.sequences + self._limits.waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already", cure="ask again in a moment")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def ask(self, model: str, messages: Sequence[Message], sampling: Sampling | None = None) -> Answer:
        """Return the answer to messages, piece by piece as it comes.

        Raises:
            as `submit`; and while it is read, whatever hinders this request (`PromptTooLong`, a damaged adapter …).
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(model, messages, sampling or Sampling(), events.put)
        return Answer(lambda: self.cancel(request), events)

    def cancel(self, request: Request) -> None:
        """Forget a request whose answer nobody reads any more; it gets no further events."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self, grace: float = 3.0) -> bool:
        """Let live requests finish for ``grace`` seconds, end the rest, close the engine; tell whether it closed.

        It does not when a long prompt is being read just now: then only the end of the process stops that.
        """
        with self._changed:
            self._closing = True
            dropped = list(self._waiting)
            self._waiting.clear()
        for request in dropped:
            _deliver(request, _stopped())
        with self._changed:
            self._changed.wait_for(lambda: not self._live, grace)
            self._stopping = True
            self._changed.notify_all()
        self._worker.join(JOIN_SECONDS)
        if not self._worker.is_alive():
            return True
        for request in list(self._live):
            _deliver(request, _stopped())
        return False

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # From here on: the runtime's own thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or self._live)
                if self._stopping:
                    break
                admitted = self._admit()
            for request in admitted:
                self._guarded([request], partial(self._start, request))
            self._take_turn()
        for request in tuple(self._live):
            self._end(request, _stopped())
        self._engine.close()

    def _take_turn(self) -> None:
        """Let the requests of one use advance, for as long as their turn lasts."""
        self._end_cancelled()
        if not self._live:
            return
        use = self._turns.choose(self._live)
        alone = all(request.use == use for request in self._live)
        changed = use != self._last_use
        for step in range(TURN_ALONE if alone else self._turns.steps):
            group = [request for request in self._live if request.use == use]
            if not group or self._stopping or (step and self._waiting):
                return
            self._last_use = use
            self._guarded(group, partial(self._advance, group, changed=changed and not step))
            self._end_cancelled()

    def _end_cancelled(self) -> None:
        for request in [request for request in self._live if request.cancelled]:
            self._end(request, None)

    def _guarded(self, group: Sequence[Request], work: Callable[[], None]) -> None:
        """Do some work for requests; if it fails, it fails for them and nobody else."""
        try:
            work()
            return
        except Exception as failed:  # an engine's fault must not end the thread that serves everybody else
            error = _translated(failed, group[0].model.name)
        for request in group:
            if request in self._live:
                self._end(request, error)

    def _admit(self) -> list[Request]:
        # Strictly in order of arrival: one that waits for adapter memory is not overtaken, so none starves.
        admitted = []
        while self._waiting and len(self._live) < self._limits.sequences and self._has_room(self._waiting[0].model):
            admitted.append(self._waiting.popleft())
            self._live.append(admitted[-1])
        return admitted

    def _has_room(self, model: ServedModel) -> bool:
        budget = self._limits.adapter_budget
        if budget is None or model.path is None or not self._live:
            return True  # with nothing live everything else can leave; what is still too big fails at its load
        in_use = {request.model.name: request.model for request in self._live} | {model.name: model}
        return sum(map(_size, in_use.values())) <= budget

    def _advance(self, group: Sequence[Request], *, changed: bool) -> None:
        """Advance requests of one use by one step of the engine, and hand out what they say."""
        begun = time.monotonic()
        all_speak = all(request.begun for request in group)
        pieces = self._engine.advance([request.stream for request in group if request.stream is not None])
        now = time.monotonic()
        if all_speak:
            self._turns.took(now - begun, changed=changed)
        for request, piece in zip(group, pieces, strict=True):
            if piece is not None:
                if request.first_token_seconds is None:
                    request.first_token_seconds = now - request.arrived
                if piece.text:
                    _deliver(request, piece.text)
            if request.stream is None or not request.stream.finished:
                continue
            if request.stream.error is not None:
                self._end(request, _translated(request.stream.error, request.model.name))
            else:
                seconds = request.first_token_seconds or now - request.arrived
                usage = dataclasses.replace(request.usage, first_token_seconds=seconds)
                self._end(request, Finished(usage, request.swapped))

    def _start(self, request: Request) -> None:
        model = request.model
        request.swapped = self._last not in (None, model.name)
        self._last = model.name
        tokens = self._engine.tokenize(request.prompt)
        room = self._engine.context_length - len(tokens)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, a conversation holds {self._engine.context_length} "
                "with its answer",
                cure="leave out the oldest messages, or shorten them",
            )
        if model.path is not None:
            self._load(model, model.path)
        sampling = dataclasses.replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
        request.stream = self._engine.start(tokens, request.use, sampling, request.usage)

    def _load(self, model: ServedModel, path: Path) -> None:
        if model.name in self._resident:
            self._resident[model.name] = self._resident.pop(model.name)  # now the last one to leave
            return
        if model.bundle.base_sha256 != self._engine.base_sha256:
            raise BaseMismatch(
                f"{model.name} was trained on base {model.bundle.base_sha256[:12]}…, "
                f"{self._engine.base_sha256[:12]}… runs here",
                where=path,
                cure="run `pitstop update`",
            )
        size = _size(model)
        self._make_room(model.name, size)
        self._engine.load_adapter(model.name, path)
        self._resident[model.name] = size

    def _make_room(self, name: str, size: int) -> None:
        budget = self._limits.adapter_budget
        if budget is None:
            return
        if size > budget:
            raise UsageError(
                f"{name} needs {size / 1e6:,.1f} MB, all adapters together may have {budget / 1e6:,.1f} MB",
                cure="raise the adapter budget",
            )
        in_use = {request.model.name for request in self._live}
        for idle in [other for other in self._resident if other not in in_use]:
            if sum(self._resident.values()) + size <= budget:
                return
            self._engine.unload_adapter(idle)
            del self._resident[idle]

    def _end(self, request: Request, event: Event | None) -> None:
        if request.stream is not None:
            request.stream.close()
        with self._changed:
            self._live.remove(request)
            self._changed.notify_all()
        if event is not None:
            _deliver(request, event)


def active_release(root: Path) -> Release:
    """Return the release a device root serves.

    Raises:
        UsageError: none is installed and active.
        StorageError: it is damaged.
    """
    release = Store(root).active()
    if release is None:
        raise UsageError("no release is active here", where=root, cure="run `pitstop update` first")
    return release


def _deliver(request: Request, event: Event) -> None:
    if not request.cancelled:
        request.deliver(event)


def _translated(error: Exception, model: str) -> PitstopError:
    if isinstance(error, PitstopError):
        return error
    _log.error("the engine failed under %s", model, exc_info=error)
    return BrokenInput(f"the engine failed: {error}", cure="run `pitstop doctor`")


def _stopped() -> Stopped:
    return Stopped("pitstop is shutting down here: the answer ends early", cure="ask again when it is back")


def _size(model: ServedModel) -> int:
    """Return the bytes of an adapter; 0 if its file is gone, for then its load says so."""
    try:
        return model.path.stat().st_size if model.path else 0
    except OSError:
        return 0
