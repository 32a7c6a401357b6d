"""A bounded reader of safetensors headers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pitstop.bundle.formats.tensors import CURE, MAX_ELEMENTS, MAX_ENTRIES, TensorInfo, regular_size
from pitstop.errors import FormatError

MAX_JSON = 16 << 20  # bytes of a safetensors header

# safetensors dtypes: name -> bits of an element.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsHeader:
    """Everything of a safetensors file but the weights."""

    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    data_offset: int  # bytes from the start of the file
    file_size: int  # bytes


def read_safetensors(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        FormatError: it cannot be read, is no safetensors file, is truncated, or has a dtype, shape or offset that a
            well-formed file cannot have.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_JSON, size - 8):
                _broken(path, f"its header would be {length:,} bytes")
            raw = file.read(length)
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror or error}", where=path) from error
    entries = _read_json(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _broken(path, "__metadata__ must map texts to texts")
    tensors = sorted((_safetensor(path, *entry) for entry in entries.items()), key=lambda t: (t.offset, t.size))
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            _broken(path, f"{tensor.name!r} begins at {tensor.offset:,} where {end:,} is expected (overlap or hole)")
        end += tensor.size
    if 8 + length + end != size:
        _broken(path, f"the tensors take {end:,} bytes, the file has {size - 8 - length:,}")
    return SafetensorsHeader(path, metadata, tuple(tensors), 8 + length, size)


def _read_json(path: Path, raw: bytes) -> dict[str, Any]:
    # Bounds what the parsed objects can take in memory before anything is parsed.
    if raw.count(b"{") > MAX_ENTRIES or raw.count(b"[") > 2 * MAX_ENTRIES or raw.count(b",") > 16 * MAX_ENTRIES:
        _broken(path, f"it lists more than {MAX_ENTRIES:,} tensors")
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _broken(path, f"its header is no JSON: {error}")
    if not isinstance(entries, dict):
        _broken(path, "its header is no JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _safetensor(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _broken(path, f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _broken(path, f"{name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        _broken(path, f"{name!r} must have a shape and two offsets, whole numbers from 0")
    # numbers of 64 bits and 16 dimensions: the product stays small enough to compute at once
    bits = math.prod(shape) * _BITS[dtype] if len(shape) <= 16 else MAX_ELEMENTS
    if bits >= MAX_ELEMENTS or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        _broken(path, f"{name!r} of shape {shape} and dtype {dtype} cannot take the bytes {offsets[0]} to {offsets[1]}")
    return TensorInfo(name, tuple(shape), dtype, offsets[0], bits // 8)


def _counts(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in numbers)


def _broken(path: Path, what: str) -> NoReturn:
    raise FormatError(f"{path.name} is no good safetensors file: {what}", where=path, cure=CURE)
