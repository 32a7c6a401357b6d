"""Serve the active release over HTTP: OpenAI's API, one model name per adapter and one for the base.

The port opens first and answers `/health` with "starting" while the base loads; SIGTERM and Ctrl-C end every stream
with a last word before the connection closes.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pitstop.errors import Busy, MissingExtra, UsageError

try:
    import uvicorn
    from starlette.types import ASGIApp
except ImportError as error:
    raise MissingExtra("`pitstop serve`", "serve") from error

from pitstop.device.access import Access, check_origins, is_loopback, read_key
from pitstop.device.memory import give_back_freed_memory
from pitstop.device.request import Limits
from pitstop.device.routes import BODY_LIMIT, Service, application
from pitstop.device.runtime import Runtime, active_release
from pitstop.device.store import Release

__all__ = ["BODY_LIMIT", "Access", "Server", "Service", "application", "listen", "serve"]

GRACE = 2.5  # seconds live answers get to end by themselves at shutdown
SHUTDOWN = 4  # seconds after which connections are cut; the whole stays under five


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    api_key_file: Path | None = None,
    no_auth: bool = False,
    cors: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Serve the active release of a device root until SIGTERM or Ctrl-C; one line on stdout says when it is ready.

    Port 0 takes any free port; the line names it. Adapter files of this machine are loaded only for clients with the
    key, or, where there is none, on a loopback address.

    Args:
        cors: origins whose pages may use the server from a browser, such as https://example.org.

    Raises:
        UsageError: no release is active; an address beyond this machine without a key or ``no_auth``; no origin.
        Busy: the port is taken.
        BrokenInput: the key file, or the release, cannot be used.
    """
    api_key = read_key(api_key_file) if api_key_file else None
    if api_key is None and not no_auth and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and anybody there could use this server",
            cure="give --api-key-file FILE, or say --no-auth if that is meant",
        )
    origins = check_origins(cors)
    release = active_release(root)
    listener = listen(host, port)
    give_back_freed_memory()
    service = Service()
    announce = _announcer(host, listener.getsockname()[1], release, as_json)
    app = application(service, Access(api_key, origins, loopback=is_loopback(host)))
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
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UsageError(f"cannot listen on {host}, port {port}: {error}", cure="see --host, --port") from error
        raise Busy(
            f"port {port} of {host} is in use by another program",
            cure="stop that one, or choose another port with --port",
        ) from error
    # asyncio does this for sockets that name TCP as their protocol; this one leaves it to the system to know. Without
    # it the second write of an answer waits until the client acknowledges the first: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


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
