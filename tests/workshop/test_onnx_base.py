"""A base prepared for ONNX Runtime, a run exported for it, and both on the stock libraries alone."""

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pitstop import records
from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.manifest import Artifact, BaseRef
from pitstop.bundle.onnx import sites
from pitstop.engines.base import Use
from pitstop.engines.onnx import OnnxEngine
from pitstop.errors import BrokenInput, RecordError, UsageError
from pitstop.workshop import base_model, train
from pitstop.workshop.export.export import Exported, export, load_exported
from pitstop.workshop.merge import merge
from pitstop.workshop.recipe import load
from pitstop.workshop.shipped import load_shipped
from workbench import Project

TEXT = "make the kitchen red"


@pytest.fixture
def ref(onnx_base: Path) -> BaseRef:
    return base_model.load_ref(onnx_base)


@pytest.fixture
def exported(onnx_project: Project, ref: BaseRef) -> Exported:
    recipe = onnx_project.recipe(export={"also": ["fp32", "int8"], "precision": "f32"})
    train.train(recipe)
    return export(recipe)


def test_a_base_has_its_onnx_artifacts_beside_the_others(onnx_base: Path, ref: BaseRef) -> None:
    assert [artifact.precision for artifact in ref.artifacts] == ["q8_0", "fp32", "int8"]
    assert ref.artifact("int8").format == "onnx"
    path = base_model.artifact_path(onnx_base, ref, "int8")
    assert path == onnx_base / "onnx" / "int8" / "model.onnx"
    sizes = {one.precision: base_model.bytes_of(onnx_base, one) for one in ref.artifacts}
    assert sizes["int8"] < 0.5 * sizes["fp32"]
    assert base_model.prepare(str(onnx_base / "hf"), onnx_base, onnx=["int8"]) == ref


def test_eight_bits_are_those_of_the_gguf(onnx_base: Path, ref: BaseRef) -> None:
    one, other = (
        base_model.load_weights(onnx_base, ref, precision="shipped", artifact=artifact).state_dict()
        for artifact in ("q8_0", "int8")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_changed_file_of_the_base_is_found(onnx_base: Path, ref: BaseRef) -> None:
    config = onnx_base / "onnx" / "fp32" / "genai_config.json"
    before = config.read_text()
    config.write_text(before.replace("1.0", "1.5", 1))
    try:
        with pytest.raises(BrokenInput, match="not what was verified"):
            base_model.artifact_path(onnx_base, ref, "fp32")
    finally:
        config.write_text(before)


def test_a_precision_that_is_none_is_told(onnx_base: Path, ref: BaseRef) -> None:
    with pytest.raises(UsageError, match="fp32, int8, int4"):
        base_model.prepare(str(onnx_base / "hf"), onnx_base, onnx=["int3"])


def test_one_run_is_exported_for_every_artifact_it_names(exported: Exported, onnx_project: Project) -> None:
    assert [one.base for one in exported.also] == ["fp32", "int8"]
    assert {one.artifact.format for one in exported.also} == {"onnx"}
    recipe = load(onnx_project.run)
    ref = base_model.load_ref(recipe.base.folder)
    assert load_exported(recipe)[1].suffix == ".gguf"
    for one in exported.also:
        graph = base_model.artifact_path(recipe.base.folder, ref, one.base)
        with OnnxEngine(graph, base_sha256=one.base_sha256, context_length=64, sequences=1, threads=1) as engine:
            engine.load_adapter("it", recipe.run / "export" / one.artifact.name, sha256=one.artifact.sha256)
            tokens = engine.tokenize(TEXT)
            moved = np.abs(engine.logits(tokens, Use("it")) - engine.logits(tokens)).max()
            assert moved > 0.1
    assert export(onnx_project.run) == exported


def test_an_artifact_that_the_base_does_not_have_is_told(onnx_project: Project, ref: BaseRef) -> None:
    recipe = onnx_project.recipe(export={"also": ["int4"]}, train={"steps": 1})
    train.train(recipe)
    with pytest.raises(RecordError, match="no int4 artifact"):
        export(recipe)


def test_an_export_of_an_older_pitstop_is_still_read() -> None:
    artifact = Artifact("adapter", "gguf", "f16", "adapter-f16.gguf", "0" * 64, 1)
    older = records.to_mapping(Exported("", "1" * 64, "2" * 64, artifact))
    del older["also"]
    assert records.from_mapping(Exported, older).also == ()


def test_training_on_what_onnx_runs(onnx_project: Project, ref: BaseRef) -> None:
    recipe = onnx_project.recipe(base={"artifact": "int8"})
    train.train(recipe)
    exported = export(recipe)
    assert exported.artifact.format == "onnx"
    assert exported.base_sha256 == ref.artifact("int8").sha256


def test_merged_it_is_a_model_of_its_own(onnx_project: Project, ref: BaseRef) -> None:
    recipe = onnx_project.recipe(base={"artifact": "fp32"}, export={"delivery": "merged"})
    train.train(recipe)
    merged = merge(recipe)
    graph = onnx_project.run / "merged" / "model.onnx"
    assert (merged.artifact.role, merged.artifact.format) == ("merged", "onnx")
    assert read_onnx_graph(graph).metadata[BASE_KEY] == ref.artifact("fp32").sha256
    assert sites(read_onnx_graph(graph)) == {}
    with (
        OnnxEngine(graph, base_sha256=merged.artifact.sha256, context_length=64, sequences=1, threads=1) as engine,
        torch.no_grad(),
    ):
        tokens = engine.tokenize(TEXT)
        whole = AutoModelForCausalLM.from_pretrained(onnx_project.run / "merged" / "hf", dtype=torch.float32)
        assert np.abs(engine.logits(tokens) - whole(torch.tensor([tokens])).logits[0].numpy()).max() < 2e-3
    assert merge(recipe) == merged
    assert load_shipped(load(onnx_project.run)).path == graph


def test_the_sample_loop_of_onnxruntime_genai(exported: Exported, onnx_project: Project) -> None:
    recipe = load(onnx_project.run)
    (file,) = (recipe.run / "export" / one.artifact.name for one in exported.also if one.base == "fp32")
    # From here on as in the library's own examples (model-generate.py, multi-LoRA).
    model = og.Model(str(recipe.base.folder / "onnx" / "fp32"))
    tokenizer = og.Tokenizer(model)
    adapters = og.Adapters(model)
    adapters.load(str(file), "it")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=40, do_sample=False)
    generator = og.Generator(model, params)
    generator.set_active_adapter(adapters, "it")
    prompt = tokenizer.encode(TEXT)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    shipped = list(generator.get_sequence(0))

    base = AutoModelForCausalLM.from_pretrained(recipe.base.folder / "hf", dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, str(recipe.run / "adapter")).eval()
    expected = trained.generate(input_ids=torch.tensor([list(prompt)]), max_length=40, do_sample=False)[0].tolist()
    assert shipped[: len(expected)] == expected
    assert tokenizer.decode(shipped)
