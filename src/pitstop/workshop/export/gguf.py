"""A PEFT LoRA to a GGUF adapter that does exactly the same, and says which base file it belongs to.

llama.cpp multiplies by alpha / rank and knows no other rule, so rsLoRA and per-module ranks or alphas would come out
wrong. The exact factor of every module is multiplied into its B, and alpha is written as 0, which means "no factor".
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import save_file

from pitstop.bundle.binding import BASE_KEY
from pitstop.files import write_bytes
from pitstop.workshop.adapter import WEIGHTS_FILE
from pitstop.workshop.export import llamacpp
from pitstop.workshop.export.lora import load_folded

MIXED = "f16+f32"


def export_gguf(adapter: Path, base: Path, base_sha256: str, target: Path, *, precision: str) -> None:
    """Write ``target`` from the PEFT folder ``adapter``; ``base`` is the base's Hugging Face folder.

    Args:
        precision: of its tensors: "f32", "f16", "q8_0", or "f16+f32": A in the first, B in the second. That file is
            half as large again as in f16, and llama.cpp decodes by a fifth faster with it (see `native.Model`).

    Raises:
        RecordError: the adapter has what a GGUF adapter cannot express, all of it at once.
        BrokenInput: the converter refuses.
        StorageError: the disk refuses; ``target`` is as it was.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folded, converted, bound = (Path(scratch, name) for name in ("adapter", "adapter.gguf", "bound.gguf"))
        fold_scaling(adapter, folded)
        mixed = precision == MIXED
        llamacpp.convert_adapter(folded, base, converted, "f32" if mixed else precision)
        _bind(converted, bound, base_sha256, halve_a=mixed)
        write_bytes(target, bound.read_bytes())


def fold_scaling(adapter: Path, target: Path) -> None:
    """Copy a PEFT folder with every module's factor multiplied into its B, in float32, and alpha 0.

    Raises:
        RecordError: DoRA, biases, saved modules: only a merged model can carry them.
    """
    _, folded = load_folded(adapter)
    target.mkdir()
    save_file(folded, target / WEIGHTS_FILE)
    plain: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    plain |= {"lora_alpha": 0, "use_rslora": False, "alpha_pattern": {}}
    (target / "adapter_config.json").write_text(json.dumps(plain))


def _bind(source: Path, target: Path, base_sha256: str, *, halve_a: bool) -> None:
    """Copy a GGUF adapter with the digest of its base among its keys; every A in f16, if it is to be halved."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        # GGUF.* are the reader's names for the header itself; the writer puts the architecture by itself.
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = entry.types[0]
            writer.add_key_value(
                key, entry.contents(), kind, sub_type=entry.types[-1] if len(entry.types) > 1 else None
            )
    writer.add_string(BASE_KEY, base_sha256)
    for tensor in reader.tensors:
        if halve_a and tensor.name.endswith(".lora_a"):
            writer.add_tensor(tensor.name, tensor.data.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
