"""Completions over HTTP with the real client: choices, constraints, log-probabilities, scoring as lm-eval does it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from pitstop.device.routes import Service
from pitstop.device.runtime import Runtime
from pitstop.engines.base import PLAIN_BASE, Sampling, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.template import render
from serving import (
    ALPHA,
    BASE,
    BETA,
    LIMITS,
    PATIENCE,
    QUESTIONS,
    SAMPLING,
    SCALES,
    Board,
    ask,
    cold_stack,
    request,
    running,
    wait_for,
)

NEAR = 1e-3  # nats: what a score may differ from the engine's own
PORTIONS = 0.1  # nats: what an answer's may, for a conversation goes on from what others left, in other portions
TEXT = "The capital of France is Paris. The capital of Italy is"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
ITEMS = [
    (context, ending)
    for context in ("The sky is", "Two and two make", "A dog is a kind of", "He said: naïve")
    for ending in (" blue", " four", " animal.", " 🙂 café")
]


@pytest.fixture(scope="module")
def web(board: Board) -> Iterator[tuple[str, Service]]:
    with running(lambda: Runtime.from_release(board.release, LIMITS)) as started:
        yield started


@pytest.fixture
def client(web: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web[0]}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def engine(board: Board) -> Iterator[LlamaEngine]:
    """An engine of its own, to compare with."""
    options = {"base_sha256": board.release.base.base_sha256, "context_length": 512, "sequences": 1, "threads": 1}
    with LlamaEngine(board.base, **options) as engine:
        for name, path in board.adapters.items():
            engine.load_adapter(name, path)
        yield engine


def chat(client: openai.OpenAI, question: str = QUESTIONS[0], model: str = BASE, **more: Any) -> Any:
    messages: Any = ask(question)
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 12, **more})


def complete(client: openai.OpenAI, prompt: Any, model: str = BASE, **more: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, **more)


def test_several_choices_have_their_own_seeds(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "seed": 5}
    chat(client, **hot)  # from here on all find the same KV of their prompt, and round the same way
    several = chat(client, n=4, **hot)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in several.choices}) > 1
    assert several.usage.completion_tokens > 12
    assert several.usage.prompt_tokens == chat(client).usage.prompt_tokens


def test_several_choices_are_streamed_at_the_same_time(board: Board, client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in chat(client, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys((0, 1), board.expected[BASE, QUESTIONS[0]])
    assert set(reasons.values()) <= {"stop", "length"}
    assert chunk.usage.completion_tokens > 12


@pytest.mark.parametrize(
    "wanted",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}},
        {"extra_body": {"json_schema": SCHEMA}},
    ],
)
def test_a_json_schema_is_followed(client: openai.OpenAI, wanted: dict[str, Any]) -> None:
    for model in (BASE, ALPHA):
        answer = json.loads(chat(client, model=model, max_tokens=60, **wanted).choices[0].message.content)
        assert answer.keys() == {"city", "people"}


def test_a_json_object_and_a_grammar_are_followed(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=200, response_format={"type": "json_object"}).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.lstrip().startswith("{")
    rules = {"grammar": 'root ::= "yes" | "no"'}
    assert chat(client, extra_body=rules).choices[0].message.content in ("yes", "no")
    assert complete(client, TEXT, extra_body=rules).choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    "wanted",
    [
        {"grammar": "root ::= ("},
        {"grammar": "root ::= root"},
        {"grammar": "(" * 200},
        {"grammar": "root ::= a1\n" + "\n".join(f"a{n} ::= a{n + 1}" for n in range(1, 1500)) + '\na1500 ::= "x"'},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"$ref": "https://example.org/schema.json"}},
        {"json_schema": {"type": "string", "maxLength": 1 << 40}},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1 << 30}},
        {"logit_bias": {"999999999": 1}},
    ],
)
def test_what_cannot_be_followed_is_refused_and_harms_nobody(
    board: Board, web: tuple[str, Service], wanted: dict[str, Any]
) -> None:
    body = {"model": BASE, "messages": ask(QUESTIONS[0]), "max_tokens": 4, **wanted}
    status, _, answer = request(web[0], "POST", "/v1/chat/completions", body)
    assert status in (200, 400)
    assert status == 200 or answer["error"]["type"] == "invalid_request_error"
    body = {"model": BETA, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens}
    _, _, answer = request(web[0], "POST", "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == board.expected[BETA, QUESTIONS[0]]


def test_bias_and_penalties_change_an_answer(client: openai.OpenAI, engine: LlamaEngine) -> None:
    (wanted,) = engine.tokenize(" Berlin")
    forced = complete(client, TEXT, max_tokens=3, logit_bias={str(wanted): 100})
    assert forced.choices[0].text == " Berlin" * 3
    unstuck = complete(client, TEXT, max_tokens=8, logit_bias={str(wanted): 12}, frequency_penalty=2)
    assert unstuck.choices[0].text != " Berlin" * 8


def test_log_probabilities_of_a_chat(board: Board, client: openai.OpenAI, engine: LlamaEngine) -> None:
    choice = chat(client, model=ALPHA, logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
    content = choice.logprobs.content
    assert len(content) == 6
    assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
    prompt = engine.tokenize(render(board.release.bundles[ALPHA].prompting, ask(QUESTIONS[0])))
    wanted = Sampling(max_tokens=6, logprobs=3)
    for token, piece in zip(content, engine.generate(prompt, Use(ALPHA, SCALES[ALPHA]), wanted), strict=True):
        assert token.logprob == pytest.approx(piece.logprob, abs=PORTIONS)
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
    streamed = []
    for chunk in chat(client, model=ALPHA, logprobs=True, max_tokens=6, stream=True):
        for one in chunk.choices:
            streamed += one.logprobs.content if one.logprobs else []
    assert [token.token for token in streamed] == [token.token for token in content]
    assert chat(client).choices[0].logprobs is None


def test_a_text_goes_on_without_a_template(client: openai.OpenAI, engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT)
    for name, use in ((BASE, PLAIN_BASE), (BETA, Use(BETA, SCALES[BETA]))):
        pieces = list(engine.generate(tokens, use, Sampling(max_tokens=6)))
        expected = "".join(piece.text for piece in pieces)
        for prompt in (TEXT, tokens):
            answer = complete(client, prompt, name, max_tokens=6)
            assert answer.choices[0].text == expected
            assert answer.usage.prompt_tokens == len(tokens)
        texts = [chunk.choices[0].text for chunk in complete(client, TEXT, name, max_tokens=6, stream=True)]
        assert "".join(texts) == expected
        assert complete(client, TEXT, name, max_tokens=6, echo=True).choices[0].text == TEXT + expected
    stopped = complete(client, TEXT, max_tokens=6, stop=["."])
    assert "." not in stopped.choices[0].text


def test_many_prompts_get_their_choices_in_order(client: openai.OpenAI, engine: LlamaEngine) -> None:
    prompts = [TEXT, "One, two, three,", "Roses are red,"]
    several = complete(client, prompts, n=2, max_tokens=4, echo=True)
    assert [choice.index for choice in several.choices] == list(range(6))
    for index, choice in enumerate(several.choices):
        assert choice.text.startswith(prompts[index // 2])
    assert several.usage.prompt_tokens == sum(len(engine.tokenize(prompt)) for prompt in prompts)
    tokens = complete(client, [engine.tokenize(prompt) for prompt in prompts], max_tokens=0, echo=True)
    assert [choice.text for choice in tokens.choices] == prompts


@pytest.mark.parametrize("limit", [0, 1])
def test_a_prompt_is_scored_in_the_older_shape(client: openai.OpenAI, engine: LlamaEngine, limit: int) -> None:
    tokens = engine.tokenize(TEXT)
    choice = complete(client, TEXT, max_tokens=limit, echo=True, logprobs=2).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(tokens) + limit
    assert "".join(scores.tokens) == choice.text
    assert [choice.text[at:].startswith(token) for token, at in zip(scores.tokens, scores.text_offset, strict=True)]
    assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
    assert scores.token_logprobs[1 : len(tokens)] == pytest.approx(engine.score(tokens[:1], tokens[1:]), abs=NEAR)
    for token, logprob, top in zip(scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    assert choice.finish_reason == "length"


def test_a_streamed_score_is_the_same(client: openai.OpenAI) -> None:
    options = {"max_tokens": 3, "echo": True, "logprobs": 1}
    whole = complete(client, TEXT, **options).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, TEXT, stream=True, **options)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for field in ("tokens", "text_offset"):
        streamed = [value for chunk in chunks if chunk.logprobs for value in getattr(chunk.logprobs, field)]
        assert streamed == getattr(whole.logprobs, field)


def harness_score(answer: dict[str, Any], context_length: int) -> tuple[float, bool]:
    """Read an answer as the class LocalCompletionsAPI of lm-evaluation-harness does (`parse_logprobs`)."""
    logprobs = answer["choices"][0]["logprobs"]
    values = logprobs["token_logprobs"][context_length:-1]
    tops = logprobs["top_logprobs"][context_length:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_scores_of_the_harness_are_the_engines(web: tuple[str, Service], engine: LlamaEngine) -> None:
    for name, use in ((BASE, PLAIN_BASE), (ALPHA, Use(ALPHA, SCALES[ALPHA]))):
        for context, ending in ITEMS:
            prompt, rest = engine.tokenize(context), engine.tokenize(ending)
            body = {
                "model": name,
                "prompt": [[*prompt, *rest]],
                "max_tokens": 1,
                "logprobs": 1,
                "echo": True,
                "seed": 1,
            }
            status, _, answer = request(web[0], "POST", "/v1/completions", {**body, "temperature": 0})
            assert status == 200, answer
            total, greedy = harness_score(answer, len(prompt))
            assert total == pytest.approx(float(engine.score(prompt, rest, use).sum()), abs=NEAR * len(rest))
            rows = engine.logits([*prompt, *rest[:-1]], use, first=len(prompt) - 1)
            assert greedy == (rows.argmax(axis=1).tolist() == rest)


def test_a_long_text_is_scored_while_others_answer(board: Board, client: openai.OpenAI, engine: LlamaEngine) -> None:
    long = (TEXT + " Rome. ") * 60
    tokens = engine.tokenize(long)[:500]
    events = complete(client, [tokens] * 3, max_tokens=0, echo=True, logprobs=0, stream=True)
    assert chat(client, model=BETA).choices[0].message.content == board.expected[BETA, QUESTIONS[0]]
    scored = {chunk.choices[0].index: chunk.choices[0].logprobs for chunk in events if chunk.choices[0].logprobs}
    expected = list(engine.score(tokens[:1], tokens[1:]))
    for index in range(3):
        assert scored[index].token_logprobs[1:] == pytest.approx(expected, abs=NEAR)


@pytest.mark.parametrize(
    ("prompt", "more", "says"),
    [
        ("", {}, "the prompt is empty"),
        ("", {"echo": True, "max_tokens": 0}, "the prompt is empty"),
        ([-1], {}, "outside of the vocabulary"),
        ([1 << 70], {"echo": True, "logprobs": 1, "max_tokens": 0}, "outside of the vocabulary"),
        ("word " * 600, {}, "a conversation holds 512"),
        ("word " * 600, {"echo": True, "logprobs": 1, "max_tokens": 0}, "a conversation holds 512"),
        (["a"] * 100, {}, "100 answers at once are too many"),
    ],
)
def test_prompts_that_cannot_be_taken(client: openai.OpenAI, prompt: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        complete(client, prompt, **more)


def test_a_prompt_may_fill_the_context_if_it_is_only_scored(client: openai.OpenAI) -> None:
    answer = complete(client, [5] * 512, max_tokens=0, echo=True, logprobs=0)
    assert len(answer.choices[0].logprobs.tokens) == 512
    with pytest.raises(openai.BadRequestError):
        complete(client, [5] * 512, max_tokens=1, echo=True, logprobs=0)


def test_a_request_stacks_adapters_by_number(board: Board, web: tuple[str, Service]) -> None:
    _, _, listed = request(web[0], "GET", "/lora-adapters")
    ids = {entry["pitstop"]["name"]: entry["id"] for entry in listed}
    scales = {ALPHA: 0.75, BETA: 0.25}
    lora = [{"id": ids[name], "scale": scale} for name, scale in scales.items()]
    body = {"model": BASE, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens, "lora": lora}
    _, _, answer = request(web[0], "POST", "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == cold_stack(board, scales, QUESTIONS[0])
    status, _, answer = request(web[0], "POST", "/v1/chat/completions", {**body, "lora": [{"id": 99, "scale": 1}]})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_more_answers_than_there_is_room_for_are_all_refused(board: Board) -> None:
    limits = replace(LIMITS, sequences=1, waiting=2)
    with running(lambda: Runtime.from_release(board.release, limits)) as (url, service):
        assert service.runtime is not None
        with service.runtime.ask(ALPHA, ask(QUESTIONS[0]), Sampling(max_tokens=400)) as live:
            next(live)
            body = {"model": BASE, "prompt": "a", "n": 3}
            status, headers, _ = request(url, "POST", "/v1/completions", body)
            assert (status, headers["Retry-After"]) == (429, "1")
            assert service.runtime.requests_now == (1, 0)
        runtime = service.runtime
        wait_for(lambda: runtime.requests_now == (0, 0))
        status, _, answer = request(url, "POST", "/v1/completions", body)
        assert (status, len(answer["choices"])) == (200, 3)
