"""Progress a person can read: a bar with rate and time left on a terminal, plain lines elsewhere, or nothing."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between plain lines
_quiet = False


class Advance(Protocol):
    """Tells how much was done, and what is worth reading beside the bar."""

    def __call__(self, done: float = 1, note: str = "") -> None: ...


def be_quiet(quiet: bool = True) -> None:
    """Switch every later progress off (for --json) or on."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether nothing is shown: what is only to be read need not be found out."""
    return _quiet


def say(text: str) -> None:
    """Print a line beside the progress, on standard error."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress of what is done meanwhile: it is part of something that shows its own."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


@contextmanager
def progress(what: str, total: float, unit: str) -> Iterator[Advance]:
    """Show the progress of one piece of work of ``total`` units on standard error."""
    if _quiet:
        yield lambda done=1, note="": None
    elif os.environ.get("PITSTOP_PROGRESS") == "events":
        yield from _events(what, total, unit)
    elif sys.stderr.isatty():
        yield from _bar(what, total, unit)
    else:
        yield from _lines(what, total, unit)


def _bar(what: str, total: float, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(what, total=total, note="", rate="")

        def advance(done: float = 1, note: str = "") -> None:
            bar.advance(task, done)
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            bar.update(task, note=note, rate=f"{speed:,.1f}/s" if speed else "")

        yield advance


def _events(what: str, total: float, unit: str) -> Iterator[Advance]:
    count = 0.0

    def advance(done: float = 1, note: str = "") -> None:
        nonlocal count
        count += done
        event = {"progress": what, "done": count, "total": total, "unit": unit, "note": note}
        print(json.dumps(event), file=sys.stderr, flush=True)

    yield advance


def _lines(what: str, total: float, unit: str) -> Iterator[Advance]:
    begun = shown = time.monotonic()
    count = 0.0

    def advance(done: float = 1, note: str = "") -> None:
        nonlocal count, shown
        count += done
        now = time.monotonic()
        if now - shown >= LINE_EVERY:
            shown = now
            rate = count / (now - begun)
            left = (total - count) / rate if rate else 0.0
            print(
                f"{what}: {count:,.0f}/{total:,.0f} {unit}, {rate:,.1f} {unit}/s, {left:,.0f} s left  {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield advance
    print(f"{what}: {count:,.0f} {unit} in {time.monotonic() - begun:,.1f} s", file=sys.stderr, flush=True)
