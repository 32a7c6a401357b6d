"""The merged model does what base and adapter do together, at the recipe's scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from pitstop.engines.base import Logits
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import Busy, UsageError
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop.merge import Merged, merge
from pitstop.workshop.runs import exclusive
from workbench import Project

TEXT = "<|im_start|>user\nmake the kitchen red<|im_end|>\n"


def attached(project: Project, scale: float) -> tuple[list[int], Logits]:
    """Return the logits of the float32 base with the adapter beside it."""
    model = AutoModelForCausalLM.from_pretrained("bases/tiny/hf", dtype=torch.float32)
    tokens = base_model.load_tokenizer(Path("bases/tiny"))(TEXT)["input_ids"]
    adapted = PeftModel.from_pretrained(model, str(project.run / adapters.FOLDER)).eval()
    with torch.no_grad(), rescale_adapter_scale(adapted, scale):
        return tokens, adapted(input_ids=torch.tensor([tokens])).logits[0].numpy()


def plain(folder: Path, tokens: list[int]) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_merged_model_computes_what_the_two_compute(exported: Project, scale: float) -> None:
    merged = merge(exported.recipe(base={"artifact": "f16"}, scale=scale))
    folder = exported.run / "merged"
    tokens, expected = attached(exported, scale)
    assert np.abs(expected - plain(Path("bases/tiny/hf"), tokens)).max() > 0.5, "an adapter that does nothing"
    assert np.abs(expected - plain(folder / "hf", tokens)).max() < 1e-3
    path = folder / merged.artifact.name
    with LlamaEngine(path, base_sha256=merged.artifact.sha256, context_length=64, sequences=1, threads=1) as engine:
        assert engine.tokenize(TEXT) == tokens
        assert np.abs(expected - engine.logits(tokens)).max() < 0.05


def test_the_result_names_what_went_in_and_what_came_out(exported: Project) -> None:
    merged = merge(Path("recipe.toml"))
    folder = exported.run / "merged"
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "merged.json", "q8_0.gguf"]
    assert merged.artifact.sha256 == sha256_file(folder / "q8_0.gguf")
    assert merged.weights_sha256 == sha256_file(folder / "hf" / "model.safetensors")
    assert merged.adapter_sha256 == sha256_file(exported.run / adapters.FOLDER / adapters.WEIGHTS_FILE)
    assert merged.scale == 1.0


def test_the_same_merge_is_made_once(exported: Project) -> None:
    path = exported.run / "merged" / "q8_0.gguf"

    def written(merged: Merged) -> tuple[Merged, int]:
        return merged, path.stat().st_mtime_ns

    first = written(merge(Path("recipe.toml")))
    assert written(merge(exported.run)) == first
    path.write_bytes(b"damaged")
    again = written(merge(Path("recipe.toml")))
    assert again[0] == first[0]
    assert again[1] > first[1]
    assert merge(exported.recipe(scale=0.5)).weights_sha256 != first[0].weights_sha256


def test_nothing_is_merged_while_another_works_or_nothing_is_trained(exported: Project) -> None:
    with exclusive(exported.run), pytest.raises(Busy):
        merge(Path("recipe.toml"))
    with pytest.raises(UsageError, match="pitstop train"):
        merge(exported.recipe(name="other"))
