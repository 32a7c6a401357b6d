"""What the tests of publishing and updating share: tiny model files, a publisher, a web server that misbehaves."""

import http.server
import mimetypes
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from pitstop import records
from pitstop.bundle.manifest import PIECE, Artifact, ArtifactRole, Bundle, Prompting
from pitstop.device import download
from pitstop.files import sha256_file, sha256_pieces
from pitstop.repository import keys, publish
from pitstop.repository.metadata import stored_path

PROMPTING = Prompting(chat_template="{{ messages }}", bos_token="<s>", eos_token="</s>")


def write_base(path: Path, seed: int = 0, rows: int = 32) -> Path:
    """Write a GGUF base of one projection, a few KB."""
    writer = gguf.GGUFWriter(path, "llama")
    random = np.random.default_rng(seed)
    writer.add_tensor("blk.0.attn_q.weight", random.normal(size=(rows, 32)).astype(np.float32))
    return _finish(writer, path)


def write_adapter(path: Path, base: Path, seed: int = 0, rank: int = 4, rows: int = 32) -> Path:
    """Write a GGUF LoRA adapter for that base."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("pitstop.base_sha256", sha256_file(base))
    writer.add_float32("adapter.lora.alpha", 0.0)
    random = np.random.default_rng(seed)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", random.normal(size=(rank, 32)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", random.normal(size=(rows, rank)).astype(np.float32))
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_bundle(folder: Path, bundle: Bundle) -> Path:
    """Write `bundle.json` beside its artifact."""
    records.save_json(bundle, folder / "bundle.json")
    return folder


def base_bundle(folder: Path, *, seed: int = 0, rows: int = 32, counter: int = 1, name: str = "tiny") -> Path:
    """Make a base bundle in a folder; ``rows`` sets its size (128 bytes each)."""
    folder.mkdir(parents=True)
    path = write_base(folder / f"{name}.gguf", seed, rows)
    artifact = _artifact("base", path)
    return write_bundle(folder, _bundle("base", name, counter, artifact, artifact.sha256))


def adapter_bundle(folder: Path, base: Path, *, seed: int = 0, counter: int = 1, name: str = "home") -> Path:
    """Make an adapter bundle for a base bundle's folder."""
    folder.mkdir(parents=True)
    base_file = artifact_of(base)
    path = write_adapter(folder / f"{name}.gguf", base_file, seed, rows=rows_of(base_file))
    artifact = _artifact("adapter", path)
    return write_bundle(folder, _bundle("adapter", name, counter, artifact, sha256_file(base_file)))


def _artifact(role: ArtifactRole, path: Path) -> Artifact:
    sha256, pieces = sha256_pieces(path, PIECE)
    return Artifact(role, "gguf", "f32", path.name, sha256, path.stat().st_size, pieces)


def _bundle(kind: Any, name: str, counter: int, artifact: Artifact, base_sha256: str) -> Bundle:
    return Bundle(
        kind=kind,
        name=name,
        version=f"1.0.{counter}",
        counter=counter,
        license="Apache-2.0",
        base_name="tiny",
        base_sha256=base_sha256,
        prompting=PROMPTING,
        context_length=512,
        artifacts=(artifact,),
    )


def bundle_of(folder: Path) -> Bundle:
    """Read a bundle folder's manifest."""
    return records.load_json(Bundle, folder / "bundle.json")


def artifact_of(folder: Path) -> Path:
    """Return the file of a bundle folder."""
    return folder / bundle_of(folder).artifacts[0].name


def rows_of(base: Path) -> int:
    """Return how many rows the projection of a base has."""
    return int(gguf.GGUFReader(base).tensors[0].shape[1])


def change_bundle(folder: Path, **changes: Any) -> Bundle:
    """Rewrite a manifest with other values."""
    bundle = replace(bundle_of(folder), **changes)
    write_bundle(folder, bundle)
    return bundle


@dataclass
class Publisher:
    """Keys, a repository, and bundles as they come."""

    home: Path
    count: int = 0

    def __post_init__(self) -> None:
        keys.create(self.keys)

    @property
    def keys(self) -> Path:
        return self.home / "keys"

    @property
    def repository(self) -> Path:
        return self.home / "repository"

    @property
    def root_json(self) -> bytes:
        return (self.repository / "metadata/1.root.json").read_bytes()

    def base(self, **options: Any) -> Path:
        return base_bundle(self._new_folder(), **options)

    def adapter(self, base: Path, **options: Any) -> Path:
        return adapter_bundle(self._new_folder(), base, **options)

    def publish(self, *folders: Path, channel: str = "stable") -> publish.Published:
        return publish.publish(folders, self.repository, self.keys, channel)

    def _new_folder(self) -> Path:
        self.count += 1
        return self.home / f"bundle-{self.count}"


