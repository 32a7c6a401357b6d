"""Who may do what: keys, origins, and the acts of an administrator."""

import pytest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from pitstop.device.access import Access, check_origins, is_loopback
from pitstop.device.routes import Service, application
from pitstop.errors import UsageError

PAGE = "https://example.org"
ORDERS = [("/v1/load_lora_adapter", {}), ("/v1/unload_lora_adapter", {}), ("/lora-adapters", [])]


@pytest.mark.parametrize(
    ("access", "origin", "allowed"),
    [
        (Access(), None, True),
        (Access(), PAGE, False),
        (Access(cors=(PAGE,)), PAGE, True),
        (Access(cors=(PAGE,)), "https://example.com", False),
        (Access(cors=("*",)), PAGE, False),
        (Access(loopback=False), None, False),
        (Access(cors=(PAGE,), loopback=False), PAGE, False),
        (Access("key", loopback=False), None, True),
        (Access("key", loopback=False), PAGE, True),
    ],
)
def test_who_may_load_adapters(access: Access, origin: str | None, allowed: bool) -> None:
    headers = Headers({"origin": origin} if origin else {})
    if allowed:
        access.check_administrator(headers)
    else:
        with pytest.raises(HTTPException, match="403"):
            access.check_administrator(headers)


@pytest.mark.parametrize(("path", "body"), ORDERS)
def test_every_order_is_guarded(path: str, body: object) -> None:
    client = TestClient(application(Service(), Access(loopback=False)))
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
    client = TestClient(application(Service()))
    assert client.post(path, json=body, headers={"Origin": PAGE}).status_code == 403


def test_pages_are_let_in_only_when_asked_for() -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    closed = TestClient(application(Service()))
    assert "access-control-allow-origin" not in closed.get("/health", headers={"Origin": PAGE}).headers
    assert closed.options("/v1/chat/completions", headers=asked).status_code == 405
    client = TestClient(application(Service(), Access("key", (PAGE,))))
    answer = client.options("/v1/chat/completions", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert client.options("/health", headers={**asked, "Origin": "https://example.com"}).status_code == 400
    refused = client.get("/v1/models", headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["", "example.org", "https://example.org/", "https://*.example.org", "ftp://a", "null"]
)
def test_what_is_no_origin_is_said(origin: str) -> None:
    with pytest.raises(UsageError, match="no origin"):
        check_origins([origin])


def test_origins() -> None:
    assert check_origins([PAGE, "http://localhost:3000", "*"]) == (PAGE, "http://localhost:3000", "*")


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)]
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) == local
