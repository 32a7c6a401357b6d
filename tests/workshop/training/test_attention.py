"""Attention for training is the plain one, value and gradients, at every length and grouping."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pitstop.workshop.training import attention


@pytest.mark.parametrize("tokens", [1, 7, attention.QUERIES, 2 * attention.QUERIES + 3])
@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2), (4, 1)])
def test_it_is_torchs(tokens: int, heads: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1 << 14)  # so that rows are done in several portions
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(3, tokens, count, 16).transpose(1, 2).requires_grad_() for count in (heads, keys, keys))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    found = attention._Causal.apply(q, k, v, 0.3)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_models_gradients_are_those_of_the_plain_way() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    tokens = torch.randint(50, (2, 20))
    gradients = []
    for implementation in ("eager", None):
        if implementation:
            model.set_attn_implementation(implementation)
        else:
            attention.use(model)
            assert model.config._attn_implementation == attention.NAME
        model.zero_grad()
        model(input_ids=tokens).logits.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
