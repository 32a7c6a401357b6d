"""Serve the active release over HTTP: OpenAI's chat API, one model name per adapter and one for the base.

The port opens first and answers `/health` with "starting" while the base loads; SIGTERM and Ctrl-C end every stream
with a last word before the connection closes.
"""

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from pitstop.device import protocol
from pitstop.device.protocol import ChatReply, ChatRequest
from pitstop.device.runtime import Event, Finished, Limits, Request, Runtime, Stopped, active_release
from pitstop.device.store import Release
from pitstop.errors import BrokenInput, Busy, MissingExtra, PitstopError, UsageError

try:
    import uvicorn
    from starlette import requests
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingExtra("`pitstop serve`", "serve") from error

BODY_LIMIT = 1 << 20  # bytes of a request body
GRACE = 2.5  # seconds live answers get to end by themselves at shutdown
SHUTDOWN = 4  # seconds after which connections are cut; the whole stays under five
RETRY_AFTER = "1"  # seconds


class Service:
    """What the routes answer from: nothing at first, a runtime once its base is loaded."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        self.stopping = False
        self.created = int(time.time())

    @property
    def status(self) -> str:
        """One word for `/health`."""
        if self.stopping:
            return "stopping"
        return "ready" if self.runtime else "starting"

    def ready(self) -> Runtime:
        """Return the runtime.

        Raises:
            Stopped: it is not there yet, or no longer.
        """
        if self.runtime is None or self.stopping:
            raise Stopped(f"pitstop is {self.status} here", cure="ask again in a moment")
        return self.runtime


def application(service: Service, *, api_key: str | None = None) -> ASGIApp:
    """Return the web application; with a key, every route but `/health` asks for it."""
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
        ],
        exception_handlers={PitstopError: _pitstop_error, HTTPException: _http_error, Exception: _fault},
    )
    app.state.service = service
    return app if api_key is None else _KeyCheck(app, api_key)


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    api_key_file: Path | None = None,
    no_auth: bool = False,
    as_json: bool = False,
) -> None:
    """Serve the active release of a device root until SIGTERM or Ctrl-C; one line on stdout says when it is ready.

    Port 0 takes any free port; the line names it.

    Raises:
        UsageError: no release is active; or an address beyond this machine without a key or ``no_auth``.
        Busy: the port is taken.
        BrokenInput: the key file, or the release, cannot be used.
    """
    api_key = _read_key(api_key_file) if api_key_file else None
    if api_key is None and not no_auth and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and anybody there could use this server",
            cure="give --api-key-file FILE, or say --no-auth if that is meant",
        )
    release = active_release(root)
    listener = listen(host, port)
    service = Service()
    announce = _announcer(host, listener.getsockname()[1], release, as_json)
    app = application(service, api_key=api_key)
    server = Server(app, service, lambda: Runtime.from_release(release, limits), announce)
    server.serve_until_stopped(listener)
    if server.failure is not None:
        raise server.failure
    if server.engine_is_busy:
        # Native code that cannot be interrupted loads the base or reads a long prompt; tearing Python down under it
        # would crash.
        sys.stdout.flush()
        os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        Busy: another program has it.
        UsageError: there is no such port, this machine has no such address, or the user may not take it.
    """
    if not 0 <= port < 1 << 16:
        raise UsageError(f"there is no port {port}", cure="choose one from 1 to 65535, or 0 for any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UsageError(f"cannot listen on {host}, port {port}: {error}", cure="see --host, --port") from error
        raise Busy(
            f"port {port} of {host} is in use by another program",
            cure="stop that one, or choose another port with --port",
        ) from error


class Server(uvicorn.Server):
    """uvicorn, with a model that loads beside it and answers that end before it does."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        load: Callable[[], Runtime],
        announce: Callable[[Runtime, float], None] = lambda runtime, seconds: None,
    ) -> None:
        """Take what loads the model, and what is to be called then, with the seconds it took."""
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN
        )
        super().__init__(config)
        self.failure: Exception | None = None  # why the release could not be loaded
        self.engine_is_busy = False  # it loads or computes still, and could not be closed in time
        self._service = service
        self._load = load
        self._announce = announce
        self._loader = threading.Thread(target=self._load_runtime, name="pitstop-load", daemon=True)

    def serve_until_stopped(self, listener: socket.socket) -> None:
        """Answer on a listening socket, with "starting" until the model is loaded."""
        self._loader.start()
        self.run(sockets=[listener])

    def _load_runtime(self) -> None:
        begun = time.monotonic()
        try:
            runtime = self._load()
        except Exception as error:  # `serve` raises it on the main thread
            self.failure = error
            self.should_exit = True
            return
        self._service.runtime = runtime
        if self._service.stopping:
            runtime.close(0)
        else:
            self._announce(runtime, time.monotonic() - begun)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let live answers end, and only then close their connections."""
        self._service.stopping = True
        runtime = self._service.runtime
        closing = asyncio.create_task(asyncio.to_thread(runtime.close, GRACE)) if runtime else None
        await super().shutdown(sockets)
        self.engine_is_busy = not await closing if closing else self._loader.is_alive()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and Ctrl-C; unlike uvicorn, do not raise them again: a clean stop is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _health(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    runtime = service.runtime
    body: dict[str, Any] = {"status": service.status}
    if runtime is not None:
        body |= {"models": {model.name: model.bundle.version for model in runtime.models}, "loaded": runtime.loaded}
    return JSONResponse(body, 200 if service.status == "ready" else 503)


async def _models(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    entries = [protocol.model_entry(model, service.created) for model in service.ready().models]
    return JSONResponse({"object": "list", "data": entries})


async def _model(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    model = service.ready().model(request.path_params["name"])
    return JSONResponse(protocol.model_entry(model, service.created))


async def _chat(request: requests.Request) -> Response:
    chat = protocol.parse_chat(await _read_body(request))
    answer = _Answer(request.app.state.service.ready(), chat, request)
    first = await anext(answer.events)  # an error before the first token still gets its own status
    if not chat.stream:
        return JSONResponse(await answer.whole(first))
    return StreamingResponse(
        answer.stream(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


class _Answer:
    """One answer between the runtime's thread and a connection that may close at any time."""

    def __init__(self, runtime: Runtime, chat: ChatRequest, request: requests.Request) -> None:
        self._runtime = runtime
        self._chat = chat
        self._reply = ChatReply(chat.model)
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the client is gone
        self._loop = asyncio.get_running_loop()
        self._request = runtime.submit(chat.model, chat.messages, chat.sampling, self._deliver)
        self._watch = asyncio.create_task(self._cancel_when_gone(request, self._request))
        self.events = self._read()

    def _deliver(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def _cancel_when_gone(self, connection: requests.Request, request: Request) -> None:
        while (await connection.receive())["type"] != "http.disconnect":
            pass
        self._runtime.cancel(request)
        self._queue.put_nowait(None)

    async def _read(self) -> AsyncIterator[str | Finished]:
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, PitstopError):
                    raise event
                if event is None:
                    raise Stopped("the client is gone")
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._runtime.cancel(self._request)
            self._watch.cancel()

    async def whole(self, first: str | Finished) -> dict[str, Any]:
        texts, event = [], first
        while isinstance(event, str):
            texts.append(event)
            event = await anext(self.events)
        return self._reply.whole("".join(texts), event)

    async def stream(self, first: str | Finished) -> AsyncIterator[bytes]:
        yield _event(self._reply.chunk("", first=True))
        try:
            event = first
            while isinstance(event, str):
                yield _event(self._reply.chunk(event))
                event = await anext(self.events)
            yield _event(self._reply.last_chunk(event))
            if self._chat.include_usage:
                yield _event(self._reply.usage_chunk(event))
        except PitstopError as error:
            status, code = protocol.error_status(error)
            yield _event(protocol.error_body(protocol.describe(error), status, code=code))
        yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _read_body(request: requests.Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise HTTPException(413, f"the body is larger than {BODY_LIMIT:,} bytes", {"Connection": "close"})
    except requests.ClientDisconnect as error:
        raise HTTPException(400, "the body ended early") from error
    return bytes(body)


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


def _pitstop_error(_: requests.Request, error: Exception) -> Response:
    assert isinstance(error, PitstopError)
    status, code = protocol.error_status(error)
    body = protocol.error_body(protocol.describe(error), status, code=code, param=getattr(error, "param", None))
    return JSONResponse(body, status, {"Retry-After": RETRY_AFTER} if status == 429 else None)


def _http_error(_: requests.Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(protocol.error_body(error.detail, error.status_code), error.status_code, error.headers)


def _fault(_: requests.Request, error: Exception) -> Response:
    return JSONResponse(protocol.error_body("an error inside pitstop; its log has the details", 500), 500)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenInput(f"cannot read the API key: {error}", where=path) from error
    if not key.isascii() or not key:
        raise BrokenInput("the API key must be one line of ASCII", where=path, cure="write a long random text into it")
    return key


def _announcer(host: str, port: int, release: Release, as_json: bool) -> Callable[[Runtime, float], None]:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def announce(runtime: Runtime, seconds: float) -> None:
        names = [model.name for model in runtime.models]
        line = f"pitstop serves {', '.join(names)} at {url} (loaded in {seconds:.1f} s; Ctrl-C stops it)"
        if as_json:
            facts = {"event": "ready", "url": url, "models": names, "seconds": seconds, "release": release.sha256}
            line = json.dumps(facts)
        print(line, flush=True)

    return announce
