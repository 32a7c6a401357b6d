"""Norms and gated products that keep less give what the model's own give, and keep less."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pitstop.workshop.training.elementwise import slim

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}


def made(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = (
        LlamaForCausalLM(LlamaConfig(**SHAPE, **heads))
        if family == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**SHAPE, **heads))
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        weight.requires_grad_("embed_tokens" in name)
    return model


def step(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the logits, the gradient of the embeddings, and how many bytes were kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=torch.arange(40).reshape(2, 20)).logits
    logits.float().square().mean().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return logits.detach(), gradient, sum(kept.values())


@pytest.mark.parametrize(("family", "count"), [("llama", 7), ("qwen3", 11)])
def test_it_is_the_models_own(family: str, count: int) -> None:
    logits, gradient, _ = step(made(family))
    model = made(family)
    assert slim(model) == count
    found, found_gradient, _ = step(model)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(found_gradient, gradient)


def test_in_16_bits_it_keeps_less_and_is_as_near() -> None:
    exact = step(made("llama"))
    plain, model = step(made("llama").bfloat16()), made("llama").bfloat16()
    slim(model)
    slimmed = step(model)
    assert slimmed[2] < 0.85 * plain[2]
    assert (slimmed[0] - exact[0]).abs().max() < 1.5 * (plain[0] - exact[0]).abs().max()
    assert torch.cosine_similarity(slimmed[1].flatten().float(), exact[1].flatten(), dim=0) > 0.999
