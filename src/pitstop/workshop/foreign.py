"""PEFT folders that other tools made, told in one way: names, ranks and shapes as this base's modules have them.

Unsloth, Axolotl, TRL and LLaMA-Factory all write PEFT's two files and differ in the names inside: wrappers of compiled
or sharded models (`_orig_mod.`, `module.`, `_fsdp_wrapped_module.`), an adapter name (`lora_A.default.weight`), the
text half of a vision model (`language_model.`), no `base_model.model.` or two of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pitstop.errors import BrokenInput, FormatError, RecordError, UsageError
from pitstop.workshop.adapter import WEIGHTS_FILE

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.[^.]+)?(\.weight)?")
CHANGES_BASE = ("pissa", "olora", "loftq", "corda")  # what they take out of the base is only in the trainer's memory
QUANTIZED = re.compile(r"-(unsloth-)?bnb-4bit$|-(awq|gptq|4bit)$", re.IGNORECASE)


@dataclass(frozen=True)
class Foreign:
    """An adapter as this base's PEFT would have written it."""

    config: dict[str, Any]  # of adapter_config.json
    tensors: dict[str, torch.Tensor]
    base_name: str  # what it says it was trained on; empty: it does not say

    @property
    def precision(self) -> str:
        """What the frozen weights were in its training, as far as the name of its base tells."""
        return "nf4" if "4bit" in self.base_name.lower() else "bf16"


