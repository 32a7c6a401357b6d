"""Retention suites: fixed items the base can do and must keep doing.

A suite is a folder with `suite.json` (what it is, where it comes from, the digest of its items) and `items.jsonl`
(one item a line). Five kinds of item:

    choice   a prompt and options, one of them right: scored by which option the model finds most likely
    cloze    a prompt and how it goes on: right if every token of that is the most likely one (as LAMBADA is scored)
    answer   a user's prompt and a rule: right if the answer, generated greedily in the base's chat format, keeps it
    text     a text: scored in bits per byte
    chat     a user's prompt and a reply, rendered with the base's chat template: drift of the reply's tokens

`purpose` says what a suite is for: `retention` suites are gated; `drift` suites only give KL to the base.

Options compete, as `scoring` says, with

    per byte   ln p(option | prompt) / bytes: for options of like content and unlike length
    whole      ln p(option | prompt): for short options, and for pairs that differ in a word
    pmi        ln p(option | prompt) - ln p(option | neutral), where `neutral` is a prompt that asks for nothing
               (domain-conditional PMI: Holtzman et al. 2021, arXiv:2104.08315): for options of unlike frequency

Items stand in an order that is a hash's (`sampling.py`), so any first part of a suite is a random sample of it: a gate
may look at a quarter first.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pitstop.errors import BrokenInput, DatasetError, RecordError, UsageError
from pitstop.files import write_bytes
from pitstop.records import from_mapping, load_json, save_json, to_mapping
from pitstop.retention.items import (
    ITEM_TYPES,
    AnswerItem,
    ChatItem,
    ChoiceItem,
    ClozeItem,
    Item,
    Kind,
    SomeItem,
    TextItem,
    item_problems,
)

__all__ = [
    "ITEMS",
    "ITEM_TYPES",
    "RECORD",
    "Ability",
    "AnswerItem",
    "ChatItem",
    "ChoiceItem",
    "ClozeItem",
    "Item",
    "Kind",
    "Purpose",
    "Scoring",
    "SomeItem",
    "Suite",
    "SuiteRecord",
    "TextItem",
    "chance_level",
    "default_folder",
    "digest_of",
    "folder_or_default",
    "load",
    "load_all",
    "make",
    "named",
    "parse_object",
    "save",
]

Purpose = Literal["retention", "drift"]
Scoring = Literal["per byte", "whole", "pmi"]
Ability = Literal["knowledge", "format", "safety", "stereotype"]

RECORD = "suite.json"
ITEMS = "items.jsonl"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHOWN = 40  # problems listed before the rest is only counted


@dataclass(frozen=True)
class SuiteRecord:
    """`suite.json`."""

    name: str
    kind: Kind
    purpose: Purpose
    items_sha256: str  # of items.jsonl; the suite's identity
    count: int  # items
    license: str
    source: str
    description: str
    chance: float | None = None  # accuracy of guessing, a fraction; None where nothing is right or wrong
    scoring: Scoring = "per byte"  # what options compete with
    guards: Ability = "knowledge"  # which margin of the gate applies; "stereotype": no drift either way is wanted
    neutral: str | None = None  # the prompt that asks for nothing; just where scoring is "pmi"


@dataclass(frozen=True)
class Suite:
    """A record and its items, checked."""

    record: SuiteRecord
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def digest(self) -> str:
        return self.record.items_sha256

    def of(self, kind: type[SomeItem]) -> tuple[SomeItem, ...]:
        """Return the items, which must all be of this type."""
        return tuple(item for item in self.items if isinstance(item, kind))


def make(
    name: str,
    kind: Kind,
    items: Sequence[Item],
    *,
    license: str,
    source: str,
    description: str,
    purpose: Purpose = "retention",
    scoring: Scoring = "per byte",
    guards: Ability = "knowledge",
    neutral: str | None = None,
    places: Sequence[str] = (),
    problems: Sequence[str] = (),
    where: object = None,
) -> Suite:
    """Make a suite out of items; digest, count and chance follow from them.

    Args:
        places: what to call each item if something is wrong with it; "item 1" and so on by default.
        problems: what was wrong already when the items were read.
        where: the file they were read from.

    Raises:
        DatasetError: everything wrong with the items, or with what was said of them, at once.
    """
    record = SuiteRecord(
        name=name,
        kind=kind,
        purpose=purpose,
        items_sha256=digest_of(items),
        count=len(items),
        license=license,
        source=source,
        description=description,
        chance=chance_level(kind, items),
        scoring=scoring,
        guards=guards,
        neutral=neutral,
    )
    places = places or [f"item {at}" for at in range(1, len(items) + 1)]
    wrong = [problem for at, item in zip(places, items, strict=True) for problem in item_problems(at, item)]
    empty = [] if items or problems else ["no items"]
    whole = _duplicates(items) + _misfits(kind, items) + empty + _wording(record)
    _refuse([*problems, *wrong, *whole], where=where or name)
    return Suite(record, tuple(items))


def save(suite: Suite, folder: Path) -> None:
    """Write a suite into its folder; `suite.json`, which names the items, comes last.

    Raises:
        StorageError: the disk refused.
    """
    write_bytes(folder / ITEMS, _lines(suite.items))
    save_json(suite.record, folder / RECORD)


def load(folder: Path) -> Suite:
    """Read and check the suite in a folder.

    Raises:
        BrokenInput: a file is missing or cannot be read.
        RecordError: `suite.json` is not such a record.
        DatasetError: everything wrong with the items, at once.
    """
    record = load_json(SuiteRecord, folder / RECORD)
    path = folder / ITEMS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenInput(
            f"cannot read {ITEMS} of suite {record.name}: {error.strerror}",
            where=path,
            cure="build the suites again, or remove this suite's folder",
        ) from error
    items, problems = _parse(record.kind, data)
    problems += _record_problems(record, data, items, parsed=not problems)
    _refuse(problems, where=path)
    return Suite(record, tuple(items))


def default_folder() -> Path:
    """Return the folder of the small suites that are part of pitstop, for whoever has built none."""
    return Path(__file__).parent / "default"


def folder_or_default(folder: Path) -> Path:
    """Return the folder, or that of the suites that are part of pitstop where it does not exist."""
    return folder if folder.is_dir() else default_folder()


def load_all(folder: Path) -> list[Suite]:
    """Read every suite below a folder, in the order of their names.

    Raises:
        BrokenInput: there is none.
        RecordError, DatasetError: as for `load`; suites of the same name.
    """
    suites = [load(record.parent) for record in sorted(folder.glob(f"*/{RECORD}"))]
    if not suites:
        raise BrokenInput("there are no retention suites", where=folder, cure="build them, or name their folder")
    twice = [name for name, count in Counter(suite.name for suite in suites).items() if count > 1]
    if twice:
        raise RecordError([f"two suites are named {name!r}" for name in twice], where=folder)
    return suites


def named(folder: Path, name: str) -> Suite:
    """Return the suite of this name below a folder.

    Raises:
        UsageError: there is none.
        BrokenInput, RecordError, DatasetError: as for `load_all`.
    """
    suites = {suite.name: suite for suite in load_all(folder)}
    if name not in suites:
        raise UsageError(f"there is no suite {name!r}", where=folder, cure=f"choose one of: {', '.join(suites)}")
    return suites[name]


def chance_level(kind: Kind, items: Sequence[Item]) -> float | None:
    """Return the accuracy of guessing: for choices the mean of 1 / number of options; None if nothing can be right."""
    if kind in ("text", "chat"):
        return None
    shares = [1 / len(item.options) for item in items if isinstance(item, ChoiceItem)]
    return math.fsum(shares) / len(shares) if shares else 0.0


def digest_of(items: Sequence[Item]) -> str:
    """Return the SHA-256 of `items.jsonl` with these items in this order."""
    return hashlib.sha256(_lines(items)).hexdigest()


def _lines(items: Sequence[Item]) -> bytes:
    return b"".join(json.dumps(to_mapping(item), ensure_ascii=False, sort_keys=True).encode() + b"\n" for item in items)


def _parse(kind: Kind, data: bytes) -> tuple[list[Item], list[str]]:
    """Read every line that can be read; say of the others what is wrong."""
    items: list[Item] = []
    problems: list[str] = []
    for at, line in enumerate(data.splitlines(), 1):
        try:
            item = from_mapping(ITEM_TYPES[kind], parse_object(line))
        except RecordError as error:
            problems += [f"line {at}: {problem}" for problem in error.problems]
            continue
        problems += item_problems(f"line {at}", item)
        items.append(item)
    return items, problems + _duplicates(items)


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        RecordError: it is not UTF-8, not JSON, or no object.
    """
    try:
        found = json.loads(line.decode())
        json.dumps(found, ensure_ascii=False).encode()  # "\\ud800" is JSON, but no text
    except UnicodeDecodeError as error:
        raise RecordError([f"not UTF-8 (byte {error.start + 1})"]) from error
    except UnicodeEncodeError as error:
        raise RecordError(["holds half a surrogate pair"]) from error
    except (ValueError, RecursionError) as error:
        raise RecordError([f"not JSON: {error}"]) from error
    if not isinstance(found, dict):
        raise RecordError(["not a JSON object"])
    return found


