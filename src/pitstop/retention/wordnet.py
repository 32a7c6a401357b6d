"""Nouns and their definitions out of WordNet's own files, wherever this machine can get them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pitstop.retention import debian

INSTALLED = Path("/usr/share/wordnet")
PACKAGE = "wordnet-base"
GLOSS_CHARACTERS = (15, 120)


@dataclass(frozen=True)
class Sense:
    """The first sense of a noun."""

    word: str
    synonyms: frozenset[str]  # the word itself included
    file: str  # the lexicographer's file: nouns of one field share it
    gloss: str


def find() -> Path:
    """Return a folder with `data.noun` and `index.noun`; the Debian package is fetched and unpacked without root.

    Raises:
        BrokenInput: WordNet is not installed, and this system cannot fetch it.
    """
    if (INSTALLED / "data.noun").is_file() and (INSTALLED / "index.noun").is_file():
        return INSTALLED
    return debian.unpacked(PACKAGE, "usr/share/wordnet/data.noun") / "usr/share/wordnet"


def senses(folder: Path) -> list[Sense]:
    """Return the first sense of every plain noun that was tagged in text, if its gloss does not give it away."""
    first = dict(_first_senses(folder / "index.noun"))
    found = {}
    for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        offset, file, _, count, *rest = head.split(" ")
        words = rest[: 2 * int(count, 16) : 2]
        gloss = gloss.split("; ")[0].strip()
        if first.get(words[0]) == offset and _usable(words[0], gloss):
            found[words[0]] = Sense(words[0], frozenset(words), file, gloss)
    return list(found.values())


def _first_senses(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (word, offset of its first sense) of nouns tagged at least once."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):
            continue
        word, _, _, pointers, *rest = line.split()
        _, tagged, offset, *_ = rest[int(pointers) :]
        if int(tagged) > 0:
            yield word, offset


def _usable(word: str, gloss: str) -> bool:
    low, high = GLOSS_CHARACTERS
    plain = re.fullmatch(r"[a-z]{3,}", word) is not None
    stem = word[: max(4, len(word) - 3)]  # "abrupt" gives "abruptness" away
    return plain and low <= len(gloss) <= high and stem not in gloss.lower() and '"' not in gloss
