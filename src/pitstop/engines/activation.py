"""Where the LoRA layers of a torch model act: from a position of each row on.

PEFT computes activated LoRAs by itself when its own forward and generate are called; here the model below is called, a
part at a time, so the low-rank product is masked where it is made. What is computed is the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Activation:
    """From which position on adapters act in the rows that are evaluated now."""

    def __init__(self) -> None:
        self._starts: torch.Tensor | None = None  # per row; None: everywhere
        self._width = 0  # positions of a row when it began; later calls go on with single ones

    @contextmanager
    def of(self, starts: Sequence[int] | None, width: int, device: Any) -> Iterator[None]:
        """Evaluate rows of this width, in which adapters act from these positions on."""
        self._starts = None if starts is None else torch.tensor(starts, device=device)
        self._width = width
        try:
            yield
        finally:
            self._starts = None

    def mask(self, width: int) -> torch.Tensor | None:
        """Return where adapters act in a call with rows of this width, of a shape that goes with (rows, width, any)."""
        if self._starts is None:
            return None
        if width != self._width:  # a token after the rows
            return (self._starts < self._width)[:, None, None]
        return (torch.arange(width, device=self._starts.device) >= self._starts[:, None])[..., None]

    def watch(self, model: torch.nn.Module, adapter: str) -> None:
        """Mask every layer of an adapter, by PEFT's name of it."""
        for module in model.modules():
            halves: Any = getattr(module, "lora_A", {})
            if adapter in halves:
                halves[adapter].register_forward_hook(self._masked)

    def _masked(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        mask = self.mask(output.shape[1])
        return output if mask is None else output * mask
