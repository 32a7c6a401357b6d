"""The interface every engine has. A request names its adapter; nothing is "active" globally.

An engine holds one base and any number of loaded adapters. It is not thread-safe: one thread owns it. State computed
under one adapter is never reused under another: KV belongs to (base, adapter, scale, tokens).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Use:
    """Which adapter a request runs under; ``Use()`` is the plain base."""

    adapter: str | None = None
    scale: float = 1.0  # multiplies the adapter's effect; 0 is the base
    also: tuple[tuple[str, float], ...] = ()  # further adapters and their scales: the effects of all are added


PLAIN_BASE = Use()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is the likeliest one, after penalties, bias and grammar."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are left out
    repeat_penalty: float = 1.0  # logits of the answer's own tokens are divided by it; 1: none
    presence_penalty: float = 0.0  # subtracted from the logit of a token that the answer has
    frequency_penalty: float = 0.0  # and this for each time it has it
    penalty_tokens: int = 256  # how far back the penalties look
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    grammar: str | None = None  # GBNF with a rule root: the answer is one of its texts
    json_schema: str | None = None  # JSON text: the answer is JSON of this schema
    logprobs: int | None = None  # ln p of every token, and of so many likeliest ones; None: not asked for
    seed: int = 0
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts


@dataclass(frozen=True)
class Piece:
    """One step of an answer: the token and the text that became certain with it (it may be empty)."""

    token: int
    text: str
    logprob: float | None = None  # ln p of the token by the model alone, nats; if asked for
    likeliest: tuple[tuple[int, float], ...] = ()  # (token, ln p), likeliest first


@dataclass
class Usage:
    """What one request cost; the engine fills it while it generates."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the session's KV
    completion_tokens: int = 0
    first_token_seconds: float = 0.0  # from the call to the first token
    finish_reason: str = ""  # "stop" or "length"


class Stream(ABC):
    """One answer on its way, made by `Engine.advance`."""

    use: Use
    usage: Usage
    place: object = None  # answers in different places can be advanced at the same time; None: by themselves only
    finished: bool = False
    error: Exception | None = None  # why it finished, if that was no proper end; other answers go on

    @abstractmethod
    def close(self) -> None:
        """Stop it, wherever it is; what was computed stays with its conversation."""


