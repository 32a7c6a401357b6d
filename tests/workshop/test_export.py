"""The exported adapter does exactly what PEFT's does, whatever its scaling rule; what GGUF cannot say is refused."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pitstop.bundle.binding import check_adapter
from pitstop.bundle.formats import read_gguf
from pitstop.engines.base import Logits, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import BaseMismatch, BrokenInput, RecordError
from pitstop.files import sha256_file
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.export import llamacpp
from pitstop.workshop.export.export import export, load_exported
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.recipe import LINEAR_MODULES
from workbench import Project, TinyModel

TEXT = "<|im_start|>user\nmake the kitchen red, and the hall 42 times blue<|im_end|>\n"
ALL = list(LINEAR_MODULES)
CONFIGS = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"v_proj": 12, "layers.0.self_attn.q_proj": 3, ".*1.*up_proj": 1},
    },
    "rslora patterns": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 16},
        "alpha_pattern": {"down_proj": 3},
    },
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}


def peft_adapter(tiny: TinyModel, folder: Path, **config: object) -> PeftModel:
    """Save a PEFT adapter whose A and B are both random, and return the adapted float32 model."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config))
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def peft_logits(adapted: PeftModel, tokens: list[int]) -> Logits:
    with torch.no_grad():
        return adapted(input_ids=torch.tensor([tokens])).logits[0].numpy()


def llama_logits(tiny: TinyModel, adapter: Path | None) -> tuple[list[int], Logits]:
    with LlamaEngine(
        tiny.gguf, base_sha256=sha256_file(tiny.gguf), context_length=64, sequences=1, threads=1
    ) as engine:
        tokens = engine.tokenize(TEXT)
        if adapter is None:
            return tokens, engine.logits(tokens)
        engine.load_adapter("it", adapter)
        return tokens, engine.logits(tokens, Use("it"))


