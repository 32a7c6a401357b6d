"""What the makers of suites share: items out of documents, names of items, choices with an order that tells nothing."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from functools import partial

from pitstop.retention.sampling import chosen
from pitstop.retention.suite import ChoiceItem, SomeItem, TextItem


def numbered(name: str, items: Sequence[SomeItem]) -> list[SomeItem]:
    """Give items the ids ``name-0000`` and so on, in their order."""
    return [dataclasses.replace(item, id=f"{name}-{at:04}") for at, item in enumerate(items)]


def picked(name: str, items: Iterable[SomeItem], size: int) -> list[SomeItem]:
    """Choose so many items by a hash of their ids, and number them in that order."""
    return numbered(name, chosen(items, size, key=lambda item: item.id))


def texts(name: str, documents: Iterable[str], size: int) -> list[TextItem]:
    """Choose so many documents by a hash of what they say; each is a group of its own."""
    some = chosen(documents, size, key=str)
    return [TextItem(f"{name}-{at:04}", f"{name}-{at:04}", text) for at, text in enumerate(some)]


def quiz(group: str, prompt: str, answer: str, others: Iterable[str]) -> ChoiceItem:
    """Make a choice of an answer and three others, in an order that tells nothing."""
    wrong = chosen(others, 3, key=partial("{}: {}".format, group))
    return shuffled(group, group, prompt, answer, wrong)


def shuffled(id: str, group: str, prompt: str, answer: str, wrong: Sequence[str]) -> ChoiceItem:
    """Make a choice whose right option stands anywhere."""
    options = chosen([answer, *wrong], len(wrong) + 1, key=partial("place of {} {}".format, id))
    return ChoiceItem(id, group, prompt, tuple(options), options.index(answer))


def sentences(text: str) -> list[str]:
    """Cut a text after every full stop, question mark and exclamation mark before a space."""
    return re.split(r"(?<=[.!?]) ", text)


def joined(parts: Iterable[str], characters: int) -> list[str]:
    """Join sentences that follow one another to documents of at least so many characters."""
    documents, now = [], ""
    for sentence in parts:
        now = f"{now} {sentence}".strip()
        if len(now) >= characters:
            documents.append(now)
            now = ""
    return documents