def _duplicates(items: Sequence[Item]) -> list[str]:
    return [f"id {name!r} is used {n} times" for name, n in Counter(item.id for item in items).items() if n > 1]


def _misfits(kind: Kind, items: Sequence[Item]) -> list[str]:
    wrong = sum(not isinstance(item, ITEM_TYPES[kind]) for item in items)
    return [f"{wrong} items are not of kind {kind!r}"] if wrong else []


def _record_problems(record: SuiteRecord, data: bytes, items: Sequence[Item], *, parsed: bool) -> list[str]:
    problems = []
    found = hashlib.sha256(data).hexdigest()
    if found != record.items_sha256:
        problems.append(f"SHA-256 is {found}, {RECORD} says {record.items_sha256}: one of the two was changed")
    if parsed and len(items) != record.count:
        problems.append(f"{len(items)} items, {RECORD} says {record.count}")
    if parsed and not items:
        problems.append("no items")
    problems += [f"{RECORD}: {problem}" for problem in _wording(record)]
    if parsed:
        chance = chance_level(record.kind, items)
        if (record.chance is None) != (chance is None) or abs((record.chance or 0.0) - (chance or 0.0)) > 1e-6:
            problems.append(f"{RECORD}: chance is {record.chance}, by the items it is {chance and round(chance, 6)}")
    return problems


