"""WebKitGTK's MiniBrowser by WebDriver, on a screen of its own: the engine family of every browser on an iPhone."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from browser import PATIENCE, Page, PageError

DRIVER = "WebKitWebDriver"
MINI_BROWSER = next(Path("/usr/lib").glob("*/webkit2gtk-4*/MiniBrowser"), None)
PACKAGES = {DRIVER: "webkit2gtk-driver", "Xvfb": "xvfb"}
PAUSE = 0.05  # seconds between two looks


def lacking() -> list[str]:
    """Name Debian's packages that are needed and not here."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return missing if MINI_BROWSER or missing else ["libwebkit2gtk-4.1-0"]


class WebKit(Page):
    """The only tab of a browser, by the W3C's WebDriver protocol."""

    def __init__(self, driver: str) -> None:
        """Start the browser of a driver at an address."""
        options = {"binary": str(MINI_BROWSER), "args": ["--automation"]}
        wanted = {"capabilities": {"alwaysMatch": {"webkitgtk:browserOptions": options}}}
        self._session = f"{driver}/session/{_send('POST', f'{driver}/session', wanted)['sessionId']}"

    def goto(self, url: str) -> None:
        _send("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        body = (
            "const done = arguments[0]; Promise.resolve(SCRIPT).then(done, (error) => done({thrown: String(error)}));"
        )
        given = {"script": body.replace("SCRIPT", f"({script})"), "args": []}
        found = _send("POST", f"{self._session}/execute/async", given)
        if isinstance(found, dict) and "thrown" in found:
            raise PageError(found["thrown"])
        return found

    def wait_until(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            if time.monotonic() > end:
                raise PageError(f"not within {PATIENCE} s")
            time.sleep(PAUSE)

    def close(self) -> None:
        """End the browser."""
        _send("DELETE", self._session)


def _send(method: str, url: str, given: Any = None) -> Any:
    data = None if given is None else json.dumps(given).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2 * PATIENCE) as reply:
            return json.load(reply)["value"]
    except HTTPError as error:
        raise PageError(error.read().decode()) from error


@contextmanager
def started(home: Path) -> Iterator[WebKit]:
    """Start a browser whose files lie in a folder, and end it whatever happens."""
    with ExitStack() as stack:
        read, write = os.pipe()
        _run(stack, ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x1024x24"], {}, pass_fds=(write,))
        os.close(write)
        with os.fdopen(read) as said:
            display = said.readline().strip()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # No sandbox, for tests may run as root; no accessibility bus, for there is none.
        environment = {
            "DISPLAY": f":{display}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1",
            "NO_AT_BRIDGE": "1",
            "LIBGL_ALWAYS_SOFTWARE": "1",
        }
        home.mkdir(exist_ok=True)
        _run(stack, [DRIVER, f"--port={port}"], environment)
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        browser = WebKit(url)
        stack.callback(browser.close)
        yield browser


def _run(stack: ExitStack, command: list[str], environment: dict[str, str], **options: Any) -> None:
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)


def _wait_for(driver: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            _send("GET", f"{driver}/status")
            return
        except (URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)
