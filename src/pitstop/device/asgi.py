"""uvicorn with a model that loads beside it, and answers that end before it does."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from pitstop.device.routes import Service
from pitstop.device.runtime import Runtime

GRACE = 2.5  # seconds live answers get to end by themselves at shutdown
SHUTDOWN = 4  # seconds after which connections are cut; the whole stays under five


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
