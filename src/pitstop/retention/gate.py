"""The gate: paired results and margins to a verdict. Pure: no files, no engine, the same verdict for the same figures.

A criterion is a non-inferiority test. With one-sided confidence bounds of the drop (positive is worse):

    pass          the upper bound is below the margin: the adapter is surely not worse by as much as the margin
    fail          the lower bound is above the margin: it surely is
    inconclusive  neither; more items would tell. "No significant difference" is this, never a pass

To pass, every criterion must pass; each is tested at the full level, for a bad adapter must slip through all of them
at once (intersection-union test). To fail, one is enough; so failing is corrected for the number of criteria (Holm).
A suite the base itself answers hardly better than by guessing cannot show forgetting: it is blind, and does not count.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from pitstop.errors import RecordError
from pitstop.retention.paired import LEAST_GROUPS, Drop, Paired, check_paired

Outcome = Literal["pass", "fail", "inconclusive"]
CriterionOutcome = Literal["pass", "fail", "inconclusive", "blind"]
Unit = Literal["accuracy", "bits per byte"]

SEEING = 0.1  # least share of the way from guessing to perfect that the base must have gone
POWER = 0.8  # of a test with the number of items that is asked for
ABSURD = 50  # times the items there are: more is not worth asking for
ALL_CHOICES = "all choice suites"
TASK = "task beats the base"
TASK_SCORE = "task score"


@dataclass(frozen=True)
class Margins:
    """How much an adapter may lose, and how sure the gate must be: the `[check]` table of a recipe."""

    accuracy: float = 0.03  # drop of the accuracy over all choice suites together; a fraction, 0.03 is 3 points
    suite_accuracy: float = 0.10  # drop of the accuracy of any one choice suite; a fraction
    bits_per_byte: float = 0.05  # rise of any one text suite; bits per byte
    min_task_score: float | None = None  # share of exact answers that must surely be reached; a fraction
    kl_warn: float = 0.05  # KL to the base above which the report warns; nats per token
    confidence: float = 0.95  # of each one-sided bound; a fraction
    resamples: int = 4000  # of the bootstrap
    seed: int = 0  # of the bootstrap


@dataclass(frozen=True)
class Criterion:
    """One test of the gate. The bounds are one-sided, each at the confidence of the margins."""

    name: str
    outcome: CriterionOutcome
    unit: Unit
    baseline: float
    adapted: float
    drop: float  # positive is worse
    lower: float | None  # None: no bound to be had
    upper: float | None
    margin: float
    items: int
    groups: int
    needed: int | None  # items that would decide an inconclusive one, 4 times out of 5; None: no sensible number
    words: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says, why, and what to do next."""

    outcome: Outcome
    criteria: tuple[Criterion, ...]
    reasons: tuple[str, ...]  # the words of what stands between the adapter and a pass
    warnings: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class _Test:
    """A criterion before the family it belongs to is known."""

    name: str
    pairs: tuple[Paired, ...]
    margin: float


def check_margins(margins: Margins, *, where: object = None) -> Margins:
    """Return the margins if a gate can work with them.

    Raises:
        RecordError: everything that is out of range, at once.
    """
    problems = []
    for name in ("accuracy", "suite_accuracy", "bits_per_byte", "kl_warn"):
        value = getattr(margins, name)
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{name}: {value} must be above 0")
    for name in ("accuracy", "suite_accuracy"):
        if getattr(margins, name) >= 1:
            problems.append(f"{name}: {getattr(margins, name)} must be below 1; it is a fraction, 0.03 is 3 points")
    if margins.min_task_score is not None and not 0 < margins.min_task_score < 1:
        problems.append(f"min_task_score: {margins.min_task_score} must be between 0 and 1; it is a fraction")
    if not 0.5 < margins.confidence < 1:
        problems.append(f"confidence: {margins.confidence} must be between 0.5 and 1")
    if margins.resamples < 1000:
        problems.append(f"resamples: {margins.resamples} must be 1000 or more")
    if margins.seed < 0:
        problems.append(f"seed: {margins.seed} must be 0 or more")
    if problems:
        raise RecordError(problems, where=where)
    return margins


def gate(
    suites: Sequence[Paired], task: Paired | None, drift: Mapping[str, float], margins: Margins | None = None
) -> Verdict:
    """Judge an adapter by its paired results.

    Args:
        suites: retention suites of kind choice and text.
        task: exact answers on held-out rows of the adapter's own task; None if there are none.
        drift: mean KL to the base by name of the probe, nats per token; only ever warns.
        margins: the defaults if not given.

    Raises:
        RecordError: margins out of range.
        BrokenInput: results that cannot be judged (no items, figures that are not finite).
    """
    margins = check_margins(margins or Margins())
    for pair in [*suites, *([task] if task else [])]:
        check_paired(pair)
    blind = [suite for suite in suites if suite.kind == "choice" and visible(suite) < SEEING]
    seeing = [suite for suite in suites if suite not in blind]
    tests = _tests(seeing, task, margins)
    criteria = [*_judge(tests, margins), *(_blind(suite, margins) for suite in blind)]
    missing = _missing(seeing, blind, task)
    outcomes = {criterion.outcome for criterion in criteria}
    outcome: Outcome = "pass"
    if "fail" in outcomes:
        outcome = "fail"
    elif "inconclusive" in outcomes or missing:
        outcome = "inconclusive"
    reasons = [item.words for item in criteria if item.outcome in ("fail", "inconclusive")] + missing
    return Verdict(
        outcome, tuple(criteria), tuple(reasons), _warnings(drift, blind, margins), _advice(criteria, missing)
    )


