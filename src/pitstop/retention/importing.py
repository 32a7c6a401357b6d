"""A user's own JSONL to a suite: what can be filled in is filled in, what is wrong is said all at once."""

from pathlib import Path
from typing import Any

from pitstop.errors import BrokenInput, RecordError
from pitstop.records import from_mapping
from pitstop.retention.suite import ITEM_TYPES, Item, Kind, Suite, make, parse_object

MUST = ("license", "source")  # whoever passes a suite on must be able to say these


def from_jsonl(path: Path, kind: Kind, name: str, **said: Any) -> Suite:
    """Make a suite out of rows of JSON, one item a line.

    A row without an ``id`` is called after its line, a row without a ``group`` is one of its own. A choice's ``answer``
    may be an index or the text of the right option.

    Args:
        said: what `suite.make` wants to know besides: license, source, description and so on.

    Raises:
        BrokenInput: the file cannot be read.
        DatasetError: everything wrong with its rows and with the suite as a whole, at once.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BrokenInput(f"cannot read {path.name}: {error.strerror}", where=path) from error
    said = {"description": f"{kind} items of {path.name}", **said}
    items: list[Item] = []
    places: list[str] = []
    problems = [f"{field}: it must not be empty" for field in MUST if not said.get(field, "").strip()]
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(from_mapping(ITEM_TYPES[kind], _filled(kind, parse_object(line), f"{name}-{at:04}")))
            places.append(f"line {at}")
        except RecordError as error:
            problems += [f"line {at}: {problem}" for problem in error.problems]
    return make(name, kind, items, **said, places=places, problems=problems, where=path)


def _filled(kind: Kind, row: dict[str, Any], id: str) -> dict[str, Any]:
    """Return a row with its id and group, and a choice's answer as an index.

    Raises:
        RecordError: the answer is none of the options.
    """
    row = {"id": id, **row}
    row = {"group": row["id"], **row}
    options = row.get("options")
    if kind == "choice" and isinstance(row.get("answer"), str) and isinstance(options, list):
        row["answer"] = index_of(row["answer"], options)
    return row


def index_of(answer: str, options: list[Any]) -> int:
    """Return the place of an answer among the options.

    Raises:
        RecordError: it is none of them.
    """
    plain = [option.strip() if isinstance(option, str) else option for option in options]
    if answer.strip() not in plain:
        raise RecordError([f"answer {answer!r} is none of the options {', '.join(map(repr, options))}"])
    return plain.index(answer.strip())
