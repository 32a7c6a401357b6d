"""The HTTP side with real clients and the real model: answers, refusals, disconnects, start and stop."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from pitstop.device import server
from pitstop.device.access import Access
from pitstop.device.asgi import Server
from pitstop.device.routes import BODY_LIMIT, Service, application
from pitstop.device.runtime import Runtime
from pitstop.errors import BrokenInput, Busy, FormatError, StorageError, UsageError
from serving import (
    ALPHA,
    BASE,
    BETA,
    ENDLESS,
    LIMITS,
    PATIENCE,
    QUESTIONS,
    SAMPLING,
    Board,
    ask,
    damage,
    install,
    request,
    running,
    wait_for,
)

MODELS = (BASE, ALPHA, BETA)
SERVE = """
import sys
from pathlib import Path
from pitstop.device.runtime import Limits
from pitstop.device.server import serve
serve(Path(sys.argv[1]), port=0, limits=Limits(threads=1), as_json=True)
"""


@pytest.fixture(scope="module")
def web(board: Board) -> Iterator[tuple[str, Service]]:
    with running(lambda: Runtime.from_release(board.release, LIMITS)) as started:
        yield started


@pytest.fixture
def client(web: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web[0]}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def post(url: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    """Send a chat request; return status, headers and the parsed body."""
    return request(url, "POST", "/v1/chat/completions", body, headers)


def chat(question: str, model: str = BASE, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": ask(question), **more}


def endless(**more: Any) -> dict[str, Any]:
    return {"model": ENDLESS[0], "messages": ENDLESS[1], **more}


def complete(client: openai.OpenAI, model: str, question: str) -> Any:
    messages: Any = ask(question)
    return client.chat.completions.create(model=model, messages=messages, max_tokens=SAMPLING.max_tokens)


@contextmanager
def serving(root: Path) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """Run `serve` in a process of its own; yield it with its ready line."""
    command = [sys.executable, "-c", SERVE, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_openai_client_gets_what_a_cold_engine_answers(board: Board, client: openai.OpenAI) -> None:
    for question in QUESTIONS[:2]:
        for model in MODELS:
            answer = complete(client, model, question)
            assert answer.choices[0].message.content == board.expected[model, question]
            assert answer.choices[0].finish_reason in ("stop", "length")
            assert answer.model == model


def test_openai_clients_at_the_same_time(board: Board, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(6) as threads:
        asked = {(m, q): threads.submit(complete, client, m, q) for m in MODELS for q in QUESTIONS[1:]}
    for (model, question), answer in asked.items():
        assert answer.result().choices[0].message.content == board.expected[model, question]


def test_stream_says_the_same(board: Board, client: openai.OpenAI) -> None:
    messages: Any = ask(QUESTIONS[2])
    stream = client.chat.completions.create(
        model=ALPHA,
        messages=messages,
        max_tokens=SAMPLING.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == board.expected[ALPHA, QUESTIONS[2]]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert len(chunks) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert 5 < chunks[-1].usage.completion_tokens <= SAMPLING.max_tokens


def test_usage_says_what_a_swap_cost(client: openai.OpenAI) -> None:
    for model in (ALPHA, BETA, BETA):
        answer = complete(client, model, QUESTIONS[0])
        figures = answer.usage.model_extra["pitstop"]
        assert figures["first_token_ms"] > 0
    assert figures == {**figures, "swapped": False, "reused_tokens": answer.usage.prompt_tokens - 1}


def test_seed_and_temperature_repeat(client: openai.OpenAI) -> None:
    messages: Any = ask(QUESTIONS[2])
    texts = [
        client.chat.completions.create(model=BASE, messages=messages, max_tokens=8, temperature=1.5, seed=seed)
        .choices[0]
        .message.content
        for seed in (5, 5, 5, 6)
    ]
    # The first one finds no KV of its prompt: it is evaluated in another portion, which rounds otherwise.
    assert texts[1] == texts[2] != texts[3]


def test_models_are_listed(client: openai.OpenAI, web: tuple[str, Service]) -> None:
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve(BETA).model_extra == {
        "pitstop": {"kind": "adapter", "version": "1.0.0", "base": BASE, "delivery": "attached"}
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gamma")


def test_health_says_what_is_ready(web: tuple[str, Service]) -> None:
    status, _, body = request(web[0], "GET", "/health")
    assert (status, body["status"], body["models"]) == (200, "ready", dict.fromkeys(MODELS, "1.0.0"))


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, "gamma", "hello")
    assert caught.value.code == "model_not_found"
    assert "smollm2, alpha, beta" in caught.value.message


def test_long_prompt_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, BASE, "word " * 600)
    assert caught.value.code == "context_length_exceeded"


def test_bad_bodies_are_refused_in_the_shape_of_openai(web: tuple[str, Service]) -> None:
    for body, param in ((b"{", None), ({"model": BASE}, "messages"), (chat("x", temperature=9), "temperature")):
        status, _, answer = post(web[0], body)
        assert status == 400
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)


def test_large_bodies_are_refused(web: tuple[str, Service]) -> None:
    status, _, answer = post(web[0], chat("x" * BODY_LIMIT))
    assert status == 413
    assert "larger than 1,048,576 bytes" in answer["error"]["message"]


def test_unknown_routes_and_methods_have_the_shape_too(web: tuple[str, Service]) -> None:
    assert request(web[0], "GET", "/v1/nothing")[0] == 404
    status, _, answer = request(web[0], "GET", "/v1/chat/completions")
    assert status == 405
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_place(board: Board, stream: bool) -> None:
    limits = replace(LIMITS, sequences=1, context_length=2048)
    with running(lambda: Runtime.from_release(board.release, limits)) as (url, service):
        assert service.runtime is not None
        live = service.runtime._worker._live
        connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps(endless(stream=stream)))
        wait_for(lambda: bool(live) and live[0].usage.completion_tokens > 2)
        abandoned = live[0]
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        status, _, answer = post(url, chat(QUESTIONS[0], max_tokens=SAMPLING.max_tokens))
        assert (status, answer["choices"][0]["message"]["content"]) == (200, board.expected[BASE, QUESTIONS[0]])
        assert abandoned.cancelled
        assert not abandoned.usage.finish_reason


def test_full_queue_says_when_to_come_back(board: Board) -> None:
    limits = replace(LIMITS, sequences=1, waiting=0, context_length=2048)
    with running(lambda: Runtime.from_release(board.release, limits)) as (url, service):
        assert service.runtime is not None
        with service.runtime.ask(*ENDLESS, replace(SAMPLING, max_tokens=2000)) as live:
            next(live)
            status, headers, answer = post(url, chat(QUESTIONS[0]))
            assert (status, headers["Retry-After"]) == (429, "1")
            assert answer["error"]["type"] == "rate_limit_error"


def test_bad_adapter_leaves_the_others_answering(board: Board, tmp_path: Path) -> None:
    bad = damage(board.adapters[BETA], tmp_path / "beta.gguf", 50_000)
    release = install(tmp_path / "root", board.base, {ALPHA: board.adapters[ALPHA], BETA: bad})
    with running(lambda: Runtime.from_release(release, LIMITS)) as (url, _):
        status, _, answer = post(url, chat(QUESTIONS[0], BETA))
        assert (status, answer["error"]["code"]) == (503, "model_cannot_be_used")
        assert str(tmp_path) not in answer["error"]["message"]
        for model in (ALPHA, BASE):
            status, _, answer = post(url, chat(QUESTIONS[0], model, max_tokens=SAMPLING.max_tokens))
            assert answer["choices"][0]["message"]["content"] == board.expected[model, QUESTIONS[0]]


def test_key_is_asked_for(board: Board) -> None:
    with running(lambda: Runtime.from_release(board.release, LIMITS), Access(api_key="secret")) as (url, _):
        assert request(url, "GET", "/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answered, answer = request(url, "GET", "/v1/models", headers=headers)
            assert (status, answered["WWW-Authenticate"]) == (401, "Bearer")
            assert answer["error"]["code"] == "invalid_api_key"
        assert request(url, "GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200


def test_starting_is_said_before_the_model_is_there(board: Board) -> None:
    go_on = threading.Event()
    service = Service()

    def load() -> Runtime:
        go_on.wait()
        return Runtime.from_release(board.release, LIMITS)

    web = Server(application(service), service, load)
    listener = server.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=web.serve_until_stopped, args=(listener,))
    thread.start()
    try:
        status, headers, body = request(url, "GET", "/health")
        assert (status, headers["Retry-After"], body) == (503, "1", {"status": "starting"})
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/lora-adapters")):
            status, headers, answer = request(url, method, path, chat("hello"))
            assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "starting")
        go_on.set()
        wait_for(lambda: request(url, "GET", "/health")[0] == 200)
    finally:
        go_on.set()
        web.should_exit = True
        thread.join()


@pytest.fixture
def curl() -> str:
    found = shutil.which("curl")
    if found is None:
        pytest.skip("curl is not installed")
    return found


def test_curl_reads_every_event_when_it_is_made(board: Board, web: tuple[str, Service], curl: str) -> None:
    url, service = web
    command = [curl, "--silent", "--no-buffer", f"{url}/v1/chat/completions", "--data"]
    done = subprocess.run([*command, json.dumps(chat(QUESTIONS[0], stream=True, max_tokens=12))], capture_output=True)
    events = [line.removeprefix("data: ") for line in done.stdout.decode().splitlines() if line]
    assert events.pop() == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == board.expected[BASE, QUESTIONS[0]]

    assert service.runtime is not None
    with subprocess.Popen([*command, json.dumps(endless(stream=True))], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(6):  # the answer has no end of its own: these come while it is made
            assert process.stdout.readline()
        assert service.runtime.requests_now == (1, 0)
        process.kill()
    wait_for(lambda: service.runtime is not None and service.runtime.requests_now == (0, 0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_stream_properly(board: Board, number: signal.Signals) -> None:
    with serving(board.root) as (process, ready):
        assert (ready["event"], ready["models"]) == ("ready", list(MODELS))
        connection = HTTPConnection(ready["url"].removeprefix("http://").removesuffix("/v1"), timeout=PATIENCE)
        body = json.dumps(endless(stream=True))
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        answer.readline()
        process.send_signal(number)
        events = [line for line in answer.read().decode().splitlines() if line]
        connection.close()
        _, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said) == (0, "")
        assert events[-1] == "data: [DONE]"
        end = json.loads(events[-2].removeprefix("data: "))
        assert end.get("error", {}).get("code") == "stopping" or end["choices"][0]["finish_reason"]


def test_port_in_use_is_said_before_the_model_loads(board: Board, tmp_path: Path) -> None:
    bad = damage(board.base, tmp_path / "base.gguf", 1000)  # would fail, were it loaded first
    install(tmp_path / "root", bad, {})
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(Busy, match=r"is in use by another program[\s\S]*--port"),
    ):
        server.serve(tmp_path / "root", port=taken.getsockname()[1])


def test_release_that_cannot_be_loaded_ends_the_server(board: Board, tmp_path: Path) -> None:
    install(tmp_path / "root", damage(board.base, tmp_path / "base.gguf", 1 << 20), {})
    with pytest.raises(FormatError):
        server.serve(tmp_path / "root", port=0)


def test_nothing_active_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no release is active here"):
        server.serve(tmp_path / "root", port=0)


def test_other_machines_need_a_key(board: Board, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "example.org", "192.168.1.7"):
        with pytest.raises(UsageError, match="--no-auth"):
            server.serve(board.root, host=host)
    empty = tmp_path / "key"
    empty.write_text("\n")
    for key in (empty, tmp_path / "missing"):
        with pytest.raises(BrokenInput, match="API key"):
            server.serve(board.root, host="0.0.0.0", api_key_file=key)


def test_nothing_of_an_answer_waits_for_the_client_to_acknowledge_what_came_before() -> None:
    with (
        server.listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "port", "says"), [("127.0.0.1", 70_000, "there is no port 70000"), ("192.0.2.1", 8080, "cannot listen on")]
)
def test_address_that_cannot_be_taken_is_said(host: str, port: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        server.listen(host, port)


def test_damaged_store_is_said(board: Board, tmp_path: Path) -> None:
    release = install(tmp_path / "root", board.adapters[ALPHA], {})
    release.base_path().unlink()
    with pytest.raises(StorageError):
        server.serve(tmp_path / "root", port=0)
