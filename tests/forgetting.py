"""A small real language model of bytes, and paired results made to measure."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Piece, Sampling, Usage, Use
from pitstop.errors import UsageError
from pitstop.retention.paired import Paired
from pitstop.retention.suite import ChatItem, ChoiceItem, Suite, TextItem, make

CORPUS = "the cat sat on the mat. the capital of france is paris. the dog ran to the house. red is a colour. "


class BigramEngine(Engine):
    """Predicts the next byte from the last one, by counts; an adapter is a table that is added to the logits."""

    name = "bigram"
    base_sha256 = "b" * 64
    context_length = 200
    vocabulary_size = 256

    def __init__(self, answers: dict[str, str] | None = None) -> None:
        data = CORPUS.encode()
        counts = np.ones((256, 256), dtype=np.float32)
        np.add.at(counts, (list(data[:-1]), list(data[1:])), 40)
        self.table = np.log(counts)
        self.loaded: dict[str, np.ndarray] = {}
        self.answers = answers or {}
        self.evaluated = 0

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.loaded)

    def load_adapter(self, name: str, path: Path, *, sha256: str | None = None) -> None:
        self.loaded[name] = np.load(path)

    def add(self, name: str, table: np.ndarray) -> Use:
        self.loaded[name] = table.astype(np.float32)
        return Use(name)

    def unload_adapter(self, name: str) -> None:
        del self.loaded[name]

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def logits(self, tokens: Sequence[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        if len(tokens) > self.context_length:
            raise UsageError("too long")
        self.evaluated += len(tokens)
        rows = self.table[list(tokens[first:])]
        if use.adapter is None:
            return rows.copy()
        return rows + np.float32(use.scale) * self.loaded[use.adapter][list(tokens[first:])]

    def generate(
        self, tokens: Sequence[int], use: Use = PLAIN_BASE, sampling: Sampling | None = None, usage: Usage | None = None
    ) -> Iterator[Piece]:
        answer = self.answers.get(self.detokenize(tokens), "?") if use.adapter else "?"
        return (Piece(byte, chr(byte)) for byte in answer.encode())

    def close(self) -> None:
        pass


def noise(size: float) -> np.ndarray:
    """An adapter table that changes every prediction at random."""
    return np.random.default_rng(0).normal(size=(256, 256)) * size


def inverted(engine: BigramEngine) -> np.ndarray:
    """An adapter table that makes the likely unlikely: forgetting at its worst."""
    return -2.0 * engine.table


def choices(count: int = 30) -> Suite:
    """A suite the bigram model does well at: words it knows against the same letters shuffled."""
    words = ["the cat", "the mat", "the dog", "house", "paris", "capital", "colour", "france"]
    items = []
    for at in range(count):
        word = words[at % len(words)]
        scrambled = "".join(np.random.default_rng(at).permutation(list(word.replace(" ", "x")))) + "q"
        options = (word, scrambled) if at % 2 else (scrambled, word)
        items.append(ChoiceItem(f"c{at}", f"g{at}", f"{at} it is the", options, options.index(word)))
    return make("words", "choice", items, license="CC0-1.0", source="tests", description="known words")


def texts(count: int = 20) -> Suite:
    items = [TextItem(f"t{at}", f"t{at}", CORPUS[at : at + 60]) for at in range(count)]
    return make("corpus", "text", items, license="CC0-1.0", source="tests", description="known text")


def chats() -> Suite:
    items = [ChatItem(f"q{at}", f"q{at}", "who sat", CORPUS[at : at + 20]) for at in range(5)]
    return make("kl-chat", "chat", items, license="CC0-1.0", source="tests", description="replies", purpose="drift")


def probe() -> Suite:
    items = [TextItem(f"p{at}", f"p{at}", CORPUS[at : at + 40]) for at in range(6)]
    return make(
        "kl-general", "text", items, license="CC0-1.0", source="tests", description="known text", purpose="drift"
    )


def accuracy(
    name: str,
    *,
    items: int,
    lost: int = 0,
    gained: int = 0,
    right: float = 0.8,
    chance: float = 0.25,
    per_group: int = 1,
) -> Paired:
    """A choice suite with so many flips each way, spread over the groups."""
    order = np.random.default_rng(items).permutation(items)
    baseline = np.zeros(items)
    baseline[order[: round(items * right)]] = 1.0
    adapted = baseline.copy()
    adapted[order[:lost]] = 0.0
    if gained:
        adapted[order[-gained:]] = 1.0
    groups = tuple(f"g{at // per_group}" for at in range(items))
    return Paired(name, "choice", groups, tuple(baseline), tuple(adapted), (1.0,) * items, chance)


def bits(name: str, *, documents: int = 60, rise: float = 0.0, spread: float = 0.0, seed: int = 0) -> Paired:
    """A text suite whose documents rise by so many bits per byte, give or take."""
    random = np.random.default_rng(seed)
    size = random.integers(300, 900, documents).astype(float)
    base = size * random.normal(1.4, 0.2, documents)
    moved = base + size * (rise + spread * random.normal(size=documents))
    return Paired(name, "text", tuple(f"d{at}" for at in range(documents)), tuple(base), tuple(moved), tuple(size))


def learned(rows: int = 200, before: float = 0.0, after: float = 0.7) -> Paired:
    """A task of which so much was right before and after."""
    right = np.arange(rows) / rows
    return Paired(
        "task",
        "task",
        tuple(f"r{at}" for at in range(rows)),
        tuple((right < before).astype(float)),
        tuple((right < after).astype(float)),
        (1.0,) * rows,
    )
