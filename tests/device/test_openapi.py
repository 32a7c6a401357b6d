"""The description says of the routes what is true."""

import json
import re
from typing import Any

import pytest

from pitstop.device.openapi import description
from pitstop.device.protocol import BadRequest, parse_chat, parse_text
from pitstop.device.routes import ROUTES


def test_it_describes_every_route_and_no_other() -> None:
    routes = {(re.sub(r":path", "", route.path), method) for route in ROUTES for method in route.methods or ()}
    described = {(path, method.upper()) for path, methods in description()["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}


def test_every_reference_leads_somewhere() -> None:
    whole = description()
    schemas = whole["components"]["schemas"]
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(whole)))
    assert named == set(schemas)


def test_every_field_it_names_is_read() -> None:
    """A field is read if a value of a wrong kind is refused under its name."""
    schemas = description()["components"]["schemas"]
    bodies: dict[str, Any] = {"Chat": {"model": "a", "messages": [{"role": "user", "content": "x"}]}}
    bodies["Text"] = {"model": "a", "prompt": "x"}
    for name, read in (("Chat", parse_chat), ("Text", parse_text)):
        for field in schemas[name]["properties"]:
            wrong = 5 if field in ("grammar", "stream", "echo", "model", "messages", "prompt", "logprobs") else "wrong"
            wrong = {"wrong": 1} if field in ("stop", "logprobs") else wrong
            with pytest.raises(BadRequest) as caught:
                read(json.dumps({**bodies[name], field: wrong}).encode())
            assert field in caught.value.what
