"""The page in Chromium, with a real repository, store and engine, from the first visit on."""

import pytest

from chromium import Chromium
from delivery import Server
from phone_site import ADAPTERS, QUESTION, Visitor, swap_time

pytestmark = pytest.mark.web


def test_from_the_first_visit_to_an_answer_without_a_network(
    visitor: Visitor, server: Server, chromium: Chromium
) -> None:
    visitor.install()
    assert visitor.tab.run("crossOriginIsolated")  # by the service worker: this host sends no headers
    assert visitor.installed() == ["", *ADAPTERS]
    answers = {model: visitor.ask_anew(QUESTION, model) for model in visitor.installed()}
    assert len(set(answers.values())) == 3
    assert all(answers.values())

    visitor.press("#fresh")
    visitor.ask(QUESTION, "red")
    assert "swapped" not in visitor.cost()
    visitor.ask("And of Italy?", "blue")
    assert swap_time(visitor.cost()) > 0
    assert "tokens/s" in visitor.cost()
    assert chromium.complaints() == []

    server.off = True
    visitor.tab.call("reload")
    visitor.wait_until_ready()
    assert {model: visitor.ask_anew(QUESTION, model) for model in visitor.installed()} == answers
    assert "network" in visitor.tab.wait_for_text("", "#freshness").lower()
