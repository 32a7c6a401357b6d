"""The low-rank factors of a PEFT LoRA adapter, and its folder with other factors in it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pitstop.errors import BrokenInput, RecordError
from pitstop.workshop.adapter import WEIGHTS_FILE

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Pair:
    """One module's factors: it adds scaling · B · A to the module's weight, and scaling is the config's business."""

    a: torch.Tensor  # (rank, in), float32
    b: torch.Tensor  # (out, rank), float32

    @property
    def product(self) -> torch.Tensor:
        """B · A, shape (out, in): what the module's weight changes by, but for the config's factor."""
        return self.b @ self.a


Pairs = Mapping[str, Pair]  # by module, as the model names it: model.layers.0.self_attn.q_proj


def read(folder: Path) -> dict[str, Pair]:
    """Return the factors of a PEFT folder in float32.

    Raises:
        RecordError: the adapter is more than low-rank pairs; everything of it that cannot be edited, at once.
        BrokenInput: values that are not finite, or half a pair.
    """
    tensors = load_file(folder / WEIGHTS_FILE)
    _refuse_other_kinds(folder, tensors)
    pairs = {}
    for name, tensor in tensors.items():
        if name.endswith(ENDS[0]):
            module = name.removesuffix(ENDS[0])
            other = tensors.get(module + ENDS[1])
            if other is None or tensor.ndim != 2 or other.ndim != 2 or other.shape[1] != tensor.shape[0]:
                raise BrokenInput(f"{module} has no B that fits its A", where=folder / WEIGHTS_FILE)
            pairs[module.removeprefix(PREFIX)] = Pair(tensor.float(), other.float())
    broken = [name for name, pair in pairs.items() if not (pair.a.isfinite().all() and pair.b.isfinite().all())]
    if broken or not pairs:
        what = f"{broken[0]} holds values that are not finite" if broken else "it holds no low-rank pairs"
        raise BrokenInput(f"the adapter is damaged: {what}", where=folder / WEIGHTS_FILE, cure="train it again")
    return pairs


def write(pairs: Pairs, source: Path, target: Path) -> None:
    """Write a PEFT folder like ``source`` with these factors, in the types the source stores them in.

    The source's `pitstop.json` is not copied: it speaks of other weights.
    """
    stored = load_file(source / WEIGHTS_FILE)
    changed = {}
    for module, pair in pairs.items():
        for end, tensor in zip(ENDS, (pair.a, pair.b), strict=True):
            name = PREFIX + module + end
            changed[name] = tensor.to(stored[name].dtype).contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(stored | changed, target / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)


def _refuse_other_kinds(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    problems = []
    if not (folder / CONFIG_FILE).is_file():
        raise BrokenInput(f"{folder.name} is no adapter folder: it has no {CONFIG_FILE}", where=folder)
    plain = json.loads((folder / CONFIG_FILE).read_text())
    if plain.get("peft_type") != "LORA":
        raise RecordError([f"a {plain.get('peft_type')} adapter: only LoRA can be repaired"], where=folder)
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    if config.use_dora:
        problems.append("DoRA: its magnitudes do not shrink with its factors")
    if config.bias != "none" or config.lora_bias:
        problems.append("trained biases do not shrink with the factors")
    if config.modules_to_save:
        problems.append(f"whole modules saved with the adapter: {', '.join(config.modules_to_save)}")
    other = sorted(name for name in tensors if not (name.startswith(PREFIX) and name.endswith(ENDS)))
    if other and not problems:
        problems.append(f"tensors that are no pair of a linear module: {', '.join(other[:5])}")
    if problems:
        raise RecordError(
            problems, where=folder, cure="train a plain LoRA: repair changes low-rank pairs and nothing else"
        )
