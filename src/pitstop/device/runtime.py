"""A release in memory: many conversations share one engine, each under its own adapter.

A request names its model; naming another one is the swap. The base is loaded once, an adapter when first asked for. The
one thread that owns the engine does what is asked of it (`worker`).
"""

import dataclasses
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pitstop.device.adapters import Catalogue, local_model
from pitstop.device.engine import open_engine
from pitstop.device.metrics import Metrics
from pitstop.device.request import (
    Answer,
    Event,
    Finished,
    Limits,
    PromptTooLong,
    QueueFull,
    Request,
    ServedModel,
    Stopped,
    UnknownModel,
)
from pitstop.device.store import Release, Store
from pitstop.device.worker import Worker
from pitstop.engines import machine
from pitstop.engines.base import Engine, Sampling
from pitstop.engines.template import Message, render
from pitstop.errors import UsageError

# Whoever uses a runtime finds here what it speaks of.
__all__ = [
    "Answer",
    "Event",
    "Finished",
    "Limits",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "Runtime",
    "ServedModel",
    "Stopped",
    "UnknownModel",
    "active_release",
]

SHARE_OF_FREE = 0.5  # of the memory that is free beside the base: what adapters may have if nothing else was said


class Runtime:
    """The models of one release, ready to answer. Any thread may call any method."""

    def __init__(
        self,
        engine: Engine,
        served: Sequence[ServedModel],
        limits: Limits | None = None,
        *,
        base_check: Iterator[None] | None = None,
    ) -> None:
        """Take over an engine: the runtime's own thread uses it from now on, and closes it.

        Args:
            base_check: goes on with each step whenever nothing is asked; what it raises ends all answers.
        """
        self.metrics = Metrics()
        self._base = next((model for model in served if model.path is None), served[0])
        self._catalogue = Catalogue(served)
        self._worker = Worker(engine, self._catalogue, limits or Limits(), self.metrics, base_check)

    @classmethod
    def from_release(cls, release: Release, limits: Limits | None = None) -> "Runtime":
        """Load the base of a release; its adapters follow when they are asked for.

        Raises:
            MissingExtra: the engine is not installed.
            FormatError: the base file is damaged.
            BaseMismatch: the base file is not the one the release names.
        """
        limits = limits or Limits()
        base = release.base
        engine = open_engine(base, release.base_path(), limits)
        free = machine.available_bytes()
        if limits.adapter_budget is None and free is not None:
            limits = dataclasses.replace(limits, adapter_budget=int(free * SHARE_OF_FREE))
        adapters = [ServedModel(name, bundle, path) for name, (bundle, path) in release.adapters().items()]
        return cls(engine, [ServedModel(base.name, base), *adapters], limits, base_check=release.check_base())

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models a request may name, the base first."""
        return self._catalogue.models

    @property
    def loaded(self) -> tuple[str, ...]:
        """The adapters in memory now."""
        return tuple(self.resident_bytes)

    @property
    def resident_bytes(self) -> dict[str, int]:
        """The adapters in memory now, least recently used first, with the bytes of their files."""
        return {resident.model.name: resident.size for resident in self._worker.residents.inside}

    @property
    def faults(self) -> dict[str, str]:
        """Adapters of the release that could not be loaded when they were last asked for, or the base, with why."""
        broken = self._worker.broken
        return self._worker.residents.faults | ({self._base.name: broken.what} if broken else {})

    @property
    def requests_now(self) -> tuple[int, int]:
        """How many requests are live, and how many wait."""
        return self._worker.requests_now

    @property
    def default_scales(self) -> dict[int, float]:
        """Scales, by number, of adapters in requests to the plain base that name none themselves."""
        return self._catalogue.default_scales()

    def is_pinned(self, model: ServedModel) -> bool:
        """Whether an adapter never leaves memory to make room for others."""
        return self._worker.residents.is_pinned(model)

    def model(self, name: str) -> ServedModel:
        """Return the served model of a name.

        Raises:
            UnknownModel: there is none, with those there are.
        """
        return self._catalogue.model(name)

    def chat_request(
        self,
        model: str,
        messages: Sequence[Message],
        sampling: Sampling,
        deliver: Callable[[Event], None],
        *,
        scales: Mapping[int, float] | None = None,
    ) -> Request:
        """Return a request for the answer to messages, to be queued; ``scales`` names adapters by number.

        Raises:
            UnknownModel: no model of this name is served, or no adapter has such a number.
            UsageError: the chat template refuses the messages.
        """
        served = self.model(model)
        prompting = served.bundle.prompting
        sampling = dataclasses.replace(sampling, stop=(*prompting.stop, *sampling.stop))
        stack = self._catalogue.stack(served, scales)
        return Request(served, render(prompting, messages), sampling, deliver, stack)

    def text_request(
        self,
        model: str,
        prompt: str | Sequence[int],
        sampling: Sampling,
        deliver: Callable[[Event], None],
        *,
        echo: bool = False,
        scales: Mapping[int, float] | None = None,
    ) -> Request:
        """Return a request for what follows a text or tokens; nothing is added to them, no template and no first token.

        Args:
            echo: the answer begins with the prompt; with its tokens, if ``sampling`` asks for log-probabilities.
                A limit of 0 tokens then asks for nothing else.

        Raises:
            UnknownModel: no model of this name is served, or no adapter has such a number.
        """
        served = self.model(model)
        return Request(served, prompt, sampling, deliver, self._catalogue.stack(served, scales), echo)

    def queue(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their turn, all or none; ``deliver`` gets their events.

        It is called on the runtime's thread and must neither block nor raise.

        Raises:
            UsageError: there are more than ever may wait.
            QueueFull: too many requests wait.
            Stopped: the runtime is closing.
            Untrusted: the base is not what was installed.
        """
        self._worker.queue(requests)

    def submit(
        self, model: str, messages: Sequence[Message], sampling: Sampling, deliver: Callable[[Event], None]
    ) -> Request:
        """Queue a request for the answer to messages.

        Raises:
            as `chat_request` and `queue`.
        """
        request = self.chat_request(model, messages, sampling, deliver)
        self.queue([request])
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
        self._worker.cancel(request)

    def load_adapter(self, name: str, path: Path | None = None, *, pin: bool | None = None) -> ServedModel:
        """Bring an adapter into memory while others generate; all or nothing.

        Args:
            path: an adapter file of this machine, served under the name from now on; None: one that is served.
            pin: never let it leave to make room, or let it again; None: as it was.

        Raises:
            UnknownModel: without a path, and no model of this name is served.
            UsageError: the name is taken or the base's, or the adapter is larger than all may be together.
            Busy: the adapters that answer now leave no room.
            BrokenInput: it is damaged, of another base, or changes nothing; everything is as it was.
            Stopped: the runtime is closing.
        """
        if path is None:
            model = self.model(name)
            if model.path is None:
                raise UsageError(f"{name!r} is the base, which is in memory as long as pitstop runs")
        else:
            model = local_model(name, path, self._base.bundle)
        return self._worker.order(partial(self._load, model, pin, new=path is not None))

    def _load(self, model: ServedModel, pin: bool | None, *, new: bool) -> ServedModel:
        model = self._catalogue.number(model) if new else model
        self._worker.load(model)
        if pin is not None:
            self._worker.residents.pin(model, pin)
        if new:
            self._catalogue.add(model)
        return model

    def unload_adapter(self, name: str) -> None:
        """Let an adapter leave memory; answers under it go on to their end first.

        One that was loaded by its path is served no longer; one of the release is loaded again when it is asked for.

        Raises:
            UnknownModel: no model of this name is served.
            UsageError: it is the base.
            Stopped: the runtime is closing.
        """
        model = self.model(name)
        if model.path is None:
            raise UsageError(f"{name!r} is the base, which cannot be unloaded")
        if model.local:
            self._catalogue.remove(model)
        self._worker.order(partial(self._worker.unload, model))

    def set_default_scales(self, scales: Mapping[int, float]) -> None:
        """Set the scales of adapters, by number, in requests to the plain base that name none themselves.

        Requests that came before keep theirs; adapters that are left out have none.

        Raises:
            UnknownModel: no adapter has such a number.
        """
        self._catalogue.set_default_scales(scales)

    def close(self, grace: float = 3.0) -> bool:
        """Let live requests finish for ``grace`` seconds, end the rest, close the engine; tell whether it closed.

        It does not when a long prompt is being read just now: then only the end of the process stops that.
        """
        return self._worker.close(grace)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
