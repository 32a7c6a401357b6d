"""`pitstop serve` and llama-server as processes, and a client that times what they stream.

Both get the same requests; only how an adapter is named differs. The client reads lines and looks at the clock; what is
in them it reads afterwards, for it shares the cores with the server.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Protocol

import llamacpp_peers
import material

PATIENCE = 120  # seconds; what takes this long hangs
STARTING = 0.01  # seconds between two looks at a server that starts


class Command(Protocol):
    """How to start a server on a port, and what its requests say besides."""

    def line(self, port: int) -> list[str]:
        """Return the command line."""

    def naming(self, adapter: int | None) -> dict[str, Any]:
        """Return the fields of a request that name an adapter; None is the base."""


@dataclass(frozen=True)
class Pitstop:
    """`pitstop serve` over a device root."""

    root: Path
    options: Sequence[str] = ()

    def line(self, port: int) -> list[str]:
        """Return the command line."""
        serve = [sys.executable, "-m", "pitstop", "serve", "--device", str(self.root)]
        return [*serve, "--port", str(port), *self.options]

    def naming(self, adapter: int | None) -> dict[str, Any]:
        """Return the fields of a request that name an adapter."""
        return {"model": material.BASE if adapter is None else material.adapter_name(adapter)}


@dataclass(frozen=True)
class LlamaServer:
    """llama-server with the same files."""

    base: Path
    adapters: Sequence[Path]
    options: Sequence[str] = ()

    def line(self, port: int) -> list[str]:
        """Return the command line."""
        loras = ["--lora", ",".join(map(str, self.adapters)), "--lora-init-without-apply"] if self.adapters else []
        program = str(llamacpp_peers.build() / "llama-server")
        return [program, "--model", str(self.base), *loras, "--port", str(port), *self.options]

    def naming(self, adapter: int | None) -> dict[str, Any]:
        """Return the fields of a request that name an adapter."""
        return {"model": material.BASE, "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}]}


@dataclass(frozen=True)
class Answer:
    """When a streamed answer came, in seconds of `time.perf_counter`."""

    asked: float
    said: tuple[float, ...]  # of each piece with text in it
    tokens: int  # of the answer, as the server counts them
    cached: int  # of the prompt's tokens, those that were there already

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.said[0] - self.asked

    @property
    def rate(self) -> float:
        """Tokens a second, from the first one on."""
        return (self.tokens - 1) / (self.said[-1] - self.said[0])


class Server:
    """A running server."""

    def __init__(self, command: Command, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.command = command
        self.process = process
        self.port = port

    def request(self, tokens: Sequence[int], adapter: int | None, limit: int, *, stream: bool) -> bytes:
        """Return the body of a request for a greedy continuation of tokens that does not end by itself."""
        body = {"prompt": list(tokens), "max_tokens": limit, "temperature": 0, **self.command.naming(adapter)}
        body["logit_bias"] = dict.fromkeys(material.ENDS, -100)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()

    def client(self) -> "contextlib.closing[HTTPConnection]":
        """Connect, for the time of a block."""
        return contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE))

    def post(self, client: HTTPConnection, body: bytes, path: str = "/v1/completions") -> Any:
        """Return the parsed answer to a request that is not streamed."""
        client.request("POST", path, body, {"Content-Type": "application/json"})
        answer = client.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{type(self.command).__name__} says {answer.status}: {data.decode()}")
        return json.loads(data) if answer.headers["Content-Type"].startswith("application/json") else data.decode()

    def stream(self, tokens: Sequence[int], adapter: int | None, limit: int) -> Answer:
        """Ask for so many tokens and time the pieces.

        Raises:
            RuntimeError: it refuses, or the answer ends early, so that rates could not be compared.
        """
        body = self.request(tokens, adapter, limit, stream=True)
        with self.client() as client:
            asked = time.perf_counter()
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = client.getresponse()
            lines = []
            while line := answer.readline():
                lines.append((time.perf_counter(), line))
        if answer.status != 200:
            raise RuntimeError(f"{type(self.command).__name__} says {answer.status}: {lines}")
        parts = [(when, json.loads(line[6:])) for when, line in lines if line.startswith(b"data: {")]
        said = tuple(when for when, part in parts if any(choice["text"] for choice in part.get("choices", ())))
        usage = next(part["usage"] for _, part in reversed(parts) if part.get("usage"))
        if usage["completion_tokens"] != limit or not said:
            raise RuntimeError(f"{type(self.command).__name__} ended early: {usage}")
        return Answer(asked, said, limit, usage["prompt_tokens_details"]["cached_tokens"])

    def crowd(self, prompts: Sequence[Sequence[int]], adapters: Sequence[int], limit: int) -> list[Answer]:
        """Ask everything at once, each by a client of its own."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(lambda one: self.stream(*one, limit), zip(prompts, adapters, strict=True)))

    @property
    def resident(self) -> int:
        """Bytes of memory that are in use now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running(command: Command) -> Iterator[Server]:
    """Run a server until the end of the block; it is ready when the block begins."""
    with _process(command) as server:
        _first_answer(server, b"", "/health")
        yield server


def cold_start(command: Command, tokens: Sequence[int], adapter: int) -> float:
    """Return the seconds from the start of a server's process to the first token of an answer under an adapter."""
    begun = time.perf_counter()
    with _process(command) as server:
        _first_answer(server, server.request(tokens, adapter, 1, stream=True), "/v1/completions")
        return time.perf_counter() - begun


@contextlib.contextmanager
def _process(command: Command) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Where modules may not be kept compiled, every start compiles them; that is nothing an installed program does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command.line(port), stdout=log, stderr=log, env=environment)
        try:
            yield Server(command, process, port)
        except BaseException:
            log.seek(0)
            print("\n".join(log.read().decode(errors="replace").splitlines()[-20:]), file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_answer(server: Server, body: bytes, path: str) -> None:
    """Ask until the server has started and the first bytes of an answer are here."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.process.poll() is None:
        with server.client() as client, contextlib.suppress(OSError, HTTPException):
            client.request("POST" if body else "GET", path, body or None, {"Content-Type": "application/json"})
            answer = client.getresponse()
            if answer.status == 200 and answer.readline():
                return
        time.sleep(STARTING)
    raise RuntimeError(f"{type(server.command).__name__} does not start")
