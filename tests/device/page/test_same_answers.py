"""One signed release on a board and in the page of a phone: they answer alike."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import material
import pytest

from delivery import Server
from phone_site import Site, Visitor
from pitstop.device.engine import open_engine
from pitstop.device.request import Limits
from pitstop.device.store import Store
from pitstop.device.updater import activate, update
from pitstop.engines.base import Sampling, Use
from pitstop.engines.template import render
from pitstop.files import sha256_file

pytestmark = [pytest.mark.web, pytest.mark.slow]
PRECISION = "q8_0"
TOKENS = 24
LEAD = 0.5  # nats by which a token leads: what is nearer may fall to either side, for int8 sums differ by processor
FEWEST = 3  # tokens of an answer that is worth comparing
ALIKE = 0.9  # of the answers
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is the opposite of hot?",
    "Write a line about rain.",
    "How many days has a week?",
    "What do bees make?",
    "Who wrote Hamlet?",
    "What is water made of?",
    "Name a large animal.",
    "Why is the sky blue?",
    "What is two plus two?",
    "Where do fish live?",
    "What is bread made of?",
    "Tell me a short joke.",
    "How do I boil an egg?",
    "What is the largest planet?",
    "Give me a name for a cat.",
    "What does a doctor do?",
    "Translate 'good morning' into French.",
    "What is the boiling point of water?",
)


@pytest.fixture
def tiny() -> Path:
    """The real base, in the place of the random one."""
    return material.base(PRECISION)


@pytest.fixture
def tiny_adapters(tiny: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """As far from the base as trained ones."""
    digest = sha256_file(tiny)
    return {
        name: make_adapter(tmp_path / f"{name}.gguf", seed, strength=0.2, base_sha256=digest)
        for seed, name in enumerate(("blue", "red"), 1)
    }


def on_the_board(site: Site, url: str, root: Path) -> dict[tuple[str, str], str]:
    """Update a board and let it answer, up to the first token that is a near-tie."""
    update(root, url, root_json=site.root_json)
    release = activate(Store(root), lambda _: None)
    assert release is not None
    answers = {}
    with open_engine(release.base, release.base_path(), Limits(512, sequences=1, threads=1)) as engine:
        bundles = {"": (release.base, Use())}
        for name, (bundle, path) in release.adapters().items():
            engine.load_adapter(name, path, sha256=bundle.artifact.sha256)
            bundles[name] = (bundle, Use(name, bundle.scale))
        for name, (bundle, use) in bundles.items():
            for question in QUESTIONS:
                prompt = engine.tokenize(render(bundle.prompting, [{"role": "user", "content": question}]))
                said = engine.generate(prompt, use, Sampling(max_tokens=TOKENS, logprobs=2))
                sure = list(takewhile(lambda piece: piece.likeliest[0][1] - piece.likeliest[1][1] > LEAD, said))
                if len(sure) >= FEWEST:
                    answers[name, question] = "".join(piece.text for piece in sure)
    return answers


def in_the_page(visitor: Visitor, name: str, question: str, length: int) -> str:
    """Return the answer, or as much of it as was asked for."""
    visitor.press("#fresh")
    answer = f"document.querySelectorAll('.turn.answer')[{visitor.begin(question, name)}]"
    text, done = f"{answer}?.querySelector('.text').textContent", f"{answer}?.getAttribute('aria-busy') === 'false'"
    tab = visitor.tab
    tab.wait(f"{done} || {text}.length >= {length}")
    if not tab.run(done):
        visitor.press("#stop")
        tab.wait(done)
    return str(tab.run(text))


def test_a_board_and_a_phone_answer_alike(site: Site, server: Server, visitor: Visitor, tmp_path: Path) -> None:
    expected = on_the_board(site, server.url, tmp_path / "device")
    visitor.install()
    alike = [
        in_the_page(visitor, name, question, len(answer)).startswith(answer)
        for (name, question), answer in expected.items()
    ]
    print(f"{sum(alike)} of {len(alike)} answers are alike, {sum(map(len, expected.values()))} characters")
    assert len(expected) > len(QUESTIONS)
    assert {name for name, _ in expected} == {"", "blue", "red"}
    assert sum(alike) >= ALIKE * len(alike)