def _wording(record: SuiteRecord) -> list[str]:
    """Return what in a record contradicts the rest of it."""
    problems = []
    if not NAME.fullmatch(record.name):
        problems.append(f"name: {record.name!r} must be a-z, 0-9, '.', '_', '-', at most 64: it names a folder")
    if record.kind == "chat" and record.purpose == "retention":
        problems.append("a chat suite measures drift, its purpose cannot be 'retention'")
    if record.kind == "answer" and record.purpose == "drift":
        problems.append("an answer suite has no reply to measure drift on, its purpose cannot be 'drift'")
    if record.scoring != "per byte" and record.kind != "choice":
        problems.append(f"scoring {record.scoring!r} is for choices, not for kind {record.kind!r}")
    if record.scoring == "pmi" and not (record.neutral or "").strip():
        problems.append("scoring 'pmi' needs a neutral prompt, such as neutral = \"Answer:\"")
    if record.scoring != "pmi" and record.neutral is not None:
        problems.append(f"neutral is for scoring 'pmi', here it is {record.scoring!r}")
    if record.guards == "stereotype" and record.kind != "choice":
        problems.append(f"stereotypes are guarded by choices, not by kind {record.kind!r}")
    return problems


def _refuse(problems: Sequence[str], *, where: object) -> None:
    if not problems:
        return
    shown = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
    more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise DatasetError(
        f"the suite cannot be used, {count}:{shown}{more}",
        where=where,
        cure="correct these lines and the record, or build the suite again",
    )
