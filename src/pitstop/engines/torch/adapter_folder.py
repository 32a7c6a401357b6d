"""What the torch engine reads out of a PEFT adapter folder, checked before anything is built from it."""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load

from pitstop.bundle.formats import read_safetensors
from pitstop.errors import FormatError
from pitstop.files import open_verified

CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE = "adapter_config.json", "adapter_model.safetensors", "pitstop.json"


def base_of(folder: Path) -> object:
    """Return what the folder's `pitstop.json` says of its base."""
    path = folder / IDENTITY_FILE
    try:
        identity = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {IDENTITY_FILE}: {error}", where=path) from error
    return identity.get("base_sha256") if isinstance(identity, dict) else None


def config_of(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():  # PEFT would ask the hub for it
        raise FormatError(f"{folder.name} is no adapter folder: it has no {CONFIG_FILE}", where=folder)
    try:
        with warnings.catch_warnings():  # PEFT would ignore a setting it does not know, and compute something else
            warnings.simplefilter("error", UserWarning)
            config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, UserWarning) as error:
        raise FormatError(f"PEFT cannot read {CONFIG_FILE}: {error}", where=path) from error
    if not isinstance(config, LoraConfig):
        raise FormatError(f"this is a {config.peft_type} adapter, only LoRA is supported", where=path)
    config.inference_mode = True
    config.init_lora_weights = False  # all weights come from the file; some ways to start would change the base
    return config


def weights_of(folder: Path, sha256: str | None) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    read_safetensors(path)
    with open_verified(path, sha256) as file:
        weights: dict[str, torch.Tensor] = load(file.read())
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if not weights or broken:
        what = f"{broken[0]} holds values that are not finite" if broken else "it holds no tensors"
        raise FormatError(f"{path.name} is damaged: {what}", where=path)
    return weights
