"""Write a GGUF model in another precision, by llama.cpp's own quantizer."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pitstop.bundle.formats import read_gguf
from pitstop.engines.llama.matmul import products
from pitstop.engines.llama.native import forget_reasons, library, reason
from pitstop.engines.machine import cores
from pitstop.errors import FormatError, StorageError, UsageError
from pitstop.files import storage_error, sync_folder

SPARE = 16 << 20  # bytes; a disk with less is full

_PRECISIONS = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M", "q5_k_s": "MOSTLY_Q5_K_S", "q5_1": "MOSTLY_Q5_1", "q5_0": "MOSTLY_Q5_0",
    "q4_k_m": "MOSTLY_Q4_K_M", "q4_k_s": "MOSTLY_Q4_K_S", "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0",
    "iq4_nl": "MOSTLY_IQ4_NL",
}  # fmt: skip


def quantize(source: Path, target: Path, precision: str, *, keys: Mapping[str, str] | None = None) -> None:
    """Write a GGUF model in another precision ("q8_0", "q4_0" …), also from one that is quantized already.

    Args:
        keys: metadata to add, as texts of at most 127 bytes.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UsageError: no such precision.
        FormatError: the source is damaged, or llama.cpp refuses it.
        StorageError: the disk refused; ``target`` is as it was.
    """
    products()  # can only be loaded before llama.cpp is, and who quantizes here may check here as well
    llama = library()
    if precision not in _PRECISIONS:
        raise UsageError(f"no precision {precision!r}", cure=f"choose one of: {', '.join(_PRECISIONS)}")
    read_gguf(source)
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_{_PRECISIONS[precision]}")
    params.nthread, params.allow_requantize = cores(), True
    if keys:
        params.kv_overrides = _overrides(llama, keys)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            # llama.cpp writes by name, so the file takes its own only when it is whole and on the disk.
            unfinished = Path(folder) / target.name
            forget_reasons()
            if llama.llama_model_quantize(os.fsencode(source), os.fsencode(unfinished), ctypes.byref(params)) != 0:
                _quantize_failed(source, target)
            read_gguf(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error


def _overrides(llama: Any, keys: Mapping[str, str]) -> Any:
    """Return llama.cpp's list of keys, which ends with an empty one."""
    overrides = (llama.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(overrides, keys.items(), strict=False):
        override.tag, override.key = llama.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode()
        override.value.val_str = value.encode()
    return overrides


def _quantize_failed(source: Path, target: Path) -> NoReturn:
    if shutil.disk_usage(target.parent).free < SPARE:
        raise StorageError(f"no space for {target.name}", where=target, cure="free some space on this disk")
    raise FormatError(f"llama.cpp cannot quantize {source.name}: {reason()}", where=source)
