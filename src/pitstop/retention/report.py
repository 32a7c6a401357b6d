"""The retention report: every figure behind a verdict, enough to judge again, as JSON, a page and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pitstop.engines.base import Engine
from pitstop.errors import UsageError
from pitstop.files import write_bytes
from pitstop.retention.drift import Drift, ScalePoint
from pitstop.retention.flips import Flips, flips
from pitstop.retention.gate import Criterion, Verdict, gate
from pitstop.retention.margins import Margins
from pitstop.retention.measure import SuiteResult, pair_all
from pitstop.retention.page import page
from pitstop.retention.paired import Paired
from pitstop.retention.suite import Kind, Suite
from pitstop.retention.task import Metric, TaskResult, pair_task
from pitstop.retention.wording import amount, looked

FORMAT = 2  # of the JSON
LIBRARIES = (
    "pitstop",
    "numpy",
    "llama-cpp-python",
    "onnxruntime",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "peft",
)


@dataclass(frozen=True)
class SuiteSummary:
    """Where a suite comes from and what it gave."""

    name: str
    kind: Kind
    digest: str
    license: str
    source: str
    items: int  # measured
    excluded: int  # did not fit the context, or held nothing to score
    chance: float | None
    baseline: float  # accuracy (a fraction) or bits per byte
    adapted: float
    baseline_margin: float | None  # choice: mean of the right option over the best wrong one, nats (per byte)
    adapted_margin: float | None  # moves before accuracy does
    flips: Flips | None  # answers that changed; None for texts
    trained_on: int = 0  # items that were set aside, for they stand in the training rows


@dataclass(frozen=True)
class TaskScores:
    """The task under one adapter, or none; all but the counts are fractions."""

    rows: int
    excluded: int
    exact: float
    parse_rate: float
    precision: float
    recall: float
    f1: float
    off: float | None = None  # of numbers: median distance to the expected one, in its own unit
    calibration_error: float | None = None  # of classes


@dataclass(frozen=True)
class TaskSummary:
    """The task without and with the adapter."""

    metric: Metric
    baseline: TaskScores
    adapted: TaskScores


@dataclass(frozen=True)
class RetentionReport:
    """`retention.json`: what was measured, on which bytes, and what the gate said."""

    format: int
    adapter: str  # its name
    adapter_sha256: str
    scale: float
    inputs: str  # digest of everything that decided the figures, given by whoever measured; may be empty
    base_sha256: str
    engine: str
    versions: dict[str, str]  # of the libraries installed where it was measured
    suites: tuple[SuiteSummary, ...]
    drift: tuple[Drift, ...]
    task: TaskSummary | None
    margins: Margins
    verdict: Verdict
    paired: tuple[Paired, ...]  # per item: what the gate judged
    paired_task: Paired | None
    look: int = 0  # which of the margins' looks decided, from 1; 0: everything was looked at once
    curve: tuple[ScalePoint, ...] = ()  # what a smaller scale would do; none: the adapter has one scale
    displacement: float | None = None  # F_delta: mean |dW x| / |x| on general text; None: the engine cannot tell
    artifact_sha256: str | None = None  # of the file that ships, if that was measured; None: the trained adapter


@dataclass(frozen=True)
class Measured:
    """Everything the measurements gave, before the verdict."""

    suites: Sequence[Suite]
    base: Sequence[SuiteResult]
    adapted: Sequence[SuiteResult]
    drift: Sequence[Drift]
    task_base: TaskResult | None = None
    task_adapted: TaskResult | None = None
    curve: Sequence[ScalePoint] = ()


def make_report(
    engine: Engine,
    measured: Measured,
    *,
    adapter: str,
    adapter_sha256: str,
    scale: float = 1.0,
    margins: Margins | None = None,
    inputs: str = "",
    look: int = 0,
    displacement: float | None = None,
    artifact_sha256: str | None = None,
) -> RetentionReport:
    """Judge what was measured, and write down what it was measured on.

    Args:
        adapter_sha256: digest of the trained weights.
        look: which of the margins' looks this is, from 1; 0 if everything is looked at once.
        displacement: F_delta on general text, if it was measured.
        artifact_sha256: digest of the file that was loaded, if it was made from them to be shipped.

    Raises:
        UsageError: measurements of different suites, rows, bases or engines.
        BrokenInput, RecordError: as for `gate`.
    """
    margins = margins or Margins()
    if any(result.base_sha256 != engine.base_sha256 for result in (*measured.base, *measured.adapted)):
        raise UsageError("the results were measured on another base than this engine's", cure="measure them again")
    paired = pair_all(measured.base, measured.adapted)
    paired_task = None
    if measured.task_base is not None and measured.task_adapted is not None:
        paired_task = pair_task(measured.task_base, measured.task_adapted)
    drift = tuple(measured.drift)
    return RetentionReport(
        format=FORMAT,
        adapter=adapter,
        adapter_sha256=adapter_sha256,
        scale=scale,
        inputs=inputs,
        base_sha256=engine.base_sha256,
        engine=engine.name,
        versions=_versions(),
        suites=_summaries(measured, paired),
        drift=drift,
        task=_task_summary(measured.task_base, measured.task_adapted),
        margins=margins,
        verdict=gate(paired, paired_task, {probe.suite: probe.mean for probe in drift}, margins, look=look),
        paired=paired,
        paired_task=paired_task,
        look=look,
        curve=tuple(measured.curve),
        displacement=displacement,
        artifact_sha256=artifact_sha256,
    )


def regate(report: RetentionReport) -> Verdict:
    """Judge the report's own figures again; a report whose verdict differs was tampered with, or is of another pitstop.

    Raises:
        BrokenInput, RecordError: as for `gate`.
    """
    drift = {probe.suite: probe.mean for probe in report.drift}
    return gate(report.paired, report.paired_task, drift, report.margins, look=report.look)


def write_html(report: RetentionReport, path: Path) -> None:
    """Write the report as one page that needs nothing else, not even a network.

    Raises:
        StorageError: the disk refused.
    """
    write_bytes(path, page(report).encode())


def print_table(report: RetentionReport, console: Console | None = None) -> None:
    """Print the verdict and every criterion."""
    console = console or Console()
    verdict = report.verdict
    color = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
    title = f"[bold]{escape(report.adapter)}: [{color[verdict.outcome]}]{verdict.outcome}[/]"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("criterion")
    for name in ("base", "adapted", "drop", "bounds", "margin"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for criterion in verdict.criteria:
        outcome = f"[{color.get(criterion.outcome, 'dim')}]{criterion.outcome}[/]"
        table.add_row(*map(escape, _cells(criterion)), outcome)
    console.print(table)
    if report.look:
        sure = f"bounds are one-sided, each with {verdict.confidence:.1%} confidence"
        console.print(f"{looked(report.look, report.margins)}; {sure}", highlight=False)
    for summary in report.suites:
        if summary.flips is not None and summary.flips.churn:
            found = summary.flips
            said = f"{found.forgotten:.1%} of the items forgotten ({found.truly_forgotten:.1%} beyond chance)"
            console.print(f"{summary.name}: {said}, {found.gained:.1%} gained", highlight=False, markup=False)
    for suite in report.suites:
        if suite.trained_on:
            said = f"{suite.trained_on} items stand in the training rows and do not count"
            console.print(f"{suite.name}: {said}", highlight=False, markup=False)
    for probe in report.drift:
        console.print(f"KL to the base, {probe.suite}: {probe.mean:.3f} nats per token", highlight=False)
    for point in report.curve:
        unlearned = "" if point.task is None else f", loss on the task's answers {point.task:.3f}"
        said = f"at {point.scale:g} of its scale: KL to the base {point.kl:.3f}{unlearned} nats per token"
        console.print(said, highlight=False)
    if report.displacement is not None:
        console.print(f"F_delta on general text: {report.displacement:.3f}", highlight=False)
    if report.task is not None:
        console.print(f"task: {_task_words(report.task)}", highlight=False)
    for line in (*verdict.warnings, *verdict.reasons, *verdict.advice):
        console.print(f"- {line}", highlight=False, markup=False)


def _task_words(task: TaskSummary) -> str:
    old, new = task.baseline, task.adapted
    said = [f"exact {old.exact:.1%} → {new.exact:.1%}"]
    if task.metric == "json":
        said += [f"field F1 {old.f1:.1%} → {new.f1:.1%}", f"parsed {old.parse_rate:.1%} → {new.parse_rate:.1%}"]
    if new.off is not None:
        said.append(f"typically off by {new.off:g} (base: {'no number' if old.off is None else f'{old.off:g}'})")
    if old.calibration_error is not None and new.calibration_error is not None:
        said.append(f"calibration error {old.calibration_error:.1%} → {new.calibration_error:.1%}")
    return ", ".join(said)


def _cells(criterion: Criterion) -> list[str]:
    unit = criterion.unit
    score = "{:.1%}" if unit == "accuracy" else "{:.3f}"
    short = {"accuracy": " points", "bits per byte": " bits per byte"}[unit]
    figures = [amount(value, unit).removesuffix(short) for value in (criterion.drop, criterion.lower, criterion.upper)]
    return [
        criterion.name,
        score.format(criterion.baseline),
        score.format(criterion.adapted),
        figures[0],
        f"{figures[1]} … {figures[2]}",
        amount(criterion.margin, unit, sign=False).removesuffix(short),
    ]


def _summaries(measured: Measured, paired: Sequence[Paired]) -> tuple[SuiteSummary, ...]:
    records = {suite.name: suite.record for suite in measured.suites}
    found = []
    for base, adapted, pair in zip(measured.base, measured.adapted, paired, strict=True):
        record = records[base.suite]
        found.append(
            SuiteSummary(
                name=record.name,
                kind=record.kind,
                digest=record.items_sha256,
                license=record.license,
                source=record.source,
                items=len(pair.groups),
                excluded=len(base.excluded),
                chance=record.chance,
                baseline=pair.score[0],
                adapted=pair.score[1],
                baseline_margin=_margin(base),
                adapted_margin=_margin(adapted),
                flips=flips(pair) if pair.kind == "choice" else None,
                trained_on=len(base.trained_on),
            )
        )
    return tuple(found)


def _margin(result: SuiteResult) -> float | None:
    if not result.choices or result.kind == "answer":  # an answer that was made has no rival
        return None
    return float(np.mean([choice.margin for choice in result.choices]))


def _task_summary(base: TaskResult | None, adapted: TaskResult | None) -> TaskSummary | None:
    if base is None or adapted is None:
        return None
    return TaskSummary(base.metric, _task_scores(base), _task_scores(adapted))


def _task_scores(result: TaskResult) -> TaskScores:
    return TaskScores(
        rows=len(result.answers),
        excluded=len(result.excluded),
        exact=result.exact,
        parse_rate=result.parse_rate,
        precision=result.precision,
        recall=result.recall,
        f1=result.f1,
        off=result.off,
        calibration_error=result.calibration_error,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
