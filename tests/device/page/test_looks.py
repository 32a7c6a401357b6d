"""Whether the page can be read and used: narrow and wide, light and dark, by keyboard and by screen reader."""

from pathlib import Path

import pytest

from chromium import Tab
from phone_site import Visitor

pytestmark = pytest.mark.web

# Of every visible text: its contrast to the nearest ground that is not transparent, as WCAG 2 counts it.
CONTRASTS = """(() => {
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (channel) => (channel /= 255) <= 0.03928 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
    const luminance = ([red, green, blue]) => 0.2126 * light(red) + 0.7152 * light(green) + 0.0722 * light(blue);
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const color = parse(getComputedStyle(element).backgroundColor);
            if (color.length === 3 || color[3] > 0) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim() !== "");
        if (texts.length === 0 || !element.checkVisibility() || element.closest(":disabled, .unseen, .skip")) continue;
        const colors = [parse(getComputedStyle(element).color), ground(element)];
        const pair = colors.map(luminance).sort((one, other) => other - one);
        found.push([texts[0].data.trim().slice(0, 40), (pair[0] + 0.05) / (pair[1] + 0.05)]);
    }
    return found;
})()"""
FOCUSED = "document.activeElement.id || document.activeElement.innerText || document.activeElement.getAttribute('href')"


def look(tab: Tab, width: int, scheme: str) -> None:
    """Look at the page with a screen of this width and a preference for light or dark."""
    tab.call("setViewport", {"width": width, "height": 800, "deviceScaleFactor": 1})
    tab.call("emulateMediaFeatures", [{"name": "prefers-color-scheme", "value": scheme}])


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(visitor: Visitor, width: int, scheme: str, tmp_path: Path) -> None:
    look(visitor.tab, width, scheme)
    visitor.tab.wait_for_text("Install", "#update")
    _check_sight(visitor.tab, width)
    visitor.install()
    visitor.ask("Name three colours.", "red")
    visitor.ask("Name three more.", "blue")
    _check_sight(visitor.tab, width)
    dark = visitor.tab.run("getComputedStyle(document.body).backgroundColor") != "rgb(245, 245, 241)"
    assert dark == (scheme == "dark")


def _check_sight(tab: Tab, width: int) -> None:
    assert tab.run("document.documentElement.scrollWidth") <= width
    contrasts = tab.run(CONTRASTS)
    assert len(contrasts) > 8
    assert [(text, contrast) for text, contrast in contrasts if contrast < 4.5] == []


def test_the_keyboard_reaches_everything_in_the_order_of_reading(visitor: Visitor) -> None:
    visitor.install()
    visitor.tab.run("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        visitor.tab.press_key("Tab")
        reached.append(visitor.tab.run(FOCUSED))
    wanted = ["skip", "", "question", "send", "fresh", "look"]  # "": the base's radio button
    positions = [reached.index(name) for name in wanted if name]
    assert positions == sorted(positions)
    visitor.tab.run("document.querySelector('#question').focus()")
    visitor.tab.type_text("Name three colours.")
    visitor.tab.press_key("Enter")
    visitor.tab.wait("document.querySelector('.turn.answer')?.getAttribute('aria-busy') === 'false'")


def test_a_screen_reader_is_told_what_everything_is_and_every_answer(visitor: Visitor) -> None:
    visitor.install()
    answer = visitor.ask("Name three colours.", "red")
    spoken = visitor.tab.run("document.querySelector('[aria-live]').textContent")
    assert spoken.startswith("red: ")
    assert answer.strip() in spoken
    tree = visitor.tab.protocol("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in ("button", "radio", "textbox", "link", "list", "group")
    ]
    assert ("textbox", "Your message") in controls
    assert ("radio", "red") in controls
    assert ("group", "Who answers") in controls
    assert ("list", "Conversation") in controls
    assert [role for role, name in controls if not name and role != "list"] == []
    assert visitor.tab.run("document.documentElement.lang") == "en"


def test_it_can_be_put_on_the_home_screen(visitor: Visitor) -> None:
    visitor.tab.wait_for_text("Install", "#update")
    manifest = visitor.tab.protocol("Page.getAppManifest")
    assert manifest["errors"] == []
    assert visitor.tab.protocol("Page.getInstallabilityErrors")["installabilityErrors"] == []


def test_iphones_find_an_icon_that_they_can_read(visitor: Visitor) -> None:
    """They read no SVG, and show a picture of the page instead."""
    visitor.tab.run("""new Promise((resolve, reject) => {
        window.icon = new Image();
        window.icon.onload = resolve;
        window.icon.onerror = reject;
        window.icon.src = document.querySelector("link[rel=apple-touch-icon]").href;
    })""")
    assert visitor.tab.run("[icon.naturalWidth, icon.naturalHeight]") == [180, 180]
    assert visitor.tab.run("icon.src").endswith(".png")
