"""What a repair tried, what it chose and why: `repair.json`, and the same as a table."""

from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pitstop.errors import Refused
from pitstop.retention.gate import Criterion
from pitstop.retention.wording import TASK, TASK_SCORE, amount
from pitstop.workshop.repair.shapes import Step

Outcome = Literal["repaired", "passing", "refused"]


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the uniform scale that does the task as well, on the same items."""

    scale: float  # of the uniform one
    difference: float  # bits per byte: below zero, this candidate keeps more of the base
    upper: float | None  # one-sided bound, corrected for the number of methods compared; None: too few groups
    matched: bool  # whether it does the task as well, within the tolerance
    better: bool  # whether it is matched and the bound is below zero


@dataclass(frozen=True)
class Candidate:
    """One point of the search, measured on the search's items."""

    method: str
    words: str  # what was done before it was scaled
    steps: tuple[Step, ...]
    scale: float
    exact: float  # share of exact answers
    exact_kept: float  # share of the gain in it over the base
    answer_nats: float  # per token of the expected answers
    likelihood_kept: float  # share of the gain in that
    damage: float  # bits per byte more than the base needs for the suites' texts and right answers
    damage_lower: float | None  # one-sided bounds at the margins' confidence
    damage_upper: float | None
    kl: float | None  # to the base, nats per token
    keeps_task: bool
    likely: bool  # whether the gate would pass it on the verdict's items, were they like these
    against_uniform: Comparison | None = None


@dataclass(frozen=True)
class Look:
    """A candidate on the items that only the verdict sees."""

    method: str
    words: str
    scale: float
    criteria: tuple[Criterion, ...]
    retention_passes: bool
    exact: float
    exact_kept: float
    passes: bool  # retention and task, and enough of the task's gain is left


@dataclass(frozen=True)
class Repair:
    """`repair.json` in the run folder of the repaired adapter."""

    inputs: str
    outcome: Outcome  # passing: nothing to repair; refused: nothing passes and keeps the task, and nothing was written
    name: str  # of the adapter
    source: str  # run folder it came from
    run: str | None  # run folder it went to
    source_sha256: str  # of the weights
    adapter_sha256: str | None  # of the repaired weights
    keep: float  # share of the gain in exact answers that must be left
    tolerance: float  # share of the likelihood's gain by which candidates of one task score may differ
    base_exact: float  # on the search's rows, as is the next one
    source_exact: float
    search_items: int
    search_rows: int
    verdict_items: int
    verdict_rows: int
    candidates: tuple[Candidate, ...]
    looks: tuple[Look, ...]
    chosen: Look | None
    reasons: tuple[str, ...]  # in sentences, why it ended so
    seconds: float


def require_repaired(result: Repair) -> Repair:
    """Return the result, unless nothing could be repaired.

    Raises:
        Refused: with what came nearest.
    """
    if result.outcome == "refused":
        what, *rest = result.reasons
        cure = "train it again with more replay, a stronger KL anchor, a lower learning rate or fewer modules"
        if result.candidates:
            cure += f"; or accept less of the task: pitstop repair {result.source} --keep {result.keep - 0.05:.2f}"
        if any(one.outcome == "inconclusive" for look in result.looks for one in look.criteria):
            cure += "; or measure larger suites: what is undecided may be good enough"
        raise Refused("\n  - ".join((what, *rest)), where=result.source, cure=cure)
    return result


def print_table(result: Repair, console: Console | None = None) -> None:
    """Print every candidate, what was looked at on the verdict's items, and the choice."""
    console = console or Console()
    if result.candidates:
        console.print(_candidates(result))
    if result.looks:
        console.print(_looks(result))
    if result.outcome != "refused":
        for line in result.reasons:
            console.print(f"- {line}", highlight=False, markup=False)


def _candidates(result: Repair) -> Table:
    title = f"[bold]{escape(result.name)}[/]: what was tried, on {result.search_items:,} items of the suites and "
    title += f"{result.search_rows} rows of the task"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("scale", "kept", "exact", "damage", "KL", "beside uniform"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in sorted(result.candidates, key=lambda one: (one.method != "scale", one.method, -one.scale)):
        figures = (f"{one.scale:.3f}", f"{one.likelihood_kept:.1%}", f"{one.exact:.1%}", _bits(one.damage))
        kl = "" if one.kl is None else f"{one.kl:.3f}"
        style = "" if one.keeps_task else "dim"
        table.add_row(one.method, *figures, kl, _versus(one.against_uniform), style=style)
    table.caption = (
        "kept: share of the gain in the answers' likelihood; damage: bits per byte more than the base needs; beside "
        "uniform: its damage less that of the uniform scale which does the task as well (and the bound of that); dim: "
        "loses too much of the task"
    )
    table.caption_justify = "left"
    return table


def _versus(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    if not comparison.matched:
        return "task not matched"
    return f"{_bits(comparison.difference)} (≤ {_bits(comparison.upper)})"


def _looks(result: Repair) -> Table:
    title = f"on {result.verdict_items:,} items and {result.verdict_rows} rows that the search has not seen"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "scale", "exact", "gain kept", "gate", "nearest to its margin"):
        table.add_column(name, justify="left" if name in ("method", "nearest to its margin") else "right")
    for look in result.looks:
        gate = "[green]pass[/]" if look.retention_passes else "[red]no pass[/]"
        chosen = " ←" if look == result.chosen else ""
        figures = (f"{look.scale:.3f}", f"{look.exact:.1%}", f"{look.exact_kept:.1%}", gate + chosen)
        table.add_row(look.method, *figures, escape(nearest(look)))
    return table


def nearest(look: Look) -> str:
    """Return the criterion of retention whose bound uses most of its margin, in a few words."""
    judged = [one for one in look.criteria if one.outcome != "blind" and one.upper is not None and is_retention(one)]
    if not judged:
        return "no criterion has a bound: too few items"
    worst = max(judged, key=lambda one: (one.upper or 0.0) / one.margin)
    lost, margin = amount(worst.upper, worst.unit), amount(worst.margin, worst.unit, sign=False)
    return f"{worst.name}: drop surely less than {lost}, margin {margin}"


def is_retention(criterion: Criterion) -> bool:
    """Tell whether a criterion of the gate is about the base, and not about the task."""
    return criterion.name not in (TASK, TASK_SCORE)


def _bits(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"
