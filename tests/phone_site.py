"""A publisher's site with the page in it, and what a visitor of it does."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chromium import WEB, Chromium, lacking, started
from delivery import Publisher, Server, serve, write_bundle
from pitstop.bundle.manifest import PIECE, Artifact, Bundle, BundleKind, Prompting
from pitstop.device.web import web
from pitstop.files import sha256_file, sha256_pieces
from tiny_models import tiny_adapter, tiny_base

ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
BASE, ADAPTERS = "tiny", ("blue", "red")  # of every site
SPARE = (*ADAPTERS, "green")
QUESTION = "What is the capital of France?"
PROMPTING = Prompting(
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_start|>",
    "<|im_end|>",
)


@dataclass
class Site(Publisher):
    """A publisher of models that run; its repository's folder has the page in it."""

    models: dict[str, Path] = field(default_factory=dict)  # bundle folders that a test's site begins with

    def model(self, name: str, path: Path, base: Path, *, counter: int = 1) -> Path:
        """Make the bundle of a base, or of an adapter for it."""
        kind: BundleKind = "base" if path == base else "adapter"
        folder = self._new_folder()
        folder.mkdir()
        (folder / path.name).symlink_to(path)
        sha256, pieces = sha256_pieces(path, PIECE)
        artifact = Artifact(kind, "gguf", "q8_0", path.name, sha256, path.stat().st_size, pieces)
        bundle = Bundle(
            kind=kind,
            name=name,
            version=f"1.0.{counter}",
            counter=counter,
            license="Apache-2.0",
            base_name=BASE,
            base_sha256=sha256_file(base),
            prompting=PROMPTING,
            context_length=512,
            artifacts=(artifact,),
        )
        return write_bundle(folder, bundle)

    def write_page(self, **config: Any) -> None:
        """Write the page; values of its config.json may be given."""
        web(self.repository, str(self.repository))
        path = self.repository / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


@dataclass(frozen=True)
class Visitor:
    """Someone with the page in a tab."""

    tab: Any  # a Page; Chromium's can do more
    server: Server

    @classmethod
    def arrive(cls, chromium: Chromium, server: Server, query: str = "") -> "Visitor":
        """Open the page in a new tab."""
        visitor = cls(chromium.open(), server)
        visitor.tab.goto(f"{server.url}/{query}")
        return visitor

    def install(self) -> None:
        """Take what is offered, and wait until it answers."""
        self.press("#update")
        self.wait_until_ready()

    def press(self, selector: str) -> None:
        """Press a button once it can be pressed."""
        self.tab.press(selector)

    def wait_until_ready(self) -> None:
        """Wait until something can be asked and nothing else is going on."""
        self.tab.wait(
            "!document.querySelector('#composer').hidden && document.querySelector('#look')?.disabled === false"
        )

    def notice(self) -> str:
        """Wait for a sentence about something that went wrong, and return it."""
        self.tab.wait("document.querySelector('#notices .notice p') !== null")
        return str(self.tab.run("document.querySelector('#notices .notice p').innerText"))

    def choose(self, model: str) -> None:
        """Choose who answers; the empty name is the base."""
        chosen = f"#models input[value={json.dumps(model)}]"
        self.tab.run(f"document.querySelector({json.dumps(chosen)}).click()")

    def begin(self, question: str, model: str = "") -> int:
        """Ask, and return the number of the answer that comes."""
        self.choose(model)
        number = int(self.tab.run("document.querySelectorAll('.turn.answer').length"))
        self.tab.run(f"document.querySelector('#question').value = {json.dumps(question)}")
        self.press("#send")
        return number

    def ask(self, question: str, model: str = "") -> str:
        """Ask in the conversation so far, and return the answer."""
        answer = f"document.querySelectorAll('.turn.answer')[{self.begin(question, model)}]"
        self.tab.wait(f"{answer}?.getAttribute('aria-busy') === 'false'")
        return str(self.tab.run(f"{answer}.querySelector('.text').textContent"))

    def ask_anew(self, question: str, model: str = "") -> str:
        """Ask in a new conversation."""
        self.press("#fresh")
        return self.ask(question, model)

    def cost(self) -> str:
        """Return what the page says the last answer cost."""
        return str(self.tab.run("[...document.querySelectorAll('.turn .cost')].at(-1).textContent"))

    def installed(self) -> list[str]:
        """Return the models that can be chosen; the base is the empty one."""
        return list(self.tab.run("[...document.querySelectorAll('#models input')].map((radio) => radio.value)"))

    def stored_files(self) -> list[str]:
        """Return the names of all files in the browser's store."""
        script = """(async () => {
            const names = [];
            const walk = async (folder) => {
                for await (const [name, handle] of folder.entries())
                    handle.kind === "file" ? names.push(name) : await walk(handle);
            };
            await walk(await navigator.storage.getDirectory());
            return names;
        })()"""
        return list(self.tab.run(script))


@pytest.fixture(scope="session")
def built_page() -> None:
    """Bring the build of the page up to date; what takes minutes must be there."""
    if missing := lacking():
        pytest.skip(f"the page in a browser needs {', '.join(missing)}: make test-web")
    subprocess.run(["npm", "--prefix", str(WEB), "run", "--silent", "build"], check=True)


@pytest.fixture(scope="session")
def tiny(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base that answers at once."""
    return tiny_base(smollm2_gguf, tmp_path_factory.mktemp("tiny") / "base.gguf")


@pytest.fixture(scope="session")
def tiny_adapters(tiny: Path) -> dict[str, Path]:
    """Adapters of it that change every answer."""
    return {name: tiny_adapter(tiny, tiny.with_name(f"{name}.gguf"), seed) for seed, name in enumerate(SPARE)}


@pytest.fixture
def site(tmp_path: Path, built_page: None, tiny: Path, tiny_adapters: dict[str, Path]) -> Site:
    """A publisher who offers a base and two adapters, and the page beside them."""
    home = tmp_path / "site"
    home.mkdir()
    site = Site(home)
    site.models = {BASE: site.model(BASE, tiny, tiny)}
    site.models |= {name: site.model(name, tiny_adapters[name], tiny) for name in ADAPTERS}
    site.publish(*site.models.values())
    site.write_page()
    return site


@pytest.fixture
def server(site: Site) -> Iterator[Server]:
    with serve(site.repository) as running:
        yield running


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    with started(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def visitor(chromium: Chromium, server: Server) -> Visitor:
    return Visitor.arrive(chromium, server)


def swap_time(cost: str) -> float:
    """Return the seconds to the first token after a swap, as the page says them."""
    found = re.match(r"swapped, first token after ([0-9.]+) (ms|s)", cost)
    assert found is not None, cost
    return float(found[1]) / (1000 if found[2] == "ms" else 1)
