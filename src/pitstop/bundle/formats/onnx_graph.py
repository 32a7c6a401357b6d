"""A bounded reader of an ONNX graph, as far as a device must know it before ONNX Runtime sees it.

What matters is what a graph reaches outside of itself (the files its weights lie in), what may be fed to it (an adapter
overrides inputs), and what it says of its base. Its weights are in another file, so the graph itself is small. It is
read with a protobuf reader of a few lines: of the wire format ONNX uses no more.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pitstop.bundle.formats.tensors import CURE, MAX_ELEMENTS, MAX_ENTRIES, regular_size
from pitstop.errors import FormatError

FILES_KEY = "pitstop.files"  # metadata of the graph: JSON, every other file of the model by name, with its SHA-256
MAX_GRAPH = 32 << 20  # bytes of the graph without its weights
MAX_FIELDS = 1 << 20  # of protobuf messages that are looked into
MAX_DEPTH = 16  # of messages in messages
MAX_NAME = 512  # bytes
MAX_METADATA = 64 << 10  # bytes of one value
MAX_FILES = 64

FLOAT32 = 1  # ONNX's code of an element type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_EXTERNAL = 1  # of a tensor's data: it lies in another file

# Which messages lie where: (message, field) -> message. What is not here is not looked into.
_INSIDE = {
    ("model", 7): "graph", ("model", 14): "entry", ("model", 25): "function",
    ("graph", 1): "node", ("graph", 5): "tensor", ("graph", 11): "value", ("graph", 15): "sparse",
    ("node", 5): "attribute", ("function", 7): "node", ("function", 11): "attribute",
    ("attribute", 5): "tensor", ("attribute", 6): "graph", ("attribute", 10): "tensor", ("attribute", 11): "graph",
    ("attribute", 22): "sparse", ("attribute", 23): "sparse", ("sparse", 1): "tensor", ("sparse", 2): "tensor",
    ("tensor", 13): "entry",
}  # fmt: skip

Shape = tuple[int | str, ...]  # a text is a size that each run chooses


@dataclass(frozen=True)
class GraphInput:
    """Something that may be fed to the graph."""

    name: str
    type: int  # ONNX's code of the element type
    shape: Shape
    default: tuple[int, ...] | None  # shape of what it is if it is not fed; None: it must be


@dataclass(frozen=True)
class ExternalData:
    """A tensor whose data lie in another file."""

    file: str
    offset: int  # bytes
    length: int  # bytes


@dataclass(frozen=True)
class OnnxGraphHeader:
    """What a graph takes in, and what it reaches outside of itself."""

    path: Path
    inputs: Mapping[str, GraphInput]
    external: tuple[ExternalData, ...]
    files: Mapping[str, str]  # other files of the model, by name, with their SHA-256
    metadata: Mapping[str, str]
    file_size: int  # bytes, without the external data


def read_onnx_graph(path: Path) -> OnnxGraphHeader:
    """Read an ONNX graph and check that it reaches no file but those beside it that it names by digest.

    Raises:
        FormatError: it cannot be read, is no ONNX graph, is larger than a graph without weights is, has a count,
            length or name that a well-formed one cannot have, or has data in a file it does not name.
    """
    try:
        size = regular_size(path)
        if size > MAX_GRAPH:
            _fail(path, f"it has {size:,} bytes, a graph without its weights has {MAX_GRAPH:,} at most")
        with path.open("rb") as file:
            data = file.read(MAX_GRAPH + 1)
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror or error}", where=path) from error
    found = _Found()
    _Walker(path, data, found).message("model", 0, len(data), "", 0)
    if found.graphs != 1:  # protobuf would make one of several
        _fail(path, f"there are {found.graphs} graphs in it")
    files = _files(path, found.metadata.get(FILES_KEY))
    for one in found.external:
        if one.file not in files:
            _fail(path, f"it has data in {one.file!r}, which is not among the files of the model that it names")
    inputs = {
        name: GraphInput(name, kind, shape, found.defaults.get(name)) for name, (kind, shape) in found.inputs.items()
    }
    return OnnxGraphHeader(path, inputs, tuple(found.external), files, found.metadata, len(data))


@dataclass
class _Found:
    """What was met on the way through a graph."""

    graphs: int = 0
    inputs: dict[str, tuple[int, Shape]] = field(default_factory=dict)
    defaults: dict[str, tuple[int, ...]] = field(default_factory=dict)  # initializers of the graph itself
    external: list[ExternalData] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


class _Walker:
    """Goes through a serialized graph once."""

    def __init__(self, path: Path, data: bytes, found: _Found) -> None:
        self.path, self.data, self.found = path, data, found
        self.fields = 0

    def fail(self, what: str) -> NoReturn:
        _fail(self.path, what)

    def message(self, kind: str, at: int, end: int, parent: str, depth: int) -> None:
        """Look into a message; ``parent`` is the kind of the one it lies in."""
        if depth > MAX_DEPTH:
            self.fail(f"its messages lie more than {MAX_DEPTH} deep in each other")
        if kind == "tensor":
            self.tensor(at, end, parent, depth)
        elif kind == "value":
            if depth == 2:  # inputs of graphs inside of attributes are fed by the graph around them
                self.input(at, end)
        elif kind == "entry":
            key, value = self.entry(at, end)
            self.found.metadata[key] = value
        else:
            self.found.graphs += kind == "graph" and depth == 1
            for number, wire, begin, stop in self.walk(at, end):
                inner = _INSIDE.get((kind, number))
                if inner is not None and wire == _BYTES:
                    self.message(inner, begin, stop, kind, depth + 1)

    def walk(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (number, wire type, begin, end) of each field; of a number, begin is its value."""
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                self.fail(f"it has more than {MAX_FIELDS:,} fields")
            tag, at = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                self.fail(f"a field has the number 0 (byte {at:,})")
            if wire == _VARINT:
                value, at = self.varint(at, end)
                yield number, wire, value, at
                continue
            if wire == _BYTES:
                length, at = self.varint(at, end)
            elif wire in (_FIXED64, _FIXED32):
                length = 8 if wire == _FIXED64 else 4
            else:
                self.fail(f"a field has the unknown wire type {wire} (byte {at:,})")
            if length > end - at:
                self.fail(f"a field is longer than what it lies in (byte {at:,})")
            yield number, wire, at, at + length
            at += length

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        byte = 128
        while byte >= 128:
            if at == end or shift > 63:
                self.fail(f"a number ends nowhere (byte {at:,})")
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
        return value & (1 << 64) - 1, at  # more bits are dropped, as protobuf does

    def text(self, begin: int, end: int, limit: int, what: str) -> str:
        raw = self.data[begin:end] if end - begin <= limit else b""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = ""
        if not text or "\0" in text:
            self.fail(f"{what} must be 1 to {limit:,} bytes of UTF-8 without NUL")
        return text

    def entry(self, at: int, end: int) -> tuple[str, str]:
        """Return key and value of a pair of texts."""
        key = value = ""
        for number, wire, begin, stop in self.walk(at, end):
            if wire == _BYTES and number == 1:
                key = self.text(begin, stop, MAX_NAME, "a key")
            elif wire == _BYTES and number == 2 and stop > begin:
                value = self.text(begin, stop, MAX_METADATA, f"the value of {key!r}")
        return key, value

    def tensor(self, at: int, end: int, parent: str, depth: int) -> None:
        """Keep the shape of a graph's own initializer, and where external data are."""
        name, location = "", 0
        sizes: list[int] = []
        external: dict[str, str] = {}
        for number, wire, begin, stop in self.walk(at, end):
            if number == 1:
                sizes += [begin] if wire == _VARINT else self.packed(begin, stop)
            elif number == 8 and wire == _BYTES:
                name = self.text(begin, stop, MAX_NAME, "the name of a tensor")
            elif number == 13 and wire == _BYTES:
                key, value = self.entry(begin, stop)
                external[key] = value
            elif number == 14 and wire == _VARINT:
                location = begin
        if len(sizes) > 16 or any(size >= MAX_ELEMENTS for size in sizes):
            self.fail(f"the tensor {name!r} has an impossible shape")
        if parent == "graph" and depth == 2:
            if name in self.found.defaults or len(self.found.defaults) == MAX_ENTRIES:
                self.fail(f"the initializer {name!r} is there twice, or is one of more than {MAX_ENTRIES:,}")
            self.found.defaults[name] = tuple(sizes)
        if location == _EXTERNAL or external:
            self.found.external.append(self.external(name, external))

    def external(self, name: str, entries: Mapping[str, str]) -> ExternalData:
        file = entries.get("location", "")
        if not is_plain_name(file):
            self.fail(f"{name!r} has its data in {file!r}, which is no file beside the graph")
        numbers = [entries.get(key, "0") for key in ("offset", "length")]
        if not all(number.isascii() and number.isdigit() and len(number) <= 18 for number in numbers):
            self.fail(f"{name!r} has its data at {numbers[0]!r} with the length {numbers[1]!r}")
        return ExternalData(file, *map(int, numbers))

    def packed(self, at: int, end: int) -> list[int]:
        sizes: list[int] = []
        while at < end and len(sizes) <= 16:
            size, at = self.varint(at, end)
            sizes.append(size)
        return sizes

    def input(self, at: int, end: int) -> None:
        """Keep an input: name = 1, type = 2, of that tensor_type = 1, of that elem_type = 1 and shape = 2."""
        name, kind = "", 0
        shape: list[int | str] = []
        for number, wire, begin, stop in self.walk(at, end):
            if number == 1 and wire == _BYTES:
                name = self.text(begin, stop, MAX_NAME, "the name of an input")
            elif number == 2 and wire == _BYTES:
                for inner in self.inside(begin, stop, 1):
                    for number_, wire_, begin_, stop_ in self.walk(*inner):
                        if number_ == 1 and wire_ == _VARINT:
                            kind = begin_
                        elif number_ == 2 and wire_ == _BYTES:
                            shape = [self.dimension(*one) for one in self.inside(begin_, stop_, 1)]
        if not name or name in self.found.inputs or len(self.found.inputs) == MAX_ENTRIES:
            self.fail(f"the input {name!r} is there twice, has no name, or is one of more than {MAX_ENTRIES:,}")
        self.found.inputs[name] = kind, tuple(shape)

    def inside(self, at: int, end: int, wanted: int) -> list[tuple[int, int]]:
        return [(begin, stop) for number, wire, begin, stop in self.walk(at, end) if (number, wire) == (wanted, _BYTES)]

    def dimension(self, at: int, end: int) -> int | str:
        for number, wire, begin, stop in self.walk(at, end):
            if number == 1 and wire == _VARINT:
                return begin
            if number == 2 and wire == _BYTES:
                return self.text(begin, stop, MAX_NAME, "a dimension")
        return ""


def is_plain_name(name: str) -> bool:
    """Tell whether this names a file in the same folder and nothing else, on any system."""
    return 0 < len(name) <= 128 and name not in (".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _files(path: Path, text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    try:
        files = json.loads(text)
    except (ValueError, RecursionError) as error:
        _fail(path, f"its {FILES_KEY} is no JSON: {error}")
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        _fail(path, f"its {FILES_KEY} must map up to {MAX_FILES} names to digests")
    for name, digest in files.items():
        if not is_plain_name(name) or not isinstance(digest, str):
            _fail(path, f"its {FILES_KEY} has {name!r}, which is no name of a file with a digest")
    return files


def _fail(path: Path, what: str) -> NoReturn:
    raise FormatError(f"{path.name} is no good ONNX graph: {what}", where=path, cure=CURE)
