"""The commands for retention suites."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pitstop.cli.frame import SUITES, Json, Suites, finish, suites


@suites.command("build")
def build_suites(
    folder: Suites = SUITES,
    size: Annotated[int | None, typer.Option(min=1, help="Items per suite at most. [what each suite needs]")] = None,
    json: Json = None,
) -> None:
    """Build the suites out of pinned packages."""
    from pitstop.retention import builders

    built = [suite.record for suite in builders.build(folder, size)]
    finish(built, f"{folder}: {', '.join(record.name for record in built)}", json)


@suites.command("list")
def list_suites(folder: Suites = SUITES, json: Json = None) -> None:
    """List the suites of a folder; those that pitstop carries where none were built."""
    from pitstop.retention import suite

    found = [suite.record for suite in suite.load_all(suite.folder_or_default(folder))]
    lines = (f"{record.name:12} {record.count:5} items  {record.description}" for record in found)
    finish(found, "\n".join(lines), json)


@suites.command("show")
def show_suite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the suite.")],
    folder: Suites = SUITES,
    items: Annotated[int, typer.Option(min=0, help="How many of its items.")] = 3,
    json: Json = None,
) -> None:
    """Show what a suite is, where it comes from, and some of its items."""
    from pitstop.retention import describe, suite

    found = suite.named(suite.folder_or_default(folder), name)
    finish({"record": found.record, "items": found.items[:items]}, describe.describe(found, items), json)


@suites.command("add")
def add_suite(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Items as JSONL, or an lm-evaluation-harness task.")],
    license: Annotated[str, typer.Option(help="Of the items, as SPDX names it.")],
    source: Annotated[str, typer.Option(help="Where the items come from.")],
    name: Annotated[str | None, typer.Option(help="Of the suite. [the file's, the task's]")] = None,
    kind: Annotated[
        Literal["choice", "cloze", "answer", "text", "chat"] | None, typer.Option(help="Of JSONL items.")
    ] = None,
    scoring: Annotated[
        Literal["per byte", "whole", "pmi"] | None, typer.Option(help="What options compete with. [per byte]")
    ] = None,
    neutral: Annotated[str | None, typer.Option(help="The prompt that asks for nothing, for pmi.")] = None,
    guards: Annotated[
        Literal["knowledge", "format", "safety", "stereotype"], typer.Option(help="Which margin applies.")
    ] = "knowledge",
    purpose: Annotated[Literal["retention", "drift"], typer.Option(help="drift: only KL to the base.")] = "retention",
    description: Annotated[str | None, typer.Option(help="In a few words.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A task's rows as JSONL. [what the task names]")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the suites are.")] = SUITES,
    json: Json = None,
) -> None:
    """Make a suite of your own items, or of a task of lm-evaluation-harness."""
    from pitstop.retention import adding

    said = {"description": description, "scoring": scoring, "neutral": neutral, "guards": guards, "purpose": purpose}
    told = {key: value for key, value in said.items() if value is not None}
    added = adding.add(file, to, name=name, kind=kind, data=data, license=license, source=source, **told)
    finish(added.record, f"{to / added.name}: {added.record.count} items", json)
