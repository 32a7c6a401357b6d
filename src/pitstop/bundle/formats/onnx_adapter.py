"""A bounded reader of `.onnx_adapter` files, and the note at their end that says which base they were trained on.

ONNX Runtime's format is a flatbuffer: a table {format version, adapter version, model version, parameters}, of which
each parameter is a table {name, dims, element type, raw data}. It has no place for a text, so what binds an adapter to
its base stands after it, where ONNX Runtime does not look:

    flatbuffer | JSON | length of the JSON, 4 bytes | "pitstop1"
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from pitstop.bundle.formats.tensors import CURE, MAX_ELEMENTS, TensorInfo, regular_size
from pitstop.errors import FormatError

IDENTIFIER = b"TORT"
FORMAT_VERSION = 1
MAX_PARAMETERS = 8_192
MAX_RANK = 4  # dimensions of a parameter
MAX_NAME = 256  # bytes
MAX_NOTE = 64 << 10  # bytes of JSON
MAX_INVOCATION = 64  # tokens

_MAGIC = b"pitstop1"
_END = struct.Struct("<I8s")
_FIELDS = 4  # of either table
# Element types an adapter may have: code -> (name, bytes).
_TYPES = {1: ("F32", 4), 10: ("F16", 2)}


@dataclass(frozen=True)
class OnnxAdapterHeader:
    """Everything of an adapter file but its weights."""

    path: Path
    adapter_version: int
    model_version: int
    tensors: tuple[TensorInfo, ...]  # offsets from the start of the file
    base_sha256: str | None  # the base it was trained on; None: it does not say
    invocation: tuple[int, ...]  # tokens from whose last occurrence on an activated adapter acts
    file_size: int  # bytes


def is_onnx_adapter(path: Path) -> bool:
    """Tell whether a file is named `.onnx_adapter`, or begins as one does.

    Raises:
        FormatError: it cannot be read.
    """
    if path.suffix == ".onnx_adapter":
        return True
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == IDENTIFIER
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror or error}", where=path) from error


def note(base_sha256: str, invocation: tuple[int, ...] = ()) -> bytes:
    """Return what is appended to an adapter file to bind it to its base."""
    entries: dict[str, Any] = {"base_sha256": base_sha256} | ({"invocation": list(invocation)} if invocation else {})
    raw = json.dumps(entries).encode()
    return raw + _END.pack(len(raw), _MAGIC)


def read_onnx_adapter(path: Path, file: IO[bytes] | None = None) -> OnnxAdapterHeader:
    """Read the header of an `.onnx_adapter` file and check it against the file's size.

    Args:
        file: the file, if it is open already; ``path`` is its name then.

    Raises:
        FormatError: it cannot be read, is no adapter of format version 1, is truncated, or has a count, length, shape,
            type or offset that a well-formed file cannot have.
    """
    try:
        if file is not None:
            return _read(_Buffer(file, path, os.fstat(file.fileno()).st_size))
        size = regular_size(path)
        with path.open("rb") as opened:
            return _read(_Buffer(opened, path, size))
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror or error}", where=path) from error


class _Buffer:
    """Reads a flatbuffer anywhere, and nothing outside of it."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size  # of what may be read

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.path.name} is no good adapter file: {what}", where=self.path, cure=CURE)

    def take(self, at: int, count: int, what: str) -> bytes:
        if at < 0 or count > self.size - at:
            self.fail(f"{what} lies outside of the file")
        self.file.seek(at)
        data = self.file.read(count)
        if len(data) != count:
            self.fail(f"the file ends inside {what}")
        return data

    def number(self, form: str, at: int, what: str) -> int:
        number: int = struct.unpack(form, self.take(at, struct.calcsize(form), what))[0]
        return number

    def follow(self, at: int, what: str) -> int:
        """Return where the offset at a place points to; offsets are unsigned, so nothing can go round in circles."""
        offset = self.number("<I", at, what)
        if offset == 0:
            self.fail(f"{what} points to itself")
        return at + offset

    def table(self, at: int, what: str) -> list[int | None]:
        """Return where the fields of a table are; None: it has the field's default."""
        vtable = at - self.number("<i", at, what)
        size, inline = struct.unpack("<HH", self.take(vtable, 4, f"the layout of {what}"))
        if size < 4 or size % 2 or inline < 4:
            self.fail(f"the layout of {what} has {size} bytes")
        count = min(_FIELDS, (size - 4) // 2)
        offsets = struct.unpack(f"<{count}H", self.take(vtable + 4, 2 * count, f"the layout of {what}"))
        if any(offset >= inline for offset in offsets):
            self.fail(f"a field of {what} lies outside of it")
        return [at + offset if offset else None for offset in offsets] + [None] * (_FIELDS - count)

    def vector(self, field: int | None, width: int, what: str) -> tuple[int, int]:
        """Return where the elements of a vector begin, and how many there are."""
        if field is None:
            self.fail(f"{what} is missing")
        at = self.follow(field, what)
        count = self.number("<I", at, f"the length of {what}")
        if count * width > self.size - at - 4:
            self.fail(f"{what} ({count:,} elements) is longer than the file")
        return at + 4, count


def _read(buffer: _Buffer) -> OnnxAdapterHeader:
    if buffer.size < 8 or buffer.take(4, 4, "the identifier") != IDENTIFIER:
        buffer.fail("it does not begin as one")
    file_size, bound = buffer.size, _read_note(buffer)
    versions = buffer.table(buffer.follow(0, "the root"), "the root")
    numbers = [0 if at is None else buffer.number("<i", at, "a version") for at in versions[:3]]
    if numbers[0] != FORMAT_VERSION:
        buffer.fail(f"its format version is {numbers[0]}, {FORMAT_VERSION} is supported")
    begin, count = buffer.vector(versions[3], 4, "the list of parameters")
    if not 0 < count <= MAX_PARAMETERS:
        buffer.fail(f"it has {count:,} parameters, 1 to {MAX_PARAMETERS:,} are allowed")
    tensors = tuple(_read_parameter(buffer, begin + 4 * index) for index in range(count))
    _check_layout(buffer, tensors)
    return OnnxAdapterHeader(buffer.path, numbers[1], numbers[2], tensors, *bound, file_size)


def _read_note(buffer: _Buffer) -> tuple[str | None, tuple[int, ...]]:
    """Return what the note says, and take it off what may be read of the flatbuffer."""
    length, magic = _END.unpack(buffer.take(buffer.size - _END.size, _END.size, "the end"))
    if magic != _MAGIC:
        return None, ()
    end = buffer.size - _END.size
    if length > min(MAX_NOTE, end - 8):
        buffer.fail(f"the note at its end would have {length:,} bytes")
    try:
        entries = json.loads(buffer.take(end - length, length, "the note at its end").decode())
    except (ValueError, RecursionError) as error:
        buffer.fail(f"the note at its end is no JSON: {error}")
    if not isinstance(entries, dict) or not isinstance(entries.get("base_sha256"), str):
        buffer.fail("the note at its end does not name a base")
    invocation = entries.get("invocation", [])
    if not isinstance(invocation, list) or len(invocation) > MAX_INVOCATION:
        buffer.fail(f"its invocation must be a list of up to {MAX_INVOCATION} tokens")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in invocation):
        buffer.fail("its invocation holds something that is no token")
    buffer.size = end - length
    return entries["base_sha256"], tuple(invocation)


