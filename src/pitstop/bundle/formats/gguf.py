"""A bounded reader of GGUF headers."""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from pitstop.bundle.formats.tensors import CURE, MAX_ELEMENTS, MAX_ENTRIES, TensorInfo, regular_size
from pitstop.errors import FormatError

MAX_STRING = 1 << 20  # bytes; a chat template fits many times
MAX_HEADER = 64 << 20  # bytes before the tensor data; the largest known tokenizers take a third
MAX_TEXT = 8 << 20  # bytes of all texts that are kept
MAX_TEXTS = 1 << 20  # in arrays that are not kept; 262,144 tokens and their merges are 777,000
MAX_ELEMENTS_KEPT = 8_192  # of all arrays; later ones are checked and counted, not kept
MAX_ALIGNMENT = 1 << 16
MAX_DIMENSIONS = 4
MAX_TENSOR_NAME = 63  # bytes; llama.cpp's limit

# GGUF value types that are scalars: code -> struct format.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9

# ggml tensor types: code -> (name, elements of a block, bytes of a block).
_BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class SkippedArray:
    """An array too long to keep: its element type (GGUF code) and count."""

    type: int
    count: int


Value = bool | int | float | str | SkippedArray | tuple[bool | int | float | str, ...]


@dataclass(frozen=True)
class GgufHeader:
    """Everything of a GGUF file but the weights."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    types: Mapping[str, int]  # GGUF type code of each metadata value
    tensors: tuple[TensorInfo, ...]
    data_offset: int  # bytes from the start of the file
    alignment: int  # bytes
    file_size: int  # bytes

    def text(self, key: str) -> str | None:
        """Return a metadata value that is a text, else None."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


