"""Bases with a SentencePiece tokenizer become GGUF files that read, compute and take adapters as torch does."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import Logits, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.template import render
from pitstop.errors import BrokenInput
from pitstop.workshop import base_model
from pitstop.workshop.export import llamacpp
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.recipe import LINEAR_MODULES
from pitstop.workshop.tokens import check_tokens
from sentencepiece_bases import CONFIGS, LINEAR, save_model

MESSAGES = [{"role": "user", "content": "Make the kitchen red, and the hall 42 times blue."}]
CLOSE = 1e-2  # of a logit: the base is converted by way of 16-bit floats


@dataclass(frozen=True)
class Base:
    name: str
    folder: Path
    ref: BaseRef

    @property
    def gguf(self) -> Path:
        return base_model.artifact_path(self.folder, self.ref, "f32")

    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self.folder / "hf", dtype=torch.float32)
        return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(request.param, folder / "source")
    return Base(request.param, folder / "base", base_model.prepare(str(source), folder / "base", precisions=["f32"]))


def computed(base: Base, adapter: Path | None = None) -> tuple[list[int], Logits]:
    with LlamaEngine(base.gguf, base_sha256=base.ref.artifact("f32").sha256, context_length=128, threads=1) as engine:
        tokens = engine.tokenize(render(base.ref.prompting, MESSAGES))
        if adapter is not None:
            engine.load_adapter("it", adapter)
        return tokens, engine.logits(tokens, Use("it") if adapter else Use())


def by_torch(model: torch.nn.Module, tokens: list[int]) -> Logits:
    with torch.no_grad():
        logits: Logits = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    return logits


def test_the_base_computes_what_torch_does(base: Base) -> None:
    tokens, shipped = computed(base)
    assert len(tokens) > 16  # Gemma's window
    assert np.abs(by_torch(base.model(), tokens) - shipped).max() < CLOSE


def test_its_adapter_computes_what_peft_does(base: Base, tmp_path: Path) -> None:
    torch.manual_seed(7)
    modules = LINEAR.get(base.name, list(LINEAR_MODULES))
    adapted = get_peft_model(base.model(), LoraConfig(r=4, lora_alpha=6, target_modules=modules))
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(tmp_path / "peft")
    file = tmp_path / "it.gguf"
    export_gguf(tmp_path / "peft", base.folder / "hf", base.ref.artifact("f32").sha256, file, precision="f32")
    tokens, plain = computed(base)
    _, shipped = computed(base, file)
    trained = by_torch(adapted, tokens)
    assert np.abs(trained - plain).max() > 0.05, "an adapter that does nothing proves nothing"
    assert np.abs(trained - shipped).max() < CLOSE


def test_special_tokens_that_became_letters_are_found(tmp_path: Path) -> None:
    source = save_model("gemma3", tmp_path / "source")
    folder = tmp_path / "base"
    ref = base_model.prepare(str(source), folder, precisions=["f32"])
    config = folder / "hf" / "tokenizer_config.json"
    plain = json.loads(config.read_text())
    plain.pop("added_tokens_decoder")  # as transformers saves it
    config.write_text(json.dumps(plain))
    llamacpp.convert_model(folder / "hf", tmp_path / "letters.gguf", "f32")
    with pytest.raises(BrokenInput, match="other tokens"):
        check_tokens(base_model.load_tokenizer(folder), ref.prompting, tmp_path / "letters.gguf")
