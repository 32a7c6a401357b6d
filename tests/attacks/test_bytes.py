"""A server that hands out other bytes than were signed for: refused, and never more of them on disk than the size."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from delivery import Publisher, Reply, Server, artifact_of, bundle_of
from pitstop.device.durable import Disk
from pitstop.device.store import Store
from pitstop.device.updater import update
from pitstop.errors import PitstopError

BEGUN = 1000  # bytes an earlier run left


def longer(reply: Reply) -> None:
    reply.with_length(reply.body + b"x")


def shorter(reply: Reply) -> None:
    reply.with_length(reply.body[:-1])


def endless(reply: Reply) -> None:
    del reply.headers["Content-Length"]
    reply.headers["Connection"] = "close"
    reply.body += b"x" * 5_000_000


def ends_early(reply: Reply) -> None:
    del reply.headers["Content-Length"]
    reply.headers["Connection"] = "close"
    reply.body = reply.body[:-1]


def flipped(reply: Reply) -> None:
    reply.body = reply.body[:-7] + bytes([reply.body[-7] ^ 1]) + reply.body[-6:]


def compressed(reply: Reply) -> None:
    reply.with_length(gzip.compress(reply.body))
    reply.headers["Content-Encoding"] = "gzip"


def compressed_in_silence(reply: Reply) -> None:
    reply.with_length(gzip.compress(reply.body))


def redirected_to_a_file(reply: Reply) -> None:
    reply.status = 302
    reply.headers["Location"] = "file:///etc/passwd"


def redirected_for_ever(reply: Reply) -> None:
    reply.status = 302
    reply.headers["Location"] = "/blobs/sha256/" + "0" * 64


def another_offset(reply: Reply) -> None:
    reply.status = 206
    reply.headers["Content-Range"] = f"bytes 7-{len(reply.body)}/{len(reply.body) + 1}"


def another_total(reply: Reply) -> None:
    reply.status = 206
    reply.headers["Content-Range"] = f"bytes 0-{len(reply.body)}/{10 * len(reply.body)}"


def no_content(reply: Reply) -> None:
    reply.status = 204
    reply.with_length(b"")


ATTACKS: list[tuple[Callable[[Reply], None], str]] = [
    (longer, "were signed for"),
    (shorter, "were signed for|stays incomplete"),
    (endless, "more than the .* bytes that were signed for"),
    (ends_early, "the repository cannot be read"),
    (flipped, "was signed for"),
    (compressed, "switch Content-Encoding off"),
    (compressed_in_silence, "signed for"),
    (redirected_to_a_file, "the repository cannot be read"),
    (redirected_for_ever, "the repository cannot be read|does not hand out"),
    (another_offset, "another part than asked for|were signed for"),
    (another_total, "were signed for"),
    (no_content, "the server answered 204"),
]


class Meter(Disk):
    """Notes how large a file under way ever was."""

    most = 0

    def append(self, path: Path, data: bytes) -> None:
        super().append(path, data)
        self.most = max(self.most, path.stat().st_size)


@pytest.mark.parametrize(("attack", "said"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
@pytest.mark.parametrize("begun", [0, BEGUN])
def test_refused(
    publisher: Publisher,
    server: Server,
    tmp_path: Path,
    attack: Callable[[Reply], None],
    said: str,
    begun: int,
) -> None:
    base = publisher.base(rows=512)
    publisher.publish(base)
    device, artifact = tmp_path / "device", bundle_of(base).artifacts[0]
    partial = device / "partial" / artifact.sha256
    partial.parent.mkdir(parents=True)
    partial.write_bytes(artifact_of(base).read_bytes()[:begun])
    server.on_blob = attack
    meter = Meter()
    with pytest.raises(PitstopError, match=said):
        update(device, server.url, root_json=publisher.root_json, disk=meter)
    assert meter.most <= artifact.size
    store = Store(device)
    assert (store.state.good, store.state.trial) == (None, None)
    assert not store.blob(artifact.sha256).exists()
    assert not partial.exists() or partial.stat().st_size <= artifact.size
    server.on_blob = None
    assert update(device, server.url).changed


def test_a_whole_file_in_answer_to_a_range_is_fine(publisher: Publisher, server: Server, tmp_path: Path) -> None:
    base = publisher.base(rows=512)
    publisher.publish(base)
    device, data = tmp_path / "device", artifact_of(base).read_bytes()
    (device / "partial").mkdir(parents=True)
    (device / "partial" / bundle_of(base).base_sha256).write_bytes(data[:BEGUN])

    def whole(reply: Reply) -> None:
        reply.status = 200
        reply.with_length(data)

    server.on_blob = whole
    assert update(device, server.url, root_json=publisher.root_json).fetched_bytes == len(data)