class _Reader:
    """Reads forward through a header and knows how much of it there can be."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.position = 0
        self.kept_text = 0  # bytes
        self.kept_elements = 0
        self.skipped_texts = 0

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.path.name}: {what} (byte {self.position:,})", where=self.path, cure=CURE)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            self.fail(f"the file ends inside {what}")
        if self.position + count > MAX_HEADER:
            self.fail(f"{what} makes the header larger than {MAX_HEADER >> 20} MiB")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            self.fail(f"the file ends inside {what}")
        self.position += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.file.seek(count, 1)
        self.position += count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def length(self, what: str) -> int:
        count: int = self.number("<Q", f"the length of {what}")
        if count > MAX_STRING:
            self.fail(f"{what} is {count:,} bytes long, the limit is {MAX_STRING:,}")
        return count

    def name(self, what: str, limit: int) -> str:
        # C compares names up to the first NUL: a name with one would be two different names to two readers.
        raw = self.take(self.length(what), what)
        if not raw or len(raw) > limit or b"\0" in raw:
            self.fail(f"{what} must be 1 to {limit:,} bytes without NUL")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, kind: int, what: str) -> Value:
        if kind == _ARRAY:
            return self.array(what)
        if kind == _STRING:
            return self.text(what)
        if kind not in _SCALARS:
            self.fail(f"{what} has the unknown type {kind}")
        scalar: bool | int | float = self.number(_SCALARS[kind], what)
        return scalar

    def text(self, what: str) -> str:
        raw = self.take(self.length(what), what)
        self.kept_text += len(raw)
        if self.kept_text > MAX_TEXT:
            self.fail(f"{what} makes more than {MAX_TEXT >> 20} MiB of texts")
        return raw.decode(errors="replace")

    def array(self, what: str) -> Value:
        kind = self.number("<I", f"the element type of {what}")
        count: int = self.number("<Q", f"the length of {what}")
        if kind != _STRING and kind not in _SCALARS:
            self.fail(f"{what} is an array of the type {kind}, which is not allowed")
        width = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        self.need(count * width, f"{what} ({count:,} elements)")
        self.kept_elements += count
        if self.kept_elements > MAX_ELEMENTS_KEPT:
            self.kept_elements -= count
            if kind == _STRING:
                self.skip_texts(count, what)
            else:
                self.skip(count * width, what)
            return SkippedArray(kind, count)
        if kind == _STRING:
            return tuple(self.text(what) for _ in range(count))
        form = f"<{count}{_SCALARS[kind][1]}"
        return struct.unpack(form, self.take(count * width, what))

    def skip_texts(self, count: int, what: str) -> None:
        # A vocabulary has hundreds of thousands of texts: the one loop here that has to be tight.
        self.skipped_texts += count
        if self.skipped_texts > MAX_TEXTS:
            self.fail(f"{what} makes more than {MAX_TEXTS:,} texts in arrays")
        read, end = self.file.read, min(self.size, MAX_HEADER)
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            self.position += 8 + length
            if length > MAX_STRING or self.position > end:
                self.fail(f"a text in {what} is longer than allowed, or than the file")
            read(length)


def read_gguf(path: Path, file: IO[bytes] | None = None) -> GgufHeader:
    """Read the header of a GGUF file and check it against the file's size.

    Args:
        file: the file, if it is open already, at its beginning; ``path`` is its name then.

    Raises:
        FormatError: it cannot be read, is no GGUF of version 2 or 3, is truncated, or has a count, length, shape, type
            or offset that a well-formed file cannot have.
    """
    try:
        if file is not None:
            return _read_gguf(_Reader(file, path, os.fstat(file.fileno()).st_size))
        size = regular_size(path)
        with path.open("rb") as opened:
            return _read_gguf(_Reader(opened, path, size))
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror or error}", where=path) from error


def _read_gguf(reader: _Reader) -> GgufHeader:
    if reader.size < 24 or reader.take(4, "the magic") != b"GGUF":
        reader.fail("this is no GGUF file")
    version = reader.number("<I", "the version")
    if version not in (2, 3):
        reader.fail(f"GGUF version {version} is not supported (2 and 3 are)")
    n_tensors, n_keys = reader.number("<Q", "the tensor count"), reader.number("<Q", "the key count")
    # A key takes at least 8 + 1 + 4 + 1 bytes, a tensor 8 + 1 + 4 + 8 + 4 + 8.
    for count, least, what in ((n_keys, 14, "metadata keys"), (n_tensors, 33, "tensors")):
        if count > MAX_ENTRIES or count * least > reader.size - reader.position:
            reader.fail(f"{count:,} {what} cannot be in this file")
    metadata, types = _read_metadata(reader, n_keys)
    alignment = _alignment(reader, metadata, types)
    tensors = tuple(_read_tensor(reader, alignment) for _ in range(n_tensors))
    data_offset = -(-reader.position // alignment) * alignment
    _check_layout(reader, tensors, data_offset)
    return GgufHeader(reader.path, version, metadata, types, tensors, data_offset, alignment, reader.size)


def _read_metadata(reader: _Reader, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    types: dict[str, int] = {}
    for _ in range(count):
        key = reader.name("a metadata key", 65_535)
        if key in metadata:
            reader.fail(f"the key {key!r} is there twice")
        types[key] = reader.number("<I", f"the type of {key!r}")
        metadata[key] = reader.value(types[key], f"the value of {key!r}")
    return metadata, types


def _alignment(reader: _Reader, metadata: Mapping[str, Value], types: Mapping[str, int]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or types.get("general.alignment", _UINT32) != _UINT32:
        reader.fail("general.alignment must be a 32-bit number")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.fail(f"general.alignment is {alignment}, it must be a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _read_tensor(reader: _Reader, alignment: int) -> TensorInfo:
    name = reader.name("a tensor name", MAX_TENSOR_NAME)
    n_dimensions = reader.number("<I", f"the shape of {name}")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        reader.fail(f"{name} has {n_dimensions:,} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
    shape = struct.unpack(f"<{n_dimensions}Q", reader.take(8 * n_dimensions, f"the shape of {name}"))
    kind = reader.number("<I", f"the type of {name}")
    offset: int = reader.number("<Q", f"the offset of {name}")
    if kind not in _BLOCKS:
        reader.fail(f"{name} has the unknown tensor type {kind}")
    label, block, block_bytes = _BLOCKS[kind]
    # Python's integers do not wrap, C's do: refuse what would.
    elements = math.prod(shape)
    if 0 in shape or elements >= MAX_ELEMENTS or elements // block * block_bytes >= MAX_ELEMENTS:
        reader.fail(f"{name} has the impossible shape {shape}")
    if shape[0] % block:
        reader.fail(f"{name} has rows of {shape[0]:,} elements, {label} needs a multiple of {block}")
    if offset % alignment:
        reader.fail(f"{name} begins at {offset:,}, not at a multiple of {alignment}")
    return TensorInfo(name, shape, label, offset, elements // block * block_bytes)


def _check_layout(reader: _Reader, tensors: Sequence[TensorInfo], data_offset: int) -> None:
    names = set()
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            reader.fail(f"the tensor {tensor.name} is there twice")
        if tensor.offset < end:
            reader.fail(f"the tensors {before} and {tensor.name} overlap")
        names.add(tensor.name)
        end, before = tensor.offset + tensor.size, tensor.name
        if data_offset + end > reader.size:
            missing = data_offset + end - reader.size
            reader.fail(f"truncated: {tensor.name} ends {missing:,} bytes after the end of the file")
