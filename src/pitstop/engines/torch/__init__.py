"""The torch engine: a transformers model with PEFT adapters."""

from pitstop.engines.torch.engine import LoraPair, TorchEngine

__all__ = ["LoraPair", "TorchEngine"]
