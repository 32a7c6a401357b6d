"""The page in Chromium when something is wrong: the host, the repository, the browser, a release, another tab."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chromium import Chromium
from delivery import Forger, Reply, Server, bundle_of
from phone_site import ADAPTERS, BASE, ISOLATION, QUESTION, Site, Visitor
from pitstop import records
from pitstop.bundle.channel import Channel, Pin, manifest_path
from serving import wait_for

pytestmark = pytest.mark.web


def test_a_host_with_the_headers_gives_threads_at_once(site: Site, server: Server, chromium: Chromium) -> None:
    server.headers |= ISOLATION
    visitor = Visitor.arrive(chromium, server, "?threads=2")
    visitor.install()
    assert visitor.tab.run("performance.getEntriesByType('navigation')[0].type") == "navigate"
    assert visitor.tab.run("crossOriginIsolated")
    visitor.tab.wait_for_text("Threads\n2", "#panel")
    assert visitor.ask(QUESTION)
    assert chromium.complaints() == []


def test_without_any_isolation_one_thread_answers(site: Site, server: Server, chromium: Chromium) -> None:
    (site.repository / "service_worker.js").unlink()
    visitor = Visitor.arrive(chromium, server)
    visitor.install()
    assert not visitor.tab.run("crossOriginIsolated")
    assert "Threads\n1\n" in visitor.tab.run("document.querySelector('#panel').innerText + '\\n'")
    assert visitor.ask(QUESTION)


def test_an_update_is_tried_and_the_owner_can_go_back(
    site: Site, visitor: Visitor, tiny: Path, tiny_adapters: dict[str, Path]
) -> None:
    visitor.install()
    before = visitor.ask_anew(QUESTION, "red")
    site.publish(site.model("red", tiny_adapters["green"], tiny, counter=2))
    visitor.press("#look")
    visitor.tab.wait_for_text("there is something newer", "#freshness")
    visitor.install()
    assert visitor.ask_anew(QUESTION, "red") != before
    visitor.press("#roll-back")
    visitor.tab.wait("!document.querySelector('#panel .models').innerText.includes('1.0.2')")
    visitor.wait_until_ready()
    assert visitor.ask_anew(QUESTION, "red") == before


def test_a_release_that_does_not_run_is_rolled_back_and_marked_bad(site: Site, visitor: Visitor, tiny: Path) -> None:
    visitor.install()
    before = visitor.ask_anew(QUESTION)
    broken = site.base(name="broken", rows=64)  # passes the header gate, and no engine can run it
    path = broken / bundle_of(broken).artifacts[0].name
    site.publish(site.model(BASE, path, path, counter=2), channel="next")
    site.write_page(channel="next")
    visitor.tab.call("reload")
    visitor.wait_until_ready()
    visitor.press("#update")
    assert "tried here and failed" in visitor.notice()
    visitor.wait_until_ready()
    assert visitor.ask_anew(QUESTION) == before
    visitor.press("#look")
    visitor.wait_until_ready()
    visitor.tab.wait_for_text("failed", ".offer")


def _edit_timestamp(site: Site, server: Server) -> None:
    path = site.repository / "metadata/timestamp.json"
    metadata = json.loads(path.read_text())
    metadata["signed"]["version"] += 1
    path.write_text(json.dumps(metadata))


def _edit_manifest(site: Site, server: Server) -> None:
    for path in (site.repository / "targets/bundles").rglob("*.json"):
        path.write_bytes(path.read_bytes().replace(b"Apache-2.0", b"Apache-3.0"))


def _edit_piece(site: Site, server: Server) -> None:
    def spoil(reply: Reply) -> None:
        reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])

    server.on_blob = spoil


def _offer_an_adapter_of_another_base(site: Site, server: Server) -> None:
    bundles = {name: bundle_of(folder) for name, folder in site.models.items()}
    bundles["red"] = replace(bundles["red"], base_sha256="0" * 64, counter=2, version="1.0.2")
    manifests = {manifest_path(bundle): records.to_json(bundle) for bundle in bundles.values()}
    forger = Forger(site.repository, site.keys)
    forger.offer(manifest_path(bundles["red"]), manifests[manifest_path(bundles["red"])], "bundles")
    forger.sign("bundles")
    pins = {
        bundle.name: Pin(path, hashlib.sha256(data).hexdigest(), bundle.counter)
        for bundle, (path, data) in zip(bundles.values(), manifests.items(), strict=True)
    }
    forger.offer("channels/stable.json", records.to_json(Channel("stable", pins)), "channels")
    forger.sign("channels")


ATTACKS: dict[str, tuple[Callable[[Site, Server], None], str]] = {
    "timestamp": (_edit_timestamp, "timestamp.json is signed by 0 of its keys"),
    "manifest": (_edit_manifest, "has another SHA-256 than was signed for"),
    "piece": (_edit_piece, "Piece 1 of base.gguf is not the one that was signed for"),
    "base": (_offer_an_adapter_of_another_base, "was made for another base"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_was_tampered_with_is_refused_with_a_sentence(
    name: str, site: Site, server: Server, chromium: Chromium
) -> None:
    tamper, words = ATTACKS[name]
    tamper(site, server)
    visitor = Visitor.arrive(chromium, server)
    if name == "piece":
        visitor.press("#update")
    assert words in visitor.notice()
    assert visitor.tab.run("document.querySelector('#composer').hidden")


def test_a_replayed_repository_is_refused_and_what_runs_goes_on(
    site: Site, visitor: Visitor, tiny: Path, tiny_adapters: dict[str, Path]
) -> None:
    old = site.home / "old"
    shutil.copytree(site.repository, old)
    site.publish(site.model("red", tiny_adapters["green"], tiny, counter=2))
    visitor.install()
    answer = visitor.ask_anew(QUESTION, "red")
    for folder in ("metadata", "targets"):
        shutil.rmtree(site.repository / folder)
        shutil.copytree(old / folder, site.repository / folder)
    visitor.press("#look")
    assert "seen before" in visitor.notice()
    visitor.wait_until_ready()
    assert visitor.ask_anew(QUESTION, "red") == answer


def test_a_phone_that_cannot_hold_it_is_told_before_anything_is_fetched(
    site: Site, server: Server, chromium: Chromium
) -> None:
    site.write_page(budget=1_000_000)
    visitor = Visitor.arrive(chromium, server)
    sentence = visitor.tab.wait_for_text("MB", "#welcome .notice")
    assert sentence.endswith(".")
    assert visitor.tab.run("document.querySelector('#update')") is None
    assert server.blob_bytes == 0


def test_a_full_browser_is_told_and_the_rest_is_fetched_when_there_is_room(server: Server, chromium: Chromium) -> None:
    visitor = Visitor.arrive(chromium, server)
    visitor.tab.wait_for_text("Install", "#update")
    visitor.tab.protocol("Storage.overrideQuotaForOrigin", origin=server.url, quotaSize=3_000_000)
    visitor.press("#update")
    assert "full" in visitor.notice()
    visitor.tab.protocol("Storage.overrideQuotaForOrigin", origin=server.url)
    visitor.install()
    assert visitor.ask(QUESTION)


def test_a_second_tab_says_so_and_can_take_over(visitor: Visitor, server: Server, chromium: Chromium) -> None:
    visitor.install()
    answer = visitor.ask_anew(QUESTION)
    second = Visitor.arrive(chromium, server)
    assert "another tab" in second.notice()
    second.press("#notices button")
    second.wait_until_ready()
    assert second.ask_anew(QUESTION) == answer
    assert "took over" in visitor.notice()
    assert visitor.tab.run("document.querySelector('#composer').hidden")


def test_a_tab_that_was_ended_is_remembered(visitor: Visitor, server: Server, chromium: Chromium) -> None:
    visitor.install()
    visitor.begin("Tell a long story.")
    visitor.tab.wait("document.querySelector('.turn.answer .text').textContent !== ''")
    visitor.tab.crash()
    again = Visitor.arrive(chromium, server)
    assert "The browser ended the tab while it was answering" in again.notice()
    again.press("#notices button")
    again.wait_until_ready()
    assert again.ask(QUESTION)


def test_a_download_can_be_cancelled_and_goes_on_later(server: Server, visitor: Visitor) -> None:
    visitor.tab.wait_for_text("Install", "#update")
    hold = threading.Event()

    def stall(reply: Reply) -> None:
        reply.cut, reply.hold = len(reply.body) // 2, hold

    server.on_blob = stall
    visitor.press("#update")
    visitor.tab.wait("document.querySelector('#progress').hidden === false")
    visitor.press("#cancel-update")
    assert "Cancelled" in visitor.notice()
    hold.set()
    server.on_blob = None
    visitor.install()
    assert visitor.ask(QUESTION)


def test_an_answer_can_be_stopped(visitor: Visitor) -> None:
    visitor.install()
    visitor.begin("Tell a long story.")
    visitor.tab.wait("document.querySelector('.turn.answer .text').textContent !== ''")
    visitor.press("#stop")
    visitor.tab.wait_for_text("stopped", ".turn .cost")


def test_a_half_uploaded_version_of_the_page_never_mixes_with_the_one_before(
    site: Site, visitor: Visitor, server: Server
) -> None:
    visitor.install()
    style = site.repository / "style.css"
    style.write_text(style.read_text() + "\nbody { outline: 9px solid red; }\n")
    worker = site.repository / "service_worker.js"
    worker.write_text(worker.read_text().replace('"version": "', '"version": "next-', 1))
    fetched = len([path for path, _ in server.sent if path == "/style.css"])
    visitor.tab.call("reload")
    wait_for(lambda: len([path for path, _ in server.sent if path == "/style.css"]) > fetched)
    visitor.tab.wait("caches.keys().then((names) => !names.some((name) => name.includes('next')))")
    visitor.tab.call("reload")
    visitor.wait_until_ready()
    assert visitor.tab.run("getComputedStyle(document.body).outlineWidth") != "9px"


def test_a_new_version_of_the_page_is_offered_and_keeps_the_engine(
    site: Site, visitor: Visitor, server: Server
) -> None:
    visitor.install()
    worker = site.repository / "service_worker.js"
    worker.write_text(worker.read_text().replace('"version": "', '"version": "next-', 1))
    visitor.tab.call("reload")
    assert "newer version of this page" in visitor.notice()
    visitor.press("#notices button")
    visitor.tab.wait("caches.keys().then((names) => names.length === 1 && names[0].includes('next'))")
    visitor.wait_until_ready()
    server.off = True
    visitor.tab.call("reload")
    visitor.wait_until_ready()
    assert visitor.ask(QUESTION)


def test_the_bench_page_measures_what_is_installed(visitor: Visitor, server: Server, chromium: Chromium) -> None:
    visitor.install()
    visitor.tab.call("close")
    bench = chromium.open()
    bench.goto(f"{server.url}/bench.html")
    bench.press("#measure")
    text = bench.wait_for_text("Next token after a swap", "#result")
    assert all(f"{name}: writing" in text for name in (BASE, *ADAPTERS))
    bench.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    bench.press("#copy-json")
    bench.wait("window.copied !== undefined")
    figures = json.loads(bench.run("window.copied"))
    assert [speed["model"] for speed in figures["speeds"]] == [BASE, *ADAPTERS]
    assert all(speed["decode_tokens_per_second"] > 0 for speed in figures["speeds"])
    assert figures["swap_first_token_seconds"] < figures["new_model_first_token_seconds"]
    assert chromium.complaints() == []
