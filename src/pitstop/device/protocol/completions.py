"""The bodies of chat and text completions."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pitstop.device.protocol.fields import BadRequest, is_whole, optional, parse_object, required, whole
from pitstop.device.protocol.sampling import (
    CHOICES,
    LIKELIEST,
    UNLIMITED,
    check_supported,
    parse_sampling,
    parse_scales,
)
from pitstop.engines.base import Sampling
from pitstop.engines.template import Message

TEXT_TOKENS = 16  # of a text completion that names no limit, as OpenAI has it

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Prompt = str | tuple[int, ...]  # text, or tokens


@dataclass(frozen=True)
class Wanted:
    """What both kinds of completion have."""

    model: str
    sampling: Sampling
    n: int  # answers to each prompt
    scales: Mapping[int, float] | None  # adapters by number, beside the model's own; None: not said
    stream: bool
    include_usage: bool  # a stream ends with a chunk of figures

    def choice(self, index: int) -> Sampling:
        """Return how the answer of a number is chosen: each has a seed of its own."""
        seed = (self.sampling.seed + index) % (1 << 32)
        return dataclasses.replace(self.sampling, seed=seed)


@dataclass(frozen=True)
class ChatRequest(Wanted):
    """The body of a chat completion."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TextRequest(Wanted):
    """The body of a text completion."""

    prompts: tuple[Prompt, ...]
    echo: bool  # answers begin with their prompts


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat completion.

    Raises:
        BadRequest: it is not JSON, a field has a wrong type or value, or asks for what pitstop cannot do.
    """
    data = parse_object(body)
    check_supported(data)
    limit = "max_completion_tokens" if data.get("max_completion_tokens") is not None else "max_tokens"
    likeliest = whole(data, "top_logprobs", 0, 0, LIKELIEST)
    scored = optional(data, "logprobs", bool, False)
    if likeliest and not scored:
        raise BadRequest("'top_logprobs' asks for 'logprobs' to be true", "top_logprobs")
    sampling = parse_sampling(
        data, max_tokens=whole(data, limit, UNLIMITED, 1, UNLIMITED), logprobs=likeliest if scored else None
    )
    messages = _messages(required(data, "messages", list))
    return ChatRequest(**_wanted(data), sampling=sampling, messages=messages)


def parse_text(body: bytes) -> TextRequest:
    """Read the body of a text completion.

    Raises:
        BadRequest: as for `parse_chat`.
    """
    data = parse_object(body)
    check_supported(data)
    scored = data.get("logprobs") is not None
    sampling = parse_sampling(
        data,
        max_tokens=whole(data, "max_tokens", TEXT_TOKENS, 0, UNLIMITED),
        logprobs=whole(data, "logprobs", 0, 0, LIKELIEST) if scored else None,
    )
    prompts = _prompts(data.get("prompt"))
    return TextRequest(**_wanted(data), sampling=sampling, prompts=prompts, echo=optional(data, "echo", bool, False))


def _wanted(data: Mapping[str, Any]) -> dict[str, Any]:
    options = optional(data, "stream_options", dict, {})
    return {
        "model": required(data, "model", str),
        "n": whole(data, "n", 1, 1, CHOICES),
        "scales": None if data.get("lora") is None else parse_scales(data["lora"], "lora"),
        "stream": optional(data, "stream", bool, False),
        "include_usage": optional(options, "include_usage", bool, False),
    }


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Return the prompts of a text, a list of texts, a list of tokens or a list of those."""
    if value is None:
        raise BadRequest("'prompt' is missing", "prompt")
    if isinstance(value, str) or _is_tokens(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) or _is_tokens(one) for one in value):
        raise BadRequest("'prompt' must be a text, a list of tokens, or a list of either, none empty", "prompt")
    return tuple(one if isinstance(one, str) else tuple(one) for one in value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_whole, value))


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
