"""A random LoRA as a PEFT folder, for benchmarks whose sides must have one and the same."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pitstop.workshop.recipe import LINEAR_MODULES


def write(model: Path, target: Path, *, seed: int, rank: int, strength: float) -> None:
    """Write one on every projection of a Hugging Face folder's model, alpha being twice the rank.

    Args:
        strength: standard deviation of the elements of B.
    """
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEAR_MODULES), task_type="CAUSAL_LM")
    peft = get_peft_model(plain, config)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=strength)
    peft.save_pretrained(str(target))
