"""A frozen layer and its LoRA as one step of the graph.

PEFT's own forward is right, and made of small parts: product, scaling, sum, and again backwards, each a pass over
activations in memory. Here the low-rank product is added by the matrix library while it is computed, forwards and
backwards. Parameters, names and checkpoints stay PEFT's.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from pitstop.engines.activation import Activation
from pitstop.workshop.training.frozen import FrozenLinear


def fuse(model: PeftModel, activation: Activation) -> int:
    """Let every plain LoRA layer of a model in training compute in one step; return how many do.

    Each acts where ``activation`` says. Layers with dropout, biases, DoRA or another adapter keep PEFT's way.
    """
    count = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = MethodType(partial(_forward, activation), module)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(module: Any) -> bool:
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else (None,)
    return (
        name is not None
        and (type(module.base_layer) is torch.nn.Linear or isinstance(module.base_layer, FrozenLinear))
        and not module.merged
        and not module.use_dora.get(name, False)
        and not module.lora_bias.get(name, False)
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
    )


def _forward(activation: Activation, self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    base = self.base_layer
    if self.disable_adapters:
        plain: torch.Tensor = base(x)
        return plain
    (name,) = self.active_adapters
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    mask = activation.mask(x.shape[1])
    result: torch.Tensor = _LoraLinear.apply(x, base, a, b, self.scaling[name], mask)
    return result


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · m · x Aᵀ Bᵀ (LoRA, arXiv:2106.09685, equation 3), W frozen; m: where it acts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.nn.Linear,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        weight = base.weight  # read again in backward: a layer in blocks makes it anew, and it is not kept
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        low, high = a.to(weight.dtype), (b * scaling).to(weight.dtype)
        inner = rows @ low.t()
        if mask is not None:
            mask = mask.reshape(-1, 1)
            inner *= mask
        y = torch.nn.functional.linear(rows, weight, base.bias).addmm_(inner, high.t())
        ctx.save_for_backward(rows, inner, low, high)
        ctx.base, ctx.scaling, ctx.shape, ctx.mask = base, scaling, x.shape, mask
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        rows, inner, low, high = ctx.saved_tensors
        d = upstream.reshape(-1, upstream.shape[-1])
        d_inner = d @ high
        if ctx.mask is not None:
            d_inner *= ctx.mask
        d_low, d_high = d_inner.t() @ rows, d.t() @ inner
        d_x = (d @ ctx.base.weight).addmm_(d_inner, low).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return d_x, None, d_low.float(), d_high.float() * ctx.scaling, None, None
