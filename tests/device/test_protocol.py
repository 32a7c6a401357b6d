"""Bodies of requests become what the runtime understands, or an error that names the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.device import protocol
from pitstop.device.protocol import (
    BadRequest,
    ChatReply,
    ChatRequest,
    Choice,
    TextReply,
    TextRequest,
    error_body,
    error_status,
    parse_chat,
    parse_text,
    usage,
)
from pitstop.device.protocol.sampling import UNSUPPORTED
from pitstop.device.request import (
    Finished,
    PromptTooLong,
    QueueFull,
    Said,
    Starting,
    Stopped,
    TokenScore,
    UnknownModel,
)
from pitstop.engines.base import Usage
from pitstop.errors import BaseMismatch, Busy, FormatError, UsageError

MINIMAL: dict[str, Any] = {"model": "home", "messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def parse(**changes: Any) -> ChatRequest:
    return parse_chat(json.dumps({**MINIMAL, **changes}).encode())


def parse_prompt(prompt: Any = "hello", **changes: Any) -> TextRequest:
    return parse_text(json.dumps({"model": "home", "prompt": prompt, **changes}).encode())


def test_a_minimal_request_is_greedy_and_unlimited() -> None:
    chat = parse()
    assert (chat.model, chat.stream, chat.include_usage, chat.n, chat.scales) == ("home", False, False, 1, None)
    assert chat.messages == ({"role": "user", "content": "hello"},)
    sampling = chat.sampling
    assert (sampling.temperature, sampling.grammar, sampling.json_schema, sampling.logprobs) == (0, None, None, None)
    assert sampling.max_tokens >= 1 << 20


def test_every_option_arrives() -> None:
    chat = parse(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=3, stop=["a", "b"], stream=True, n=2,
        stream_options={"include_usage": True}, repeat_penalty=1.1, repeat_last_n=9, presence_penalty=-1,
        frequency_penalty=2, logit_bias={"5": -100, "7": 1.5}, logprobs=True, top_logprobs=3,
        lora=[{"id": 0, "scale": 0.5}],
    )  # fmt: skip
    sampling = chat.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 40)
    assert (sampling.seed, sampling.stop, sampling.min_p, sampling.logprobs) == (3, ("a", "b"), 0.1, 3)
    assert (sampling.repeat_penalty, sampling.penalty_tokens) == (1.1, 9)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.logit_bias == ((5, -100), (7, 1.5))
    assert (chat.stream, chat.include_usage, chat.n, chat.scales) == (True, True, 2, {0: 0.5})


def test_each_answer_has_a_seed_of_its_own() -> None:
    chat = parse(n=3, seed=(1 << 32) - 1)
    assert [chat.choice(index).seed for index in range(3)] == [(1 << 32) - 1, 0, 1]


def test_newer_names_of_the_api() -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    chat = parse(max_completion_tokens=5, max_tokens=None, stop="x", messages=[{"role": "developer", "content": parts}])
    assert chat.messages == ({"role": "system", "content": "be brief"},)
    assert (chat.sampling.max_tokens, chat.sampling.stop) == (5, ("x",))


@pytest.mark.parametrize(
    ("changes", "schema"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, SCHEMA),
        ({"json_schema": SCHEMA}, SCHEMA),
    ],
)
def test_every_way_to_ask_for_json(changes: dict[str, Any], schema: Any) -> None:
    for sampling in (parse(**changes).sampling, parse_prompt(**changes).sampling):
        assert (json.loads(sampling.json_schema) if sampling.json_schema else None) == schema
        assert sampling.grammar is None


def test_a_grammar_arrives() -> None:
    assert parse(grammar='root ::= "a"').sampling.grammar == 'root ::= "a"'


def test_what_asks_for_nothing_passes() -> None:
    parse(n=1, tools=[], logprobs=False, presence_penalty=0.0, response_format={"type": "text"}, user="me", store=None)
    for name, neutral in UNSUPPORTED.items():
        for value in neutral:
            parse(**{name: value})


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
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"mirostat": 2}, "mirostat"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"response_format": "json"}, "response_format"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"json_schema": {"title": "x" * (1 << 16)}}, "json_schema"),
        ({"grammar": 3}, "grammar"),
        ({"grammar": "a" * (1 << 16)}, "grammar"),
        ({"grammar": "root ::= [a]", "response_format": {"type": "json_object"}}, "grammar"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": [[1, 2]]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_last_n": -1}, "repeat_last_n"),
        ({"lora": {"id": 0, "scale": 1}}, "lora"),
        ({"lora": [{"id": "0", "scale": 1}]}, "lora"),
        ({"lora": [{"id": 0}]}, "lora"),
        ({"lora": [{"id": 0, "scale": 1e9}]}, "lora"),
        ({"lora": [{"id": 0, "scale": 1}, {"id": 0, "scale": 2}]}, "lora"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**changes)
    assert caught.value.param == param
    assert param in caught.value.what


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_every_shape_of_a_prompt(prompt: Any, prompts: Any) -> None:
    text = parse_prompt(prompt)
    assert text.prompts == prompts
    assert (text.echo, text.sampling.max_tokens, text.sampling.logprobs) == (False, 16, None)


def test_a_text_may_ask_for_no_answer_but_its_own_score() -> None:
    text = parse_prompt(echo=True, max_tokens=0, logprobs=0)
    assert (text.echo, text.sampling.max_tokens, text.sampling.logprobs) == (True, 0, 0)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_prompt(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"model": "\\ud800"}'])
@pytest.mark.parametrize(
    "read", [parse_chat, parse_text, protocol.parse_load, protocol.parse_unload], ids=lambda read: read.__name__
)
def test_what_is_no_json_object_is_refused(read: Any, body: bytes) -> None:
    with pytest.raises(BadRequest):
        read(body)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"lora_name": None}, "lora_name"),
        ({"lora_name": ""}, "lora_name"),
        ({"lora_name": "a b"}, "lora_name"),
        ({"lora_name": "../x"}, "lora_name"),
        ({"lora_path": 3}, "lora_path"),
        ({"lora_path": "here.gguf"}, "lora_path"),
        ({"lora_path": "/a\0b"}, "lora_path"),
        ({"pin": "yes"}, "pin"),
    ],
)
def test_what_is_wrong_with_an_order_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        protocol.parse_load(json.dumps({"lora_name": "a", "lora_path": "/a.gguf", **changes}).encode())
    assert caught.value.param == param


def test_default_scales_are_a_list() -> None:
    assert protocol.parse_default_scales(b'[{"id": 1, "scale": -0.5}]') == {1: -0.5}
    for body in (b"{}", b"[1]", b'[{"id": true, "scale": 1}]', b'[{"id": 1, "scale": NaN}]'):
        with pytest.raises(BadRequest, match="the body"):
            protocol.parse_default_scales(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stream", "stream_options", "n", "tools", "response_format", "grammar", "json_schema", "logit_bias",
    "presence_penalty", "frequency_penalty", "repeat_penalty", "repeat_last_n", "logprobs", "top_logprobs", "lora",
    "prompt", "echo", "lora_name", "lora_path", "pin", *UNSUPPORTED,
]  # fmt: skip
READERS = [parse_chat, parse_text, protocol.parse_load, protocol.parse_unload, protocol.parse_default_scales]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.booleans())
def test_any_json_is_read_or_refused(changes: dict[str, Any], minimal: bool) -> None:
    start = {**MINIMAL, "prompt": "x", "lora_name": "a"} if minimal else {}
    body = json.dumps({**start, **changes}).encode()
    for read in READERS:
        try:
            parsed = read(body)
        except BadRequest:
            continue
        if isinstance(parsed, ChatRequest | TextRequest):
            assert 0 <= parsed.sampling.seed < 1 << 32
            assert 1 <= parsed.n <= 8


@given(json_values)
def test_any_json_value_is_read_or_refused(value: Any) -> None:
    for read in READERS:
        try:
            read(json.dumps(value).encode())
        except BadRequest:
            continue


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for read in READERS:
        try:
            read(body)
        except BadRequest:
            continue


@pytest.mark.parametrize("depth", [900, 960, 980, 990, 995, 1000, 2000])
def test_nested_schemas_are_read_or_refused(depth: int) -> None:
    body = b'{"model": "x", "prompt": "x", "json_schema": ' + b'{"a": ' * depth + b"1" + b"}" * (depth + 1)
    try:
        parse_text(body)
    except BadRequest:
        return


@pytest.mark.parametrize(
    ("error", "status", "code", "passing"),
    [
        (UnknownModel("x"), 404, "model_not_found", False),
        (PromptTooLong("x"), 400, "context_length_exceeded", False),
        (QueueFull("x"), 429, "queue_full", True),
        (Starting("x"), 503, "starting", True),
        (Stopped("x"), 503, "stopping", True),
        (Busy("x"), 503, "busy", True),
        (UsageError("x"), 400, None, False),
        (FormatError("x"), 503, "model_cannot_be_used", False),
        (BaseMismatch("x"), 503, "model_cannot_be_used", False),
    ],
)
def test_errors_get_the_status_a_client_acts_on(error: Any, status: int, code: str | None, passing: bool) -> None:
    assert error_status(error) == (status, code)
    assert protocol.is_passing(error) == passing


def test_error_body_has_the_shape_of_openai() -> None:
    body = error_body("no", 404, code="model_not_found", param="model")
    assert body == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }


def test_usage_carries_what_pitstop_measures() -> None:
    figures = usage([Finished(Usage(10, 4, 3, 0.0125, "stop"), swapped=True)])
    assert figures["total_tokens"] == 13
    assert figures["prompt_tokens_details"] == {"cached_tokens": 4}
    assert figures["pitstop"] == {"first_token_ms": 12.5, "reused_tokens": 4, "swapped": True}


def test_usage_of_several_answers_counts_a_prompt_once() -> None:
    figures = usage([Finished(Usage(10, 0, 3, 0.5, "stop"), swapped=False)] * 4, n=2)
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (20, 12)


def choice(*tokens: TokenScore, text: str = "") -> Choice:
    return Choice([text], list(tokens), Finished(Usage(1, 0, 1, 0.1, "stop"), swapped=False))


def test_log_probabilities_of_a_chat() -> None:
    score = TokenScore(b"\xc3", -float("inf"), ((b"a", -0.5), (b"\xc3", -1.0)))
    (entry,) = ChatReply("m").whole([choice(score)])["choices"]
    (content,) = entry["logprobs"]["content"]
    assert (content["token"], content["logprob"], content["bytes"]) == ("�", -9999.0, [0xC3])
    assert [top["token"] for top in content["top_logprobs"]] == ["a", "�"]
    (entry,) = ChatReply("m").whole([choice(text="x")])["choices"]
    assert entry["logprobs"] is None


def test_log_probabilities_of_a_text_have_the_older_shape() -> None:
    scores = [
        TokenScore(b"h\xc3", None),
        TokenScore(b"\xa9", -1.0, ((b"b", -0.25), (b"b", -0.5))),
        TokenScore(b"!", -0.5, ((b"!", -0.5),)),
    ]
    (entry,) = TextReply("m").whole([choice(*scores)])["choices"]
    assert entry["logprobs"] == {
        "tokens": ["bytes:\\x68\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"bytes:\\xa9": -1.0, "b": -0.25}, {"!": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    reply = TextReply("m")
    chunks = [reply.chunk(0, Said(text, (TokenScore(text.encode(), -1.0),))) for text in ("né", "e", "d")]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [2], [3]]
    assert reply.last_chunk(0, choice().end)["choices"][0]["finish_reason"] == "stop"
