"""A base in its blocks is the dequantized base: same logits, same gradients of the adapter, less memory."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pitstop.engines.activation import Activation
from pitstop.errors import BrokenInput
from pitstop.workshop import base_model
from pitstop.workshop.training import frozen
from pitstop.workshop.training.arithmetic import compute_dtype
from pitstop.workshop.training.frozen import FrozenLinear
from pitstop.workshop.training.lora import fuse
from workbench import TinyModel


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    tiny_qwen2: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """Tiny bases and an artifact of each: rows in another order, and biases."""
    if request.param == "llama":
        return tiny_base, "q8_0"
    folder = tmp_path_factory.mktemp("bases") / "qwen2"
    with pytest.MonkeyPatch.context() as patch:  # no Qwen2 has SmolLM2's words: transformers splits them as Qwen2's
        patch.setattr(base_model, "check_tokens", lambda *_: None)
        base_model.prepare(str(tiny_qwen2.gguf), folder, precisions=["q4_0"])
    return folder, "q4_0"


def load(base: tuple[Path, str], kept: str, precision: str = "shipped") -> PreTrainedModel:
    folder, artifact = base
    ref = base_model.load_ref(folder)
    return base_model.load_weights(folder, ref, precision=precision, artifact=artifact, kept=kept)


def blocks_of(model: torch.nn.Module) -> int:
    return sum(isinstance(layer, FrozenLinear) for layer in model.modules())


def step(model: PreTrainedModel, fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of one step of a LoRA that is not zero."""
    torch.manual_seed(3)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(peft, PeftModel)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if fused:
        assert fuse(peft, Activation()) == 14
    tokens = torch.randint(1000, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute_dtype() is torch.bfloat16):
        loss = peft(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [True, False])
def test_loss_and_gradients_are_those_of_the_dequantized_base(base: tuple[Path, str], fused: bool) -> None:
    blocks, plain = load(base, "blocks"), load(base, "dequantized")
    assert (blocks_of(blocks), blocks_of(plain)) == (14, 0)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(blocks(tokens).logits, plain(tokens).logits)
    (loss, found), (expected_loss, expected) = step(blocks, fused), step(plain, fused)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_nf4_blocks_are_nf4_dequantized(base: tuple[Path, str], fused: bool) -> None:
    blocks, plain = load(base, "blocks", "nf4"), load(base, "dequantized", "nf4")
    assert (blocks_of(blocks), blocks_of(plain)) == (14, 0)
    (loss, found), (expected_loss, expected) = step(blocks, fused), step(plain, fused)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_nf4_is_not_the_base_and_bf16_is(base: tuple[Path, str]) -> None:
    weights = [
        load(base, "dequantized", precision).model.layers[0].mlp.up_proj.weight.float()
        for precision in ("bf16", "nf4", "shipped")
    ]
    errors = [(weight - weights[0]).norm() / weights[0].norm() for weight in weights]
    assert errors[0] == 0
    assert 0.05 < errors[1] < 0.15
    assert errors[2] < (0.02 if base[1] == "q8_0" else 0.15)


def test_the_real_base_in_blocks_is_the_dequantized_one(base_folder: Path) -> None:
    """Real blocks of two kinds in one file, and memory of a quarter."""
    blocks, plain = load((base_folder, "q8_0"), "blocks"), load((base_folder, "q8_0"), "dequantized")
    tokens = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(blocks(tokens).logits, plain(tokens).logits)

    def size(model: PreTrainedModel) -> int:
        parts = (*model.model.layers.parameters(), *model.model.layers.buffers())
        return sum(part.nbytes for part in parts)

    assert size(blocks) < 0.55 * size(plain)  # 34 bytes for 32 weights


def test_blocks_of_another_file_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    load((tiny_base, "q8_0"), "dequantized")
    shutil.copytree(tiny_base / "shipped" / "q8_0", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] *= 2
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BrokenInput, match="not what the base was dequantized to"):
        frozen.load_blocks(tmp_path, tiny_base / "gguf" / "q8_0.gguf")


def test_memory_decides_if_the_recipe_does_not(base: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks_of(load(base, "auto")) == 0
    monkeypatch.setattr(frozen, "_free_memory", lambda: 1 << 16)
    assert blocks_of(load(base, "auto")) == 14
