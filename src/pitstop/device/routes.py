"""The routes of the server: OpenAI's completions, the adapter verbs of vLLM and llama-server, and how it is."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette import requests
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from pitstop.device import metrics, protocol
from pitstop.device.access import Access
from pitstop.device.answers import Answers, Deliver, Make
from pitstop.device.openapi import description
from pitstop.device.protocol import ChatReply, ChatRequest, Reply, TextReply, TextRequest, Wanted
from pitstop.device.request import Request, Starting, Stopped
from pitstop.device.runtime import Runtime
from pitstop.errors import BrokenInput, PitstopError

BODY_LIMIT = 1 << 20  # bytes of a request body
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
        if self.runtime is None:
            return "starting"
        return "degraded" if self.runtime.faults else "ready"

    def ready(self) -> Runtime:
        """Return the runtime.

        Raises:
            Starting: it is not there yet.
            Stopped: it is there no longer.
        """
        if self.stopping:
            raise Stopped("pitstop is stopping here", cure="ask again when it is back")
        if self.runtime is None:
            raise Starting("pitstop is starting here", cure="ask again in a moment")
        return self.runtime


def application(service: Service, access: Access | None = None) -> ASGIApp:
    """Return the web application behind its checks of who may do what."""
    app = Starlette(
        routes=ROUTES,
        exception_handlers={PitstopError: _pitstop_error, HTTPException: _http_error, Exception: _fault},
    )
    app.state.service = service
    app.state.access = access or Access()
    return app.state.access.wrap(app)  # type: ignore[no-any-return]


async def _health(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    runtime, status = service.runtime, service.status
    body: dict[str, Any] = {"status": status}
    if runtime is not None:
        body |= {"models": {model.name: model.bundle.version for model in runtime.models}, "loaded": runtime.loaded}
    if status == "degraded" and runtime is not None:
        body["reasons"] = runtime.faults
    if status in ("starting", "stopping"):
        return JSONResponse(body, 503, {"Retry-After": RETRY_AFTER})
    return JSONResponse(body)


async def _metrics(request: requests.Request) -> Response:
    runtime = _runtime(request)
    text = runtime.metrics.render(*runtime.requests_now, runtime.resident_bytes)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})


async def _openapi(_: requests.Request) -> Response:
    return JSONResponse(description())


async def _models(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(protocol.model_list(service.ready().models, service.created))


async def _model(request: requests.Request) -> Response:
    service: Service = request.app.state.service
    model = service.ready().model(request.path_params["name"])
    return JSONResponse(protocol.model_entry(model, service.created))


async def _chat(request: requests.Request) -> Response:
    chat = protocol.parse_chat(await _read_body(request))
    runtime = _runtime(request)
    return await _answer(request, runtime, chat, partial(_chat_requests, runtime, chat), ChatReply(chat.model, chat.n))


def _chat_requests(runtime: Runtime, chat: ChatRequest, deliver: Callable[[int], Deliver]) -> list[Request]:
    return [
        runtime.chat_request(chat.model, chat.messages, chat.choice(index), deliver(index), scales=chat.scales)
        for index in range(chat.n)
    ]


async def _text(request: requests.Request) -> Response:
    text = protocol.parse_text(await _read_body(request))
    runtime = _runtime(request)
    return await _answer(request, runtime, text, partial(_text_requests, runtime, text), TextReply(text.model, text.n))


def _text_requests(runtime: Runtime, text: TextRequest, deliver: Callable[[int], Deliver]) -> list[Request]:
    wanted = [(prompt, text.choice(index)) for prompt in text.prompts for index in range(text.n)]
    return [
        runtime.text_request(text.model, prompt, sampling, deliver(index), echo=text.echo, scales=text.scales)
        for index, (prompt, sampling) in enumerate(wanted)
    ]


async def _answer(request: requests.Request, runtime: Runtime, wanted: Wanted, make: Make, reply: Reply) -> Response:
    answers = Answers(runtime, request, make, reply)
    first = await anext(answers.parts)  # an error before the first token still gets its own status
    if not wanted.stream:
        return JSONResponse(await answers.whole())
    return StreamingResponse(
        answers.stream(first, include_usage=wanted.include_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


async def _adapters(request: requests.Request) -> Response:
    runtime = _runtime(request)
    scales, loaded = runtime.default_scales, runtime.loaded
    entries = [
        protocol.adapter_entry(
            model, scales.get(model.id, 0.0), loaded=model.name in loaded, pinned=runtime.is_pinned(model)
        )
        for model in runtime.models
        if model.scalable
    ]
    return JSONResponse(entries)


async def _set_adapters(request: requests.Request) -> Response:
    """Set the adapters of requests to the plain base that name none; all others are answered as before."""
    _check_administrator(request)
    scales = protocol.parse_default_scales(await _read_body(request))
    _runtime(request).set_default_scales(scales)
    return JSONResponse({"success": True})


async def _load(request: requests.Request) -> Response:
    """Load an adapter file of this machine: only for whoever administers it, and only a regular file is opened."""
    _check_administrator(request)
    wanted = protocol.parse_load(await _read_body(request))
    runtime = _runtime(request)
    try:
        await asyncio.to_thread(runtime.load_adapter, wanted.name, wanted.path, pin=wanted.pin)
    except BrokenInput as error:
        body = protocol.error_body(protocol.describe(error), 400, code="adapter_refused", param="lora_path")
        return JSONResponse(body, 400)
    return PlainTextResponse(f"Success: LoRA adapter '{wanted.name}' added successfully.")


async def _unload(request: requests.Request) -> Response:
    _check_administrator(request)
    name = protocol.parse_unload(await _read_body(request))
    await asyncio.to_thread(_runtime(request).unload_adapter, name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


ROUTES = [
    Route("/health", _health),
    Route("/metrics", _metrics),
    Route("/openapi.json", _openapi),
    Route("/v1/models", _models),
    Route("/v1/models/{name:path}", _model),
    Route("/v1/chat/completions", _chat, methods=["POST"]),
    Route("/v1/completions", _text, methods=["POST"]),
    Route("/v1/load_lora_adapter", _load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", _unload, methods=["POST"]),
    Route("/lora-adapters", _adapters),
    Route("/lora-adapters", _set_adapters, methods=["POST"]),
]


def _runtime(request: requests.Request) -> Runtime:
    service: Service = request.app.state.service
    return service.ready()


def _check_administrator(request: requests.Request) -> None:
    access: Access = request.app.state.access
    access.check_administrator(request.headers)


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


def _pitstop_error(_: requests.Request, error: Exception) -> Response:
    assert isinstance(error, PitstopError)
    status, code = protocol.error_status(error)
    body = protocol.error_body(protocol.describe(error), status, code=code, param=getattr(error, "param", None))
    return JSONResponse(body, status, {"Retry-After": RETRY_AFTER} if protocol.is_passing(error) else None)


def _http_error(_: requests.Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(protocol.error_body(error.detail, error.status_code), error.status_code, error.headers)


def _fault(_: requests.Request, error: Exception) -> Response:
    return JSONResponse(protocol.error_body("an error inside pitstop; its log has the details", 500), 500)
