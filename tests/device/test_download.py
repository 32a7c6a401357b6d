"""How a blob comes over a network that fails (attacks by the server: tests/attacks)."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError

from delivery import Publisher, Reply, Server, artifact_of, bundle_of, serve
from pitstop.bundle.manifest import PIECE, Artifact
from pitstop.device.download import RETRIES, fetch_blob, open_source
from pitstop.device.store import Store
from pitstop.errors import BrokenInput, UsageError, WrongPiece
from pitstop.files import CHUNK

ROWS = 4096  # a base of half a MB


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "device")
    with store.locked():
        return store


@pytest.fixture
def artifact(publisher: Publisher) -> Artifact:
    base = publisher.base(rows=ROWS)
    publisher.publish(base)
    return bundle_of(base).artifacts[0]


def fetch(store: Store, url: str, artifact: Artifact) -> int:
    received = []
    fetch_blob(open_source(url), artifact, store.add_blob(artifact), received.append)
    return sum(received)


def test_whole(store: Store, server: Server, artifact: Artifact) -> None:
    assert fetch(store, server.url, artifact) == artifact.size
    assert store.blob(artifact.sha256).stat().st_size == artifact.size
    assert server.ranges == [""]


@pytest.mark.parametrize("begun", [1, 1000, -1, None])
def test_resumes_where_it_stopped(
    store: Store, server: Server, artifact: Artifact, publisher: Publisher, begun: int | None
) -> None:
    data = (publisher.repository / "blobs/sha256" / artifact.sha256).read_bytes()[:begun]
    (store.root / "partial" / artifact.sha256).write_bytes(data)
    assert fetch(store, server.url, artifact) == artifact.size - len(data)
    assert server.ranges == ([f"bytes={len(data)}-"] if len(data) < artifact.size else [])


@pytest.mark.parametrize("reset", [False, True])
def test_cut_again_and_again(store: Store, server: Server, artifact: Artifact, reset: bool) -> None:
    places = random.Random(1)

    def cut(reply: Reply) -> None:
        reply.cut = places.randrange(1, 100_000)
        reply.reset = reset

    server.on_blob = cut
    received = fetch(store, server.url, artifact)
    assert len(server.ranges) > 3
    assert received == artifact.size  # nothing came twice


def test_cut_without_ranges(store: Store, server: Server, artifact: Artifact, publisher: Publisher) -> None:
    data = (publisher.repository / "blobs/sha256" / artifact.sha256).read_bytes()
    cuts = iter([200_000, 100_000, 300_000])

    def no_ranges(reply: Reply) -> None:
        reply.status = 200
        reply.headers.pop("Content-Range", None)
        reply.with_length(data)
        reply.cut = next(cuts, None)

    server.on_blob = no_ranges
    assert fetch(store, server.url, artifact) == 600_000 + artifact.size


def test_errors_that_pass(store: Store, server: Server, artifact: Artifact) -> None:
    replies = iter([503, 429, 500])

    def fail(reply: Reply) -> None:
        status = next(replies, 0)
        if status:
            reply.status = status

    server.on_blob = fail
    assert fetch(store, server.url, artifact) == artifact.size


def test_gives_up_and_keeps_what_came(store: Store, server: Server, artifact: Artifact) -> None:
    def cut(reply: Reply) -> None:
        reply.cut = 1000 if reply.status == 200 else 0

    server.on_blob = cut
    with pytest.raises(UsageError, match="cannot be read") as caught:
        fetch(store, server.url, artifact)
    assert "what was fetched is kept" in str(caught.value)
    assert len(server.ranges) == RETRIES + 2
    assert (store.root / "partial" / artifact.sha256).stat().st_size == 1000
    server.on_blob = None
    assert fetch(store, server.url, artifact) == artifact.size - 1000


def test_what_a_power_cut_garbled_is_fetched_anew(store: Store, server: Server, artifact: Artifact) -> None:
    (store.root / "partial" / artifact.sha256).write_bytes(bytes(5000))
    assert fetch(store, server.url, artifact) == artifact.size - 5000 + artifact.size


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A repository with a blob of three pieces, the last one short."""
    publisher = Publisher(tmp_path_factory.mktemp("large"))
    base = publisher.base(rows=3 * PIECE // 128 - 50_000)
    publisher.publish(base)
    artifact = bundle_of(base).artifacts[0]
    assert len(artifact.pieces) == 3
    return publisher.repository, artifact


def begin(store: Store, repository: Path, artifact: Artifact, size: int, flipped: int | None = None) -> None:
    """Leave what an earlier run may have: the first bytes, with one of them changed."""
    data = bytearray((repository / "blobs/sha256" / artifact.sha256).read_bytes()[:size])
    if flipped is not None:
        data[flipped] ^= 1
    (store.root / "partial" / artifact.sha256).write_bytes(data)


@pytest.mark.parametrize("begun", [edge + by for edge in (PIECE, 2 * PIECE) for by in (-1, 0, 1)])
def test_a_cut_at_the_edge_of_a_piece_costs_nothing(store: Store, large: tuple[Path, Artifact], begun: int) -> None:
    repository, artifact = large
    begin(store, repository, artifact, begun)
    assert fetch(store, str(repository), artifact) == artifact.size - begun


@pytest.mark.parametrize("flipped", [0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 999])
def test_a_byte_lost_in_what_is_here_costs_its_piece(store: Store, large: tuple[Path, Artifact], flipped: int) -> None:
    """What comes after it is not looked at; the piece under way is found wrong once it is whole."""
    repository, artifact = large
    begun = 2 * PIECE + 1000
    begin(store, repository, artifact, begun, flipped)
    start = flipped // PIECE * PIECE
    rest_first = artifact.size - begun if start == 2 * PIECE else 0
    assert fetch(store, str(repository), artifact) == rest_first + artifact.size - start


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_piece_that_comes_wrong_is_fetched_again(store: Store, large: tuple[Path, Artifact], piece: int) -> None:
    repository, artifact = large
    wrong = iter([True])

    def flip(reply: Reply) -> None:
        if next(wrong, False):
            reply.body = flipped_at(reply.body, piece * PIECE + 5)

    with serve(repository) as server:
        server.on_blob = flip
        received = fetch(store, server.url, artifact)
    assert received <= artifact.size + PIECE + CHUNK  # a chunk may reach into the next piece
    assert server.ranges == ["", f"bytes={piece * PIECE}-" if piece else ""]


def test_a_piece_that_stays_wrong_ends_it_and_costs_no_other(store: Store, large: tuple[Path, Artifact]) -> None:
    repository, artifact = large

    def flip(reply: Reply) -> None:
        start = artifact.size - len(reply.body)
        reply.body = flipped_at(reply.body, PIECE + 5 - start)

    with serve(repository) as server:
        server.on_blob = flip
        with pytest.raises(WrongPiece, match="piece 2 of 3 of tiny"):
            fetch(store, server.url, artifact)
        assert server.ranges == ["", f"bytes={PIECE}-"]
        server.on_blob = None
        assert fetch(store, server.url, artifact) == artifact.size - PIECE


def test_a_manifest_without_pieces_is_fetched_whole(store: Store, large: tuple[Path, Artifact]) -> None:
    repository, artifact = large
    begin(store, repository, artifact, PIECE + 1)
    assert fetch(store, str(repository), replace(artifact, pieces=())) == artifact.size - PIECE - 1


def flipped_at(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_blob_the_publisher_forgot(store: Store, server: Server, artifact: Artifact, publisher: Publisher) -> None:
    (publisher.repository / "blobs/sha256" / artifact.sha256).unlink()
    for url in (server.url, str(publisher.repository)):
        with pytest.raises(BrokenInput, match="does not hand out tiny"):
            fetch(store, url, artifact)


def test_a_folder_is_a_repository_too(store: Store, artifact: Artifact, publisher: Publisher) -> None:
    (store.root / "partial" / artifact.sha256).write_bytes(artifact_bytes(publisher, artifact)[:1000])
    assert fetch(store, publisher.repository.as_uri(), artifact) == artifact.size - 1000
    (store.blob(artifact.sha256)).unlink()
    assert fetch(store, str(publisher.repository), artifact) == artifact.size


def artifact_bytes(publisher: Publisher, artifact: Artifact) -> bytes:
    return (publisher.repository / "blobs/sha256" / artifact.sha256).read_bytes()


def test_a_pipe_or_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    source = open_source(str(tmp_path))
    for name in ("pipe", "folder"):
        with pytest.raises(DownloadError, match="is not a file"):
            source.read(name)
    with pytest.raises(DownloadHTTPError):
        source.read("nothing")


def test_nobody_answers(store: Store, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        fetch(store, "http://127.0.0.1:9/repository", artifact)
    assert "object at 0x" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://example.org/", "http://", "/no/such/folder", "file:///no/such/folder"])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError):
        open_source(url)


def test_artifact_of_is_what_was_published(publisher: Publisher) -> None:
    base = publisher.base()
    publisher.publish(base)
    assert artifact_bytes(publisher, bundle_of(base).artifacts[0]) == artifact_of(base).read_bytes()
