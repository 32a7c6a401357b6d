"""Retention suites: fixed items the base can do and must keep doing.

A suite is a folder with `suite.json` (what it is, where it comes from, the digest of its items) and `items.jsonl`
(one item a line). Three kinds of item:

    choice   a prompt and options, one of them right: scored by which option the model finds most likely
    text     a text: scored in bits per byte
    chat     a user's prompt and a reply, rendered with the base's chat template: drift of the reply's tokens

`purpose` says what a suite is for: `retention` suites are gated; `drift` suites only give KL to the base.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pitstop.errors import BrokenInput, DatasetError, RecordError
from pitstop.files import write_bytes
from pitstop.records import from_mapping, load_json, save_json, to_mapping

Kind = Literal["choice", "text", "chat"]
Purpose = Literal["retention", "drift"]
Scoring = Literal["per byte", "whole"]
Ability = Literal["knowledge", "format", "safety", "stereotype"]

RECORD = "suite.json"
ITEMS = "items.jsonl"
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
    chance: float | None = None  # accuracy of guessing, a fraction; None unless kind is "choice"
    scoring: Scoring = "per byte"  # what options compete with: ln p per byte, or ln p of the whole option
    guards: Ability = "knowledge"  # which margin of the gate applies; "stereotype": no drift either way is wanted


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt and its options; each option is scored as prompt + " " + option."""

    id: str
    group: str  # items of one group are resampled together
    prompt: str
    options: tuple[str, ...]
    answer: int  # index of the right option


@dataclass(frozen=True)
class TextItem:
    """A text whose every token after the first is scored."""

    id: str
    group: str
    text: str


@dataclass(frozen=True)
class ChatItem:
    """A user's prompt and a reply; only the reply's tokens count."""

    id: str
    group: str
    prompt: str
    reply: str


Item = ChoiceItem | TextItem | ChatItem
SomeItem = TypeVar("SomeItem", ChoiceItem, TextItem, ChatItem)
ITEM_TYPES: dict[str, type[ChoiceItem] | type[TextItem] | type[ChatItem]] = {
    "choice": ChoiceItem,
    "text": TextItem,
    "chat": ChatItem,
}


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
) -> Suite:
    """Make a suite out of items; digest, count and chance follow from them.

    Raises:
        DatasetError: everything wrong with the items, at once.
    """
    problems = [problem for at, item in enumerate(items, 1) for problem in _item_problems(f"item {at}", item)]
    problems += _duplicates(items) + _misfits(kind, items) + ([] if items else ["no items"])
    _refuse(problems, where=name)
    digest = hashlib.sha256(_lines(items)).hexdigest()
    chance = chance_level(items) if kind == "choice" else None
    record = SuiteRecord(name, kind, purpose, digest, len(items), license, source, description, chance, scoring, guards)
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


def chance_level(items: Sequence[Item]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of options."""
    shares = [1 / len(item.options) for item in items if isinstance(item, ChoiceItem)]
    return sum(shares) / len(shares) if shares else 0.0


def _lines(items: Sequence[Item]) -> bytes:
    return b"".join(json.dumps(to_mapping(item), ensure_ascii=False, sort_keys=True).encode() + b"\n" for item in items)


def _parse(kind: Kind, data: bytes) -> tuple[list[Item], list[str]]:
    """Read every line that can be read; say of the others what is wrong."""
    items: list[Item] = []
    problems: list[str] = []
    for at, line in enumerate(data.splitlines(), 1):
        try:
            item = from_mapping(ITEM_TYPES[kind], _object(line))
        except RecordError as error:
            problems += [f"line {at}: {problem}" for problem in error.problems]
            continue
        problems += _item_problems(f"line {at}", item)
        items.append(item)
    return items, problems + _duplicates(items)


def _object(line: bytes) -> dict[str, Any]:
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


def _item_problems(at: str, item: Item) -> Iterator[str]:
    if not item.id.strip() or not item.group.strip():
        yield f"{at}: id and group must not be empty"
    match item:
        case ChoiceItem():
            if len(item.options) < 2:
                yield f"{at}: a choice needs two options or more, here {len(item.options)}"
            if any(not option.strip() for option in item.options):
                yield f"{at}: an option is empty"
            if len({option.strip() for option in item.options}) < len(item.options):
                yield f"{at}: two options are the same"
            if not 0 <= item.answer < len(item.options):
                yield f"{at}: answer {item.answer} is out of range, options are 0 to {len(item.options) - 1}"
            if not item.prompt.strip():
                yield f"{at}: the prompt is empty"
        case TextItem():
            if not item.text.strip():
                yield f"{at}: the text is empty"
        case ChatItem():
            if not item.prompt.strip() or not item.reply.strip():
                yield f"{at}: prompt and reply must not be empty"


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
    if record.kind == "chat" and record.purpose == "retention":
        problems.append(f"{RECORD}: a chat suite measures drift, its purpose cannot be 'retention'")
    if parsed and record.kind == "choice":
        chance = chance_level(items)
        if record.chance is None or abs(record.chance - chance) > 1e-6:
            problems.append(f"{RECORD}: chance is {record.chance}, by the number of options it is {chance:.6g}")
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
