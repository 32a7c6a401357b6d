"""OpenAI's shapes: what a client may ask, and how answers and errors are written. No I/O, no web framework."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pitstop.device.runtime import Finished, PromptTooLong, QueueFull, ServedModel, Stopped, UnknownModel
from pitstop.engines.base import Sampling
from pitstop.engines.template import Message
from pitstop.errors import PitstopError, UsageError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_STOPS = 16  # stop texts one request may name

# What OpenAI's API has and pitstop has not: values that ask for nothing pass, any other is refused, not ignored.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
}


class BadRequest(UsageError):
    """A request body that is not what the API takes; ``param`` is the field at fault."""

    def __init__(self, what: str, param: str | None = None) -> None:
        super().__init__(what)
        self.param = param


@dataclass(frozen=True)
class ChatRequest:
    """The body of a chat completion."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False  # a stream ends with a chunk of figures


@dataclass(frozen=True)
class ChatReply:
    """Writes one answer, whole or in chunks; all of it carries one id."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """Return the body of an answer that was not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.usage.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(finished)}

    def chunk(self, text: str, *, first: bool = False) -> dict[str, Any]:
        """Return a chunk with the next text."""
        return self._chunk({"role": "assistant", "content": text} if first else {"content": text}, None)

    def last_chunk(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        return self._chunk({}, finished.usage.finish_reason)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk of figures after the last one."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(finished)}

    def _chunk(self, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(finished: Finished) -> dict[str, Any]:
    """Return the figures of an answer; `pitstop` holds those OpenAI's API has no place for."""
    cost = finished.usage
    return {
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": cost.completion_tokens,
        "total_tokens": cost.prompt_tokens + cost.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cost.reused_tokens},
        "pitstop": {
            "first_token_ms": round(cost.first_token_seconds * 1000, 3),
            "reused_tokens": cost.reused_tokens,
            "swapped": finished.swapped,
        },
    }


def model_entry(model: ServedModel, created: int) -> dict[str, Any]:
    """Return a served model as `/v1/models` lists it."""
    bundle = model.bundle
    extra = {"kind": bundle.kind, "version": bundle.version, "base": bundle.base_name}
    return {"id": model.name, "object": "model", "created": created, "owned_by": "pitstop", "pitstop": extra}


def error_status(error: PitstopError) -> tuple[int, str | None]:
    """Return the HTTP status of an error, and OpenAI's code for it."""
    cases: tuple[tuple[type[PitstopError], int, str | None], ...] = (
        (UnknownModel, 404, "model_not_found"),
        (PromptTooLong, 400, "context_length_exceeded"),
        (QueueFull, 429, "queue_full"),
        (Stopped, 503, "stopping"),
        (UsageError, 400, None),
    )
    return next(
        ((status, code) for kind, status, code in cases if isinstance(error, kind)), (503, "model_cannot_be_used")
    )


def error_body(message: str, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: PitstopError) -> str:
    """Return what a client may know of an error: not where on this device the file lies."""
    return f"{error.what}; {error.cure}" if error.cure else error.what


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat completion request.

    Raises:
        BadRequest: it is not JSON, a field has a wrong type or value, or asks for what pitstop cannot do.
    """
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadRequest("the body must be a JSON object")
    for name, neutral in _UNSUPPORTED.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise BadRequest(f"{name!r} is not supported here", name)
    options = _get(data, "stream_options", dict, {})
    return ChatRequest(
        model=_required(data, "model", str),
        messages=_messages(_required(data, "messages", list)),
        sampling=_sampling(data),
        stream=_get(data, "stream", bool, False),
        include_usage=_get(options, "include_usage", bool, False),
    )


def _sampling(data: Mapping[str, Any]) -> Sampling:
    # Greedy unless asked otherwise: the adapters of a board answer in fixed forms. No limit: up to the context's end.
    limit = "max_completion_tokens" if data.get("max_completion_tokens") is not None else "max_tokens"
    stop = [data["stop"]] if isinstance(data.get("stop"), str) else _get(data, "stop", list, [])
    if len(stop) > _STOPS or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest(f"'stop' must be a text or up to {_STOPS} of them, none empty", "stop")
    return Sampling(
        max_tokens=int(_number(data, limit, 1 << 30, 1, 1 << 30, whole=True)),
        temperature=_number(data, "temperature", 0.0, 0.0, 2.0),
        top_p=_number(data, "top_p", 1.0, 1e-6, 1.0),
        top_k=int(_number(data, "top_k", 0, 0, 1 << 30, whole=True)),
        seed=int(_number(data, "seed", secrets.randbits(31), -(1 << 63), (1 << 63) - 1, whole=True)) % (1 << 32),
        stop=tuple(stop),
    )


def _messages(entries: list[Any]) -> tuple[Message, ...]:
    if not entries:
        raise BadRequest("'messages' is empty", "messages")
    return tuple(_message(entry, f"messages[{index}]") for index, entry in enumerate(entries))


def _message(entry: Any, at: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRequest(f"{at!r} must be an object", at)
    role = entry.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(f"'{at}.role' must be one of {', '.join(_ROLES)}", f"{at}.role")
    content = entry.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(map(_is_text_part, parts)):
        raise BadRequest(f"'{at}.content' must be a text, or parts of the type 'text'", f"{at}.content")
    return {"role": _ROLES[role], "content": "".join(part["text"] for part in parts)}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _required(data: Mapping[str, Any], name: str, kind: type) -> Any:
    if data.get(name) is None:
        raise BadRequest(f"{name!r} is missing", name)
    return _get(data, name, kind, None)


def _get(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
        raise BadRequest(f"{name!r} must be {names[kind]}", name)
    return value


def _number(
    data: Mapping[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = data.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    # `not (low <= …)` refuses NaN too, which Python's JSON reads.
    if isinstance(value, bool) or not isinstance(value, kinds) or not (low <= value <= high):
        raise BadRequest(f"{name!r} must be a {'whole ' if whole else ''}number from {low:,} to {high:,}", name)
    return value
