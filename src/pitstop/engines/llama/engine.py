"""A GGUF base with GGUF LoRA adapters, many conversations at once.

llama.cpp keeps KV across a change of adapters and would answer from it. So every conversation is a sequence of its own,
tagged with what it was computed under (`sessions`), every evaluation sets its adapters first, and a swap is nothing but
the next evaluation in another sequence; of another context if there are several (`lanes`). A merged model has a lane of
its own for good. A conversation that makes room for another may be parked (`parking`) and come back.
"""

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from pitstop.bundle.formats import read_gguf
from pitstop.engines.answer import Wording, check_sampling, check_tokens
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Piece, Sampling, Stream, Usage, Use, log_probability
from pitstop.engines.llama.adapters import Adapters
from pitstop.engines.llama.beginnings import Beginnings
from pitstop.engines.llama.crew import Crew
from pitstop.engines.llama.forest import Groves, fits, forests
from pitstop.engines.llama.kv import context_bytes
from pitstop.engines.llama.lanes import Lane, Lanes
from pitstop.engines.llama.matmul import NAME, multiplies, products
from pitstop.engines.llama.native import BATCH, OUTPUTS, Context, Model, reason
from pitstop.engines.llama.pace import Pace
from pitstop.engines.llama.rows import Rows
from pitstop.engines.llama.sampler import Sampler
from pitstop.engines.llama.streams import LlamaStream, Portion, portions, reader_of
from pitstop.engines.llama.threads import Threads
from pitstop.engines.machine import available_bytes, cores
from pitstop.engines.parking import Parking
from pitstop.engines.probe import probe
from pitstop.engines.sessions import BASE_TAG, Session, Tag
from pitstop.errors import BrokenInput, Busy, NotFinite, UsageError

SHARE_OF_FREE = 0.25  # of the machine's free memory that a context of an adapter's own may take


