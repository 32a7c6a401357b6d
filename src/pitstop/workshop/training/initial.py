"""How A and B begin, by the names PEFT has for it.

PEFT's PiSSA and OLoRA take their start out of the base's weights, so that the adapter fits no file a device has. Here
the base stays as it is: the start stands in the adapter a second time, with the other sign and frozen. That is the
same function at twice the rank. LoftQ's start is what quantizing took from the weights, and changes what the model
says from the first step on.
"""

from typing import Any

import torch

OF_PEFT = ("gaussian", "orthogonal")
DOUBLED = ("pissa", "olora")
LOFTQ = "loftq"
ITERATIONS = 8  # of the randomized decomposition


def start(layer: Any, init: str, original: torch.Tensor | None = None) -> None:
    """Set A and B of a fresh LoRA layer of PEFT's; "default" and PEFT's own are there already.

    Args:
        original: the layer's weights before they were quantized, shape (out, in), for LoftQ.
    """
    if init in DOUBLED:
        _start_doubled(layer, init)
    elif original is not None:
        base: torch.Tensor = layer.get_base_layer().weight
        lost = original.to(base.device).float() - base.float()
        high, low = _pissa(lost, layer.r["default"])
        _set(layer, low, high)


def _start_doubled(layer: Any, init: str) -> None:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank = len(a) // 2
    base: torch.Tensor = layer.get_base_layer().weight
    high, low = _pissa(base.float(), rank) if init == "pissa" else _olora(base.float(), rank)
    _set(layer, torch.cat([low, low]), torch.cat([high, -high], dim=1))
    a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    b.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1))


def _set(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Set A and B so that the layer adds B A, whatever it multiplies them by."""
    share = layer.scaling["default"] ** 0.5
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a / share)
        layer.lora_B["default"].weight.copy_(b / share)


def _pissa(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of the principal singular values (PiSSA, arXiv:2404.02948; of a residual: LoftQ, 2310.08659)."""
    u, s, v = torch.svd_lowrank(weight, rank, niter=ITERATIONS)
    return u * s.sqrt(), s.sqrt()[:, None] * v.t()


def _olora(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of the first columns of an orthonormal basis (OLoRA, arXiv:2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]
