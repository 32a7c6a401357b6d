"""The page in WebKit, on one thread: what it lacks here (a private file system) is told, or put into memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import webkit
from delivery import Reply, Server
from phone_site import ADAPTERS, QUESTION, Site, Visitor, swap_time
from webkit import WebKit

pytestmark = pytest.mark.web
STORE = Path(__file__).with_name("memory_store.js")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebKit]:
    if missing := webkit.lacking():
        pytest.skip(f"WebKit needs: apt-get install {' '.join(missing)}")
    with webkit.started(tmp_path / "home") as running:
        yield running


@pytest.fixture
def in_memory(site: Site) -> None:
    """Let page and worker keep their files in memory."""
    shutil.copyfile(STORE, site.repository / STORE.name)
    page, worker = site.repository / "index.html", site.repository / "page/worker.js"
    begin = '<script type="module"'
    page.write_text(page.read_text().replace(begin, f'<script src="{STORE.name}"></script>\n{begin}', 1))
    worker.write_text(f'import "../{STORE.name}";\n{worker.read_text()}')


def arrive(browser: WebKit, server: Server) -> Visitor:
    browser.goto(f"{server.url}/")
    return Visitor(browser, server)


def test_a_browser_that_cannot_store_is_told_so(site: Site, server: Server, browser: WebKit) -> None:
    assert browser.run("navigator.storage?.getDirectory === undefined")
    visitor = arrive(browser, server)
    assert "cannot store models" in visitor.notice()


@pytest.mark.usefixtures("in_memory")
def test_from_the_first_visit_to_a_swap(server: Server, browser: WebKit) -> None:
    visitor = arrive(browser, server)
    visitor.install()
    assert visitor.installed() == ["", *ADAPTERS]
    assert "Threads\n1\n" in browser.run("document.querySelector('#panel').innerText + '\\n'")
    answers = {model: visitor.ask_anew(QUESTION, model) for model in visitor.installed()}
    assert len(set(answers.values())) == 3
    for model in reversed(visitor.installed()):
        assert visitor.ask_anew(QUESTION, model) == answers[model]
    visitor.ask("And of Italy?", "blue")
    assert swap_time(visitor.cost()) > 0


@pytest.mark.usefixtures("in_memory")
def test_a_piece_that_was_tampered_with_is_refused(server: Server, browser: WebKit) -> None:
    def spoil(reply: Reply) -> None:
        reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])

    server.on_blob = spoil
    visitor = arrive(browser, server)
    visitor.press("#update")
    assert "Piece 1 of base.gguf is not the one that was signed for" in visitor.notice()
