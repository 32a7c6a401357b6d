"""OpenAI's shapes: what a client may ask, and how answers and errors are written. No I/O, no web framework."""

from pitstop.device.protocol.completions import ChatRequest, TextRequest, Wanted, parse_chat, parse_text
from pitstop.device.protocol.errors import describe, error_body, error_status, is_passing
from pitstop.device.protocol.fields import BadRequest
from pitstop.device.protocol.replies import ChatReply, Choice, Reply, TextReply, usage
from pitstop.device.protocol.verbs import (
    LoadRequest,
    adapter_entry,
    model_entry,
    model_list,
    parse_default_scales,
    parse_load,
    parse_unload,
)

__all__ = [
    "BadRequest",
    "ChatReply",
    "ChatRequest",
    "Choice",
    "LoadRequest",
    "Reply",
    "TextReply",
    "TextRequest",
    "Wanted",
    "adapter_entry",
    "describe",
    "error_body",
    "error_status",
    "is_passing",
    "model_entry",
    "model_list",
    "parse_chat",
    "parse_default_scales",
    "parse_load",
    "parse_text",
    "parse_unload",
    "usage",
]
