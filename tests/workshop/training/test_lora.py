"""A fused LoRA layer computes what PEFT's does, forwards and backwards, and only where it may."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pitstop.engines.activation import Activation
from pitstop.engines.invocation import active_from
from pitstop.workshop.training.lora import fuse

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def adapted(dtype: torch.dtype = torch.float32, bias: bool = False, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=bias)).to(dtype)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **settings
    )
    made = get_peft_model(model, config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return made


def step(model: PeftModel, precision: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients of one step."""
    tokens = torch.arange(24).reshape(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        logits = model(input_ids=tokens).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_pefts_layer(bias: bool, rslora: bool) -> None:
    expected, gradients = step(adapted(bias=bias, use_rslora=rslora), torch.float32)
    model = adapted(bias=bias, use_rslora=rslora)
    assert fuse(model, Activation()) == 6
    logits, found = step(model, torch.float32)
    torch.testing.assert_close(logits, expected)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("fused", [True, False])
def test_it_acts_where_pefts_activated_layer_acts(fused: bool) -> None:
    invocation = [7, 8]  # in the first of the two rows only
    expected, gradients = step(adapted(alora_invocation_tokens=invocation), torch.float32)
    model, activation = adapted(), Activation()
    activation.watch(model, "default")
    if fused:
        assert fuse(model, activation) == 6
    rows = torch.arange(24).reshape(2, 12).tolist()
    with activation.of([active_from(row, invocation) for row in rows], 12, "cpu"):
        logits, found = step(model, torch.float32)
    torch.testing.assert_close(logits, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)
    assert not torch.allclose(logits, step(adapted(), torch.float32)[0])


def test_in_16_bits_it_is_as_near_as_rounding_lets_it_be() -> None:
    exact, gradients = step(adapted(), torch.float32)
    model = adapted(torch.bfloat16)
    fuse(model, Activation())
    logits, found = step(model, torch.bfloat16)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.99


def test_without_the_adapter_it_is_the_base() -> None:
    model = adapted()
    fuse(model, Activation())
    tokens = torch.arange(12)[None]
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=tokens).logits
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        torch.testing.assert_close(found, base(input_ids=tokens).logits)
        assert not torch.allclose(model(input_ids=tokens).logits, found)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_is_not_plain_stays_pefts(settings: dict[str, object]) -> None:
    assert fuse(adapted(**settings), Activation()) == 0