def _read_parameter(buffer: _Buffer, entry: int) -> TensorInfo:
    fields = buffer.table(buffer.follow(entry, "a parameter"), "a parameter")
    begin, length = buffer.vector(fields[0], 1, "the name of a parameter")
    raw = buffer.take(begin, length, "the name of a parameter") if 0 < length <= MAX_NAME else b""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = ""
    # C compares names up to the first NUL: a name with one would be two different names to two readers.
    if not name.isprintable() or not name:
        buffer.fail(f"the name of a parameter must be 1 to {MAX_NAME} bytes of printable UTF-8")
    begin, count = buffer.vector(fields[1], 8, f"the shape of {name}")
    if not 1 <= count <= MAX_RANK:
        buffer.fail(f"{name} has {count:,} dimensions, 1 to {MAX_RANK} are allowed")
    shape = struct.unpack(f"<{count}q", buffer.take(begin, 8 * count, f"the shape of {name}"))
    kind = 0 if fields[2] is None else buffer.number("<i", fields[2], f"the type of {name}")
    if kind not in _TYPES:
        buffer.fail(f"{name} has the type {kind}; {' and '.join(label for label, _ in _TYPES.values())} are allowed")
    label, width = _TYPES[kind]
    begin, size = buffer.vector(fields[3], 1, f"the data of {name}")
    # Python's integers do not wrap, C's do: refuse what would.
    if min(shape) < 0 or max(shape) >= MAX_ELEMENTS or math.prod(shape) * width != size:
        buffer.fail(f"{name} of shape {shape} and type {label} cannot have {size:,} bytes")
    return TensorInfo(name, shape, label, begin, size)


def _check_layout(buffer: _Buffer, tensors: tuple[TensorInfo, ...]) -> None:
    names: set[str] = set()
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.name in names:
            buffer.fail(f"{tensor.name} is there twice")
        if tensor.offset < end:
            buffer.fail(f"{before} and {tensor.name} overlap")
        names.add(tensor.name)
        end, before = tensor.offset + tensor.size, tensor.name
