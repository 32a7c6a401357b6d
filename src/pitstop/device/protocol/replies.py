"""How answers are written in OpenAI's shapes, whole or in chunks."""

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pitstop.device.request import Finished, Said, TokenScore

LOWEST = -9999.0  # nats; JSON has no minus infinity


@dataclass
class Choice:
    """One of the answers to a request, as it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenScore] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, said: Said) -> None:
        """Let it grow."""
        self.texts.append(said.text)
        self.tokens += said.tokens

    @property
    def said(self) -> Said:
        """All of it."""
        return Said("".join(self.texts), tuple(self.tokens))

    @property
    def end(self) -> Finished:
        """How it ended, once it did."""
        assert self.finished is not None
        return self.finished


class Reply(ABC):
    """Writes the answers to one request; all of it carries one id."""

    def __init__(self, model: str, n: int, prefix: str) -> None:
        """Begin.

        Args:
            n: answers to each prompt.
        """
        self._model, self._n = model, n
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the body of answers that were not streamed."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before the first text of an answer, if there is one."""

    @abstractmethod
    def chunk(self, index: int, said: Said) -> dict[str, Any]:
        """Return a chunk with the next text of an answer."""

    @abstractmethod
    def last_chunk(self, index: int, finished: Finished) -> dict[str, Any]:
        """Return the chunk that says why an answer ended."""

    @abstractmethod
    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the chunk of figures after all others."""

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return usage([choice.end for choice in choices], self._n)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


class ChatReply(Reply):
    """Writes the answers of a chat completion."""

    def __init__(self, model: str, n: int = 1) -> None:
        super().__init__(model, n, "chatcmpl")

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        entries = [self._entry(index, choice) for index, choice in enumerate(choices)]
        return {**self._head("chat.completion"), "choices": entries, "usage": self._usage(choices)}

    def _entry(self, index: int, choice: Choice) -> dict[str, Any]:
        said = choice.said
        return {
            "index": index,
            "message": {"role": "assistant", "content": said.text, "refusal": None},
            "logprobs": _chat_logprobs(said.tokens),
            "finish_reason": choice.end.usage.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def chunk(self, index: int, said: Said) -> dict[str, Any]:
        return self._chunk(index, {"content": said.text}, None, _chat_logprobs(said.tokens))

    def last_chunk(self, index: int, finished: Finished) -> dict[str, Any]:
        return self._chunk(index, {}, finished.usage.finish_reason)

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(choices)}

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


class TextReply(Reply):
    """Writes the answers of a text completion."""

    def __init__(self, model: str, n: int = 1) -> None:
        super().__init__(model, n, "cmpl")
        self._offsets: dict[int, _Offset] = {}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        entries = [
            self._entry(index, choice.said, choice.end.usage.finish_reason) for index, choice in enumerate(choices)
        ]
        return {**self._head("text_completion"), "choices": entries, "usage": self._usage(choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, said: Said) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [self._entry(index, said, None)]}

    def last_chunk(self, index: int, finished: Finished) -> dict[str, Any]:
        entry = self._entry(index, Said(""), finished.usage.finish_reason)
        return {**self._head("text_completion"), "choices": [entry]}

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [], "usage": self._usage(choices)}

    def _entry(self, index: int, said: Said, reason: str | None) -> dict[str, Any]:
        offset = self._offsets.setdefault(index, _Offset())
        logprobs = _text_logprobs(said.tokens, offset)
        return {"text": said.text, "index": index, "logprobs": logprobs, "finish_reason": reason}


class _Offset:
    """Where in the text of an answer, in characters, its next token begins."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = 0

    def take(self, text: bytes) -> int:
        """Return where a token begins."""
        at = self._at
        self._at += len(self._decoder.decode(text))
        return at


def _chat_logprobs(tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [
        {
            **_chat_token(token.text, token.logprob or 0.0),
            "top_logprobs": [_chat_token(*one) for one in token.likeliest],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(text)}


def _text_logprobs(tokens: Sequence[TokenScore], offset: _Offset) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {
        "tokens": [_written(token.text) for token in tokens],
        "token_logprobs": [None if token.logprob is None else max(token.logprob, LOWEST) for token in tokens],
        "top_logprobs": [_text_likeliest(token) for token in tokens],
        "text_offset": [offset.take(token.text) for token in tokens],
    }


def _text_likeliest(token: TokenScore) -> dict[str, float] | None:
    if token.logprob is None or not token.likeliest:
        return None
    # Two tokens may be written the same way: the likelier one stands. The token itself is always among them.
    entries = [(token.text, token.logprob), *reversed(token.likeliest)]
    found: dict[str, float] = {}
    for text, logprob in entries:
        found[_written(text)] = max(logprob, LOWEST, found.get(_written(text), LOWEST))
    return found


def _written(text: bytes) -> str:
    """Return a token as a text; one that is no whole UTF-8 as OpenAI writes it, for no two must look the same."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def usage(finished: Sequence[Finished], n: int = 1) -> dict[str, Any]:
    """Return the figures of answers; `pitstop` holds those OpenAI's API has no place for.

    Args:
        n: answers to each prompt, which counts once.
    """
    costs = [one.usage for one in finished]
    prompt = sum(cost.prompt_tokens for cost in costs[::n])
    completion = sum(cost.completion_tokens for cost in costs)
    reused = sum(cost.reused_tokens for cost in costs[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
        "pitstop": {
            "first_token_ms": round(min(cost.first_token_seconds for cost in costs) * 1000, 3),
            "reused_tokens": reused,
            "swapped": any(one.swapped for one in finished),
        },
    }
