"""What the tests of the runtime share: a device root with the real base and two adapters, and what each must answer."""

import json
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from pitstop import records
from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.manifest import Artifact, ArtifactRole, Bundle, Prompting
from pitstop.bundle.onnx import parts
from pitstop.device import server
from pitstop.device.access import Access
from pitstop.device.asgi import Server
from pitstop.device.engine import open_engine
from pitstop.device.request import ServedModel
from pitstop.device.routes import Service, application
from pitstop.device.runtime import Limits, Runtime
from pitstop.device.store import Release, Store
from pitstop.engines.base import Sampling, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.template import render
from pitstop.files import CHUNK, sha256_file


def ask(text: str) -> list[dict[str, str]]:
    """Return a conversation that begins with this question."""
    return [{"role": "user", "content": text}]


BASE, ALPHA, BETA = "smollm2", "alpha", "beta"
QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?", "What is the opposite of hot?")
ENDLESS = (ALPHA, ask("Name three colours."))  # alpha repeats itself here until it is stopped: for what ends early
SAMPLING = Sampling(max_tokens=12)
LIMITS = Limits(context_length=512, sequences=3, waiting=16, threads=1)
SCALES = {ALPHA: 1.0, BETA: 0.5}
SEEDS = {ALPHA: 30, BETA: 41}  # of random adapters that answer these questions without a near-tie
DECIDED = 0.2  # nats by which each token of an expected answer leads: twice what evaluating in other portions moves
PATIENCE = 600  # seconds; what takes this long hangs, however busy the machine is


def install(
    root: Path,
    base: Path,
    adapters: Mapping[str, Path],
    base_sha256: str | None = None,
    *,
    merged: Collection[str] = (),
) -> Release:
    """Install and activate a release of real files, without a repository."""
    store = Store(root)
    with store.locked():
        digest = base_sha256 or sha256_file(base)
        bundles = [_bundle("base", BASE, base, digest)]
        for name, path in adapters.items():
            bundles.append(_bundle("merged" if name in merged else "adapter", name, path, digest))
        release = store.release({bundle.name: records.to_json(bundle) for bundle in bundles})
        for path, bundle in zip([base, *adapters.values()], bundles, strict=True):
            _add(store, path, bundle.artifact)
        for part, path in _parts(base).items():
            _add(store, path, part)
        store.install(release)
        store.activate()
        store.confirm()
    return release


def _bundle(role: ArtifactRole, name: str, path: Path, base_sha256: str) -> Bundle:
    system = "You control a smart home." if name == ALPHA else None
    return Bundle(
        kind="base" if role == "base" else "adapter",
        name=name,
        version="1.0.0",
        counter=1,
        license="Apache-2.0",
        base_name=BASE,
        base_sha256=base_sha256,
        prompting=Prompting(_template(), "<|im_start|>", "<|im_end|>", system=system),
        context_length=2048,
        artifacts=(
            Artifact(role, _format(path), "f32", path.name, sha256_file(path), path.stat().st_size),
            *(_parts(path) if role == "base" else ()),
        ),
        scale=1.0 if role == "merged" else SCALES.get(name, 1.0),
    )


def _format(path: Path) -> str:
    return "onnx" if path.suffix.startswith(".onnx") else "gguf"


def _parts(base: Path) -> dict[Artifact, Path]:
    return parts(read_onnx_graph(base)) if _format(base) == "onnx" else {}


def _template() -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _add(store: Store, path: Path, artifact: Artifact) -> None:
    incoming = store.add_blob(artifact)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            incoming.append(chunk)
    incoming.finish()


@dataclass(frozen=True)
class Board:
    """A device root that serves, and what a cold engine answers to each question under each model."""

    root: Path
    release: Release
    expected: Mapping[tuple[str, str], str]  # (model, question) -> text
    base: Path
    adapters: Mapping[str, Path]


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory, f16_gguf: Path, make_adapter: Callable[..., Path]) -> Board:
    """A device root with the real base and two adapters."""
    return make_board(tmp_path_factory.mktemp("board"), f16_gguf, make_adapter)


def make_board(
    folder: Path, base: Path, make_adapter: Callable[..., Path], questions: Sequence[str] = QUESTIONS
) -> Board:
    """Install a base and two random adapters in a folder; the questions must have answers without a near-tie."""
    adapters = {
        name: make_adapter(folder / f"{name}.gguf", SEEDS[name], strength=0.5 / scale, base_sha256=sha256_file(base))
        for name, scale in SCALES.items()
    }
    release = install(folder / "root", base, adapters)
    return Board(folder / "root", release, _cold_answers(release, questions), base, adapters)


def _cold_answers(release: Release, questions: Sequence[str]) -> dict[tuple[str, str], str]:
    """Answer every question under every model, each with an engine that did nothing before."""
    return {
        (name, question): cold_answer(release, name, question) for name in release.bundles for question in questions
    }


def cold_stack(board: Board, scales: Mapping[str, float], question: str) -> str:
    """Answer as the base does under several adapters at once, with an engine that did nothing before."""
    options = {"context_length": LIMITS.context_length, "sequences": 1, "threads": LIMITS.threads}
    with LlamaEngine(board.base, base_sha256=board.release.base.base_sha256, **options) as engine:
        for name in scales:
            engine.load_adapter(name, board.adapters[name])
        tokens = engine.tokenize(render(board.release.base.prompting, ask(question)))
        pieces = engine.generate(tokens, Use(also=tuple(scales.items())), SAMPLING)
        return "".join(piece.text for piece in pieces)


def cold_answer(release: Release, name: str, question: str) -> str:
    """Answer a question under a model, with an engine that did nothing before."""
    bundle = release.bundles[name]
    with open_engine(release.base, release.base_path(), replace(LIMITS, sequences=1)) as engine:
        use = Use()
        if bundle.kind == "adapter":
            engine.load_adapter(name, release.adapters()[name][1])
            use = Use(name, bundle.scale)
        tokens = engine.tokenize(render(bundle.prompting, ask(question)))
        pieces = list(engine.generate(tokens, use, replace(SAMPLING, logprobs=2)))
    for piece in pieces:
        (_, first), (_, second) = piece.likeliest
        assert first - second > DECIDED, f"{name} wavers at {question!r}: another CPU may answer otherwise"
    return "".join(piece.text for piece in pieces)


@contextmanager
def running(load: Callable[[], Runtime], access: Access | None = None) -> Iterator[tuple[str, Service]]:
    """Run the real web server on a free port, with its model loaded, in a thread of this process."""
    service = Service()
    ready: queue.Queue[Runtime] = queue.Queue()
    web = Server(application(service, access), service, load, lambda runtime, seconds: ready.put(runtime))
    listener = server.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=web.serve_until_stopped, args=(listener,))
    thread.start()
    try:
        ready.get(timeout=600)
        yield url, service
    finally:
        web.should_exit = True
        thread.join()


def request(url: str, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
    """Send a request; return status, headers and the body, parsed if it is JSON."""
    if isinstance(body, dict | list):
        body = json.dumps(body)
    connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, answer.headers, json.loads(data) if is_json else data.decode()
    finally:
        connection.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def published(name: str, bundle: Bundle, path: Path) -> ServedModel:
    """Return the model of an adapter's file as if a publisher had named just this file."""
    artifact = Artifact("adapter", "gguf", "f32", path.name, sha256_file(path), path.stat().st_size)
    return ServedModel(name, replace(bundle, name=name, artifacts=(artifact,)), path)


def damage(path: Path, target: Path, size: int) -> Path:
    """Write the first bytes of a file to another."""
    target.write_bytes(path.read_bytes()[:size])
    return target
