"""Reading the fields of a request body: each has its type and range, and what is wrong is named."""

import json
from collections.abc import Mapping
from typing import Any

from pitstop.errors import UsageError

_KINDS = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}


class BadRequest(UsageError):
    """A request body that is not what the API takes; ``param`` is the field at fault."""

    def __init__(self, what: str, param: str | None = None) -> None:
        super().__init__(what)
        self.param = param


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        BadRequest: it is not JSON.
    """
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    return data


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the object a body holds.

    Raises:
        BadRequest: it is not JSON, or no object.
    """
    data = parse_json(body)
    if not isinstance(data, dict):
        raise BadRequest("the body must be a JSON object")
    return data


def required(data: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field that must be there.

    Raises:
        BadRequest: it is not, or has another type.
    """
    if data.get(name) is None:
        raise BadRequest(f"{name!r} is missing", name)
    return optional(data, name, kind, None)


def optional(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field, or the default where it is not there or null.

    Raises:
        BadRequest: it has another type.
    """
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequest(f"{name!r} must be {_KINDS[kind]}", name)
    return value


def number(data: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """Return a number within a range.

    Raises:
        BadRequest: it is no number, or outside.
    """
    value = data.get(name)
    if value is None:
        return default
    if not is_number(value) or not low <= value <= high:
        raise BadRequest(f"{name!r} must be a number from {low:,} to {high:,}", name)
    return float(value)


def whole(data: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """Return a whole number within a range.

    Raises:
        BadRequest: it is none, or outside.
    """
    value = data.get(name)
    if value is None:
        return default
    if not is_whole(value) or not low <= value <= high:
        raise BadRequest(f"{name!r} must be a whole number from {low:,} to {high:,}", name)
    return int(value)


def is_number(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite, which Python's JSON reads."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
