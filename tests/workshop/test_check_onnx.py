"""One run beside two artifacts of its base: checked, compared and packed for ONNX as for GGUF, by the same commands."""

from pathlib import Path

import pytest

from pitstop import records
from pitstop.bundle.manifest import Bundle
from pitstop.errors import UsageError
from pitstop.files import sha256_file
from pitstop.retention import suite as suites
from pitstop.retention.suite import TextItem
from pitstop.workshop import base_model, train
from pitstop.workshop.check import check, report_file
from pitstop.workshop.export.export import export
from pitstop.workshop.pack import pack
from pitstop.workshop.parity import parity
from pitstop.workshop.recipe import load
from workbench import TEXTS, Project


@pytest.fixture
def both(onnx_project: Project) -> Project:
    """A run that is exported for GGUF and for ONNX."""
    items = [TextItem(str(number), str(number), text) for number, text in enumerate(TEXTS)]
    mine = suites.make("mine", "text", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(mine, Path("suites", "mine"))
    recipe = onnx_project.recipe(export={"also": ["int8"]}, check={"rows": 4, "max_new_tokens": 8})
    train.train(recipe)
    export(recipe)
    return onnx_project


def test_what_ships_for_onnx_is_measured_by_the_same_suites(both: Project) -> None:
    trained, gguf, onnx = check(both.run), check(both.run, engine="llama"), check(both.run, engine="onnx")
    assert [report.engine.split(",")[0] for report in (trained, gguf, onnx)] == ["torch", "llama", "onnx"]
    artifacts = export(both.run)
    assert onnx.artifact_sha256 == artifacts.also[0].artifact.sha256 != gguf.artifact_sha256
    assert [summary.items for summary in onnx.suites] == [summary.items for summary in gguf.suites]
    recipe = load(both.run)
    assert report_file(recipe, "onnx") == report_file(recipe, artifact="int8") == recipe.run / "retention-int8.json"
    assert report_file(recipe, "llama") == report_file(recipe) == recipe.run / "retention.json"
    assert (recipe.run / "retention-int8.html").is_file()
    written = (recipe.run / "retention-int8.json").stat().st_mtime_ns
    assert check(both.run, artifact="int8").inputs == onnx.inputs
    assert (recipe.run / "retention-int8.json").stat().st_mtime_ns == written, "measured once"


def test_it_is_compared_and_packed_for_each(both: Project) -> None:
    one, other = parity(both.run), parity(both.run, artifact="int8")
    assert one.artifact_sha256 != other.artifact_sha256
    assert one.trained == other.trained
    assert other.kl_nats_per_token < 0.01
    assert parity(both.run, artifact="int8") == other
    assert {path.name for path in both.run.glob("parity*")} == {"parity.json", "parity-int8.json"}


def test_a_base_is_packed_with_all_of_its_files(onnx_base: Path) -> None:
    folder = pack(onnx_base, artifact="int8")
    assert folder == onnx_base / "bundle-int8"
    bundle = records.load_json(Bundle, folder / "bundle.json")
    assert bundle.artifact.sha256 == bundle.base_sha256 == base_model.load_ref(onnx_base).artifact("int8").sha256
    assert {"model.onnx.data", "tokenizer.json", "genai_config.json"} <= {part.name for part in bundle.parts}
    for artifact in bundle.artifacts:
        assert sha256_file(folder / artifact.name) == artifact.sha256
    assert pack(onnx_base, artifact="int8") == folder
    assert records.load_json(Bundle, folder / "bundle.json") == bundle
    assert pack(onnx_base).name == "bundle"


def test_what_is_not_there_is_told(both: Project) -> None:
    with pytest.raises(UsageError, match="not exported for fp64"):
        parity(both.run, artifact="fp64")
    both.recipe(check={"rows": 4, "max_new_tokens": 8})
    with pytest.raises(UsageError, match="the onnx engine runs nothing of what lights is checked for: q8_0"):
        check(Path("recipe.toml"), engine="onnx")