def visible(suite: Paired) -> float:
    """Return how far the base is from guessing towards perfect on a choice suite: 0 none of the way, 1 all of it."""
    chance = suite.chance or 0.0
    return max((suite.score[0] - chance) / (1.0 - chance), 0.0)


def _tests(seeing: Sequence[Paired], task: Paired | None, margins: Margins) -> list[_Test]:
    choices = tuple(suite for suite in seeing if suite.kind == "choice")
    tests = [_Test(ALL_CHOICES, choices, margins.accuracy)] if choices else []
    tests += [_Test(suite.name, (suite,), margins.suite_accuracy) for suite in choices]
    tests += [_Test(suite.name, (suite,), margins.bits_per_byte) for suite in seeing if suite.kind == "text"]
    if task is not None:
        tests.append(_Test(TASK, (task,), 0.0))
        if margins.min_task_score is not None:
            # Against a perfect baseline the drop is what is missing to perfect, and its margin what may be missing.
            perfect = dataclasses.replace(task, baseline=(1.0,) * len(task.baseline))
            tests.append(_Test(TASK_SCORE, (perfect,), 1.0 - margins.min_task_score))
    return tests


def _judge(tests: Sequence[_Test], margins: Margins) -> list[Criterion]:
    drops = [Drop(test.pairs, resamples=margins.resamples, seed=margins.seed) for test in tests]
    failed = holm(
        [drop.p_above(test.margin) for drop, test in zip(drops, tests, strict=True)], 1.0 - margins.confidence
    )
    return [
        _criterion(test, drop, surely_worse, margins, family=len(tests))
        for test, drop, surely_worse in zip(tests, drops, failed, strict=True)
    ]


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Return which hypotheses are rejected so that any false rejection at all has at most this probability.

    Holm's step-down (Scandinavian Journal of Statistics 6, 1979, 65-70).
    """
    rejected = [False] * len(p_values)
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        if p_values[at] > level / (len(p_values) - rank):
            break
        rejected[at] = True
    return rejected


def _criterion(test: _Test, drop: Drop, surely_worse: bool, margins: Margins, *, family: int) -> Criterion:
    lower, upper = drop.lower(margins.confidence), drop.upper(margins.confidence)
    outcome: CriterionOutcome = "inconclusive"
    if upper is not None and upper < test.margin:
        outcome = "pass"
    elif surely_worse:
        outcome = "fail"
    needed = _needed(drop, upper, lower, test.margin, margins, family) if outcome == "inconclusive" else None
    baseline, adapted = _scores(test.pairs)
    criterion = Criterion(
        name=test.name,
        outcome=outcome,
        unit="accuracy" if drop.binary else "bits per byte",
        baseline=baseline,
        adapted=adapted,
        drop=drop.value,
        lower=lower,
        upper=upper,
        margin=test.margin,
        items=drop.items,
        groups=drop.groups,
        needed=needed,
        words="",
    )
    return dataclasses.replace(criterion, words=_words(criterion, enough=drop.enough))


def _scores(pairs: Sequence[Paired]) -> tuple[float, float]:
    total = math.fsum(weight for pair in pairs for weight in pair.weights)
    baseline = math.fsum(value for pair in pairs for value in pair.baseline) / total
    return baseline, math.fsum(value for pair in pairs for value in pair.adapted) / total


def _needed(
    drop: Drop, upper: float | None, lower: float | None, margin: float, margins: Margins, family: int
) -> int | None:
    """Return how many items would decide, were the drop and its spread as measured."""
    if upper is None or lower is None:
        return None
    towards_pass = drop.value < margin
    z = NormalDist().inv_cdf(margins.confidence)
    error = ((upper - drop.value) if towards_pass else (drop.value - lower)) / z
    level = margins.confidence if towards_pass else 1.0 - (1.0 - margins.confidence) / family
    reach = (NormalDist().inv_cdf(level) + NormalDist().inv_cdf(POWER)) * error
    gap = abs(margin - drop.value)
    if gap == 0 or (reach / gap) ** 2 > ABSURD:
        return None
    return max(math.ceil(drop.items * (reach / gap) ** 2), drop.items + 1)


def _blind(suite: Paired, margins: Margins) -> Criterion:
    baseline, adapted = suite.score
    return Criterion(
        name=suite.name,
        outcome="blind",
        unit="accuracy",
        baseline=baseline,
        adapted=adapted,
        drop=baseline - adapted,
        lower=None,
        upper=None,
        margin=margins.suite_accuracy,
        items=len(suite.groups),
        groups=len(set(suite.groups)),
        needed=None,
        words=f"{suite.name}: blind. The base itself has {baseline:.1%} where guessing gives {suite.chance or 0:.1%}, "
        "so there is nothing here that could be forgotten; it does not count",
    )


def _words(criterion: Criterion, *, enough: bool) -> str:
    said = f"{criterion.name}: {_measured(criterion)}"
    if criterion.outcome == "pass":
        return f"{said}; {_promise(criterion)}"
    if criterion.outcome == "fail":
        return f"{said}; {_failure(criterion)}"
    if not enough:
        return f"{said}; too few groups to judge ({criterion.groups}, at least {LEAST_GROUPS} are needed)"
    if criterion.name == TASK and criterion.drop >= 0:
        return f"{said}; no better than the base"
    if criterion.needed is None:
        return f"{said}; too close to its limit to decide with any sensible number of items"
    return f"{said}; not decided by {criterion.items:,} items, about {criterion.needed:,} would (4 times out of 5)"


def _measured(criterion: Criterion) -> str:
    if criterion.name == TASK_SCORE:
        low = "?" if criterion.upper is None else f"{1 - criterion.upper:.1%}"
        high = "?" if criterion.lower is None else f"{1 - criterion.lower:.1%}"
        return f"{criterion.adapted:.1%} exact (bounds {low} to {high}), asked for {1 - criterion.margin:.1%}"
    if criterion.unit == "accuracy":
        scores = f"{criterion.baseline:.1%} → {criterion.adapted:.1%}"
    else:
        scores = f"{criterion.baseline:.3f} → {criterion.adapted:.3f} bits per byte"
    bounds = f"bounds {amount(criterion.lower, criterion.unit)} to {amount(criterion.upper, criterion.unit)}"
    return f"{scores}, drop {amount(criterion.drop, criterion.unit)} ({bounds})"


def _promise(criterion: Criterion) -> str:
    if criterion.name == TASK:
        return "surely better than the base"
    if criterion.name == TASK_SCORE:
        return "surely reached"
    return f"surely less than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"


def _failure(criterion: Criterion) -> str:
    if criterion.name == TASK:
        return "surely worse than the base"
    if criterion.name == TASK_SCORE:
        return "surely not reached"
    return f"surely more than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"


def amount(value: float | None, unit: Unit, *, sign: bool = True) -> str:
    """Return a drop in the unit people read it in: points of accuracy, or bits per byte."""
    if value is None:
        return "?"
    shown = value * 100 if unit == "accuracy" else value
    digits = 1 if unit == "accuracy" else 3
    text = f"{shown + 0.0:+.{digits}f}" if sign else f"{shown:.{digits}f}"
    return f"{text} points" if unit == "accuracy" else f"{text} bits per byte"


def _missing(seeing: Sequence[Paired], blind: Sequence[Paired], task: Paired | None) -> list[str]:
    missing = []
    if not seeing:
        missing.append("retention: no suite that could show forgetting was measured")
    elif blind and not any(suite.kind == "choice" for suite in seeing):
        missing.append("retention: every choice suite is blind for this base")
    if task is None:
        missing.append("task: it was not measured, so a do-nothing adapter would look perfect")
    return missing


def _warnings(drift: Mapping[str, float], blind: Sequence[Paired], margins: Margins) -> tuple[str, ...]:
    found = [
        f"{name}: KL to the base is {value:.3f} nats per token, above {margins.kl_warn:g}: the model changed where the "
        "task does not need it; look closely even if the suites pass"
        for name, value in drift.items()
        if not value <= margins.kl_warn
    ]
    return (*found, *(f"{suite.name} is blind for this base and was not counted" for suite in blind))


def _advice(criteria: Sequence[Criterion], missing: Sequence[str]) -> tuple[str, ...]:
    kept = [criterion for criterion in criteria if criterion.name not in (TASK, TASK_SCORE)]
    task = [criterion for criterion in criteria if criterion.name in (TASK, TASK_SCORE)]
    advice = []
    if any(criterion.outcome == "fail" for criterion in kept):
        advice.append(
            "it forgets: try a smaller scale first, then train again with more replay, a stronger KL anchor, a lower "
            "learning rate or fewer modules"
        )
    if any(criterion.outcome == "inconclusive" for criterion in kept):
        advice.append(
            "retention is undecided: measure larger suites, or reduce the drop as for an adapter that forgets"
        )
    if any(criterion.outcome != "pass" for criterion in task):
        advice.append("the task is not surely learned: train longer or on more rows, or hold out more rows to be sure")
    if any(line.startswith("retention") for line in missing):
        advice.append("add suites this base is clearly better at than guessing, or text suites")
    if any(line.startswith("task") for line in missing):
        advice.append("hold out rows of the task and measure them")
    return tuple(advice) or (
        "make what ships of it (pitstop export, or merge), compare the two (pitstop parity), and pack it",
    )
