"""The second half of the story: publish, update over loopback HTTP, serve, and ask the running server in turn."""

import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import openai
from rich.console import Console

from pitstop.demo import smollm2
from pitstop.device import health, updater
from pitstop.device.store import Store
from pitstop.errors import BrokenInput
from pitstop.repository import keys, publish

REPOSITORY, KEYS, DEVICE = Path("repository"), Path("keys"), Path("device")
BUNDLES = (Path("bases") / smollm2.NAME / "bundle", Path("runs/home/bundle"), Path("runs/address/bundle"))
QUESTIONS = {
    "home": "turn on the lamp in the kitchen",
    "address": "1600 Pennsylvania Ave NW, Washington, DC 20500",
    smollm2.NAME: "Why is the sky blue?",
}
FOLLOW_UPS = {
    "home": ("close the blinds in the bedroom", "set a timer for 5 minutes", "is the front door locked"),
    "address": ("350 Fifth Avenue, New York, NY 10118", "1 Main St, Springfield IL 62701", "77 Mass Ave Cambridge MA"),
}


def deliver(console: Console, figures: dict[str, float], answers: dict[str, str], files: dict[str, str]) -> None:
    """Publish the packed bundles, update a device root from them over HTTP, serve it and ask.

    Raises:
        PitstopError: a step failed.
    """
    _say(console, f"pitstop keys create {KEYS}; pitstop publish {' '.join(map(str, BUNDLES))}")
    if not KEYS.is_dir():
        keys.create(KEYS)
    published = publish.publish(list(BUNDLES), REPOSITORY, KEYS)
    files["repository"] = str(REPOSITORY)
    with _hosted(REPOSITORY) as url:
        _say(console, f"pitstop update {url} --root {published.root}")
        store = Store(DEVICE)
        updated = updater.update(DEVICE, url, root_json=published.root.read_bytes())
        updater.activate(store, lambda release: print_probe(console, health.probe(release)))
    figures["update_fetched_bytes"] = updated.fetched_bytes
    files["device"] = str(DEVICE)
    _say(console, "pitstop serve")
    with _serving() as address:
        _ask(console, address, figures, answers)


def _ask(console: Console, address: str, figures: dict[str, float], answers: dict[str, str]) -> None:
    """Ask every model in turn, then swap between warm conversations; times as the client sees them."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    talks: dict[str, list[dict[str, str]]] = {}
    cold: list[float] = []
    for model, question in QUESTIONS.items():
        talks[model] = [{"role": "user", "content": question}]
        answer, seconds = _first_token(client, model, talks[model])
        cold.append(seconds)
        answers[model] = answer
        talks[model].append({"role": "assistant", "content": answer})
        console.print(f"  {model}: {question}\n    → {answer}", highlight=False)
    warm: list[float] = []
    for turn in range(len(FOLLOW_UPS["home"])):
        for model, questions in FOLLOW_UPS.items():
            talks[model].append({"role": "user", "content": questions[turn]})
            answer, seconds = _first_token(client, model, talks[model])
            warm.append(seconds)
            talks[model].append({"role": "assistant", "content": answer})
    figures["swap_to_first_token_cold_ms"] = round(median(cold) * 1000, 1)
    figures["swap_to_first_token_warm_ms"] = round(median(warm) * 1000, 1)


def _first_token(client: openai.OpenAI, model: str, messages: list[Any]) -> tuple[str, float]:
    """Stream one greedy answer; return it and the seconds from asking to its first text."""
    begun = perf_counter()
    first = None
    text = ""
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=96, temperature=0, stream=True
    ):
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first if first is not None else perf_counter() - begun
            text += piece
    return text.strip(), first if first is not None else perf_counter() - begun


def print_probe(console: Console, probe: health.Probe) -> None:
    """Say what the release did in a child process before it may serve."""
    names = ", ".join(model.name for model in probe.models)
    console.print(f"  tried in a child process: {names} answer", highlight=False)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _hosted(folder: Path) -> Iterator[str]:
    """Serve a folder as any static host would, on loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _serving() -> Iterator[str]:
    """Run `pitstop serve` on a free port, and stop it as a service manager would."""
    command = [sys.executable, "-m", "pitstop", "serve", "--device", str(DEVICE), "--port", "0", "--json"]
    with (
        Path("serve.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            ready = child.stdout.readline()
            if not ready:
                raise BrokenInput(f"the server ended with {child.wait()}", where=Path("serve.log").absolute())
            yield str(json.loads(ready)["url"])
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(30)


def _say(console: Console, command: str) -> None:
    console.print(f"\n[bold]$ {command}[/bold]", highlight=False)
