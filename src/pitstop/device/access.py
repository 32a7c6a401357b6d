"""Who may do what on this server: keys, origins, and the acts of an administrator."""

import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pitstop.device import protocol
from pitstop.errors import BrokenInput, UsageError

_ORIGIN = re.compile(r"https?://[^/\s?#@*]+|\*")


@dataclass(frozen=True)
class Access:
    """What a server lets in."""

    api_key: str | None = None  # with one, every route but `/health` asks for it
    cors: tuple[str, ...] = ()  # origins whose pages may read answers in a browser; "*": any
    loopback: bool = True  # only this machine reaches the server

    def check_administrator(self, headers: Headers) -> None:
        """Let pass who may load files of this machine and change what others are answered with.

        Whoever has the key may; without one, only programs of this machine. A browser on this machine is no such
        program: any page it shows can send requests to a local port, and says so in ``Origin``.

        Raises:
            HTTPException: 403.
        """
        if self.api_key is not None:
            return
        if not self.loopback:
            raise HTTPException(403, "adapters are loaded and set only with an API key: give --api-key-file")
        origin = headers.get("origin")
        if origin is not None and origin not in self.cors:
            raise HTTPException(403, f"pages from {origin} may not load or set adapters: give --cors {origin}")

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return the application behind these checks."""
        if self.api_key is not None:
            app = _KeyCheck(app, self.api_key)
        if self.cors:
            # Outermost: a browser asks first (OPTIONS), without the key.
            app = CORSMiddleware(
                app, self.cors, allow_methods=("GET", "POST"), allow_headers=("Authorization", "Content-Type")
            )
        return app


class _KeyCheck:
    """Lets through only requests that carry the key, and questions after health."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        body = protocol.error_body(
            "this server needs its API key: Authorization: Bearer KEY", 401, code="invalid_api_key"
        )
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Return origins as browsers send them.

    Raises:
        UsageError: one is none.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(f"{origin!r} is no origin", cure="write https://HOST, http://HOST:PORT or '*'")
    return tuple(origins)


def read_key(path: Path) -> str:
    """Return the key in a file.

    Raises:
        BrokenInput: it cannot be read, or is no line of ASCII.
    """
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenInput(f"cannot read the API key: {error}", where=path) from error
    if not key.isascii() or not key:
        raise BrokenInput("the API key must be one line of ASCII", where=path, cure="write a long random text into it")
    return key
