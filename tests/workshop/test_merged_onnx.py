"""A model merged for ONNX Runtime, beside its base: asked for as an adapter is, and delivered with all of its files."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from delivery import Publisher
from onnx_files import random_onnx_adapter
from pitstop.bundle.manifest import BaseRef
from pitstop.device.engine import check_files
from pitstop.device.request import Limits
from pitstop.device.runtime import Runtime
from pitstop.device.store import Store
from pitstop.device.updater import activate, update
from pitstop.engines.base import PLAIN_BASE, Sampling, Usage, Use
from pitstop.engines.onnx import OnnxEngine
from pitstop.errors import BaseMismatch, BrokenInput, UsageError
from pitstop.retention import suite as suites
from pitstop.retention.suite import TextItem
from pitstop.workshop import base_model, train
from pitstop.workshop import pack as packing
from pitstop.workshop.check import check
from pitstop.workshop.merge import merge
from pitstop.workshop.pack import pack
from pitstop.workshop.parity import parity
from workbench import TEXTS, Project

TEXT = "make the kitchen red"
MERGED, ATTACHED = Use("merged"), Use("attached")
OPTIONS = {"context_length": 64, "sequences": 2, "threads": 1}


@pytest.fixture
def ref(onnx_base: Path) -> BaseRef:
    return base_model.load_ref(onnx_base)


@pytest.fixture
def merged(onnx_project: Project) -> Path:
    """The graph of a run that ships merged."""
    items = [TextItem(str(number), str(number), text) for number, text in enumerate(TEXTS)]
    mine = suites.make("mine", "text", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(mine, Path("suites", "mine"))
    recipe = onnx_project.recipe(
        base={"artifact": "int8"}, export={"delivery": "merged"}, check={"rows": 4, "max_new_tokens": 8}
    )
    train.train(recipe)
    merge(recipe)
    return onnx_project.run / "merged" / "model.onnx"


def base_engine(onnx_base: Path, ref: BaseRef) -> OnnxEngine:
    graph = base_model.artifact_path(onnx_base, ref, "int8")
    return OnnxEngine(graph, base_sha256=ref.artifact("int8").sha256, **OPTIONS)


def answer(engine: OnnxEngine, use: Use, usage: Usage | None = None) -> list[int]:
    return [piece.token for piece in engine.generate(engine.tokenize(TEXT), use, Sampling(max_tokens=8), usage)]


def test_beside_its_base_it_computes_what_it_computes_alone(
    onnx_base: Path, ref: BaseRef, merged: Path, tmp_path: Path
) -> None:
    with OnnxEngine(merged, base_sha256="0" * 64, **OPTIONS) as alone:
        tokens = alone.tokenize(TEXT)
        logits, answers = alone.logits(tokens), answer(alone, PLAIN_BASE)
    with base_engine(onnx_base, ref) as engine:
        plain, said = engine.logits(tokens), answer(engine, PLAIN_BASE)
        engine.load_adapter("attached", random_onnx_adapter(tmp_path / "a.onnx_adapter", engine.path, 1))
        moved, told = engine.logits(tokens, ATTACHED), answer(engine, ATTACHED)
        engine.load_adapter("merged", merged)
        for one, other in itertools.combinations((plain, logits, moved), 2):
            assert np.abs(one - other).max() > 0.1
        for _ in range(2):
            assert np.array_equal(engine.logits(tokens, MERGED), logits)
            assert np.array_equal(engine.logits(tokens, ATTACHED), moved)
            assert np.array_equal(engine.logits(tokens), plain)
        for use, expected in ((MERGED, answers), (ATTACHED, told), (PLAIN_BASE, said), (MERGED, answers)):
            assert answer(engine, use) == expected
        usage = Usage()
        assert answer(engine, MERGED, usage) == answers
        assert usage.reused_tokens == usage.prompt_tokens - 1, "its own conversation, whatever came between"
        for use in (
            Use("merged", 0.5),
            Use("merged", 1.0, (("attached", 1.0),)),
            Use("attached", 1.0, (("merged", 1.0),)),
        ):
            with pytest.raises(UsageError, match="merged is merged into its base"):
                engine.logits(tokens, use)


def test_it_leaves_with_its_conversations_and_comes_back(onnx_base: Path, ref: BaseRef, merged: Path) -> None:
    with base_engine(onnx_base, ref) as engine:
        plain = answer(engine, PLAIN_BASE)
        engine.load_adapter("merged", merged)
        expected = answer(engine, MERGED)
        stream = engine.start(engine.tokenize(TEXT), MERGED, Sampling(max_tokens=8), Usage())
        engine.advance([stream])
        engine.unload_adapter("merged")
        engine.advance([stream])
        assert "was unloaded in the middle of an answer" in str(stream.error)
        assert engine._adapters.gone == (), "its memory is given back when nothing runs on it"
        with pytest.raises(UsageError, match="no adapter 'merged' is loaded"):
            answer(engine, MERGED)
        assert answer(engine, PLAIN_BASE) == plain
        engine.load_adapter("merged", merged)
        assert answer(engine, MERGED) == expected


def test_what_is_not_this_base_merged_is_refused(onnx_base: Path, ref: BaseRef, merged: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(merged.parent, other, ignore=shutil.ignore_patterns("hf"))
    with base_engine(onnx_base, ref) as engine:
        with pytest.raises(BaseMismatch, match="does not say which base"):
            engine.load_adapter("merged", base_model.artifact_path(onnx_base, ref, "int8"))
        (other / "tokenizer_config.json").write_text("{}")
        with pytest.raises(BrokenInput, match="not what was verified"):
            engine.load_adapter("merged", other / "model.onnx")
        graph = onnx.load(other / "model.onnx", load_external_data=False)
        next(entry for entry in graph.metadata_props if entry.key == "pitstop.base_sha256").value = "0" * 64
        (other / "model.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(BaseMismatch, match="0000"):
            engine.load_adapter("merged", other / "model.onnx")
        assert engine.adapters == ()


def test_it_is_measured_as_it_ships_packed_delivered_and_answers(
    onnx_project: Project, onnx_base: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, compared = check(onnx_project.run), parity(onnx_project.run)
    assert (report.engine, report.artifact_sha256) == ("onnx", compared.artifact_sha256)
    assert compared.kl_nats_per_token > 0
    monkeypatch.setattr(packing, "_refuse_unproven", lambda *_: None)  # test_pack.py: this model is too small to pass
    folders = [pack(onnx_base, artifact="int8"), pack(onnx_project.run)]
    home = tmp_path / "publisher"
    home.mkdir()
    publisher = Publisher(home)
    publisher.publish(*folders)
    update(tmp_path / "device", str(publisher.repository), root_json=publisher.root_json)
    release = activate(Store(tmp_path / "device"), check_files)
    assert release is not None
    bundle, path = release.adapters()["lights"]
    assert bundle.merged
    assert bundle.size > path.stat().st_size + 1_000, "its weights, tokenizer and settings came with it"
    question = [{"role": "user", "content": TEXT}]
    with Runtime.from_release(release, Limits(64, sequences=2, threads=1)) as runtime:
        answers = {
            name: "".join(runtime.ask(name, question, Sampling(max_tokens=8))) for name in ("lights", "tiny", "lights")
        }
        assert runtime.resident_bytes["lights"] >= bundle.size
    assert answers["lights"] != answers["tiny"]
