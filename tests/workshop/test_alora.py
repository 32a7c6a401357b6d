"""An activated LoRA from the recipe to what llama.cpp computes with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from pitstop.bundle.binding import invocation_of
from pitstop.bundle.formats import read_gguf
from pitstop.engines.base import Use
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import DatasetError, RecordError, UsageError
from pitstop.workshop import base_model
from pitstop.workshop.export.export import export, load_exported
from pitstop.workshop.merge import merge
from pitstop.workshop.recipe import load
from pitstop.workshop.train import train
from workbench import Project

INVOCATION = "<|im_start|>assistant\n"
TEXT = f"<|im_start|>user\nmake the kitchen red<|im_end|>\n{INVOCATION}"


def activated(project: Project) -> Path:
    """Write the recipe of an activated LoRA."""
    return project.recipe(train={"invocation": INVOCATION})


def test_what_llama_cpp_computes_is_what_peft_was_trained_to(project: Project) -> None:
    recipe = activated(project)
    folder = train(recipe)
    tokenizer = base_model.load_tokenizer(Path("bases/tiny"))
    invocation = tokenizer(INVOCATION, add_special_tokens=False)["input_ids"]
    assert json.loads((folder / "adapter_config.json").read_text())["alora_invocation_tokens"] == invocation
    export(recipe)
    _, path = load_exported(load(recipe))
    assert invocation_of(read_gguf(path)) == tuple(invocation)

    tokens = tokenizer(TEXT + "{", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) - len(invocation)
    ids = torch.tensor([tokens])
    ref = base_model.load_ref(Path("bases/tiny"))
    model = base_model.load_weights(Path("bases/tiny"), ref, precision="shipped", artifact="q8_0").float()
    with torch.no_grad():
        base = model(input_ids=ids).logits[0].numpy()
        expected = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits[0].numpy()
    assert np.abs(expected[:start] - base[:start]).max() < 1e-5
    assert np.abs(expected[start:] - base[start:]).max() > 0.5, "an adapter that does nothing"
    gguf = base_model.artifact_path(Path("bases/tiny"), ref, "q8_0")
    with LlamaEngine(
        gguf, base_sha256=ref.artifact("q8_0").sha256, context_length=64, sequences=1, threads=1
    ) as engine:
        engine.load_adapter("it", path)
        found = engine.logits(tokens, Use("it"))
        assert np.abs(found - expected).max() < 0.1  # llama.cpp rounds activations to 8 bits too


def test_rows_without_the_invocation_are_counted(project: Project) -> None:
    with pytest.raises(DatasetError, match=r"\d+ of \d+ rows do not have the invocation '### Answer'"):
        train(project.recipe(train={"invocation": "### Answer"}))


def test_an_empty_invocation_is_a_mistake_of_the_recipe(project: Project) -> None:
    with pytest.raises(RecordError, match=r"train\.invocation: it is empty"):
        load(project.recipe(train={"invocation": ""}))


def test_it_is_not_merged(project: Project) -> None:
    recipe = activated(project)
    train(recipe)
    with pytest.raises(UsageError, match="before its invocation too"):
        merge(recipe)
