"""The answers to one HTTP request, between the runtime's thread and a connection that may close at any time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette import requests

from pitstop.device import protocol
from pitstop.device.protocol import Choice, Reply
from pitstop.device.request import Event, Finished, Request, Said, Stopped
from pitstop.device.runtime import Runtime
from pitstop.errors import PitstopError

Deliver = Callable[[Event], None]
Make = Callable[[Callable[[int], Deliver]], list[Request]]  # gets what delivers the events of an answer, by its number
Part = tuple[int, Said | Finished]  # of which answer


class Answers:
    """Reads what a runtime says to several requests of one client, and cancels them when it leaves."""

    def __init__(self, runtime: Runtime, connection: requests.Request, make: Make, reply: Reply) -> None:
        """Make the requests and queue them, all or none.

        Raises:
            PitstopError: as `Runtime.queue`, and whatever ``make`` raises.
        """
        self._runtime = runtime
        self._reply = reply
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()  # None: the client is gone
        self._loop = asyncio.get_running_loop()
        self._requests = make(lambda index: partial(self._deliver, index))
        self._choices = [Choice() for _ in self._requests]
        runtime.queue(self._requests)
        self._watch = asyncio.create_task(self._cancel_when_gone(connection))
        self.parts = self._read()

    def _deliver(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def _cancel_when_gone(self, connection: requests.Request) -> None:
        while (await connection.receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        self._queue.put_nowait(None)

    def _cancel(self) -> None:
        for request in self._requests:
            self._runtime.cancel(request)

    async def _read(self) -> AsyncIterator[Part]:
        """Yield what comes until every answer has ended; if one fails, all do."""
        try:
            while any(choice.finished is None for choice in self._choices):
                arrived = await self._queue.get()
                if arrived is None:
                    raise Stopped("the client is gone")
                index, event = arrived
                if isinstance(event, PitstopError):
                    raise event
                yield self._take(index, Said(event) if isinstance(event, str) else event)
        finally:
            self._cancel()
            self._watch.cancel()

    def _take(self, index: int, part: Said | Finished) -> Part:
        if isinstance(part, Finished):
            self._choices[index].finished = part
        else:
            self._choices[index].take(part)
        return index, part

    async def whole(self) -> dict[str, Any]:
        """Return the body of the reply once every answer has ended.

        Raises:
            PitstopError: one of them failed.
        """
        async for _ in self.parts:
            pass
        return self._reply.whole(self._choices)

    async def stream(self, first: Part, *, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the reply in chunks, from the first part on, which was read already; an error is its last word."""
        for index in range(len(self._choices)):
            if (opening := self._reply.opening(index)) is not None:
                yield _written(opening)
        try:
            yield _written(self._chunk(first))
            async for part in self.parts:
                yield _written(self._chunk(part))
            if include_usage:
                yield _written(self._reply.usage_chunk(self._choices))
        except PitstopError as error:
            status, code = protocol.error_status(error)
            yield _written(protocol.error_body(protocol.describe(error), status, code=code))
        yield b"data: [DONE]\n\n"

    def _chunk(self, part: Part) -> dict[str, Any]:
        index, what = part
        if isinstance(what, Finished):
            return self._reply.last_chunk(index, what)
        return self._reply.chunk(index, what)


def _written(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