class LlamaEngine(Engine):
    """A base with adapters on llama.cpp."""

    name = "llama"

    def __init__(
        self,
        path: Path,
        *,
        base_sha256: str,
        context_length: int = 2048,
        sequences: int = 8,
        threads: int | None = None,
        own_lanes: int = 0,
        parking: Parking | None = None,
        own_products: bool = False,
    ) -> None:
        """Load a base.

        Args:
            base_sha256: digest of the file, which the caller has checked.
            context_length: tokens of one conversation.
            sequences: conversations kept in memory; each takes ``context_length`` tokens of KV.
            threads: at most, fewer while other programs use the cores; None: every core this process may use.
            own_lanes: so many adapters get a context of their own, with ``sequences`` as well: a swap costs nothing.
            parking: where conversations go that make room for others; None: they are read again if they come back.
            own_products: multiply with `matmul.c` where that can be: for workshops, it is compiled on this machine.

        Raises:
            MissingExtra: llama-cpp-python is not installed.
            FormatError: the file is damaged or is no model that llama.cpp can run.
            UsageError: the context is longer than the model's, or does not fit in memory.
        """
        if context_length < 1 or sequences < 1:
            raise UsageError("context_length and sequences must be 1 or more")
        self.path = path
        self.base_sha256 = base_sha256
        self.context_length = context_length
        self._closed = True  # until all of it is there
        self._header = read_gguf(path)
        multiplying = products() if own_products and multiplies(self._header) else None
        if multiplying is not None:
            self.name = NAME
        self._model = Model(path, products=multiplying)
        self.vocabulary_size = self._model.vocabulary_size
        self._crew = Crew(Threads(threads or cores()))
        self._rows, self._pace = Rows(), Pace()
        self._beginnings = Beginnings(Parking() if parking is None else parking)
        self._streams: WeakSet[LlamaStream] = WeakSet()  # those on their way, and some that ended
        try:
            if context_length > self._model.trained_length:
                raise UsageError(
                    f"a context of {context_length} tokens was asked for, the model was trained for "
                    f"{self._model.trained_length}"
                )
            self._scratch = sequences  # the one after those of conversations
            self._scratch_taken = False
            self._groves = Groves()
            self._lanes = Lanes(
                self._context(self._model), self._own_context, sequences + 1, own_lanes, self._beginnings.park
            )
        except BaseException:
            self._model.free()
            raise
        self._closed = False
        self._adapters = Adapters(self._model, self._header, base_sha256)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names

    @property
    def context_bytes(self) -> int:
        return context_bytes(self._header, self.context_length, self._scratch)

    def load_adapter(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        self._check_open()
        loaded = self._adapters.load(name, path, sha256)
        try:
            if loaded.model is not None:
                self._lanes.add(loaded.tag, self._context(loaded.model))
            probe(self, name, path)
        except BaseException:
            self.unload_adapter(name)
            raise

    def _context(self, model: Model) -> Context:
        # One sequence more than there are conversations: for what is evaluated from nothing.
        return Context(model, self.context_length, self._scratch + 1)

    def _own_context(self) -> Context:
        """Open a context for one adapter, if the machine has memory to spare."""
        free = available_bytes()
        if free is not None and free < self.context_bytes / SHARE_OF_FREE:
            raise UsageError(
                f"{self.context_bytes / 1e6:,.0f} MB are too much of the {free / 1e6:,.0f} MB that are free"
            )
        return self._context(self._model)

    def invocation(self, adapter: str) -> tuple[int, ...]:
        return self._adapters.invocation(adapter)

    def unload_adapter(self, name: str) -> None:
        self._check_open()
        if name not in self._adapters.names:
            raise UsageError(f"no adapter {name!r} is loaded")
        self._beginnings.parking.drop(name)
        self._lanes.forget(name)
        self._groves.clear()
        self._adapters.unload(name)

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        return self._model.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._check_open()
        if tokens:
            check_tokens(tokens, len(tokens), self.vocabulary_size)
        return b"".join(map(self._model.text_of, tokens)).decode(errors="replace")

    def token_text(self, token: int) -> bytes:
        self._check_open()
        return self._model.text_of(token, special=True)

    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        blocks = self.logits_blocks(tokens, use, first=first)
        begun = next(blocks)  # checks all of it before memory is taken
        result = np.empty((len(tokens) - first, self.vocabulary_size), np.float32)
        result[: len(begun)] = begun
        at = len(begun)
        for block in blocks:
            result[at : at + len(block)] = block
            at += len(block)
        return result

    def logits_blocks(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0
    ) -> Generator[Logits, None, None]:
        tag = self._tag(use, tokens)
        check_tokens(tokens, self.context_length, self.vocabulary_size)
        if not 0 <= first < len(tokens):
            raise UsageError(f"first is {first}, it must be from 0 to {len(tokens) - 1}")
        if self._scratch_taken:
            raise Busy("another evaluation from nothing goes on", cure="read it to its end, or close it")
        lane, scratch = self._lanes.merged(tag) or self._lanes.shared, Session(self._scratch)
        finite = 0  # tokens after which the values were seen to be finite
        self._scratch_taken = True
        try:
            lane.empty(scratch)
            while (at := len(scratch.tokens)) < len(tokens):
                end = min(len(tokens), at + BATCH, max(at, first) + OUTPUTS)
                plain = at < tag.active_from
                end = min(end, tag.active_from) if plain else end
                wanted = max(0, end - max(at, first))
                self._evaluate(lane, BASE_TAG if plain else tag, [(scratch, tokens[at:end], wanted)])
                if wanted:
                    rows = lane.context.rows(wanted)
                    finite = end if np.isfinite(rows[-1, 0]) else finite
                    yield rows
        finally:
            self._scratch_taken = False
            if not self._closed:
                (lane.empty if finite == len(scratch.tokens) else lane.heal)(scratch)

    def logits_batch(
        self, rows: Sequence[Sequence[int]], use: Use = PLAIN_BASE, *, firsts: Sequence[int] | None = None
    ) -> Iterator[Logits]:
        firsts = firsts or [0] * len(rows)
        under: list[Tag | None] = []  # what each is evaluated under together with its neighbours; None: by itself
        for row, first in zip(rows, firsts, strict=True):
            tag = self._tag(use, row)
            check_tokens(row, self.context_length, self.vocabulary_size)
            if not 0 <= first < len(row):
                raise UsageError(f"first is {first}, it must be from 0 to {len(row) - 1}")
            under.append(tag if fits(row, first) and not tag.active_from else None)
        for tag, group in groupby(zip(under, rows, firsts, strict=True), key=lambda entry: entry[0]):
            part = [(row, first) for _, row, first in group]
            if tag is None:
                yield from (self.logits(row, use, first=first) for row, first in part)
            else:
                yield from self._forests(part, tag)

    def _forests(self, rows: Sequence[tuple[Sequence[int], int]], tag: Tag) -> Iterator[Logits]:
        for forest in forests(rows):
            self._check_open()
            context = self._groves.of(self._adapters.model(tag))
            status = self._crew.evaluate(partial(forest.evaluate, context, self._adapters.pointers(tag)))
            if status != 0:
                raise self._failed(status, len(forest.tokens))
            yield from list(forest.split(context))

    def generate(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, sampling: Sampling | None = None, usage: Usage | None = None
    ) -> Iterator[Piece]:
        sampling, usage = sampling or Sampling(), usage if usage is not None else Usage()
        self._check_request(tokens, use, sampling)
        return self._answer(tokens, use, sampling, usage)

    def _answer(self, tokens: Sequence[int], use: Use, sampling: Sampling, usage: Usage) -> Iterator[Piece]:
        stream = self.start(tokens, use, sampling, usage)
        try:
            while not stream.finished:
                yield from (piece for piece in self.advance([stream]) if piece is not None)
            if stream.error is not None:
                raise stream.error
        finally:
            stream.close()

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], use: Use = PLAIN_BASE, sampling: Sampling | None = None
    ) -> list[str]:
        sampling = sampling or Sampling()
        for prompt in prompts:
            self._check_request(prompt, use, sampling)
        answers = [""] * len(prompts)
        coming = list(enumerate(prompts))[::-1]
        live: dict[Stream, int] = {}  # stream -> whose answer it is
        try:
            self._beginnings.begin_steadily(self._lanes)
            while coming or live:
                while coming and len(live) < self._scratch:
                    at, prompt = coming.pop()
                    live[self.start(prompt, use, sampling, Usage())] = at
                for stream, piece in zip(list(live), self.advance(list(live)), strict=True):
                    answers[live[stream]] += piece.text if piece else ""
                    if stream.error is not None:
                        raise stream.error
                    if stream.finished:
                        del live[stream]
        finally:
            self._beginnings.steady = False
            for stream in live:
                stream.close()
        return answers

    def start(self, tokens: Sequence[int], use: Use, sampling: Sampling, usage: Usage) -> LlamaStream:
        tag = self._check_request(tokens, use, sampling)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def text_of(token: int | None) -> str:
            return decoder.decode(b"", final=True) if token is None else decoder.decode(self._model.text_of(token))

        sampler = Sampler(self._model, sampling)
        try:
            lane = self._lanes.of(tag)
            place = lane.sessions.take(tag, tokens)
        except BaseException:
            sampler.close()
            raise
        session = place.session
        kept = self._beginnings.bring_in(lane, place, tag, tokens)
        usage.prompt_tokens, usage.reused_tokens = len(tokens), kept
        wording = Wording(self.context_length - len(tokens), sampling, usage, text_of, self._model.ends)
        waiting = list(tokens[kept:])
        stream = LlamaStream(use, usage, tag, lane, session, list(tokens), sampling, sampler, wording, waiting)
        stream.behind, stream.awaited = reader_of(stream, self._streams)
        self._streams.add(stream)
        if wording.finished:
            stream.close()
        return stream

    def settle(self) -> bool:
        self._check_open()
        return self._lanes.settle()

    @property
    def parallel(self) -> int:
        return self._crew.lanes

    def advance(self, streams: Sequence[Stream], *, others_wait: bool = False) -> list[Piece | None]:
        self._check_open()
        lanes: dict[Lane, list[LlamaStream]] = {}
        for stream in streams:
            if not isinstance(stream, LlamaStream) or stream.finished:
                continue
            if stream.waits and (others_wait or stream.behind in streams):
                continue  # a reader that nobody advances is waited for by nobody
            if stream.behind is not None:
                self._beginnings.catch_up(stream)
            lanes.setdefault(stream.lane, []).append(stream)
        if any(stream.use != group[0].use for group in lanes.values() for stream in group):
            raise UsageError("answers of different adapters cannot be evaluated together")
        said: dict[LlamaStream, Piece] = {}
        most = BATCH if self._beginnings.steady else self._pace.tokens
        coming = [(lane, list(portions(group, most, others_wait=others_wait).items())) for lane, group in lanes.items()]
        while coming:  # once, but where an activated adapter acts for some of its answers and not for others
            said |= self._advance([(lane, *steps.pop(0)) for lane, steps in coming])
            coming = [(lane, steps) for lane, steps in coming if steps]
        return [said.get(stream) if isinstance(stream, LlamaStream) else None for stream in streams]

    def _advance(self, steps: Sequence[tuple[Lane, Tag, list[Portion]]]) -> dict[LlamaStream, Piece]:
        """Evaluate portions of streams, each lane's under one tag; return what is said by those that were read."""
        jobs = [partial(self._step, lane, tag, self._adapters.pointers(tag), taken) for lane, tag, taken in steps]
        said: dict[LlamaStream, Piece] = {}
        for (lane, _, taken), (status, rows) in zip(steps, self._crew.evaluate_all(jobs), strict=True):
            if status == 0:
                said |= self._listen(lane, taken, rows)
            for portion in taken if status else ():
                portion.stream.fail(self._failed(status, len(portion.tokens)))
        return said

    def _step(
        self, lane: Lane, tag: Tag, pointers: Sequence[tuple[Any, float]], taken: Sequence[Portion], threads: int
    ) -> tuple[int, list[Any]]:
        """Evaluate portions of streams in one lane; return llama.cpp's status, and a row for each portion."""
        speaking = all(len(portion.tokens) == 1 for portion in taken)
        adapted, at_once = bool(tag.adapters), len(taken)
        if speaking and at_once > 1 and not self._beginnings.steady:
            at_once = self._rows.at_once(at_once, threads, adapted)
        rows: list[Any] = []
        for at in range(0, len(taken), at_once):
            part = taken[at : at + at_once]
            begun = time.perf_counter()
            # Of a prompt that is not read to its end too: whether its values are finite has to be seen.
            wanted = [(portion.stream.session, portion.tokens, 1) for portion in part]
            if status := lane.evaluate(tag, pointers, wanted, threads):
                return status, []
            seconds = time.perf_counter() - begun
            if speaking:
                self._rows.took(len(part), threads, adapted, seconds)
            else:
                self._pace.took(sum(len(portion.tokens) for portion in part), seconds)
            found = lane.context.rows(len(part))
            rows.extend(found if at_once == len(taken) else found.copy())  # the next evaluation overwrites them
        return 0, rows

    def _listen(self, lane: Lane, taken: Sequence[Portion], rows: Sequence[Any]) -> dict[LlamaStream, Piece]:
        """Take what streams say from the rows that were evaluated."""
        said: dict[LlamaStream, Piece] = {}
        for portion, row in zip(taken, rows, strict=True):
            stream = portion.stream
            del stream.waiting[: len(portion.tokens)]
            try:
                if not np.isfinite(row[0]):
                    what = "under these adapters and scales the model computes values that are not finite"
                    raise NotFinite(what, cure="ask for a smaller scale")
                if portion.last:
                    said[stream] = self._say(stream, row)
            except Exception as error:  # what fails for one answer is no matter of the others
                stream.fail(error)
        for portion in taken:
            if isinstance(portion.stream.error, NotFinite):
                lane.heal(portion.stream.session)
        return said

    def _say(self, stream: LlamaStream, row: Any) -> Piece:
        token = stream.sampler.choose(row)
        logprob, top = (
            (None, ()) if stream.sampling.logprobs is None else log_probability(row, token, stream.sampling.logprobs)
        )
        text = stream.wording.take(token)
        if stream.wording.finished:
            stream.close()
        else:
            stream.waiting.append(token)
        return Piece(token, text, logprob, top)

    def _evaluate(self, lane: Lane, tag: Tag, portions: Sequence[tuple[Session, Sequence[int], int]]) -> None:
        """Evaluate tokens at the ends of sessions of one lane, under one tag and no other."""
        self._check_open()
        status = self._crew.evaluate(partial(lane.evaluate, tag, self._adapters.pointers(tag), portions))
        if status != 0:
            raise self._failed(status, sum(len(tokens) for _, tokens, _ in portions))

    def _failed(self, status: int, count: int) -> BrokenInput:
        return BrokenInput(f"llama.cpp could not evaluate {count} tokens ({status}): {reason()}", where=self.path)

    def _check_request(self, tokens: Sequence[int], use: Use, sampling: Sampling) -> Tag:
        tag = self._tag(use, tokens)
        check_sampling(sampling, self.vocabulary_size)
        check_tokens(tokens, self.context_length, self.vocabulary_size, answer=1)
        return tag

    def _tag(self, use: Use, tokens: Sequence[int]) -> Tag:
        self._check_open()
        return self._adapters.tag(use, tokens)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._beginnings.parking.clear()
            self._crew.close()
            self._lanes.close()
            self._groves.clear()
            self._adapters.close()
            self._model.free()
