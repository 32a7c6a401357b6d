"""The table every benchmark prints, and the JSON it writes: pitstop and its peer side by side, medians and ratios."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pitstop
from pitstop.files import write_bytes


@dataclass(frozen=True)
class Row:
    """One figure."""

    figure: str
    ours: float  # median of the runs
    peer: float  # of what it is held against
    ratio: float  # ours ÷ peer
    unit: str  # of ours and peer
    runs: int
    goal: str = ""  # for the ratio, as the issue wants it


def row(figure: str, ours: Sequence[float], peer: Sequence[float], unit: str, goal: str = "") -> Row:
    """Return the row of two series of measurements, taken alternately."""
    one, other = statistics.median(ours), statistics.median(peer)
    return Row(figure, one, other, one / other, unit, min(len(ours), len(peer)), goal)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options.add_argument("--quick", action="store_true", help="few runs, under two minutes")
    return options


def header(packages: Iterable[str], **facts: Any) -> dict[str, Any]:
    """Return what the figures depend on besides the code: versions, the machine and the date."""
    return {
        "pitstop": pitstop.__version__,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def report(head: dict[str, Any], rows: Sequence[Row], target: Path | None) -> None:
    """Print the table; write header and rows as JSON if a file is named."""
    console = Console(width=None if os.isatty(1) else 150)
    for name, value in head.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    table = Table("figure", "unit")
    for title in ("ours", "peer", "ratio"):
        table.add_column(title, justify="right")
    table.add_column("wanted")
    for one in rows:
        table.add_row(one.figure, one.unit, f"{one.ours:,.2f}", f"{one.peer:,.2f}", f"{one.ratio:.2f}", one.goal)
    console.print(table)
    if target is not None:
        write_bytes(target, json.dumps([head, *map(asdict, rows)], indent=1, ensure_ascii=False).encode() + b"\n")
