"""An ONNX base with LoRA adapters, each conversation in a generator of its own.

onnxruntime-genai keeps KV across a change of adapters and would answer from it. So every conversation is tagged with
what it was computed under (`sessions`), and has a generator to itself: naming another adapter is nothing but an
evaluation in another generator, and one that comes back finds its KV as it was. When there are more conversations than
may stay in memory, the one that was used longest ago makes room: its generator is emptied, never continued.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pitstop.bundle.formats import read_onnx_graph
from pitstop.engines.answer import GrowingText, Wording, check_sampling, check_tokens
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Piece, Sampling, Stream, Usage, Use, log_probability
from pitstop.engines.machine import available_bytes, cores
from pitstop.engines.onnx.adapters import Adapters
from pitstop.engines.onnx.guide import guide_of
from pitstop.engines.onnx.native import PORTION, Conversation, Model
from pitstop.engines.onnx.sampler import Sampler
from pitstop.engines.onnx.streams import OnnxStream
from pitstop.engines.probe import probe
from pitstop.engines.sessions import BASE_TAG, Session, Sessions, Tag
from pitstop.errors import Busy, NotFinite, UsageError

ROOM = 256  # tokens: the KV of what is evaluated from nothing has room for a multiple of it


class OnnxEngine(Engine):
    """A base with adapters on onnxruntime-genai."""

    name = "onnx"

    def __init__(
        self,
        path: Path,
        *,
        base_sha256: str,
        context_length: int = 2048,
        sequences: int = 8,
        threads: int | None = None,
        warm: int = 0,
    ) -> None:
        """Load a base.

        Args:
            path: the graph; the other files of the model are beside it, under their names or their digests.
            base_sha256: digest of the graph, which names those of the other files; the caller has checked them.
            context_length: tokens of one conversation.
            sequences: answers that can be on their way at the same time; each has ``context_length`` tokens of KV.
            threads: None: every core this process may use.
            warm: bytes for conversations beyond those that stay in memory; the least recently used ones leave first.

        Raises:
            MissingExtra: onnxruntime-genai is not installed.
            FormatError: a file is damaged or is no model that it can run.
            UsageError: the context is longer than the model's, or does not fit in memory.
        """
        if context_length < 1 or sequences < 1:
            raise UsageError("context_length and sequences must be 1 or more")
        self.path = path
        self.base_sha256 = base_sha256
        self.context_length = context_length
        self._closed = True  # until all of it is there
        graph = read_onnx_graph(path)
        self._model = Model(graph, threads or cores())
        self.vocabulary_size = self._model.settings.vocabulary_size
        self._at_once = sequences
        try:
            self._check_size(sequences)
        except BaseException:
            self._model.close()
            raise
        self._sessions = Sessions(sequences + max(0, warm) // self.context_bytes)
        self._conversations: dict[int, Conversation] = {}  # by sequence of a session; those that were ever begun
        self._scratch: Conversation | None = None  # for what is evaluated from nothing
        self._scratch_taken = False
        self._adapters = Adapters(graph, base_sha256, self._model, partial(Model, threads=threads or cores()))
        self._closed = False

    def _check_size(self, sequences: int) -> None:
        trained = self._model.settings.context_length
        if self.context_length > trained:
            raise UsageError(
                f"a context of {self.context_length} tokens was asked for, the model was trained for {trained}"
            )
        needed, free = sequences * self.context_bytes, available_bytes()
        if free is not None and needed > free:
            raise UsageError(
                f"{sequences} conversations of {self.context_length} tokens need {needed / 1e6:,.0f} MB, "
                f"{free / 1e6:,.0f} MB are free",
                cure="ask for fewer or shorter ones",
            )

    @property
    def context_bytes(self) -> int:
        """What one conversation takes of memory."""
        return self.context_length * self._model.settings.kv_bytes

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names

    def load_adapter(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        self._check_open()
        self._adapters.load(name, path, sha256)
        try:
            probe(self, name, path)
        except BaseException:
            self.unload_adapter(name)
            raise

    def unload_adapter(self, name: str) -> None:
        self._check_open()
        if name not in self._adapters.names:
            raise UsageError(f"no adapter {name!r} is loaded")
        self._adapters.unload(name)
        self._tidy()

    def _tidy(self) -> None:
        """Give back what was unloaded, and with it the idle generators that were ever given it, or are of it."""
        if not self._scratch_taken and self._is_over(self._scratch):
            self._forget_scratch()
        for session in self._sessions:
            if not session.busy and self._is_over(self._conversations.get(session.sequence)):
                self._empty(session)
        live = [*self._conversations.values(), *([self._scratch] if self._scratch is not None else [])]
        held = {name for conversation in live for name in conversation.given}
        self._adapters.tidy(held, {conversation.model for conversation in live})

    def _is_over(self, conversation: Conversation | None) -> bool:
        if conversation is None:
            return False
        given, model = self._adapters.doomed.intersection(conversation.given), conversation.model
        return bool(given) or model in self._adapters.gone

    def _empty(self, session: Session) -> None:
        session.tag, session.tokens = None, []
        conversation = self._conversations.pop(session.sequence, None)
        if conversation is not None:
            conversation.close()

    def _forget_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def invocation(self, adapter: str) -> tuple[int, ...]:
        return self._adapters.invocation(adapter)

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        return self._model.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._check_open()
        if tokens:
            check_tokens(tokens, len(tokens), self.vocabulary_size)
        return self._model.detokenize(tokens)

    def token_text(self, token: int) -> bytes:
        self._check_open()
        return self._model.detokenize([token], special=True).encode()

    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        return np.concatenate(list(self.logits_blocks(tokens, use, first=first)))

    def logits_blocks(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0
    ) -> Generator[Logits, None, None]:
        tag = self._tag(use, tokens)
        check_tokens(tokens, self.context_length, self.vocabulary_size)
        if not 0 <= first < len(tokens):
            raise UsageError(f"first is {first}, it must be from 0 to {len(tokens) - 1}")
        if self._scratch_taken:
            raise Busy("another evaluation from nothing goes on", cure="read it to its end, or close it")
        self._scratch_taken = True
        finite = False
        try:
            length = min(self.context_length, -(-len(tokens) // ROOM) * ROOM)
            self._scratch = scratch = self._emptied(self._scratch, tag, len(tokens), 0, length, every_row=True)
            at = 0
            while at < len(tokens):
                end = self._evaluate(scratch, tag, tokens, at)
                if end > first:
                    rows = scratch.rows(end - max(at, first))
                    finite = bool(np.isfinite(rows[-1]).all())
                    yield rows
                at = end
        finally:
            self._scratch_taken = False
            if not finite and not self._closed:  # or not read to its end
                self._forget_scratch()
            if not self._closed:
                self._tidy()

    def _emptied(
        self,
        conversation: Conversation | None,
        tag: Tag,
        count: int,
        kept: int,
        length: int,
        guide: str | None = None,
        *,
        every_row: bool = False,
    ) -> Conversation:
        """Return a conversation that holds the first ``kept`` of ``count`` tokens and can take in the rest.

        It is the one given, or else an empty one with room for ``length`` tokens, which takes its place.
        """
        model = self._adapters.model(tag)
        if conversation is not None and conversation.serves(model, length, guide):
            changes = [self._adapters.native(BASE_TAG)] if kept < min(tag.active_from, count) else []
            changes += [self._adapters.native(tag)] if tag.active_from < count else []
            if not (tag.adapters or conversation.given) or conversation.takes([name for name in changes if name]):
                conversation.rewind(kept)
                return conversation
        made = model.conversation(length, guide, every_row=every_row)
        if conversation is not None:
            conversation.close()
        return made

    def _evaluate(self, conversation: Conversation, tag: Tag, tokens: Sequence[int], at: int) -> int:
        """Evaluate a portion of tokens from a position on, under a tag; return where it ends."""
        self._check_open()
        plain = at < tag.active_from
        end = min(len(tokens), at + PORTION, tag.active_from if plain and tag.adapters else len(tokens))
        acting = BASE_TAG if plain and tag.adapters else tag
        # One that was never given an adapter is the base's as it is, and a merged model's takes none.
        if (acting.adapters or conversation.given) and (name := self._adapters.native(acting)):
            conversation.set_adapter(name)
        conversation.append(tokens[at:end])
        return end

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

    def start(self, tokens: Sequence[int], use: Use, sampling: Sampling, usage: Usage) -> OnnxStream:
        tag = self._check_request(tokens, use, sampling)
        guide = guide_of(sampling)
        if sum(session.busy for session in self._sessions) >= self._at_once:
            raise Busy(
                f"all {self._at_once} conversations are in the middle of an answer",
                cure="finish or close one, or open the engine with more sequences",
            )
        place = self._sessions.take(tag, tokens)
        session, before = place.session, self._conversations.get(place.session.sequence)
        # The last token is always evaluated: the logits that choose the next one must be of this request.
        kept = min(place.common, len(tokens) - 1)
        try:
            conversation = self._emptied(before, tag, len(tokens), kept, self.context_length, guide)
        except BaseException:
            session.busy = False
            raise
        kept = kept if conversation is before else 0
        self._conversations[session.sequence] = conversation
        session.tag, session.tokens = tag, list(tokens[:kept])
        usage.prompt_tokens, usage.reused_tokens = len(tokens), kept
        text = GrowingText(self._model.detokenize)
        ends = self._model.end_tokens.__contains__
        wording = Wording(self.context_length - len(tokens), sampling, usage, text.feed, ends)
        waiting = list(tokens[kept:])
        stream = OnnxStream(
            use, usage, tag, session, sampling, Sampler(sampling), wording, waiting, self._left, guide is not None
        )
        if wording.finished:
            stream.close()
        return stream

    def _left(self) -> None:
        if not self._closed and (self._adapters.doomed or self._adapters.gone):
            self._tidy()

    def advance(self, streams: Sequence[Stream], *, others_wait: bool = False) -> list[Piece | None]:
        self._check_open()
        pieces: list[Piece | None] = []
        for stream in streams:
            piece = None
            if isinstance(stream, OnnxStream) and not stream.finished:
                try:
                    piece = self._step(stream)
                except Exception as error:  # what fails for one answer is no matter of the others
                    self._empty(stream.session)
                    stream.fail(error)
            pieces.append(piece)
        return pieces

    def _step(self, stream: OnnxStream) -> Piece | None:
        """Read a portion of a prompt, or the last token; return what is said then."""
        session = stream.session
        conversation = self._conversations[session.sequence]
        if stream.guided and stream.usage.completion_tokens:
            self._adapters.model(stream.tag)  # or it was unloaded
            row = conversation.row()
            session.tokens += stream.waiting
            stream.waiting = []
        else:
            end = self._evaluate(conversation, stream.tag, [*session.tokens, *stream.waiting], len(session.tokens))
            count = end - len(session.tokens)
            session.tokens += stream.waiting[:count]
            del stream.waiting[:count]
            if stream.waiting:
                return None
            row = conversation.row()
        if not np.isfinite(row).all():
            what = "under these adapters and scales the model computes values that are not finite"
            raise NotFinite(what, cure="ask for a smaller scale")
        return self._say(stream, row)

    def _say(self, stream: OnnxStream, row: NDArray[np.float32]) -> Piece:
        prepared, conversation = stream.sampler.prepare(row), self._conversations[stream.session.sequence]
        token = conversation.choose(prepared) if stream.guided else int(prepared.argmax())
        stream.sampler.accept(token)
        wanted = stream.sampling.logprobs
        logprob, top = (None, ()) if wanted is None else log_probability(row, token, wanted)
        text = stream.wording.take(token)
        stream.waiting = [token]
        if stream.wording.finished:
            stream.close()
        return Piece(token, text, logprob, top)

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
            for conversation in self._conversations.values():
                conversation.close()
            self._forget_scratch()
            self._adapters.close()
            self._model.close()
