"""GGUF headers byte by byte, for tests of what reads them."""

import struct

F32, F16, Q8_0, I8 = 0, 1, 8, 24
U8, U32, F32_VALUE, BOOL, STRING, ARRAY, U64, F64_VALUE = 0, 4, 6, 7, 8, 9, 10, 12

Tensor = tuple[str, tuple[int, ...], int, int | None]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(
    keys: list[bytes], infos: list[bytes], data: int = 0, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    n_tensors, n_keys = counts or (len(infos), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % 32) + bytes(data)
