"""The one thread that owns the engine: it answers requests, and does what else is ordered between two of their steps.

queue ──► waiting ──► live: those of one use together, uses in turn ──► Finished
            │           │
            └── cancel ─┴──► gone, its place is free
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from pitstop.device.adapters import Catalogue, Residents
from pitstop.device.metrics import Metrics
from pitstop.device.request import (
    Event,
    Finished,
    Limits,
    PromptTooLong,
    QueueFull,
    Request,
    Said,
    ServedModel,
    Stopped,
    TokenScore,
)
from pitstop.device.turns import Turns
from pitstop.engines.answer import check_tokens
from pitstop.engines.base import Engine, Piece, Use
from pitstop.errors import BrokenInput, PitstopError, Untrusted, UsageError

TURN_ALONE = 64  # steps before those that wait for anything else are looked at
TURN_BESIDE = 8  # steps between two blocks of a prompt that is scored: about the time of such a block
IDLE = 0.1  # seconds without a request after which the engine makes later ones faster
JOIN_SECONDS = 1.0  # for the last token to end when the runtime closes
DONE = object()  # no step is left

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Worker:
    """A thread with an engine. Any thread may call `queue`, `cancel`, `order` and `close`; orders may call the rest."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        limits: Limits,
        metrics: Metrics,
        base_check: Iterator[None] | None = None,
    ) -> None:
        """Start the thread; it closes the engine when it ends."""
        self.broken: Untrusted | None = None  # what was found about the base: nothing is answered any more
        self._base_check = base_check or iter(())  # goes on while nothing is asked
        self.residents = Residents(engine, limits.adapter_budget, metrics)
        self._engine = engine
        self._catalogue = catalogue
        self._limits = limits
        self._metrics = metrics
        self._changed = threading.Condition()  # guards the five below
        self._waiting: deque[Request] = deque()
        self._live: list[Request] = []
        self._orders: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closing = False  # takes no more requests
        self._stopping = False  # ends those it has
        self._scoring: deque[Request] = deque()  # live ones whose prompts are scored, one after the other
        self._leaving: set[str] = set()  # keys of adapters that leave memory when nobody uses them
        self._turns = Turns()
        self._last: Use | None = None  # of the request that came last
        self._last_uses: set[Use] = set()  # what the engine last evaluated under
        self._thread = threading.Thread(target=self._work, name="pitstop-engine", daemon=True)
        self._thread.start()

    @property
    def requests_now(self) -> tuple[int, int]:
        """How many requests are live, and how many wait."""
        return len(self._live), len(self._waiting)

    def queue(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their turn, all or none.

        Raises:
            UsageError: there are more than ever may wait.
            QueueFull: too many requests wait.
            Stopped: the runtime is closing.
            Untrusted: the base is not what was installed.
        """
        if self.broken is not None:
            raise self.broken
        places = self._limits.sequences + self._limits.waiting
        if len(requests) > places:
            raise UsageError(f"{len(requests)} answers at once are too many", cure=f"ask for {places} at most")
        with self._changed:
            if self._closing:
                raise _closed()
            if len(self._live) + len(self._waiting) + len(requests) > places:
                for request in requests:
                    self._metrics.count("requests", adapter=request.label, outcome="queue_full")
                raise QueueFull(f"{len(self._waiting)} requests wait already", cure="ask again in a moment")
            self._waiting.extend(requests)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Forget a request whose answer nobody reads any more; it gets no further events."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self._metrics.count("requests", adapter=request.label, outcome="cancelled")

    def order(self, work: Callable[[], T]) -> T:
        """Have something done on the engine's thread, between two steps of the answers, and wait for it.

        Raises:
            Stopped: the runtime is closing.
            and whatever ``work`` raises.
        """
        done: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise _closed()
            self._orders.append((done, work))
            self._changed.notify_all()
        return done.result()

    def close(self, grace: float) -> bool:
        """Let live requests finish for ``grace`` seconds, end the rest, close the engine; tell whether it closed."""
        with self._changed:
            self._closing = True
            dropped = list(self._waiting)
            self._waiting.clear()
        for request in dropped:
            _deliver(request, _cut_short())
        with self._changed:
            self._changed.wait_for(lambda: not self._live, grace)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(JOIN_SECONDS)
        if not self._thread.is_alive():
            return True
        for request in list(self._live):
            _deliver(request, _cut_short())
        return False

    # From here on: the engine's own thread.

    def load(self, model: ServedModel) -> None:
        """Bring an adapter into memory, to stay there; all or nothing.

        Raises:
            as `Residents.load`.
        """
        self._bring_in([model])
        self._leaving.discard(model.key)

    def _bring_in(self, models: Sequence[ServedModel]) -> None:
        if not all(map(self.residents.holds, models)):
            while self._scoring:  # the probe of a new adapter is evaluated where prompts are scored
                self._score_some()
        in_use = {adapter.key for request in self._live for adapter, _ in request.stack}
        self.residents.load(models, in_use | {model.key for model in models})

    def unload(self, model: ServedModel) -> None:
        """Let an adapter leave memory, if it is there, as soon as no request needs it."""
        if self.residents.holds(model):
            self._leaving.add(model.key)
            self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        """Unload adapters that are to leave, or are served no longer, once no request needs them."""
        served = {model.key for model in self._catalogue.models}
        inside = [resident.model for resident in self.residents.inside]
        unwanted = [model for model in inside if model.key in self._leaving or model.key not in served]
        if not unwanted:
            return
        with self._changed:
            needed = {adapter.key for request in (*self._live, *self._waiting) for adapter, _ in request.stack}
        for model in unwanted:
            if model.key not in needed:
                self.residents.unload(model)
                self._leaving.discard(model.key)

    def _work(self) -> None:
        while True:
            while not self._asked(IDLE) and self._settle():
                pass
            with self._changed:
                self._asked(None)
                if self._stopping:
                    break
                admitted = self._admit()
            for request in admitted:
                self._guarded([request], partial(self._start, request))
            self._end_cancelled()
            self._take_orders()
            self._take_turn()
            self._score_some()
        self._take_orders()
        for request in tuple(self._live):
            self._end(request, _cut_short())
        self._engine.close()

    def _asked(self, seconds: float | None) -> bool:
        """Wait until something is asked for, for some seconds at most; tell whether it is."""
        with self._changed:
            return bool(
                self._changed.wait_for(lambda: self._stopping or self._orders or self._waiting or self._live, seconds)
            )

    def _settle(self) -> bool:
        """Use a moment in which nothing is asked; tell whether there is more to do."""
        try:
            return self._engine.settle() or next(self._base_check, DONE) is not DONE
        except Untrusted as error:
            _log.error("%s", error.what)
            self.broken = error
            return False
        except Exception:  # it was not asked for by anybody
            _log.exception("the engine failed while nothing was asked of it")
            return False

    def _take_orders(self) -> None:
        while self._orders:
            done, work = self._orders.popleft()
            try:
                if self._stopping:
                    raise _closed()
                done.set_result(work())
            except Exception as error:  # whoever gave the order is told
                done.set_exception(_translated(error, "an order"))

    def _take_turn(self) -> None:
        """Let the requests whose turn it is advance, for as long as that lasts."""
        speaking = [request for request in self._live if request.stream is not None]
        if not speaking:
            return
        uses = set(self._turns.choose(speaking, self._engine.parallel))
        alone = all(request.use in uses for request in self._live)
        changed = uses - self._last_uses if self._last_uses else set()
        longest = TURN_BESIDE if self._scoring else TURN_ALONE
        for step in range(longest if alone else self._turns.steps):
            group = [request for request in self._live if request.use in uses and request.stream is not None]
            if not group or self._stopping or (step and (self._waiting or self._orders)):
                return
            self._last_uses = uses
            self._guarded(group, partial(self._advance, group, changed=set() if step else changed, alone=alone))
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
            error = _translated(failed, group[0].label)
        for request in group:
            if request in self._live:
                self._end(request, error)

    def _admit(self) -> list[Request]:
        # Strictly in order of arrival: one that waits for adapter memory is not overtaken, so none starves.
        admitted = []
        while self._waiting and len(self._live) < self._limits.sequences and self._has_room(self._waiting[0]):
            admitted.append(self._waiting.popleft())
            self._live.append(admitted[-1])
        return admitted

    def _has_room(self, request: Request) -> bool:
        if not request.stack or not self._live:
            return True  # with nothing live everything else can leave; what is still too big fails at its load
        in_use = [adapter for live in self._live for adapter, _ in live.stack]
        return self.residents.fits((adapter for adapter, _ in request.stack), in_use)

    def _start(self, request: Request) -> None:
        request.swapped = self._last not in (None, request.use)
        self._last = request.use
        prompt = request.prompt
        request.tokens = self._engine.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if self._room(request) < min(1, request.sampling.max_tokens):
            raise PromptTooLong(
                f"the prompt has {len(request.tokens)} tokens, a conversation holds {self._engine.context_length} "
                "with its answer",
                cure="leave out the oldest messages, or shorten them",
            )
        check_tokens(request.tokens, self._engine.context_length, self._engine.vocabulary_size)
        self._bring_in([adapter for adapter, _ in request.stack])
        if request.wants_scores:
            request.scores = [TokenScore(self._engine.token_text(request.tokens[0]), None)]
            request.scoring = self._engine.score_each(request.tokens, request.use, request.sampling.logprobs or 0)
            self._scoring.append(request)
        else:
            if request.echo:
                _deliver(request, Said(self._written(request)))
            self._generate(request)

    def _room(self, request: Request) -> int:
        return self._engine.context_length - len(request.tokens)

    def _written(self, request: Request) -> str:
        """Return the prompt as text, special tokens as they are written."""
        if isinstance(request.prompt, str):
            return request.prompt
        return b"".join(map(self._engine.token_text, request.tokens)).decode(errors="replace")

    def _generate(self, request: Request) -> None:
        if request.sampling.max_tokens < 1:
            request.usage.prompt_tokens, request.usage.finish_reason = len(request.tokens), "length"
            self._finish(request)
            return
        limit = min(request.sampling.max_tokens, self._room(request))
        sampling = dataclasses.replace(request.sampling, max_tokens=limit)
        request.stream = self._engine.start(request.tokens, request.use, sampling, request.usage)

    def _score_some(self) -> None:
        """Go one block of tokens on with the prompt that is scored now; others speak between two blocks."""
        if self._scoring:
            request = self._scoring[0]
            self._guarded([request], partial(self._score_block, request))

    def _score_block(self, request: Request) -> None:
        assert request.scoring is not None
        block = next(request.scoring, None)
        self._last_uses = {request.use}
        if block is not None:
            request.scores += map(self._score, block)
            return
        self._scoring.popleft()
        request.scoring = None
        _deliver(request, Said(self._written(request), tuple(request.scores)))
        self._generate(request)

    def _score(self, piece: Piece) -> TokenScore:
        text_of = self._engine.token_text
        likeliest = tuple((text_of(token), logprob) for token, logprob in piece.likeliest)
        return TokenScore(text_of(piece.token), piece.logprob, likeliest)

    def _advance(self, group: Sequence[Request], *, changed: set[Use], alone: bool) -> None:
        """Advance requests by one step of the engine, and hand out what they say."""
        begun = time.monotonic()
        all_speak = all(request.begun for request in group)
        streams = [request.stream for request in group if request.stream is not None]
        pieces = self._engine.advance(streams, others_wait=not alone)
        now = time.monotonic()
        cost = self._turns.took(now - begun, changed=bool(changed)) if all_speak else 0.0
        for use in changed:
            label = next(request.label for request in group if request.use == use)
            self._metrics.count("swaps", adapter=label)
            self._metrics.count("swap_seconds", cost / len(changed), adapter=label)
        for request, piece in zip(group, pieces, strict=True):
            if piece is not None:
                self._hand_out(request, piece, now)
            if request.stream is None or not request.stream.finished:
                continue
            if request.stream.error is not None:
                self._end(request, _translated(request.stream.error, request.label))
            else:
                self._finish(request)

    def _hand_out(self, request: Request, piece: Piece, now: float) -> None:
        if request.first_token_seconds is None:
            request.first_token_seconds = now - request.arrived
            self._metrics.first_token(request.label, request.first_token_seconds)
        if request.sampling.logprobs is not None:
            _deliver(request, Said(piece.text, (self._score(piece),)))
        elif piece.text:
            _deliver(request, piece.text)

    def _finish(self, request: Request) -> None:
        seconds = time.monotonic() - request.arrived
        usage = dataclasses.replace(request.usage, first_token_seconds=request.first_token_seconds or seconds)
        self._end(request, Finished(usage, request.swapped, seconds))

    def _end(self, request: Request, event: Event | None) -> None:
        if request.stream is not None:
            request.stream.close()
        if request.scoring is not None:
            request.scoring.close()
            self._scoring.remove(request)
        with self._changed:
            self._live.remove(request)
            self._changed.notify_all()
        self._count(request, event)
        self._drop_unwanted()
        if event is not None:
            _deliver(request, event)

    def _count(self, request: Request, event: Event | None) -> None:
        outcome = "cancelled" if event is None or request.cancelled else "error"
        outcome = event.usage.finish_reason if isinstance(event, Finished) else outcome
        self._metrics.count("requests", adapter=request.label, outcome=outcome)
        usage = request.usage
        self._metrics.count("prompt_tokens", usage.prompt_tokens, adapter=request.label)
        self._metrics.count("reused_tokens", usage.reused_tokens, adapter=request.label)
        self._metrics.count("completion_tokens", usage.completion_tokens, adapter=request.label)


def _deliver(request: Request, event: Event) -> None:
    if not request.cancelled:
        request.deliver(event)


def _translated(error: Exception, what: str) -> PitstopError:
    if isinstance(error, PitstopError):
        return error
    _log.error("the engine failed under %s", what, exc_info=error)
    return BrokenInput(f"the engine failed: {error}", cure="run `pitstop doctor`")


def _closed() -> Stopped:
    return Stopped("pitstop is shutting down here", cure="ask again when it is back")


def _cut_short() -> Stopped:
    return Stopped("pitstop is shutting down here: the answer ends early", cure="ask again when it is back")