def read(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Foreign:
    """Read a PEFT folder.

    Args:
        shapes: of the base's matrices by module name, (outputs, inputs).

    Raises:
        UsageError: it is no PEFT folder.
        FormatError: its weights are damaged.
        RecordError: everything in it that does not fit the base, or cannot be shipped in any way.
    """
    config = _config(folder)
    base_name = str(config.get("base_model_name_or_path") or "")
    found = _load(folder / WEIGHTS_FILE)
    problems = _unsupported(config)
    tensors, unknown = _renamed(found, shapes)
    problems += [_stranger(name) for name in unknown[:5]]
    problems += [f"… and {len(unknown) - 5} more that it does not have"] if len(unknown) > 5 else []
    matrices = {name: tensor for name, tensor in tensors.items() if MATRIX.fullmatch(name)}
    if not matrices and not problems:
        problems.append("it holds no LoRA matrices")
    problems += _misfits(matrices, shapes, config)
    if problems:
        raise RecordError(problems, where=folder, cure="name the base it was trained on in the recipe")
    return Foreign(_cleaned(config, matrices, shapes), tensors, base_name)


def base_words(name: str) -> str:
    """Return the model that a base's name speaks of: without owner, quantization and case."""
    last = name.rstrip("/").rpartition("/")[2]
    return QUANTIZED.sub("", last.removesuffix(".gguf")).lower()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} is no PEFT folder: it has no {CONFIG_FILE}",
            cure=f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}, such as a checkpoint's",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{CONFIG_FILE} is no JSON: {error}", where=path) from error
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG_FILE} is no JSON object", where=path)
    return config


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        if pickled.is_file():
            raise UsageError(
                f"{pickled.name} is a pickle, which runs what its maker wants when it is opened",
                where=pickled,
                cure="save it anew where you trust it: model.save_pretrained(folder, safe_serialization=True)",
            )
        raise UsageError(f"no {WEIGHTS_FILE}", where=path.parent, cure="give the folder that the training wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"the weights cannot be read: {error}", where=path, cure="fetch them again") from error


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    found = []
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        found.append(f"peft_type: {kind} is no LoRA; only LoRA can be shipped")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGES_BASE):
        found.append(
            f"init_lora_weights: {initial} took a part out of the base, and the adapter alone does not say which; "
            "write it as a plain LoRA: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for key in ("fan_in_fan_out", "layer_replication", "target_parameters", "megatron_config"):
        if config.get(key):
            found.append(f"{key}: {config[key]} is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or isinstance(config.get(key), bool):
            found.append(f"{key}: {config.get(key)!r} is no number; without it the adapter's strength is unknown")
    return found


def _renamed(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors under PEFT's names for this base, and the modules that it does not have."""
    by_end = {_end(name): name for name in shapes}
    found: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        plain = WRAPPERS.sub("", name).lstrip(".")
        while plain.startswith(PREFIX):
            plain = plain.removeprefix(PREFIX)
        match = MATRIX.fullmatch(plain)
        if match is None:
            found[PREFIX + plain] = tensor  # merged, it may still be of use
        elif (module := by_end.get(_end(match["module"]))) is not None:
            found[f"{PREFIX}{module}.lora_{match['which']}.weight"] = tensor
        elif match["module"] not in unknown:
            unknown.append(match["module"])
    return found, unknown


def _end(module: str) -> str:
    """Return a module's name from its layer on: what stands before it differs from tool to tool."""
    return module[at:] if (at := module.find("layers.")) >= 0 else module.rpartition(".")[2]


def _stranger(module: str) -> str:
    if module.endswith(("lm_head", "embed_tokens")):
        return f"{module}: only the layers' projections can be adapted on a device"
    return f"{module}: this base has no such matrix"


def _misfits(
    matrices: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]
) -> list[str]:
    found = []
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in matrices)
    for module in modules:
        a, b = (matrices.get(f"{module}.lora_{which}.weight") for which in "AB")
        said = module.removeprefix(PREFIX)
        if a is None or b is None:
            found.append(f"{said}: lora_{'A' if a is None else 'B'} is missing")
            continue
        outputs, inputs = shapes[said]
        rank = a.shape[0]
        if tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
            found.append(
                f"{said}: A is {_shape(a)} and B {_shape(b)}; this base needs rank x {inputs} and {outputs} x rank"
            )
        elif rank != (expected := _rank(config, said)):
            found.append(f"{said}: rank {rank}, but {CONFIG_FILE} says {expected}; its strength would be wrong")
        elif not (a.isfinite().all() and b.isfinite().all()):
            found.append(f"{said}: values that are not finite")
    return found if len(found) <= 5 else [*found[:5], f"… and {len(found) - 5} more like these"]


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _rank(config: Mapping[str, Any], module: str) -> int:
    # As PEFT looks it up: the whole name, or its end after a dot, by regular expression.
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"]) if isinstance(config.get("r"), int) else -1


def _cleaned(
    config: Mapping[str, Any], matrices: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the configuration with the modules named one by one where they are not the same in every layer."""
    modules = list(dict.fromkeys(name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in matrices))
    patterns = {
        key: {WRAPPERS.sub("", name).lstrip(".").removeprefix(PREFIX): value for name, value in config[key].items()}
        for key in ("rank_pattern", "alpha_pattern")
        if config.get(key)
    }
    plain = {
        "target_modules": _targets(modules, shapes),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "init_lora_weights": True,
    }
    return {**config, **patterns, **plain}


def _targets(modules: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the projections' names if every layer has all of them, else every module's whole name."""
    names = {module.rpartition(".")[2] for module in modules}
    alike = {module for module in shapes if module.rpartition(".")[2] in names}
    return sorted(names) if alike == set(modules) else list(modules)


def refuse_other_base(foreign: Foreign, names: Sequence[str], folder: Path) -> None:
    """Refuse an adapter that says it was trained on another model.

    Args:
        names: what the base at hand is known by.

    Raises:
        BrokenInput: none of them is what it says.
    """
    if foreign.base_name and not any(base_words(foreign.base_name) == base_words(name) for name in names if name):
        known = ", ".join(dict.fromkeys(name for name in names if name))
        raise BrokenInput(
            f"it was trained on {foreign.base_name}; the recipe's base is {known}",
            where=folder / CONFIG_FILE,
            cure="name its own base in the recipe; if both are the same model, say so: --trained-on NAME-OF-THE-BASE",
        )
