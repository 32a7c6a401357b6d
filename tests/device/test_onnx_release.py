"""A release that carries ONNX: refused, probed, served and swapped as one that carries GGUF is."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from onnx_files import random_onnx_adapter, write_onnx_adapter
from pitstop import profiles
from pitstop.bundle.formats import read_onnx_graph
from pitstop.device import health
from pitstop.device.engine import check_engine, check_files, check_formats
from pitstop.device.limits import MIB, within
from pitstop.device.runtime import Runtime
from pitstop.device.store import Release
from pitstop.errors import FormatError, Untrusted, UsageError
from pitstop.files import sha256_file
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
    cold_answer,
    install,
    request,
    running,
)

SEEDS = {ALPHA: 7, BETA: 29}  # of random adapters that answer without a near-tie
LINUX = profiles.load("linux-x86_64")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx-board")


@pytest.fixture(scope="module")
def release(root: Path, onnx_graph: Path) -> Release:
    adapters = {
        name: random_onnx_adapter(root / f"{name}.onnx_adapter", onnx_graph, seed, strength=0.5 / SCALES[name])
        for name, seed in SEEDS.items()
    }
    return install(root / "root", onnx_graph, adapters)


def test_it_is_found_good_in_a_child_process(release: Release) -> None:
    check_formats(release)
    check_files(release)
    found = health.probe(release, timeout=600)
    assert [model.name for model in found.models] == [BASE, ALPHA, BETA]
    assert found.models[0].change == 0
    assert all(model.change > 0.1 for model in found.models[1:])


def test_swaps_over_http_answer_as_cold_engines_do(release: Release) -> None:
    names = (BASE, ALPHA, BETA, ALPHA, BASE)
    expected = {name: cold_answer(release, name, QUESTIONS[0]) for name in set(names)}
    assert len(set(expected.values())) == 3
    with running(lambda: Runtime.from_release(release, LIMITS)) as (url, _):
        for name in names:
            body = {"model": name, "messages": ask(QUESTIONS[0]), "max_tokens": SAMPLING.max_tokens}
            status, _, answer = request(url, "POST", "/v1/chat/completions", body)
            assert (status, answer["choices"][0]["message"]["content"]) == (200, expected[name])


def test_an_answer_follows_a_schema_over_http(release: Release) -> None:
    schema = {"type": "object", "properties": {"room": {"enum": ["kitchen", "hall"]}}, "required": ["room"]}
    body = {"model": ALPHA, "messages": ask("Where?"), "max_tokens": 20, "json_schema": schema}
    with running(lambda: Runtime.from_release(release, LIMITS)) as (url, _):
        status, _, answer = request(url, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"].startswith('{"room": "')
        status, _, answer = request(url, "POST", "/v1/chat/completions", body | {"json_schema": {"type": 5}})
        assert (status, "cannot be followed" in answer["error"]["message"]) == (400, True)
        status, _, answer = request(
            url, "POST", "/v1/chat/completions", {**body, "json_schema": None, "grammar": 'root ::= "a"'}
        )
        assert (status, "not GBNF" in answer["error"]["message"]) == (400, True)


def test_an_adapter_of_this_machine_is_loaded_and_served(release: Release, root: Path, onnx_graph: Path) -> None:
    path = random_onnx_adapter(root / "own.onnx_adapter", onnx_graph, 9)
    with Runtime.from_release(release, LIMITS) as runtime:
        runtime.load_adapter("own", path)
        assert "".join(runtime.ask("own", ask(QUESTIONS[0]), SAMPLING))
        (root / "no.onnx_adapter").write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(FormatError, match="no good adapter file"):
            runtime.load_adapter("no", root / "no.onnx_adapter")


def test_the_engine_that_was_asked_for_must_be_the_one(release: Release, board: Board) -> None:
    check_engine(release, "onnx", LINUX)
    check_engine(board.release, "llama", LINUX)
    with pytest.raises(UsageError, match="as onnx, which the onnx engine runs, not llama"):
        check_engine(release, "llama")
    with pytest.raises(UsageError, match="as gguf, which the llama engine runs, not onnx"):
        check_engine(board.release, "onnx")
    with pytest.raises(UsageError, match="phone-browser runs gguf"):
        check_engine(release, profile=profiles.load("phone-browser"))


def test_a_profile_bounds_conversations_by_what_the_graph_says(release: Release) -> None:
    size = sum(artifact.size for artifact in release.artifacts() if artifact.role in ("base", "part"))
    spare = LINUX.adapter_budget_mib * MIB + LIMITS.parked_memory + 64 * MIB + 3 * LIMITS.context_length * 46_080
    board = dataclasses.replace(LINUX, budget_mib=(size + spare) // MIB + 1)
    found = within(board, release.base_path(), LIMITS, format="onnx")
    assert (found.sequences, found.context_length) == (2, LIMITS.context_length)


def test_damaged_weights_are_noticed_in_idle_moments(release: Release, tmp_path: Path) -> None:
    assert list(release.check_base())
    for artifact in release.artifacts():
        (tmp_path / artifact.sha256).symlink_to(release.blobs / artifact.sha256)
    tokenizer = next(part for part in release.base.parts if part.name == "tokenizer.json")
    (tmp_path / tokenizer.sha256).unlink()
    (tmp_path / tokenizer.sha256).write_bytes(b"{}")
    with pytest.raises(Untrusted, match="has changed"):
        list(dataclasses.replace(release, blobs=tmp_path).check_base())


def test_a_bundle_that_leaves_a_file_out_is_refused(release: Release) -> None:
    base = release.base
    kept = tuple(artifact for artifact in base.artifacts if artifact.name != "tokenizer.json")
    lacking = dataclasses.replace(release, bundles={**release.bundles, BASE: dataclasses.replace(base, artifacts=kept)})
    with pytest.raises(FormatError, match=r"does not list tokenizer\.json"):
        check_files(lacking)


def test_formats_that_do_not_go_together_are_refused(release: Release) -> None:
    artifact = dataclasses.replace(release.bundles[ALPHA].artifact, format="gguf")
    bundle = dataclasses.replace(release.bundles[ALPHA], artifacts=(artifact,))
    with pytest.raises(FormatError, match="'gguf', the base of the release is"):
        check_formats(dataclasses.replace(release, bundles={**release.bundles, ALPHA: bundle}))


def test_an_adapter_that_replaces_the_prompt_is_refused(root: Path, onnx_graph: Path) -> None:
    prompt = write_onnx_adapter(
        root / "prompt.onnx_adapter", {"input_ids": np.zeros((1, 4), np.float32)}, sha256_file(onnx_graph)
    )
    with pytest.raises(FormatError, match="'input_ids', which is nothing an adapter"):
        check_files(install(root / "prompt", onnx_graph, {ALPHA: prompt}))


def test_the_graph_names_all_of_its_files(onnx_graph: Path) -> None:
    names = {path.name for path in onnx_graph.parent.iterdir() if path.is_file()} - {"model.onnx"}
    assert set(read_onnx_graph(onnx_graph).files) == names
