"""Serve the active release over HTTP: OpenAI's API, one model name per adapter and one for the base.

The port opens first and answers `/health` with "starting" while the base loads; SIGTERM and Ctrl-C end every stream
with a last word before the connection closes.
"""

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

from pitstop.errors import Busy, MissingExtra, UsageError

if not all(map(find_spec, ("starlette", "uvicorn"))):
    raise MissingExtra("`pitstop serve`", "serve")

from pitstop.device.access import Access, check_origins, is_loopback, read_key
from pitstop.device.engine import check_engine, preload
from pitstop.device.memory import give_back_freed_memory
from pitstop.device.page import WithPage, check_page
from pitstop.device.request import Limits
from pitstop.device.runtime import Runtime, active_release
from pitstop.device.store import Release
from pitstop.engines.opening import EngineName


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    engine: EngineName | None = None,
    api_key_file: Path | None = None,
    no_auth: bool = False,
    cors: Sequence[str] = (),
    page: Path | None = None,
    as_json: bool = False,
) -> None:
    """Serve the active release of a device root until SIGTERM or Ctrl-C; one line on stdout says when it is ready.

    Port 0 takes any free port; the line names it. Adapter files of this machine are loaded only for clients with the
    key, or, where there is none, on a loopback address.

    Args:
        engine: which one must run it; None: the one for the format that the release carries.
        cors: origins whose pages may use the server from a browser, such as https://example.org.
        page: a folder written by `pitstop web`, offered at the server's root.

    Raises:
        UsageError: no release is active, or another engine runs it; an address beyond this machine without a key or
            ``no_auth``; no origin; no page.
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
    if page is not None:
        check_page(page)
    release = active_release(root)
    check_engine(release, engine)
    listener = listen(host, port)
    give_back_freed_memory()
    preload(release)
    loading = _begin(lambda: Runtime.from_release(release, limits))
    # What the web server is made of is imported while the model loads: that takes a tenth of a second.
    from pitstop.device.asgi import Server
    from pitstop.device.routes import Service, application

    service = Service()
    announce = _announcer(host, listener.getsockname()[1], release, as_json)
    app = application(service, Access(api_key, origins, loopback=is_loopback(host)))
    if page is not None:
        app = WithPage(app, page)
    server = Server(app, service, loading.result, announce)
    server.serve_until_stopped(listener)
    if server.failure is not None:
        raise server.failure
    if server.engine_is_busy:
        # Native code that cannot be interrupted loads the base or reads a long prompt; tearing Python down under it
        # would crash.
        sys.stdout.flush()
        os._exit(0)


def _begin(load: Callable[[], Runtime]) -> Future[Runtime]:
    """Load in a thread, from now on."""
    loading: Future[Runtime] = Future()

    def work() -> None:
        try:
            loading.set_result(load())
        except BaseException as error:  # whoever waits for the result raises it
            loading.set_exception(error)

    threading.Thread(target=work, name="pitstop-load", daemon=True).start()
    return loading


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
