"""Many clients at once who do everything at random: all are served, nobody with another's answer, nothing is left.

PITSTOP_SOAK_SECONDS=300 lets the clients of the real command go on for five minutes.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from pitstop.device.runtime import Runtime
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
    request,
    running,
    wait_for,
)

CLIENTS, REQUESTS = 12, 10
SECONDS = float(os.environ.get("PITSTOP_SOAK_SECONDS", "20"))
SHUTDOWN = 5.0  # seconds a signal may take to end the server, its streams ended properly
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Client:
    """Does something at random, again and again, and checks what comes back."""

    def __init__(self, board: Board, url: str, number: int) -> None:
        self.board, self.url, self.name = board, url, f"client-{number}"
        self.random = random.Random(number)
        self.done = 0

    def run(self) -> None:
        for _ in range(REQUESTS):
            self.act()

    def run_until(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            self.act()

    def act(self) -> None:
        acts = (self.ask, self.ask, self.score, self.choices, self.leave, self.send_nonsense, self.load)
        self.random.choice(acts)()
        self.done += 1

    def send(self, path: str, body: Any, expected: int = 200) -> Any:
        """Return the answer, asking again while the server is too busy for it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            status, headers, answer = request(self.url, "POST", path, body)
            if status not in (429, 503):
                break
            assert headers["Retry-After"]
            assert time.monotonic() < deadline, f"{self.name} was never served"
            time.sleep(0.05)
        assert status == expected, answer
        return answer

    def ask(self) -> None:
        model, question = self.random.choice((BASE, ALPHA, BETA)), self.random.choice(QUESTIONS)
        answer = self.send(CHAT, {"model": model, "messages": ask(question), "max_tokens": SAMPLING.max_tokens})
        assert answer["choices"][0]["message"]["content"] == self.board.expected[model, question]

    def score(self) -> None:
        prompt = [self.random.randrange(1000) for _ in range(self.random.randrange(1, 300))]
        body = {
            "model": self.random.choice((BASE, BETA)),
            "prompt": prompt,
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,
        }
        answer = self.send(TEXT, body)
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == len(prompt) + 1

    def choices(self) -> None:
        body = {"model": ALPHA, "prompt": "One, two,", "n": 3, "max_tokens": 5, "temperature": 1.0}
        assert len(self.send(TEXT, body)["choices"]) == 3

    def leave(self) -> None:
        """Go away in the middle of a stream."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE)
        connection.request("POST", CHAT, json.dumps({"model": ENDLESS[0], "messages": ENDLESS[1], "stream": True}))
        connection.getresponse().read(self.random.randrange(400))
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    def send_nonsense(self) -> None:
        path = self.random.choice((CHAT, TEXT))
        self.send(path, self.random.randbytes(40), 400)
        self.send(path, {"model": BASE, "prompt": "word " * 3000, "messages": ask("word " * 3000)}, 400)

    def load(self) -> None:
        path = self.board.adapters[self.random.choice((ALPHA, BETA))]
        self.send("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(path)})
        self.send(CHAT, {"model": self.name, "messages": ask("hello"), "max_tokens": 3})
        self.send("/v1/unload_lora_adapter", {"lora_name": self.name})


@pytest.mark.slow
def test_many_clients_at_random(board: Board, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in board.adapters.values())
    limits = replace(LIMITS, waiting=6, adapter_budget=3 * size)
    with running(lambda: Runtime.from_release(board.release, limits)) as (url, service):
        clients = [Client(board, url, number) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as threads:
            for done in [threads.submit(client.run) for client in clients]:
                done.result()
        runtime = service.runtime
        assert runtime is not None
        wait_for(lambda: runtime.requests_now == (0, 0))
        assert [model.name for model in runtime.models] == [BASE, ALPHA, BETA]
        assert set(runtime.loaded) <= {ALPHA, BETA}
        assert runtime.faults == {}
        for (model, question), expected in board.expected.items():
            assert "".join(runtime.ask(model, ask(question), SAMPLING)) == expected


@pytest.mark.slow
def test_clients_of_the_real_command_until_it_is_told_to_stop(board: Board) -> None:
    command = [sys.executable, "-m", "pitstop", "serve", "--device", str(board.root), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"].removesuffix("/v1")
        try:
            clients = [Client(board, url, number) for number in range(32)]
            deadline = time.monotonic() + SECONDS
            with ThreadPoolExecutor(len(clients)) as threads:
                for done in [threads.submit(client.run_until, deadline) for client in clients]:
                    done.result()
            print(f"{sum(client.done for client in clients)} acts in {SECONDS:g} s")
            connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
            connection.request("POST", CHAT, json.dumps({"model": ENDLESS[0], "messages": ENDLESS[1], "stream": True}))
            answer = connection.getresponse()
            answer.readline()
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert answer.read().decode().rstrip().endswith("data: [DONE]")
            connection.close()
            assert process.wait(SHUTDOWN) == 0
            assert time.monotonic() - begun < SHUTDOWN
        finally:
            process.kill()
