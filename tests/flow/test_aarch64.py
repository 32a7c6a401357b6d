"""The device side on another processor: a board updates over the network, activates, serves and swaps.

What it answers is what an x86 answers with the same files, token by token: each leads by more than kernels differ.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aarch64 import Machine
from delivery import Publisher, Server, write_bundle
from onnx_files import random_onnx_adapter
from pitstop.engines.base import Use
from pitstop.engines.llama.quantize import quantize
from pitstop.engines.onnx import OnnxEngine
from pitstop.files import sha256_file
from serving import ALPHA, BASE, BETA, QUESTIONS, SAMPLING, Board, ask, make_board, request

pytestmark = [pytest.mark.slow, pytest.mark.board]
THREADS = "1"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory, f16_gguf: Path, make_adapter: Callable[..., Path]) -> Board:
    """The base in the precision boards get: qemu takes minutes for a prompt of 16-bit floats, which it emulates."""
    folder = tmp_path_factory.mktemp("board")
    base = folder / "base.gguf"
    quantize(f16_gguf, base, "q8_0")
    return make_board(folder, base, make_adapter, QUESTIONS[:1])


@pytest.fixture
def repository(publisher: Publisher, server: Server, board: Board, tmp_path: Path) -> Server:
    """The real base and two adapters, published, on a loopback port."""
    folders = []
    for name, bundle in board.release.bundles.items():
        folder = tmp_path / "bundles" / name
        folder.mkdir(parents=True)
        file = board.base if bundle.kind == "base" else board.adapters[name]
        (folder / bundle.artifact.name).symlink_to(file)
        folders.append(write_bundle(folder, bundle))
    publisher.publish(*folders)
    (tmp_path / "1.root.json").write_bytes(publisher.root_json)
    return server


@pytest.fixture
def url(machine: Machine, repository: Server, tmp_path: Path) -> Iterator[str]:
    """The server of a board that has updated."""
    device = tmp_path / "device"
    root = ["--device", device, "--root", tmp_path / "1.root.json"]
    updated = machine.run("-m", "pitstop", "update", repository.url, *root, "--json", "-")
    assert updated.returncode == 0, updated.stderr
    assert json.loads(updated.stdout)["probes"], "it was tried by a process of its own before it became active"
    serving = machine.start("-m", "pitstop", "serve", "--device", device, "--port", "0", "--threads", THREADS, "--json")
    assert serving.stdout is not None
    try:
        yield str(json.loads(serving.stdout.readline())["url"]).removesuffix("/v1")
    finally:
        serving.terminate()
        serving.communicate(timeout=60)


def test_a_board_updates_serves_and_swaps(machine: Machine, url: str, board: Board) -> None:
    for name in (ALPHA, BETA, ALPHA, BASE):
        body = {"model": name, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens, "temperature": 0}
        status, _, answered = request(url, "POST", "/v1/chat/completions", body)
        assert status == 200
        assert answered["choices"][0]["message"]["content"] == board.expected[name, QUESTIONS[0]]


def test_a_board_that_got_other_bytes_refuses_them(machine: Machine, repository: Server, tmp_path: Path) -> None:
    def spoil(reply: Any) -> None:
        reply.with_length(bytes(len(reply.body)))

    repository.on_blob = spoil
    root = ["--device", tmp_path / "device", "--root", tmp_path / "1.root.json"]
    refused = machine.run("-m", "pitstop", "update", repository.url, *root)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "device" / "blobs" / "sha256").iterdir())


ONNX = """
import json, sys
from pathlib import Path
import numpy as np
from pitstop.engines.base import Use
from pitstop.engines.llama.quantize import quantize
from pitstop.engines.onnx import OnnxEngine
graph, digest, one, two, out = sys.argv[1:]
with OnnxEngine(Path(graph), base_sha256=digest, context_length=64, sequences=1, threads=1) as engine:
    engine.load_adapter("one", Path(one))
    engine.load_adapter("two", Path(two))
    tokens = engine.tokenize("The capital of France is")
    uses = [Use("one"), Use("two"), Use("one"), Use()]
    np.savez(out, *[engine.logits(tokens, use) for use in uses])
"""


def test_onnx_computes_there_what_it_computes_here(machine: Machine, onnx_graph: Path, tmp_path: Path) -> None:
    adapters = [random_onnx_adapter(tmp_path / f"{seed}.onnx_adapter", onnx_graph, seed) for seed in (1, 2)]
    digest, out = sha256_file(onnx_graph), tmp_path / "there.npz"
    done = machine.run("-c", ONNX, onnx_graph, digest, *adapters, out)
    assert done.returncode == 0, done.stderr
    there = list(np.load(out).values())
    with OnnxEngine(onnx_graph, base_sha256=digest, context_length=64, sequences=1, threads=1) as engine:
        for name, path in zip(("one", "two"), adapters, strict=True):
            engine.load_adapter(name, path)
        tokens = engine.tokenize("The capital of France is")
        here = [engine.logits(tokens, use) for use in (Use("one"), Use("two"), Use("one"), Use())]
    assert np.abs(here[0] - here[1]).max() > 1, "the adapters differ"
    for one, other in zip(here, there, strict=True):
        assert np.abs(one - other).max() < 2e-3
    assert (there[0] == there[2]).all()