CASES = [*(("tiny_llama", name) for name in CONFIGS), ("tiny_qwen2", "patterns"), ("tiny_qwen3", "rslora patterns")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_exported_adapter_computes_what_peft_computes(
    model: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tiny: TinyModel = request.getfixturevalue(model)
    adapted = peft_adapter(tiny, tmp_path / "peft", **CONFIGS[name])
    target = tmp_path / "it.gguf"
    export_gguf(tmp_path / "peft", tiny.folder, sha256_file(tiny.gguf), target, precision="f32")
    tokens, shipped = llama_logits(tiny, target)
    trained = peft_logits(adapted, tokens)
    _, plain = llama_logits(tiny, None)
    assert np.abs(trained - plain).max() > 0.05, "an adapter that does nothing proves nothing"
    assert np.abs(trained - shipped).max() < 1e-3


def test_without_folding_an_rslora_adapter_would_be_wrong(tiny_llama: TinyModel, tmp_path: Path) -> None:
    adapted = peft_adapter(tiny_llama, tmp_path / "peft", **CONFIGS["rslora"])
    llamacpp.convert_adapter(tmp_path / "peft", tiny_llama.folder, tmp_path / "stock.gguf", "f32")
    target = bind(tmp_path / "stock.gguf", tmp_path / "bound.gguf", sha256_file(tiny_llama.gguf))
    tokens, shipped = llama_logits(tiny_llama, target)
    assert np.abs(peft_logits(adapted, tokens) - shipped).max() > 0.02


@pytest.mark.parametrize("precision", ["f32", "f16", "f16+f32", "q8_0"])
def test_the_file_names_its_base_and_passes_the_devices_check(
    tiny_llama: TinyModel, tmp_path: Path, precision: str
) -> None:
    peft_adapter(tiny_llama, tmp_path / "peft", **CONFIGS["patterns"])
    base_sha256 = sha256_file(tiny_llama.gguf)
    target = tmp_path / "it.gguf"
    export_gguf(tmp_path / "peft", tiny_llama.folder, base_sha256, target, precision=precision)
    header = read_gguf(target)
    assert header.text("pitstop.base_sha256") == base_sha256
    assert header.metadata["adapter.lora.alpha"] == 0.0
    check_adapter(header, read_gguf(tiny_llama.gguf), base_sha256)
    types = {half: {one.type for one in header.tensors if one.name.endswith(half)} for half in ("lora_a", "lora_b")}
    of_a, _, of_b = precision.upper().partition("+")
    assert of_a in types["lora_a"]
    assert types["lora_b"] == {of_b} or not of_b


def test_the_engine_refuses_it_on_another_base(tiny_llama: TinyModel, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "peft", **CONFIGS["plain"])
    target = tmp_path / "it.gguf"
    export_gguf(tmp_path / "peft", tiny_llama.folder, "0" * 64, target, precision="f32")
    with pytest.raises(BaseMismatch):
        llama_logits(tiny_llama, target)


def test_what_gguf_cannot_say_is_refused_all_at_once(tiny_qwen2: TinyModel, tmp_path: Path) -> None:
    peft_adapter(
        tiny_qwen2,
        tmp_path / "peft",
        target_modules=["q_proj"],
        use_dora=True,
        bias="lora_only",
        modules_to_save=["lm_head"],
    )
    target = tmp_path / "it.gguf"
    with pytest.raises(RecordError) as caught:
        export_gguf(tmp_path / "peft", tiny_qwen2.folder, "0" * 64, target, precision="f16")
    assert len(caught.value.problems) == 3
    for word in ("DoRA", "bias", "lm_head"):
        assert word in str(caught.value)
    assert "pitstop merge" in str(caught.value)
    assert not target.exists()


def test_tensors_of_another_kind_are_refused(tiny_qwen2: TinyModel, tmp_path: Path) -> None:
    peft_adapter(tiny_qwen2, tmp_path / "peft", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(RecordError, match="embed_tokens"):
        export_gguf(tmp_path / "peft", tiny_qwen2.folder, "0" * 64, tmp_path / "it.gguf", precision="f16")


def bind(source: Path, target: Path, base_sha256: str) -> Path:
    """Copy a stock adapter with the digest of its base, so that the engine loads it at all."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key in ("general.type", "adapter.type"):
        writer.add_string(key, reader.fields[key].contents())
    writer.add_float32("adapter.lora.alpha", reader.fields["adapter.lora.alpha"].contents())
    writer.add_string("pitstop.base_sha256", base_sha256)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_stage_writes_once_and_says_what_it_wrote(exported: Project) -> None:
    path = exported.run / "export" / "adapter-f16.gguf"
    begun = path.stat().st_mtime_ns
    result = export(Path("recipe.toml"))
    assert path.stat().st_mtime_ns == begun
    assert result.artifact.sha256 == sha256_file(path)
    assert result.base_sha256 == base_model.load_ref(Path("bases/tiny")).artifact("q8_0").sha256
    assert export(exported.recipe(export={"precision": "q8_0"})).artifact.name == "adapter-q8_0.gguf"


def test_the_precision_is_the_smallest_that_the_budget_allows(exported: Project) -> None:
    sizes = {}
    for kl, precision in ((1.0, "q8_0"), (1e-9, "f32")):
        made = export(exported.recipe(export={"precision": "auto", "parity_kl": kl}))
        assert (made.artifact.precision, made.artifact.name) == (precision, f"adapter-{precision}.gguf")
        sizes[precision] = made.artifact.size
    assert sizes["q8_0"] < sizes["f32"]


def test_a_damaged_export_is_not_used_and_is_made_again(exported: Project) -> None:
    recipe = recipes.load(Path("recipe.toml"))
    path = exported.run / "export" / "adapter-f16.gguf"
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    with pytest.raises(BrokenInput, match="--force"):
        load_exported(recipe)
    export(Path("recipe.toml"))
    assert path.read_bytes() == before


def test_an_adapter_trained_for_another_artifact_is_not_exported(exported: Project) -> None:
    base = exported.folder / "bases" / "own"
    shutil.copytree("bases/tiny", base)
    base_model.prepare(str(base), base, precisions=["q4_0"])
    with pytest.raises(BaseMismatch):
        export(exported.recipe(base={"folder": "bases/own", "artifact": "q4_0"}), force=True)
