"""Items of a suite that an adapter was trained on: they say what it memorised, not what it kept.

As language models' authors look for test items in training data (GPT-3, arXiv:2005.14165, appendix C): 13 words in a
row that stand in both. An item shorter than that counts if all of it, six words at least, stands in a row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pitstop.errors import DatasetError
from pitstop.retention.drift import Drift
from pitstop.retention.measure import SuiteResult
from pitstop.retention.suite import AnswerItem, ChatItem, ChoiceItem, ClozeItem, Item, Suite, TextItem

OVERLAP = 13  # words in a row that count as the same text
SHORT = 6  # words; what is shorter stands in many texts by chance

Gram = tuple[str, ...]


def grams(text: str, length: int = OVERLAP) -> set[Gram]:
    """Return every run of so many words, lower case and without punctuation; a shorter text has none."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def words_of(item: Item) -> str:
    """Return everything a suite's item says, in one text."""
    match item:
        case ChoiceItem():
            return " ".join((item.prompt, *item.options))
        case ClozeItem():
            return f"{item.prompt} {item.answer}"
        case AnswerItem():
            return item.prompt
        case ChatItem():
            return f"{item.prompt} {item.reply}"
        case TextItem():
            return item.given + item.text


def trained_on(suites: Sequence[Suite], texts: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the ids of items that stand in training texts, by the name of their suite."""
    wanted: dict[Gram, list[tuple[str, str]]] = {}
    for suite in suites:
        for item in suite.items:
            for gram in _marks(item):
                wanted.setdefault(gram, []).append((suite.name, item.id))
    lengths = {len(gram) for gram in wanted}
    found: dict[str, set[str]] = {suite.name: set() for suite in suites}
    for text in texts:
        for gram in {gram for length in lengths for gram in grams(text, length)} & wanted.keys():
            for name, id in wanted[gram]:
                found[name].add(id)
    return {name: frozenset(ids) for name, ids in found.items()}


def _marks(item: Item) -> set[Gram]:
    """Return the runs of words by which an item is recognised; a choice by its question with the right answer."""
    text = f"{item.prompt} {item.options[item.answer]}" if isinstance(item, ChoiceItem) else words_of(item)
    length = len(re.findall(r"[^\W_]+", text))
    return grams(text, min(length, OVERLAP)) if length >= SHORT else set()


def set_aside(results: Sequence[SuiteResult], ids: Mapping[str, frozenset[str]]) -> tuple[SuiteResult, ...]:
    """Return results without the items of these ids.

    Raises:
        DatasetError: nothing is left of a suite.
    """
    return tuple(_without(result, ids.get(result.suite, frozenset())) for result in results)


def _without(result: SuiteResult, ids: frozenset[str]) -> SuiteResult:
    choices = tuple(choice for choice in result.choices if choice.id not in ids)
    texts = tuple(text for text in result.texts if text.id not in ids)
    measured = [choice.id for choice in result.choices] + [text.id for text in result.texts]
    aside = [id for id in measured if id in ids]
    if aside and not choices and not texts:
        raise DatasetError(
            f"every item of the suite {result.suite} stands in the training rows: it cannot show what is forgotten",
            cure="take rows for [retain] or [data] from another source, or leave this suite out",
        )
    return replace(result, choices=choices, texts=texts, trained_on=tuple(aside))


def set_documents_aside(drifts: Sequence[Drift], ids: Mapping[str, frozenset[str]]) -> tuple[Drift, ...]:
    """Return drift without the documents of these ids."""
    return tuple(
        replace(
            drift,
            documents=tuple(one for one in drift.documents if one.id not in ids.get(drift.suite, ())),
        )
        for drift in drifts
    )
