"""A PEFT LoRA as every format can carry it: its exact scaling multiplied into B, and what is more than that refused.

The engines know one rule of scaling or none, so rsLoRA and per-module ranks or alphas would come out wrong.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from pitstop.errors import RecordError
from pitstop.workshop.adapter import WEIGHTS_FILE


def load_folded(adapter: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return a PEFT folder's config, and its tensors in float32 with every module's factor multiplied into its B.

    Raises:
        RecordError: DoRA, biases, saved modules: only a merged model can carry them.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    assert isinstance(config, LoraConfig)
    tensors = load_file(adapter / WEIGHTS_FILE)
    _refuse_inexpressible(config, tensors, adapter)
    return config, {
        name: (tensor.float() * scaling(config, name) if ".lora_B." in name else tensor.float()).contiguous()
        for name, tensor in tensors.items()
    }


def scaling(config: LoraConfig, tensor: str) -> float:
    """Return PEFT's factor of one tensor's module: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    module = module_of(tensor)
    rank = _pattern(config.rank_pattern or {}, module, config.r)
    alpha = _pattern(config.alpha_pattern or {}, module, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def module_of(tensor: str) -> str:
    """Return the base's name of the module that a tensor of an adapter changes."""
    return tensor.removeprefix("base_model.model.").rpartition(".lora_")[0]


def _pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    # As PEFT looks it up: the whole name, or its end after a dot, by regular expression.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _refuse_inexpressible(config: LoraConfig, tensors: dict[str, torch.Tensor], adapter: Path) -> None:
    problems = []
    if config.use_dora:
        problems.append("DoRA: its magnitudes cannot be in an adapter file")
    if config.bias != "none" or config.lora_bias:
        problems.append("trained biases cannot be in an adapter file")
    if config.modules_to_save:
        problems.append(f"whole modules saved with the adapter: {', '.join(config.modules_to_save)}")
    other = sorted(name for name in tensors if ".lora_A." not in name and ".lora_B." not in name)
    if other and not problems:
        problems.append(f"tensors that are no LoRA pair: {', '.join(other[:5])}")
    if problems:
        raise RecordError(problems, where=adapter, cure="ship it merged: pitstop merge R")
