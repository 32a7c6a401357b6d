"""Adapter verbs, health and counts over HTTP: what is refused is named with the reason, and others are answered."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pitstop.device.access import Access
from pitstop.device.routes import BODY_LIMIT
from pitstop.device.runtime import Runtime
from serving import (
    ALPHA,
    BASE,
    BETA,
    LIMITS,
    QUESTIONS,
    SAMPLING,
    SCALES,
    Board,
    ask,
    cold_stack,
    damage,
    install,
    request,
    running,
)

LOAD, UNLOAD, ADAPTERS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/lora-adapters"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def url(board: Board) -> Iterator[str]:
    with running(lambda: Runtime.from_release(board.release, LIMITS)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def third(board: Board, make_adapter: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "third.gguf"
    return make_adapter(path, 7, base_sha256=board.release.base.base_sha256)


def text_of(url: str, model: str, **more: Any) -> str:
    body = {"model": model, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens, **more}
    status, _, answer = request(url, "POST", "/v1/chat/completions", body)
    assert status == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


def names(url: str) -> list[str]:
    return [model["id"] for model in request(url, "GET", "/v1/models")[2]["data"]]


def test_an_adapter_is_loaded_asked_and_unloaded(board: Board, url: str, third: Path) -> None:
    status, _, said = request(url, "POST", LOAD, {"lora_name": "my/third", "lora_path": str(third)})
    assert (status, said) == (200, "Success: LoRA adapter 'my/third' added successfully.")
    assert names(url) == [BASE, ALPHA, BETA, "my/third"]
    assert request(url, "GET", "/v1/models/my/third")[2]["pitstop"]["version"] == "local"
    assert text_of(url, "my/third") not in board.expected.values()
    (entry,) = [one for one in request(url, "GET", ADAPTERS)[2] if one["pitstop"]["name"] == "my/third"]
    assert (entry["path"], entry["scale"], entry["pitstop"]["loaded"]) == ("third.gguf", 0.0, True)
    status, _, answer = request(url, "POST", LOAD, {"lora_name": "my/third", "lora_path": str(third)})
    assert (status, "served already" in answer["error"]["message"]) == (400, True)
    assert request(url, "POST", UNLOAD, {"lora_name": "my/third"})[0] == 200
    assert names(url) == [BASE, ALPHA, BETA]
    assert request(url, "POST", UNLOAD, {"lora_name": "my/third"})[0] == 404
    assert text_of(url, ALPHA) == board.expected[ALPHA, QUESTIONS[0]]


def test_bad_adapters_are_refused_by_name(board: Board, url: str, make_adapter: Make, tmp_path: Path) -> None:
    digest = board.release.base.base_sha256
    (tmp_path / "folder").mkdir()

    def on(name: str, tensor: str, columns: int, rows: int) -> Path:
        return make_adapter(tmp_path / name, 3, base_sha256=digest, others={f"{tensor}.weight": (columns, rows)})

    bad = {
        on(
            "norm.gguf", "blk.0.attn_norm", 576, 1
        ): "norm.gguf has the tensor blk.0.attn_norm.weight, which is no projection",
        on("wide.gguf", "blk.0.attn_q", 2048, 2048): "wide.gguf has (2048, 4) and (4, 2048) for blk.0.attn_q.weight",
        on("deep.gguf", "blk.40.attn_q", 576, 576): "deep.gguf changes blk.40.attn_q.weight, which the base does not",
        damage(board.adapters[ALPHA], tmp_path / "cut.gguf", 100_000): "cut.gguf",
        make_adapter(tmp_path / "other.gguf", 3, base_sha256="0" * 64): "base",
        make_adapter(tmp_path / "zero.gguf", 3, strength=0.0, base_sha256=digest): "zero.gguf changes nothing",
        make_adapter(tmp_path / "nan.gguf", 3, strength=float("nan"), base_sha256=digest): "nan.gguf",
        tmp_path / "folder": "folder is no regular file",
        tmp_path / "missing.gguf": "missing.gguf cannot be read",
        Path("/dev/null"): "null is no regular file",
    }
    for path, words in bad.items():
        status, _, answer = request(url, "POST", LOAD, {"lora_name": "bad", "lora_path": str(path)})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "adapter_refused", "lora_path")
        assert words in answer["error"]["message"]
        assert str(tmp_path) not in answer["error"]["message"]
        assert names(url) == [BASE, ALPHA, BETA]
    assert request(url, "GET", "/health")[2]["status"] == "ready"
    assert text_of(url, ALPHA) == board.expected[ALPHA, QUESTIONS[0]]
    _, _, counted = request(url, "GET", "/metrics")
    assert 'pitstop_refused_adapters_total{adapter="bad",reason="no_effect"} 1' in counted
    assert 'pitstop_refused_adapters_total{adapter="bad",reason="wrong_base"} 1' in counted


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (LOAD, {}, 400),
        (LOAD, [], 400),
        (LOAD, {"lora_name": "x", "lora_path": "here.gguf"}, 400),
        (LOAD, {"lora_name": "x"}, 404),
        (LOAD, {"lora_name": BASE}, 400),
        (UNLOAD, {"lora_name": BASE}, 400),
        (UNLOAD, {"lora_name": 3}, 400),
        (ADAPTERS, {}, 400),
        (ADAPTERS, [{"id": 0}], 400),
        (ADAPTERS, [{"id": 99, "scale": 1}], 404),
    ],
)
def test_orders_that_make_no_sense(url: str, path: str, body: Any, status: int) -> None:
    answered, _, answer = request(url, "POST", path, body)
    assert (answered, answer["error"]["type"]) == (status, "invalid_request_error")


def test_default_scales_are_for_the_plain_base(board: Board, url: str) -> None:
    listed = request(url, "GET", ADAPTERS)[2]
    assert [(entry["pitstop"]["name"], entry["scale"]) for entry in listed] == [(ALPHA, 0.0), (BETA, 0.0)]
    beta = listed[1]["id"]
    try:
        assert request(url, "POST", ADAPTERS, [{"id": beta, "scale": SCALES[BETA]}])[::2] == (200, {"success": True})
        assert request(url, "GET", ADAPTERS)[2][1]["scale"] == SCALES[BETA]
        assert text_of(url, BASE) == cold_stack(board, {BETA: SCALES[BETA]}, QUESTIONS[0])
        assert text_of(url, BASE, lora=[]) == board.expected[BASE, QUESTIONS[0]]
        assert text_of(url, ALPHA) == board.expected[ALPHA, QUESTIONS[0]]
    finally:
        request(url, "POST", ADAPTERS, [])
    assert text_of(url, BASE) == board.expected[BASE, QUESTIONS[0]]


def test_an_adapter_is_pinned(url: str) -> None:
    for pin in (True, False):
        assert request(url, "POST", LOAD, {"lora_name": ALPHA, "pin": pin})[0] == 200
        entry = request(url, "GET", ADAPTERS)[2][0]
        assert (entry["pitstop"]["loaded"], entry["pitstop"]["pinned"]) == (True, pin)


def test_health_is_degraded_by_an_adapter_that_cannot_be_loaded(board: Board, tmp_path: Path) -> None:
    bad = damage(board.adapters[BETA], tmp_path / "beta.gguf", 50_000)
    release = install(tmp_path / "root", board.base, {ALPHA: board.adapters[ALPHA], BETA: bad})
    with running(lambda: Runtime.from_release(release, LIMITS)) as (url, service):
        assert request(url, "GET", "/health")[2]["status"] == "ready"
        body = {"model": BETA, "messages": ask("hello")}
        assert request(url, "POST", "/v1/chat/completions", body)[0] == 503
        status, _, health = request(url, "GET", "/health")
        assert (status, health["status"], list(health["reasons"])) == (200, "degraded", [BETA])
        assert str(tmp_path) not in health["reasons"][BETA]
        assert text_of(url, ALPHA) == board.expected[ALPHA, QUESTIONS[0]]
        service.stopping = True
        status, headers, health = request(url, "GET", "/health")
        assert (status, headers["Retry-After"], health["status"]) == (503, "1", "stopping")
        status, headers, answer = request(url, "POST", "/v1/chat/completions", body)
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "stopping")


def test_counts_say_what_was_done(board: Board) -> None:
    size = board.adapters[ALPHA].stat().st_size
    with running(lambda: Runtime.from_release(board.release, replace(LIMITS, adapter_budget=size))) as (url, _):
        for model in (BASE, ALPHA, ALPHA, BETA):
            text_of(url, model)
        status, headers, text = request(url, "GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def total(name: str, adapter: str) -> float:
        found = [value for key, value in counted.items() if key.startswith(name) and f'adapter="{adapter}"' in key]
        return sum(map(float, found))

    assert [total("pitstop_requests_total", model) for model in (BASE, ALPHA, BETA)] == [1, 2, 1]
    assert total("pitstop_first_token_seconds_count", ALPHA) == 2
    assert total("pitstop_reused_tokens_total", ALPHA) > 0
    assert 12 < total("pitstop_completion_tokens_total", ALPHA) <= 24
    assert [total("pitstop_swaps_total", model) for model in (ALPHA, BETA)] == [1, 1]
    assert [total("pitstop_adapter_loads_total", model) for model in (ALPHA, BETA)] == [1, 1]
    assert total("pitstop_adapter_load_seconds_total", BETA) > 0
    assert total("pitstop_evictions_total", ALPHA) == 1
    assert counted[f'pitstop_resident_adapter_bytes{{adapter="{BETA}"}}'] == str(size)


def test_orders_need_the_key_where_there_is_one(board: Board, third: Path) -> None:
    access = Access("secret", loopback=False)
    body = {"lora_name": "third", "lora_path": str(third)}
    with running(lambda: Runtime.from_release(board.release, LIMITS), access) as (url, _):
        assert request(url, "POST", LOAD, body)[0] == 401
        assert request(url, "POST", LOAD, body, {"Authorization": "Bearer secret"})[0] == 200


def test_the_description_is_served(url: str) -> None:
    status, _, description = request(url, "GET", "/openapi.json")
    assert (status, description["openapi"]) == (200, "3.1.0")


def test_large_bodies_are_refused_everywhere(url: str) -> None:
    for path in (LOAD, UNLOAD, ADAPTERS, "/v1/completions"):
        assert request(url, "POST", path, b" " * (BODY_LIMIT + 1))[0] == 413