class Engine(ABC):
    """A base in memory with adapters beside it."""

    name: str  # "llama", "torch" …
    base_sha256: str  # of the base file that runs
    context_length: int  # tokens one conversation may have
    vocabulary_size: int

    @property
    def context_bytes(self) -> int:
        """What a merged model takes of memory besides its file: its conversations are its own."""
        return 0

    @abstractmethod
    def load_adapter(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        """Load an adapter under a name of the caller's choice; all or nothing.

        The file may be a merged model too, of an engine that runs such beside its base: its name then is asked for as
        an adapter's is, but it has one scale and cannot be stacked.

        Args:
            sha256: digest that the file of its weights must have; the very bytes that were hashed are loaded.

        Raises:
            UsageError: the name is taken.
            BrokenInput: the file is missing or cannot be read.
            Untrusted: it has another digest.
            FormatError: the file is damaged or is no adapter this engine can run.
            BaseMismatch: it was trained on another base.
        """

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and every state computed under it.

        Raises:
            UsageError: no such adapter.
        """

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """The loaded adapters, in the order they came."""

    def invocation(self, adapter: str) -> tuple[int, ...]:
        """Return the tokens from whose last occurrence on an activated LoRA acts; none: it acts everywhere.

        Before them the plain base computes; without them in a prompt, all of it is the base's.

        Raises:
            UsageError: no such adapter.
        """
        return ()

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens written in it count as such, none is added."""

    @abstractmethod
    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out; broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        """Evaluate a sequence from nothing and return the logits at positions ``first`` and later.

        Returns:
            float32 of shape (len(tokens) - first, vocabulary_size); row i predicts token first + i + 1.

        Raises:
            UsageError: no such adapter, no tokens, or more than the context holds.
        """

    def logits_blocks(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0
    ) -> Generator[Logits, None, None]:
        """Yield what `logits` returns in blocks of rows: all of them need not fit in memory.

        A block is good until anything is evaluated. Until the last one is read, or this is closed, answers may
        advance, but nothing else may be evaluated from nothing.

        Raises:
            UsageError: as for `logits`.
            Busy: another evaluation from nothing has not come to its end.
        """
        yield self.logits(tokens, use, first=first)

    def token_text(self, token: int) -> bytes:
        """Return one token as it is written, special ones too; that need not be whole UTF-8."""
        return self.detokenize([token]).encode()

    @abstractmethod
    def generate(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, sampling: Sampling | None = None, usage: Usage | None = None
    ) -> Iterator[Piece]:
        """Continue a prompt, token by token; closing the iterator stops the work.

        Raises:
            UsageError: no such adapter, no tokens, or a prompt that fills the context.
        """

    def start(self, tokens: Sequence[int], use: Use, sampling: Sampling, usage: Usage) -> Stream:
        """Take a prompt in; nothing is computed before `advance`.

        Raises:
            UsageError: as for `generate`.
            Busy: no room for another answer at the same time.
        """
        return _Iterated(use, usage, self.generate(tokens, use, sampling, usage))

    @property
    def parallel(self) -> int:
        """How many uses can be advanced at the same time, if their answers are in different places."""
        return 1

    def advance(self, streams: Sequence[Stream], *, others_wait: bool = False) -> list[Piece | None]:
        """Go one step on with answers of one use, which are evaluated together, or of several in different places.

        Args:
            others_wait: answers that are not among these wait for their turn: a long prompt is not read at once.

        Returns:
            for each, its next piece; None where there is none yet (its prompt is long), or no more (it is finished).
        """
        pieces: list[Piece | None] = []
        for stream in streams:
            assert isinstance(stream, _Iterated)
            try:
                pieces.append(next(stream.pieces, None))
            except Exception as error:
                stream.error = error
                pieces.append(None)
            stream.finished = pieces[-1] is None or bool(stream.usage.finish_reason)
        return pieces

    def settle(self) -> bool:
        """Use a moment in which nothing is asked for to make later answers faster; tell whether more can be done."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Give back memory and files; the engine is of no use afterwards."""

    def score(self, prompt: Sequence[int], completion: Sequence[int], use: Use = PLAIN_BASE) -> NDArray[np.float64]:
        """Return ln p of each completion token after the prompt, shape (len(completion),), in nats.

        Raises:
            UsageError: as for `logits`; an empty prompt or completion.
        """
        tokens = [*prompt, *completion]
        rows = self.logits(tokens[:-1], use, first=len(prompt) - 1)
        return log_softmax(rows)[np.arange(len(completion)), list(completion)]

    def score_each(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, likeliest: int = 0
    ) -> Generator[list[Piece], None, None]:
        """Yield the tokens after the first one with ln p of each, and of so many likeliest ones, block by block.

        What `logits_blocks` says of the time between two blocks holds here too.

        Raises:
            UsageError: as for `logits`.
            Busy: as for `logits_blocks`.
        """
        at = 1
        for rows in self.logits_blocks(tokens[:-1], use) if len(tokens) > 1 else ():
            block = zip(tokens[at : at + len(rows)], rows, strict=True)
            yield [Piece(token, "", *log_probability(row, token, likeliest)) for token, row in block]
            at += len(rows)

    def logits_batch(
        self, rows: Sequence[Sequence[int]], use: Use = PLAIN_BASE, *, firsts: Sequence[int] | None = None
    ) -> Iterator[Logits]:
        """Yield the logits of many sequences in order; an engine that can evaluates several at once.

        Args:
            firsts: per row, the first position that is wanted; None: all of them.

        Raises:
            UsageError: as for `logits`.
        """
        for row, first in zip(rows, firsts or [0] * len(rows), strict=True):
            yield self.logits(row, use, first=first)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], use: Use = PLAIN_BASE, sampling: Sampling | None = None
    ) -> list[str]:
        """Return the answers to many prompts; an engine that can makes several at once.

        Raises:
            UsageError: as for `generate`.
        """
        # All are checked before the first begins.
        answers = [self.generate(prompt, use, sampling) for prompt in prompts]
        return ["".join(piece.text for piece in answer) for answer in answers]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Iterated(Stream):
    """An answer of an engine that makes one at a time."""

    def __init__(self, use: Use, usage: Usage, pieces: Iterator[Piece]) -> None:
        self.use, self.usage, self.pieces = use, usage, pieces

    def close(self) -> None:
        self.finished = True
        close: Callable[[], None] | None = getattr(self.pieces, "close", None)
        if close is not None:
            close()


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return ln p over the last axis, in float64: KL of nearly equal models is lost in float32."""
    wide: NDArray[np.float64] = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def log_probability(row: NDArray[np.float32], token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return ln p of a token, and of the ``count`` likeliest ones, in nats."""
    highest = float(row.max())
    normal = highest + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))
    top: Sequence[int] = np.argpartition(row, -count)[-count:].tolist() if count else []
    ordered = sorted(top, key=lambda one: -row[one])
    return float(row[token]) - normal, tuple((one, float(row[one]) - normal) for one in ordered)


def divergence(one: Logits, other: Logits) -> NDArray[np.float64]:
    """Return KL(one || other) at every position over the whole vocabulary, shape (positions,), in nats.

    With shifted logits a, b: KL = Σ e^a (a - b) / Σ e^a - ln Σ e^a + ln Σ e^b. Exponentials in float32, sums in
    float64: off by about 1e-6, exactly 0 for equal logits, and a quarter of the cost of float64 throughout.
    """
    a = one - one.max(axis=-1, keepdims=True)
    b = other - other.max(axis=-1, keepdims=True)
    weights = np.exp(a)
    normal = weights.sum(axis=-1, dtype=np.float64)
    change = np.log(np.exp(b).sum(axis=-1, dtype=np.float64)) - np.log(normal)
    weights *= a - b
    result: NDArray[np.float64] = weights.sum(axis=-1, dtype=np.float64) / normal + change
    return result
