"""Prompts that cannot be made or taken: each is refused with the reason, and the server keeps answering others."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pitstop.device.request import ServedModel
from pitstop.device.runtime import Runtime
from pitstop.engines.llama import LlamaEngine
from serving import ALPHA, BASE, LIMITS, QUESTIONS, SAMPLING, Board, ask, request, running

TEMPLATES = {
    "missing": ("", "prompt is empty"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "unreadable": ("{% for message in %}", "cannot be read"),
    "divides": ("{{ 1 / 0 }}", "division by zero"),
    "unknown": ("{{ messages[0].content.nothing.at.all }}", "has no attribute"),
    "endless": ("{% for number in range(10000000000) %}x{% endfor %}", "[Rr]ange"),
    "deep": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    "reaches": ("{{ messages.__class__.__mro__ }}", "access to attribute"),
}
LONG = "word " * 600


@pytest.fixture(scope="module")
def url(board: Board) -> Iterator[str]:
    """The server with a model for each template, beside the sound ones."""
    base = board.release.base

    def load() -> Runtime:
        options = {"context_length": LIMITS.context_length, "sequences": 2, "threads": 1}
        engine = LlamaEngine(board.base, base_sha256=base.base_sha256, **options)
        models = [ServedModel(BASE, base), *(ServedModel(name, *it) for name, it in board.release.adapters().items())]
        for name, (template, _) in TEMPLATES.items():
            prompting = replace(base.prompting, chat_template=template)
            models.append(ServedModel(name, replace(base, prompting=prompting)))
        return Runtime(engine, models, LIMITS)

    with running(load) as (url, _):
        yield url


def refused(url: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    status, _, answer = request(url, "POST", path, body)
    assert_sound(url)
    return status, answer["error"]["message"]


def assert_sound(url: str) -> None:
    """The server still answers."""
    body = {"model": ALPHA, "messages": ask(QUESTIONS[0]), "max_tokens": 1}
    assert request(url, "POST", "/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_makes_no_prompt(url: str, name: str) -> None:
    status, message = refused(url, "/v1/chat/completions", {"model": name, "messages": ask(QUESTIONS[0])})
    assert status in (400, 503)
    assert re.search(TEMPLATES[name][1], message)


@pytest.mark.parametrize("model", [BASE, ALPHA])
def test_an_empty_prompt_and_one_beyond_the_context(url: str, board: Board, model: str) -> None:
    for path, more in (("/v1/chat/completions", {"messages": ask(LONG)}), ("/v1/completions", {"prompt": LONG})):
        status, message = refused(url, path, {"model": model, **more})
        assert (status, "a conversation holds 512" in message) == (400, True)
    for prompt in ("", []):
        status, message = refused(url, "/v1/completions", {"model": model, "prompt": prompt})
        assert status == 400
        assert "empty" in message
    status, _ = refused(url, "/v1/chat/completions", {"model": model, "messages": []})
    assert status == 400
    body = {"model": model, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens}
    answer = request(url, "POST", "/v1/chat/completions", body)[2]
    assert answer["choices"][0]["message"]["content"] == board.expected[model, QUESTIONS[0]]
