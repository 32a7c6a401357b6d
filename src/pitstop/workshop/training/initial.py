"""How A and B begin, by the names PEFT has for it.

PEFT's PiSSA and OLoRA take their start out of the base's weights, so that the adapter fits no file a device has. Here
the base stays as it is: the start stands in the adapter a second time, with the other sign and frozen. That is the
same function at twice the rank.
"""

from typing import Any

import torch

OF_PEFT = ("gaussian", "orthogonal")
DOUBLED = ("pissa", "olora")
NAMES = ("default", *OF_PEFT, *DOUBLED)
ITERATIONS = 8  # of the randomized decomposition


def start(layer: Any, init: str) -> None:
    """Set A and B of a fresh LoRA layer of PEFT's; "default" and PEFT's own are there already."""
    if init not in DOUBLED:
        return
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank = len(a) // 2
    base: torch.Tensor = layer.get_base_layer().weight
    high, low = _pissa(base.float(), rank) if init == "pissa" else _olora(base.float(), rank)
    share = layer.scaling["default"] ** 0.5  # of the factor that the product is multiplied by
    with torch.no_grad():
        a.copy_(torch.cat([low, low]) / share)
        b.copy_(torch.cat([high, -high], dim=1) / share)
    a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    b.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1))


def _pissa(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of the principal singular values (arXiv:2404.02948)."""
    u, s, v = torch.svd_lowrank(weight, rank, niter=ITERATIONS)
    return u * s.sqrt(), s.sqrt()[:, None] * v.t()


def _olora(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of the first columns of an orthonormal basis (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]
