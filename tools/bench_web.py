"""The page's engine beside @wllama/wllama, in one page of Chromium that passes for a phone: speed, swaps, download.

Needs Debian's chromium, and what `make web` needs. Both sides read the same files from the browser's own store and
answer the same prompts in turn; their first round is left out. That no swap moves a bit, and how near the engine is to
llama.cpp outside of a browser, are tests: tests/device/web/test_engine.py.
"""

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import build_web_engine
import material
from measured import Row, header, parser, report, row

from pitstop.bundle.manifest import Prompting
from pitstop.files import sha256_file

WEB = build_web_engine.WEB
PEER = WEB / "node_modules" / "@wllama" / "wllama" / "esm"
FOLDERS = {
    "dist": WEB / "dist",
    "wllama": PEER,
    "bench": Path(__file__).parent / "web_bench",
    "models": material.folder(),
}
THREADS = 2
CONTEXT = 2048  # tokens
RANK = 8  # of the adapters, on every projection
PLAIN = Prompting("{% for message in messages %}{{ message.content }}{% endfor %}", "", "")  # both sides read the text
GOALS = {"q4_0": ("≥ 2.5", "≥ 3"), "q8_0": ("≥ 2", "≥ 2")}  # decode, prefill


class _Handler(SimpleHTTPRequestHandler):
    """Serves a few folders, isolated, so that threads are allowed."""

    def translate_path(self, path: str) -> str:
        top, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        return str(FOLDERS[top] / rest) if top in FOLDERS and ".." not in rest else ""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the table is what is read."""


@contextmanager
def serving() -> Iterator[str]:
    """Serve the folders on a free port of this machine, and give the origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def measure(rounds: int) -> Mapping[str, Any]:
    """Return the times of every round, by precision."""
    if shutil.which("chromium") is None:
        sys.exit("chromium is needed: apt-get install chromium (on Debian), then again")
    with serving() as origin, tempfile.TemporaryDirectory() as profile:
        task = {
            "web": str(WEB),
            "origin": origin,
            "profile": profile,
            "precisions": [_files(precision) for precision in GOALS],
            "rounds": rounds,
            "threads": THREADS,
            "contextLength": CONTEXT,
            "prompting": asdict(PLAIN),
        }
        command = ["node", str(FOLDERS["bench"] / "drive.mjs"), json.dumps(task)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def _files(precision: str) -> dict[str, Any]:
    base, *adapters = (
        {"name": path.name, "sha256": sha256_file(path)}
        for path in (material.base(precision), *(material.adapter(precision, at, rank=RANK) for at in range(2)))
    )
    return {"name": precision, "base": base, "adapters": adapters}


def rows_of(precision: str, seen: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one precision."""
    name, (decode, prefill) = precision.upper(), GOALS[precision]
    ours, theirs = seen["swap"]
    return [
        row(f"decode, base, {name} ÷ wllama", *seen["decode"], "tokens/s", decode),
        row(f"prefill, base, {name} ÷ wllama", *seen["prefill"], "tokens/s", prefill),
        row(f"warm swap + 1 token, {name} ÷ a token of the plain base", ours, seen["plain"], "ms", "≤ 2"),
        row(f"warm swap + 1 token, {name} ÷ a token of the same adapter, no swap", ours, seen["same"], "ms"),
        row(f"warm swap, {name} ÷ wllama's per-request swap", ours, theirs, "ms", "≤ 0.033"),
    ]


def download() -> Row:
    """Return what a browser fetches of either engine before it can run, compressed."""
    compressed = partial(gzip.compress, compresslevel=9)
    ours = [build_web_engine.TARGET / f"engine-mt{end}" for end in (".js", ".wasm", ".worker.js")]
    theirs = [PEER / "index.js", PEER / "wasm" / "wllama.wasm"]
    sizes = [sum(len(compressed(file.read_bytes())) for file in files) / 1e6 for files in (ours, theirs)]
    return row("engine download, gz (ours ≤ 1.1 MB) ÷ wllama", [sizes[0]], [sizes[1]], "MB", "≤ 1")


def main() -> None:
    """Measure, and print the table."""
    options = parser(__doc__).parse_args()
    if not (WEB / "dist" / "engine" / "engine-mt.wasm").is_file() or not PEER.is_dir():
        sys.exit("the page is not built: make web, then again")
    seen = measure(rounds=2 if options.quick else 7)
    rows = [one for precision in GOALS for one in rows_of(precision, seen[precision])]
    memory = {precision: f"{seen[precision]['memory'] / 1e6:.0f} MB" for precision in GOALS}
    head = header(
        ["llama-cpp-python"], wllama=_version("@wllama/wllama"), threads=THREADS, heap=memory, chromium=_chromium()
    )
    report(head, [*rows, download()], options.json)


def _version(package: str) -> str:
    return str(json.loads((WEB / "node_modules" / package / "package.json").read_text())["version"])


def _chromium() -> str:
    return subprocess.run(["chromium", "--version"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
