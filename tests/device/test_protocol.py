"""Bodies of requests become what the runtime understands, or an error that names the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.device.protocol import BadRequest, ChatRequest, error_body, error_status, parse_chat, usage
from pitstop.device.runtime import Finished, PromptTooLong, QueueFull, Stopped, UnknownModel
from pitstop.engines.base import Usage
from pitstop.errors import BaseMismatch, FormatError, UsageError

MINIMAL: dict[str, Any] = {"model": "home", "messages": [{"role": "user", "content": "hello"}]}


def parse(**changes: Any) -> ChatRequest:
    return parse_chat(json.dumps({**MINIMAL, **changes}).encode())


def test_a_minimal_request_is_greedy_and_unlimited() -> None:
    chat = parse()
    assert (chat.model, chat.stream, chat.include_usage) == ("home", False, False)
    assert chat.messages == ({"role": "user", "content": "hello"},)
    assert chat.sampling.temperature == 0
    assert chat.sampling.max_tokens >= 1 << 20


def test_every_option_arrives() -> None:
    chat = parse(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=40, seed=3, stop=["a", "b"], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    sampling = chat.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 40)
    assert (sampling.seed, sampling.stop, chat.stream, chat.include_usage) == (3, ("a", "b"), True, True)


def test_newer_names_of_the_api() -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    chat = parse(max_completion_tokens=5, max_tokens=None, stop="x", messages=[{"role": "developer", "content": parts}])
    assert chat.messages == ({"role": "system", "content": "be brief"},)
    assert (chat.sampling.max_tokens, chat.sampling.stop) == (5, ("x",))


def test_what_asks_for_nothing_passes() -> None:
    parse(n=1, tools=[], logprobs=False, presence_penalty=0.0, response_format={"type": "text"}, user="me", store=None)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**changes)
    assert caught.value.param == param
    assert param in caught.value.what


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"model": "\\ud800"}'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_chat(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stream", "stream_options", "n", "tools",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        chat = parse(**changes)
    except BadRequest:
        return
    assert chat.sampling.max_tokens >= 1
    assert 0 <= chat.sampling.seed < 1 << 32


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownModel("x"), 404, "model_not_found"),
        (PromptTooLong("x"), 400, "context_length_exceeded"),
        (QueueFull("x"), 429, "queue_full"),
        (Stopped("x"), 503, "stopping"),
        (UsageError("x"), 400, None),
        (FormatError("x"), 503, "model_cannot_be_used"),
        (BaseMismatch("x"), 503, "model_cannot_be_used"),
    ],
)
def test_errors_get_the_status_a_client_acts_on(error: Any, status: int, code: str | None) -> None:
    assert error_status(error) == (status, code)


def test_error_body_has_the_shape_of_openai() -> None:
    body = error_body("no", 404, code="model_not_found", param="model")
    assert body == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }


def test_usage_carries_what_pitstop_measures() -> None:
    figures = usage(Finished(Usage(10, 4, 3, 0.0125, "stop"), swapped=True))
    assert figures["total_tokens"] == 13
    assert figures["prompt_tokens_details"] == {"cached_tokens": 4}
    assert figures["pitstop"] == {"first_token_ms": 12.5, "reused_tokens": 4, "swapped": True}
