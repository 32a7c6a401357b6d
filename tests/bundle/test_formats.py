"""Hostile and damaged headers: the gate raises FormatError, or lets a well-formed file pass; nothing else, and soon."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headers import ARRAY, BOOL, F32, F32_VALUE, Q8_0, STRING, U8, U32, U64, array, gguf_bytes, info, key, text
from pitstop.bundle.formats import GgufHeader, read_gguf, read_safetensors
from pitstop.bundle.formats import gguf as formats
from pitstop.bundle.formats.safetensors import MAX_JSON
from pitstop.errors import FormatError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(data: bytes, name: str = "file.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


def small_gguf() -> bytes:
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("a.bool", BOOL, b"\1"),
        key("a.float", F32_VALUE, struct.pack("<f", 0.5)),
        key("a.list", ARRAY, array(U32, 3, struct.pack("<3I", 7, 8, 9))),
        key("a.texts", ARRAY, array(STRING, 2, text("x") + text("y"))),
    ]
    return gguf_bytes(keys, [info("one", (4, 2), F32, 0), info("two", (32,), Q8_0, 32)], data=66)


def test_the_real_model_is_read(smollm2_gguf: Path) -> None:
    header = read_gguf(smollm2_gguf)
    assert (header.version, header.alignment, len(header.tensors)) == (3, 32, 272)
    assert header.metadata["llama.block_count"] == 30
    assert header.metadata["tokenizer.ggml.tokens"] == formats.SkippedArray(STRING, 49_152)
    assert header.text("tokenizer.chat_template").startswith("{% for message")  # type: ignore[union-attr]
    assert header.text("llama.block_count") is None
    embedding = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    assert (embedding.shape, embedding.type, embedding.size) == ((576, 49_152), "Q8_0", 576 * 49_152 // 32 * 34)
    assert max(tensor.offset + tensor.size for tensor in header.tensors) + header.data_offset == header.file_size


def test_it_reads_what_the_gguf_package_reads(smollm2_gguf: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(smollm2_gguf)
    header = read_gguf(smollm2_gguf)
    expected = [(t.name, tuple(map(int, t.shape)), t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors]
    assert [(t.name, t.shape, t.type, t.size) for t in header.tensors] == expected
    assert [header.data_offset + t.offset for t in header.tensors] == [int(t.data_offset) for t in reader.tensors]
    assert {name for name in reader.fields if not name.startswith("GGUF.")} == set(header.metadata)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    import gguf

    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        assert formats._BLOCKS[int(kind)] == (kind.name, block, size)


def test_metadata_of_every_kind_is_kept(write: Callable[..., Path]) -> None:
    header = read_gguf(write(small_gguf()))
    assert header.metadata == {
        "general.architecture": "llama",
        "a.bool": True,
        "a.float": 0.5,
        "a.list": (7, 8, 9),
        "a.texts": ("x", "y"),
    }
    assert [(tensor.offset, tensor.size) for tensor in header.tensors] == [(0, 32), (32, 34)]


HUGE = 1 << 60
MALFORMED = {
    "empty": b"",
    "another magic": b"GGJT" + small_gguf()[4:],
    "big endian": b"GGUF" + struct.pack(">I", 3) + small_gguf()[8:],
    "version 1": gguf_bytes([], [], version=1),
    "version 4": gguf_bytes([], [], version=4),
    "49 bytes that hang the gguf package": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key(b"a", ARRAY, array(U8, HUGE)),
    "array of empty texts without end": gguf_bytes([key("a", ARRAY, array(STRING, HUGE))], []),
    "array of arrays": gguf_bytes([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))], []),
    "array of an unknown type": gguf_bytes([key("a", ARRAY, array(99, 1, bytes(8)))], []),
    "array count that overflows with its width": gguf_bytes([key("a", ARRAY, array(U64, 1 << 61))], []),
    "unknown value type": gguf_bytes([key("a", 13, bytes(8))], []),
    "more keys than bytes": gguf_bytes([], [], counts=(0, HUGE)),
    "more tensors than bytes": gguf_bytes([], [], counts=(HUGE, 0)),
    "negative counts": gguf_bytes([], [], counts=((1 << 64) - 1, (1 << 64) - 1)),
    "text longer than the file": gguf_bytes([key("a", STRING, struct.pack("<Q", 1 << 40))], []),
    "text of 2^64 - 1": gguf_bytes([key("a", STRING, struct.pack("<Q", (1 << 64) - 1))], []),
    "text over the limit": gguf_bytes([key("a", STRING, text(b"x" * (formats.MAX_STRING + 1)))], []),
    "key twice": gguf_bytes([key("a", U8, b"\1"), key("a", U8, b"\2")], []),
    "key with NUL": gguf_bytes([key("adapter.type\0", U8, b"\1")], []),
    "key of no bytes": gguf_bytes([key("", U8, b"\1")], []),
    "key that is not UTF-8": gguf_bytes([key(b"\xff\xfe", U8, b"\1")], []),
    "alignment 0": gguf_bytes([key("general.alignment", U32, struct.pack("<I", 0))], []),
    "alignment 3": gguf_bytes([key("general.alignment", U32, struct.pack("<I", 3))], []),
    "alignment 2^31": gguf_bytes([key("general.alignment", U32, struct.pack("<I", 1 << 31))], []),
    "alignment as a text": gguf_bytes([key("general.alignment", STRING, text("32"))], []),
    "alignment as 64 bits": gguf_bytes([key("general.alignment", U64, struct.pack("<Q", 32))], []),
    "no dimensions": gguf_bytes([], [info("t", (), F32, 0)], data=32),
    "five dimensions": gguf_bytes([], [info("t", (1, 1, 1, 1, 1), F32, 0)], data=32),
    "2^32 dimensions": gguf_bytes([], [text("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(64)]),
    "a dimension of 0": gguf_bytes([], [info("t", (0, 4), F32, 0)], data=32),
    "a negative dimension": gguf_bytes([], [info("t", ((1 << 64) - 1,), F32, 0)], data=32),
    "elements that wrap to a few": gguf_bytes([], [info("t", (1 << 33, 1 << 31), F32, 0)], data=32),
    "bytes that wrap to a few": gguf_bytes([], [info("t", (1 << 62,), F32, 0)], data=32),
    "rows that are no whole blocks": gguf_bytes([], [info("t", (33,), Q8_0, 0)], data=68),
    "an unknown tensor type": gguf_bytes([], [info("t", (4,), 4, 0)], data=32),
    "a tensor type of 2^32 - 1": gguf_bytes([], [info("t", (4,), 0xFFFFFFFF, 0)], data=32),
    "an offset out of line": gguf_bytes([], [info("t", (4,), F32, 16)], data=64),
    "an offset after the end": gguf_bytes([], [info("t", (4,), F32, 1 << 40)], data=64),
    "an offset that wraps": gguf_bytes([], [info("t", (4,), F32, (1 << 64) - 32)], data=64),
    "data that ends early": gguf_bytes([], [info("t", (9,), F32, 0)], data=32),
    "two tensors in one place": gguf_bytes([], [info("t", (4,), F32, 0), info("u", (4,), F32, 0)], data=32),
    "two tensors that overlap": gguf_bytes([], [info("t", (16,), F32, 0), info("u", (4,), F32, 32)], data=64),
    "a tensor twice": gguf_bytes([], [info("t", (4,), F32, 0), info("t", (4,), F32, 32)], data=64),
    "a tensor name of 64 bytes": gguf_bytes([], [info("t" * 64, (4,), F32, 0)], data=32),
    "a tensor name with NUL": gguf_bytes([], [info("t\0u", (4,), F32, 0)], data=32),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_gguf_is_refused(write: Callable[..., Path], data: bytes) -> None:
    path = write(data)
    with pytest.raises(FormatError) as caught:
        read_gguf(path)
    assert caught.value.where == str(path)
    assert caught.value.cure


def test_the_shape_that_hangs_the_gguf_package_has_49_bytes() -> None:
    assert len(MALFORMED["49 bytes that hang the gguf package"]) == 49


def test_a_header_built_to_cost_time_and_memory_is_refused_cheaply(write: Callable[..., Path]) -> None:
    many_texts = gguf_bytes(
        [key("a", ARRAY, array(STRING, formats.MAX_TEXTS + 1, bytes(8) * (formats.MAX_TEXTS + 1)))], []
    )
    long_texts = gguf_bytes([key(f"k{n}", STRING, text(b"x" * formats.MAX_STRING)) for n in range(12)], [])
    many_lists = gguf_bytes([key(f"k{n}", ARRAY, array(U8, 8_000, bytes(8_000))) for n in range(500)], [])
    tracemalloc.start()
    try:
        for data in (many_texts, long_texts):
            with pytest.raises(FormatError):
                read_gguf(write(data))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert read_gguf(write(many_lists)).metadata["k499"] == formats.SkippedArray(U8, 8_000)
        assert tracemalloc.get_traced_memory()[1] - before < 2 * len(many_lists)
    finally:
        tracemalloc.stop()


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path in (tmp_path / "missing", tmp_path, fifo):
        for read in (read_gguf, read_safetensors):
            with pytest.raises(FormatError, match=path.name):
                read(path)


def survives(read: Callable[[Path], Any], path: Path) -> None:
    """It is read, or refused in the one way."""
    try:
        read(path)
    except FormatError:
        return


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, GgufHeader]:
    """A file of the real model's size whose weights are a hole, its header's bytes, and what they say."""
    header = read_gguf(smollm2_gguf)
    path = tmp_path_factory.mktemp("real") / "changed.gguf"
    with smollm2_gguf.open("rb") as file:
        data = file.read(header.data_offset)
    path.write_bytes(data)
    return path, data, header


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 3_000),  # bytes from the begin, where the metadata is
        st.integers(1, 20_000),  # bytes from the end, where the tensors are
        st.sampled_from([b"\0", b"\xff", b"\x09", b"\x7f", bytes(8), b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f"]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(MUTATIONS, st.integers(0, 64), st.booleans())
def test_a_changed_real_header_is_read_or_refused(
    real: tuple[Path, bytes, GgufHeader], changes: list[tuple[int, int, bytes]], cut: int, early: bool
) -> None:
    path, data, header = real
    with path.open("r+b") as file:
        for begin, end, change in changes:
            file.seek(begin if early else len(data) - end)
            file.write(change)
        file.truncate(header.file_size - cut)
    survives(read_gguf, path)
    with path.open("r+b") as file:
        for begin, end, change in changes:
            place = begin if early else len(data) - end
            file.seek(place)
            file.write(data[place : place + len(change)])
        file.truncate(len(data))
        file.truncate(header.file_size)
    assert len(read_gguf(path).tensors) == len(header.tensors)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 400))
def test_a_small_header_with_anything_in_it_is_read_or_refused(
    tmp_path: Path, change: bytes, at: int, cut: int
) -> None:
    data = bytearray(small_gguf())
    data[at : at + len(change)] = change
    path = tmp_path / "changed.gguf"
    path.write_bytes(bytes(data[: max(0, len(data) - cut)]))
    survives(read_gguf, path)


def test_every_truncation_is_refused(write: Callable[..., Path]) -> None:
    data = small_gguf()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            read_gguf(write(data[:length]))


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_bytes(header: object, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"__metadata__": {"format": "pt"}, "b": entry("F16", [2, 3], 16, 28), "a": entry("F32", [4], 0, 16)}


def test_a_safetensors_file_is_read(write: Callable[..., Path]) -> None:
    header = read_safetensors(write(safetensors_bytes(GOOD, 28)))
    assert header.metadata == {"format": "pt"}
    assert [(t.name, t.shape, t.type, t.offset, t.size) for t in header.tensors] == [
        ("a", (4,), "F32", 0, 16),
        ("b", (2, 3), "F16", 16, 12),
    ]


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="the workshop part is not installed")
    import numpy as np

    arrays = {"x": np.zeros((3, 5), np.float32), "y": np.zeros((), np.int64), "z": np.zeros((0, 4), np.float16)}
    numpy.save_file(arrays, tmp_path / "file")
    assert {t.name: t.shape for t in read_safetensors(tmp_path / "file").tensors} == {
        name: array.shape for name, array in arrays.items()
    }


BAD_SAFETENSORS = {
    "empty": b"",
    "seven bytes": bytes(7),
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a header longer than the file": struct.pack("<Q", 100) + b"{}",
    "a header over the limit": struct.pack("<Q", MAX_JSON + 1) + bytes(MAX_JSON + 1),
    "no JSON": safetensors_bytes(b"{"),
    "not UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "a list": safetensors_bytes([]),
    "deep": safetensors_bytes(b"[" * 100_000 + b"]" * 100_000),
    "many braces": safetensors_bytes(b"{" * 1_000_000),
    "many numbers": safetensors_bytes(b'{"a":[' + b"0," * 2_000_000 + b"0]}"),
    "a long number": safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"),
    "a name twice": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}}),
    "metadata as a list": safetensors_bytes({"__metadata__": []}),
    "a tensor that is a number": safetensors_bytes({"a": 1}),
    "a missing key": safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "an extra key": safetensors_bytes({"a": {**entry("F32", [1], 0, 4), "more": 1}}, 4),
    "an unknown dtype": safetensors_bytes({"a": entry("PICKLE", [1], 0, 4)}, 4),
    "a dtype that is a list": safetensors_bytes({"a": {**entry("F32", [1], 0, 4), "dtype": ["F32"]}}, 4),
    "a negative dimension": safetensors_bytes({"a": entry("F32", [-1, -1], 0, 4)}, 4),
    "a fraction as dimension": safetensors_bytes({"a": entry("F32", [1.0], 0, 4)}, 4),
    "true as dimension": safetensors_bytes({"a": entry("F32", [True], 0, 4)}, 4),
    "a shape that wraps": safetensors_bytes({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}),
    "a shape of many dimensions": safetensors_bytes({"a": entry("F32", [(1 << 63) - 1] * 1_000, 0, 4)}, 4),
    "an offset that is negative": safetensors_bytes({"a": entry("F32", [1], -4, 0)}, 4),
    "offsets in reverse": safetensors_bytes({"a": entry("F32", [1], 4, 0)}, 4),
    "three offsets": safetensors_bytes({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0, 4, 4]}}, 4),
    "size other than the shape's": safetensors_bytes({"a": entry("F32", [2], 0, 4)}, 4),
    "data that ends early": safetensors_bytes({"a": entry("F32", [2], 0, 8)}, 4),
    "data after the last tensor": safetensors_bytes({"a": entry("F32", [1], 0, 4)}, 8),
    "an overlap": safetensors_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12),
    "a hole": safetensors_bytes({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12),
}


@pytest.mark.parametrize("data", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS.keys())
def test_a_malformed_safetensors_file_is_refused(write: Callable[..., Path], data: bytes) -> None:
    path = write(data)
    with pytest.raises(FormatError) as caught:
        read_safetensors(path)
    assert caught.value.where == str(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 250), st.integers(0, 250))
def test_a_changed_safetensors_file_is_read_or_refused(tmp_path: Path, change: bytes, at: int, cut: int) -> None:
    data = bytearray(safetensors_bytes(GOOD, 28))
    data[at : at + len(change)] = change
    path = tmp_path / "changed.safetensors"
    path.write_bytes(bytes(data[: max(0, len(data) - cut)]))
    survives(read_safetensors, path)
