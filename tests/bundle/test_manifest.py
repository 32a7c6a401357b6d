"""What a manifest may say of the pieces of a file."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from pitstop.bundle.manifest import PIECE, Artifact, Bundle, Prompting, check_bundle
from pitstop.errors import RecordError
from pitstop.files import CHUNK, sha256_pieces

A, B, C = "a" * 64, "b" * 64, "c" * 64


def bundle(size: int, pieces: tuple[str, ...]) -> Bundle:
    artifact = Artifact("base", "gguf", "f32", "tiny.gguf", A, size, pieces)
    return Bundle("base", "tiny", "1.0.0", 1, "Apache-2.0", "tiny", A, Prompting("", "", ""), 512, (artifact,))


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(1, ()), (1, (A,)), (PIECE, (A,)), (PIECE + 1, (B, C)), (2 * PIECE, (B, C)), (2 * PIECE + 1, (B, B, C))],
)
def test_pieces_that_fit_the_size(size: int, pieces: tuple[str, ...]) -> None:
    assert check_bundle(bundle(size, pieces)).artifact.pieces == pieces


@pytest.mark.parametrize(
    ("size", "pieces", "said"),
    [
        (PIECE, (B,), "the digest of the file"),
        (PIECE, (A, B), "2 of them, 16777216 bytes make 1"),
        (PIECE + 1, (B,), "1 of them, 16777217 bytes make 2"),
        (2 * PIECE, (B, B, C), "make 2"),
        (PIECE + 1, (B, "x" * 64), "one is no SHA-256"),
    ],
)
def test_pieces_that_do_not(size: int, pieces: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        check_bundle(bundle(size, pieces))


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK])
def test_a_file_is_hashed_whole_and_in_pieces(tmp_path: Path, size: int) -> None:
    path, length = tmp_path / "file", 2 * CHUNK
    data = bytes(range(251)) * (size // 251 + 1)
    path.write_bytes(data[:size])
    expected = [hashlib.sha256(data[at : min(at + length, size)]).hexdigest() for at in range(0, size, length)]
    assert sha256_pieces(path, length) == (hashlib.sha256(data[:size]).hexdigest(), tuple(expected))


def test_a_small_file_has_one_piece_its_own_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    sha256, pieces = sha256_pieces(path, PIECE)
    assert pieces == (sha256,)
    replaced = replace(bundle(1, ()).artifact, sha256=sha256, pieces=pieces)
    check_bundle(replace(bundle(1, ()), base_sha256=sha256, artifacts=(replaced,)))
