"""A phone beside the board that a test has: the same TypeScript as in the page, run by node over real files."""

import fcntl
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from pitstop.device import updater
from pitstop.errors import PitstopError

REPOSITORY = Path(__file__).parents[1]
WEB = REPOSITORY / "src/pitstop/device/web"
HERE = Path("tests/device/web")  # the tests in TypeScript


class Refused(Exception):
    """What the phone said: kind, and a sentence for whoever holds it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Phone:
    """Answers one question after the other."""

    @cached_property
    def built(self) -> Path:
        """The folder of the compiled TypeScript: of the store, of trust, and of the tests."""
        if not (shutil.which("node") and shutil.which("npm")):
            pytest.skip("node and npm are not installed: apt-get install nodejs npm")
        with (WEB / "package.json").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (WEB / "node_modules/@types/node").is_dir():
                made = subprocess.run(["npm", "ci"], cwd=WEB, capture_output=True, text=True)
                if made.returncode:
                    pytest.skip(f"npm ci brings no TypeScript here: {made.stderr.strip().splitlines()[-1:]}")
        self.scratch = tempfile.TemporaryDirectory(prefix="pitstop-web-")
        folder = Path(self.scratch.name)
        (folder / "package.json").write_text('{"type": "module"}')
        compiler = WEB / "node_modules/.bin/tsc"
        command = [compiler, "-p", REPOSITORY / HERE, "--outDir", folder]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout
        return folder

    @cached_property
    def process(self) -> subprocess.Popen[str]:
        driver = self.built / HERE / "driver.js"
        return subprocess.Popen(
            ["node", "--no-warnings", driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, verb: str, *given: Any) -> Any:
        """Let the phone do something.

        Raises:
            Refused: it will not.
        """
        pipe = self.process
        assert pipe.stdin
        assert pipe.stdout
        pipe.stdin.write(json.dumps([verb, *given], default=str) + "\n")
        pipe.stdin.flush()
        answer = json.loads(pipe.stdout.readline())
        if "result" in answer:
            return answer["result"]
        assert answer["kind"] != "bug", answer["message"]
        raise Refused(answer["kind"], answer["message"])

    def update(self, folder: Path, url: str, root_json: bytes | None, channel: str = "stable") -> str:
        """Install and confirm what a channel offers; returns the release. A phone keeps its first root."""
        root = folder.parent / f"{folder.name}.root.json"
        if not root.exists():
            root.write_bytes(root_json or b"")
        release: str = self.ask("update", folder, url, root, channel, time.time())
        return release

    def close(self) -> None:
        """End the process, if it was needed."""
        if "process" in self.__dict__:
            self.process.communicate()
        if "built" in self.__dict__:
            self.scratch.cleanup()


phone = Phone()


def update_both(device: Path, url: str, **options: Any) -> updater.Updated:
    """Update a board and the phone beside it: both come to the same release, or both refuse."""
    refused, release = True, ""
    with suppress(Refused):
        channel = options.get("channel", "stable")
        release = phone.update(device.with_name("phone"), url, options.get("root_json"), channel)
        refused = False
    try:
        updated = updater.update(device, url, **options)
    except PitstopError as error:
        if not refused:
            pytest.fail(f"the phone took what the board refuses: {error}")
        raise
    assert release == updated.release
    return updated
