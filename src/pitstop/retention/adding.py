"""`pitstop suites add`: a file of the user's becomes one more folder beside the other suites."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pitstop.errors import UsageError
from pitstop.retention import harness, importing
from pitstop.retention.sampling import chosen
from pitstop.retention.suite import RECORD, Kind, Suite, digest_of, save


def add(
    file: Path, folder: Path, *, name: str | None, kind: Kind | None, data: Path | None = None, **said: Any
) -> Suite:
    """Make a suite of JSONL items or of a task's YAML, put it beside the others, and return it.

    Args:
        data: rows of a task, instead of those it names.

    Raises:
        UsageError: a suite of that name is there already, or it is not said what kind of items these are.
        BrokenInput, RecordError, DatasetError: everything wrong with the file.
        StorageError: the disk refused.
    """
    if file.suffix in (".yaml", ".yml"):
        if kind is not None:
            raise UsageError("a task says itself what its items are", cure="leave --kind away")
        found = harness.from_task(file, name, data=data, **said)
    else:
        if data is not None:
            raise UsageError("rows of another file are for a task's YAML", cure=f"leave --data away, or add {data}")
        if kind is None:
            raise UsageError(f"it is not said what {file.name} holds", cure="add --kind choice, cloze, answer, text …")
        found = importing.from_jsonl(file, kind, name or file.stem.lower(), **said)
    if (folder / found.name / RECORD).exists():
        raise UsageError(
            f"a suite {found.name} is there already",
            where=folder / found.name,
            cure="choose another --name, or remove its folder first",
        )
    found = _hashed(found)
    save(found, folder / found.name)
    return found


def _hashed(suite: Suite) -> Suite:
    """Put the items into the order of their hashes: any first part of them is a random sample then."""
    items = tuple(chosen(suite.items, len(suite.items), key=lambda item: item.id))
    return Suite(replace(suite.record, items_sha256=digest_of(items)), items)
