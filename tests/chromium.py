"""Chromium with tabs, driven through chromium_driver.mjs: what the tests of the page do as its visitor."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser import PATIENCE, Page, PageError

DRIVER = Path(__file__).with_name("chromium_driver.mjs")
WEB = Path(__file__).parents[1] / "src" / "pitstop" / "device" / "web"
PROGRAM = "chromium"
# No sandbox, for tests may run as root; nothing is asked of hosts that have no part in the tests.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def lacking() -> list[str]:
    """Name what these tests need and this machine does not have."""
    programs = [name for name in ("node", "npm", PROGRAM) if shutil.which(name) is None]
    built = ("node_modules/puppeteer-core/package.json", "dist/engine/engine-st.wasm")
    return programs + [name for name in built if not (WEB / name).is_file()]


@dataclass(frozen=True)
class Tab(Page):
    """One tab."""

    chromium: "Chromium"
    number: int

    def call(self, method: str, *given: Any) -> Any:
        """Call a method of puppeteer's Page."""
        return self.chromium.do(self.number, method, *given)

    def protocol(self, method: str, **parameters: Any) -> Any:
        """Send a command of Chrome's DevTools Protocol."""
        return self.chromium.do(None, "protocol", self.number, method, parameters)

    def crash(self) -> None:
        """End its process, as a system does that has no memory left."""
        self.chromium.do(None, "crash", self.number)

    def goto(self, url: str) -> None:
        self.call("goto", url)

    def run(self, script: str) -> Any:
        return self.call("evaluate", script)

    def wait_until(self, condition: str) -> None:
        self.call("waitForFunction", condition, {"timeout": PATIENCE * 1000, "polling": 50})

    def press_key(self, key: str) -> None:
        """Press a key of the keyboard."""
        self.chromium.do(None, "pressKey", self.number, key)

    def type_text(self, text: str) -> None:
        """Type into what has the focus."""
        self.chromium.do(None, "typeText", self.number, text)


class Chromium:
    """A browser with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which(PROGRAM)
        assert program is not None
        self._process = subprocess.Popen(
            ["node", str(DRIVER), program, str(profile), *FLAGS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def do(self, tab: int | None, call: str, *given: Any) -> Any:
        """Have one thing done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"tab": tab, "call": call, "with": given}) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise PageError(f"the driver ended at {call} {given}")
        reply = json.loads(line)
        if "error" in reply:
            raise PageError(f"{call}: {reply['error']}")
        return reply.get("result")

    def open(self) -> Tab:
        """Open a tab."""
        return Tab(self, self.do(None, "open"))

    def complaints(self) -> list[str]:
        """Return the errors and warnings of all tabs since this was last asked."""
        return list(self.do(None, "complaints"))

    def close(self) -> None:
        """End it."""
        self.do(None, "quit")
        self._process.communicate(timeout=PATIENCE)


@contextmanager
def started(profile: Path) -> Iterator[Chromium]:
    """Start a browser, and end it whatever happens."""
    chromium = Chromium(profile)
    try:
        yield chromium
    finally:
        chromium.close()
