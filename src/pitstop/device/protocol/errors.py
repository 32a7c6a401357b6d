"""How errors are written in OpenAI's shape."""

from typing import Any

from pitstop.device.request import PromptTooLong, QueueFull, Starting, Stopped, UnknownModel
from pitstop.errors import Busy, PitstopError, UsageError


def error_status(error: PitstopError) -> tuple[int, str | None]:
    """Return the HTTP status of an error, and OpenAI's code for it."""
    cases: tuple[tuple[type[PitstopError], int, str | None], ...] = (
        (UnknownModel, 404, "model_not_found"),
        (PromptTooLong, 400, "context_length_exceeded"),
        (QueueFull, 429, "queue_full"),
        (Starting, 503, "starting"),
        (Stopped, 503, "stopping"),
        (Busy, 503, "busy"),
        (UsageError, 400, None),
    )
    return next(
        ((status, code) for kind, status, code in cases if isinstance(error, kind)), (503, "model_cannot_be_used")
    )


def is_passing(error: PitstopError) -> bool:
    """Whether the same request may succeed in a moment."""
    return isinstance(error, QueueFull | Starting | Stopped | Busy)


def error_body(message: str, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: PitstopError) -> str:
    """Return what a client may know of an error: not where on this device the file lies."""
    return f"{error.what}; {error.cure}" if error.cure else error.what
