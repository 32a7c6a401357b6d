"""Nouns and their definitions out of WordNet's own files, wherever this machine can get them."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pitstop.errors import BrokenInput
from pitstop.packages import cache_folder

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
    unpacked = cache_folder() / "wordnet"
    for folder in (INSTALLED, unpacked / "usr/share/wordnet"):
        if (folder / "data.noun").is_file() and (folder / "index.noun").is_file():
            return folder
    _download(unpacked)
    return unpacked / "usr/share/wordnet"


def _download(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # apt checks the package against the signed list of the distribution.
        _run(["apt-get", "download", "--quiet", PACKAGE], folder)
        package = next(Path(folder).glob("*.deb"), None)
        if package is None:
            raise BrokenInput(f"apt-get fetched no {PACKAGE} package")
        _run(["dpkg-deb", "-x", package.name, "unpacked"], folder)
        if not (Path(folder) / "unpacked/usr/share/wordnet/data.noun").is_file():
            raise BrokenInput(f"the {PACKAGE} package holds no data.noun")
        (Path(folder) / "unpacked").rename(target)


def _run(command: list[str], folder: str) -> None:
    cure = f"install the Debian package {PACKAGE}, or do without this suite"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokenInput(f"WordNet is not installed, and {command[0]} cannot fetch it: {error}", cure=cure) from error
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no reason given"]
        raise BrokenInput(f"WordNet is not installed, and {command[0]} cannot fetch it: {words[-1]}", cure=cure)


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