@dataclass
class Forger:
    """Signs what a thief of some keys could: reads a published repository, changes it, signs it again."""

    repository: Path
    keys: Path
    roles: dict[str, Metadata[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.roles = {"timestamp": self._load("timestamp.json")}
        self.roles["snapshot"] = self._load(f"{self.roles['timestamp'].signed.snapshot_meta.version}.snapshot.json")
        for name in ("targets", "channels", "bundles"):
            self.roles[name] = self._load(f"{self.roles['snapshot'].signed.meta[f'{name}.json'].version}.{name}.json")

    def _load(self, name: str) -> Metadata[Any]:
        return Metadata.from_file(str(self.repository / "metadata" / name))

    def offer(self, path: str, data: bytes, role: str) -> None:
        """Let a role sign a file under a path."""
        target = TargetFile.from_data(path, data, ["sha256"])
        self.roles[role].signed.targets[path] = target
        stored = self.repository / stored_path(target)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(data)

    def sign(self, role: str = "", signer: str = "") -> None:
        """Sign a role (with another role's key, if named), then snapshot and timestamp."""
        signers = keys.load(self.keys).signers
        if role in ("targets", "channels", "bundles"):
            data = self._sign(role, signers[signer or role])
            self.roles["snapshot"].signed.meta[f"{role}.json"] = self._meta(role, data)
        data = self._sign("snapshot", signers["snapshot"])
        self.roles["timestamp"].signed.snapshot_meta = self._meta("snapshot", data)
        self._sign("timestamp", signers["timestamp"])

    def expire(self, role: str) -> None:
        """Let a role have ended an hour ago."""
        self.roles[role].signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)

    def _meta(self, role: str, data: bytes) -> MetaFile:
        return MetaFile.from_data(self.roles[role].signed.version, data, ["sha256"])

    def _sign(self, role: str, signer: Any) -> bytes:
        metadata = self.roles[role]
        metadata.signed.version += 1
        metadata.sign(signer)
        data = metadata.to_bytes()
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        (self.repository / "metadata" / name).write_bytes(data)
        return data


@dataclass
class Reply:
    """What the server is about to send; a test may change it."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None  # bytes of the body after which the connection ends
    reset: bool = False  # by a reset, which takes what is on its way with it
    hold: threading.Event | None = None  # waited for at the cut instead

    def with_length(self, body: bytes) -> None:
        """Send another body, with an honest length."""
        self.body = body
        self.headers["Content-Length"] = str(len(body))


@dataclass
class Server:
    """A static web server with ranges, a log, and a hook to misbehave with blobs."""

    url: str
    sent: list[tuple[str, int]] = field(default_factory=list)  # path, bytes of the body
    ranges: list[str] = field(default_factory=list)  # of blob requests
    on_blob: Callable[[Reply], None] | None = None
    on_metadata: Callable[[str, Reply], None] | None = None
    headers: dict[str, str] = field(default_factory=dict)  # sent with everything
    off: bool = False  # connections end without an answer

    @property
    def blob_bytes(self) -> int:
        return sum(size for path, size in self.sent if path.startswith("/blobs/"))


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder on a free loopback port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if server.off:
                self.close_connection = True
                return
            path = folder / (self.path.partition("?")[0].lstrip("/") or "index.html")
            if not path.is_file():
                self.send_error(404)
                return
            reply = _reply(path.read_bytes(), self.headers.get("Range"))
            reply.headers["Content-Type"] = mimetypes.guess_type(path)[0] or "application/octet-stream"
            reply.headers |= server.headers
            if self.path.startswith("/blobs/"):
                server.ranges.append(self.headers.get("Range", ""))
                if server.on_blob:
                    server.on_blob(reply)
            elif server.on_metadata:
                server.on_metadata(self.path, reply)
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = reply.body if reply.cut is None else reply.body[: reply.cut]
            server.sent.append((self.path, len(body)))
            try:
                self.wfile.write(body)
                self.wfile.flush()
                if reply.hold:
                    reply.hold.wait(60)
            except OSError:
                return
            if reply.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = self.close_connection or reply.cut is not None

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    listener = Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def _reply(body: bytes, wanted: str | None) -> Reply:
    part = re.fullmatch(r"bytes=(\d+)-", wanted or "")
    if part is None:
        return Reply(200, {"Content-Length": str(len(body))}, body)
    start = int(part[1])
    if start >= len(body):
        return Reply(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(body)}"}, b"")
    headers = {
        "Content-Length": str(len(body) - start),
        "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}",
    }
    return Reply(206, headers, body[start:])


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(bundles: Sequence[Bundle]) -> list[str]:
    """Return the names of bundles, sorted."""
    return sorted(bundle.name for bundle in bundles)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """A publisher with fresh keys and nothing published."""
    home = tmp_path / "publisher"
    home.mkdir()
    return Publisher(home)


@pytest.fixture
def server(publisher: Publisher) -> Iterator[Server]:
    """The publisher's repository on a loopback port."""
    with serve(publisher.repository) as running:
        yield running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
