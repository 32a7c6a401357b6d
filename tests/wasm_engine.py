"""The engines of web/, run in node from Python: built by the tool of `make web`, one process for each engine."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import build_web_engine
import gguf
import numpy as np
from numpy.typing import NDArray

from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.manifest import Prompting
from pitstop.files import sha256_file

DRIVER = Path(__file__).with_name("device") / "web" / "engine_in_node.mjs"
PLAIN = Prompting("{% for message in messages %}{{ message.content }}{% endfor %}", "", "")


class EngineRefused(Exception):
    """The engine threw an EngineError; its text is the sentence for the user."""


class WasmEngine:
    """One engine; a call that fails raises what the engine said."""

    def __init__(self, folder: Path, scratch: Path, *, native: bool = False, **settings: Any) -> None:
        """Start it; ``native`` is the engine over llama.rn, on a fake."""
        # Named .cjs, node takes the script of emscripten's workers for what it is; it looks for the module beside it.
        worker = scratch / "worker.cjs"
        shutil.copyfile(folder / "engine-mt.worker.js", worker)
        module = scratch / "engine-mt.js"
        if not module.exists():
            module.symlink_to(folder / module.name)
        command = ["node", str(DRIVER), str(folder), str(worker)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.call("openNative" if native else "open", **{"threads": 1, **settings})

    def call(self, function: str, **given: Any) -> Any:
        """Call a function of the driver and return what it gives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": function, **given}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise (EngineRefused if reply["error"] == "EngineError" else RuntimeError)(reply["message"])
        return reply["value"]

    def load(self, base: Path, prompting: Prompting = PLAIN, context_length: int = 512, sha256: str = "") -> None:
        file = {"path": str(base), "sha256": sha256 or sha256_file(base)}
        self.call("load", base=file, prompting=asdict(prompting), contextLength=context_length)

    def add_adapter(self, name: str, path: Path, scale: float = 1.0, prompting: Prompting = PLAIN) -> None:
        base = gguf.GGUFReader(path).fields[BASE_KEY].contents()
        file = {"path": str(path), "sha256": sha256_file(path), "baseSha256": base}
        self.call("addAdapter", name=name, file=file, scale=scale, prompting=asdict(prompting))

    def logits(self, adapter: str | None, conversation: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        raw = self.call("logits", adapter=adapter, conversation=conversation, tokens=list(tokens))
        return np.frombuffer(base64.b64decode(raw), np.float32)

    def generate(self, text: str, adapter: str | None = None, **given: Any) -> tuple[str, Mapping[str, Any]]:
        """Return the answer to one message, and its usage."""
        ask = {"conversation": "one", "messages": [{"role": "user", "content": text}], "maxTokens": 32, **given}
        answer = self.call("generate", adapter=adapter, **ask)
        return "".join(answer["pieces"]), answer["usage"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


Open = Callable[..., WasmEngine]  # the fixture `open_engine`


def built() -> Path:
    """Return the folder of the engine, built if anything has changed since the last time."""
    web = build_web_engine.WEB
    if not (web / "node_modules" / ".bin" / "tsc").exists():
        subprocess.run(["npm", "--prefix", str(web), "ci"], check=True, capture_output=True)
    subprocess.run([str(web / "node_modules" / ".bin" / "tsc"), "-p", str(web)], check=True)
    for variant in build_web_engine.VARIANTS:
        build_web_engine.build(variant)
    return build_web_engine.TARGET
