"""Norms and gates that keep less until backward.

Written as small operations, a norm keeps its input three times in float32, and a gated product its activation beside
what it is made of. Here each keeps its 16-bit inputs and makes the rest again: less memory than the matrices' own
inputs take, and fewer passes over it.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn import functional

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")


def slim(model: torch.nn.Module) -> int:
    """Let the norms and gated products of a model with frozen weights compute that way; return how many do."""
    count = 0
    for module in model.modules():
        if type(module).__name__ in NORMS and not module.weight.requires_grad:
            module.forward = MethodType(_norm, module)
            count += 1
        elif _is_gated(module):
            module.forward = MethodType(_gated, module)
            count += 1
    return count


def _is_gated(module: torch.nn.Module) -> bool:
    parts = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return parts and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return result


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.down_proj(_SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))
    return result


class _RmsNorm(torch.autograd.Function):
    """y = weight · x / sqrt(mean(x²) + eps), weight frozen (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        d = (upstream * weight).float()
        d_x = (d - normal * (d * normal).mean(-1, keepdim=True)).mul_(scale)
        return d_x.to(x.dtype), None, None


class _SiluProduct(torch.autograd.Function):
    """y = silu(gate) · up (arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return d_gate, upstream * functional.silu(gate)
