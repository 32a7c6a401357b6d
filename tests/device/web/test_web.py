"""`pitstop web` and the server beside it: what is written, what is refused, and the headers a browser needs."""

import hashlib
import json
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from delivery import Publisher
from pitstop.device import web as stage
from pitstop.device.access import Access
from pitstop.device.page import WithPage, check_page
from pitstop.errors import BrokenInput, UsageError


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A build of the page, as far as its files' names matter."""
    folder = tmp_path / "dist"
    for name in ("index.html", "page/page.js", *stage.ENGINES, stage.LAST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """A publisher whose repository lies where the page will be."""
    home = tmp_path / "site"
    home.mkdir()
    publisher = Publisher(home)
    publisher.publish(publisher.base())
    return publisher


def test_a_page_is_told_its_repository_channel_and_root(built: Path, publisher: Publisher) -> None:
    written = stage.web(publisher.home, str(publisher.repository), channel="beta", built=built)
    config = json.loads((publisher.home / "config.json").read_text())
    assert config["repository"] == "repository/"
    assert config["channel"] == "beta"
    assert config["root"].encode() == publisher.root_json
    assert config["budget"] == 400 << 20
    assert config["context_length"] == 2048
    assert (publisher.home / "page/page.js").read_bytes() == (built / "page/page.js").read_bytes()
    assert written.files == 6


def test_the_page_can_lie_in_the_repository_itself(built: Path, publisher: Publisher) -> None:
    assert stage.web(publisher.repository, str(publisher.repository), built=built).repository == "./"


def test_a_repository_elsewhere_needs_its_root(built: Path, publisher: Publisher) -> None:
    address = "https://models.example.org/repository"
    with pytest.raises(UsageError, match=r"what the page shall trust is not known"):
        stage.web(publisher.home, address, built=built)
    root = publisher.repository / stage.ROOT
    assert stage.web(publisher.home, address, root_json=root, built=built).repository == f"{address}/"


def test_a_folder_that_the_host_will_not_offer_is_refused(built: Path, publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"will not offer a repository outside of it"):
        stage.web(tmp_path / "other", str(publisher.repository), built=built)
    assert not (tmp_path / "other").exists()


def test_a_folder_without_a_repository_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no repository"):
        stage.web(tmp_path, str(tmp_path), built=built)


def test_other_metadata_is_no_root(built: Path, publisher: Publisher) -> None:
    timestamp = publisher.repository / "metadata/timestamp.json"
    with pytest.raises(BrokenInput, match="the metadata of 'timestamp'"):
        stage.web(publisher.home, str(publisher.repository), root_json=timestamp, built=built)
    timestamp.write_text("{}")
    with pytest.raises(BrokenInput, match=r"this is no root\.json"):
        stage.web(publisher.home, str(publisher.repository), root_json=timestamp, built=built)


def test_a_page_that_is_not_built_says_how(built: Path, publisher: Publisher) -> None:
    (built / stage.ENGINES[1]).unlink()
    with pytest.raises(UsageError, match="make web"):
        stage.web(publisher.home, str(publisher.repository), built=built)


def test_a_channel_and_a_board_must_exist(built: Path, publisher: Publisher) -> None:
    with pytest.raises(UsageError, match="cannot name a channel"):
        stage.web(publisher.home, str(publisher.repository), channel="../x", built=built)
    with pytest.raises(UsageError, match="no device profile"):
        stage.web(publisher.home, str(publisher.repository), profile="toaster", built=built)


@pytest.fixture
def client(built: Path, publisher: Publisher) -> TestClient:
    """The page and its repository beside an application that asks for a key."""
    stage.web(publisher.home, str(publisher.repository), built=built)
    routes = [Route("/v1/models", lambda _: PlainTextResponse("models"))]
    app = Access(api_key="secret").wrap(Starlette(routes=routes))
    return TestClient(WithPage(app, check_page(publisher.home)))


def test_the_page_comes_with_the_headers_that_isolate_it(client: TestClient) -> None:
    for path in ("/", "/page/page.js", "/config.json"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
        assert answer.headers["cache-control"] == "no-cache"
    assert client.get("/").text == "index.html\n"


def test_the_repository_beside_it_is_offered_with_ranges(client: TestClient, publisher: Publisher) -> None:
    blob = next((publisher.repository / "blobs/sha256").iterdir())
    answer = client.get(f"/repository/blobs/sha256/{blob.name}", headers={"Range": "bytes=1-"})
    assert answer.status_code == 206
    assert hashlib.sha256(blob.read_bytes()[:1] + answer.content).hexdigest() == blob.name


def test_the_api_keeps_its_key_and_nothing_above_the_folder_is_read(client: TestClient, publisher: Publisher) -> None:
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).text == "models"
    (publisher.home.parent / "private").write_text("private")
    for path in ("/../private", "/%2e%2e/private", "/page/../../private"):
        assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 404


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no page"):
        check_page(tmp_path)
