"""The gate: paired results and margins to a verdict. Pure: no files, no engine, the same verdict for the same figures.

A criterion is a non-inferiority test. With one-sided confidence bounds of the drop (positive is worse):

    pass          the upper bound is below the margin: the adapter is surely not worse by as much as the margin
    fail          the lower bound is above the margin: it surely is
    inconclusive  neither; more items would tell. "No significant difference" is this, never a pass

To pass, every criterion must pass; each is tested at the full level, for a bad adapter must slip through all of them
at once (intersection-union test). To fail, one is enough; so failing is corrected for the number of criteria (Holm).
A suite the base itself answers hardly better than by guessing cannot show forgetting: it is blind, and does not count.
Of stereotypes no drift is wanted, up or down: such a suite passes if the drop surely lies between the margin and its
negative (two one-sided tests), and fails if it surely lies beyond either.

Items are measured in looks, each of which may end with a verdict; so each must be surer than all together (`looks`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from pitstop.retention.looks import confidences
from pitstop.retention.margins import Margins, check_margins
from pitstop.retention.paired import Drop, Paired, check_paired
from pitstop.retention.suite import Ability
from pitstop.retention.wording import TASK, TASK_SCORE, advice, blind_words, warnings, words

Outcome = Literal["pass", "fail", "inconclusive"]
CriterionOutcome = Literal["pass", "fail", "inconclusive", "blind"]
Unit = Literal["accuracy", "bits per byte"]

SEEING = 0.1  # least share of the way from guessing to perfect that the base must have gone
POWER = 0.8  # of a test with the number of items that is asked for
ABSURD = 50  # times the items there are: more is not worth asking for
ALL_CHOICES = "all knowledge suites"


@dataclass(frozen=True)
class Criterion:
    """One test of the gate. The bounds are one-sided, each at the confidence of the look."""

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
    two_sided: bool = False  # a rise by as much as the margin is no better than a drop
    guards: Ability = "knowledge"


@dataclass(frozen=True)
class Verdict:
    """What the gate says, why, and what to do next."""

    outcome: Outcome
    criteria: tuple[Criterion, ...]
    reasons: tuple[str, ...]  # the words of what stands between the adapter and a pass
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    confidence: float  # of each one-sided bound, at this look


@dataclass(frozen=True)
class _Test:
    """A criterion before the family it belongs to is known."""

    name: str
    pairs: tuple[Paired, ...]
    margin: float
    two_sided: bool = False


def gate(
    suites: Sequence[Paired],
    task: Paired | None,
    drift: Mapping[str, float],
    margins: Margins | None = None,
    *,
    look: int = 0,
) -> Verdict:
    """Judge an adapter by its paired results.

    Args:
        suites: retention suites.
        task: exact answers on held-out rows of the adapter's own task; None if there are none.
        drift: mean KL to the base by name of the probe, nats per token; only ever warns.
        margins: the defaults if not given.
        look: which of the margins' looks this is, from 1; 0 if everything is looked at once.

    Raises:
        RecordError: margins out of range.
        BrokenInput: results that cannot be judged (no items, figures that are not finite).
    """
    margins = check_margins(margins or Margins())
    for pair in [*suites, *([task] if task else [])]:
        check_paired(pair)
    sure = confidences(margins.looks, margins.confidence)[look - 1] if look else margins.confidence
    blind = [suite for suite in suites if not sees(suite)]
    seeing = [suite for suite in suites if sees(suite)]
    criteria = [*_judge(_tests(seeing, task, margins), margins, sure), *(_blind(suite, margins) for suite in blind)]
    missing = _missing(seeing, blind, task)
    outcomes = {criterion.outcome for criterion in criteria}
    outcome: Outcome = "pass"
    if "fail" in outcomes:
        outcome = "fail"
    elif "inconclusive" in outcomes or missing:
        outcome = "inconclusive"
    reasons = [item.words for item in criteria if item.outcome in ("fail", "inconclusive")] + missing
    said = warnings(drift, blind, margins)
    return Verdict(outcome, tuple(criteria), tuple(reasons), said, advice(criteria, missing), sure)


def visible(suite: Paired) -> float:
    """Return how far the base is from guessing towards perfect on a choice suite: 0 none of the way, 1 all of it."""
    chance = suite.chance or 0.0
    return max((suite.score[0] - chance) / (1.0 - chance), 0.0)


def sees(suite: Paired) -> bool:
    """Return whether a suite could show that something was forgotten; drift of stereotypes shows at any level."""
    return suite.kind != "choice" or suite.guards == "stereotype" or visible(suite) >= SEEING


def _tests(seeing: Sequence[Paired], task: Paired | None, margins: Margins) -> list[_Test]:
    knowledge = tuple(suite for suite in seeing if suite.kind == "choice" and suite.guards == "knowledge")
    tests = [_Test(ALL_CHOICES, knowledge, margins.accuracy)] if knowledge else []
    tests += [
        _Test(suite.name, (suite,), margins.of(suite.kind, suite.guards), suite.guards == "stereotype")
        for suite in seeing
    ]
    if task is not None:
        tests.append(_Test(TASK, (task,), 0.0))
        if margins.min_task_score is not None:
            # Against a perfect baseline the drop is what is missing to perfect, and its margin what may be missing.
            perfect = dataclasses.replace(task, baseline=(1.0,) * len(task.baseline))
            tests.append(_Test(TASK_SCORE, (perfect,), 1.0 - margins.min_task_score))
    return tests


def _judge(tests: Sequence[_Test], margins: Margins, sure: float) -> list[Criterion]:
    drops = [Drop(test.pairs, resamples=margins.resamples, seed=margins.seed) for test in tests]
    failed = holm([_p_worse(drop, test) for drop, test in zip(drops, tests, strict=True)], 1.0 - sure)
    return [
        _criterion(test, drop, surely_worse, sure, family=len(tests))
        for test, drop, surely_worse in zip(tests, drops, failed, strict=True)
    ]


def _p_worse(drop: Drop, test: _Test) -> float:
    """Return the p-value of "no more than the margin": of two tails at most one can be true, so none is doubled."""
    above = drop.p_above(test.margin)
    return min(above, drop.p_below(-test.margin)) if test.two_sided else above


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


def _criterion(test: _Test, drop: Drop, surely_worse: bool, sure: float, *, family: int) -> Criterion:
    lower, upper = drop.lower(sure), drop.upper(sure)
    outcome: CriterionOutcome = "inconclusive"
    within = lower is not None and lower > -test.margin if test.two_sided else True
    if upper is not None and upper < test.margin and within:
        outcome = "pass"
    elif surely_worse:
        outcome = "fail"
    needed = _needed(drop, upper, lower, test, sure, family) if outcome == "inconclusive" else None
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
        two_sided=test.two_sided,
        guards=test.pairs[0].guards,
    )
    return dataclasses.replace(criterion, words=words(criterion, enough=drop.enough))


def _scores(pairs: Sequence[Paired]) -> tuple[float, float]:
    total = math.fsum(weight for pair in pairs for weight in pair.weights)
    baseline = math.fsum(value for pair in pairs for value in pair.baseline) / total
    return baseline, math.fsum(value for pair in pairs for value in pair.adapted) / total


def _needed(drop: Drop, upper: float | None, lower: float | None, test: _Test, sure: float, family: int) -> int | None:
    """Return how many items would decide, were the drop and its spread as measured."""
    if upper is None or lower is None:
        return None
    value = abs(drop.value) if test.two_sided else drop.value
    towards_pass = value < test.margin
    z = NormalDist().inv_cdf(sure)
    error = ((upper - drop.value) if towards_pass else (drop.value - lower)) / z
    level = sure if towards_pass else 1.0 - (1.0 - sure) / family
    reach = (NormalDist().inv_cdf(level) + NormalDist().inv_cdf(POWER)) * error
    gap = abs(test.margin - value)
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
        margin=margins.of(suite.kind, suite.guards),
        items=len(suite.groups),
        groups=len(set(suite.groups)),
        needed=None,
        words=blind_words(suite),
        guards=suite.guards,
    )


def _missing(seeing: Sequence[Paired], blind: Sequence[Paired], task: Paired | None) -> list[str]:
    missing = []
    if not seeing:
        missing.append("retention: no suite that could show forgetting was measured")
    elif blind and not any(suite.kind == "choice" and suite.guards == "knowledge" for suite in seeing):
        missing.append("retention: every choice suite is blind for this base")
    if task is None:
        missing.append("task: it was not measured, so a do-nothing adapter would look perfect")
    return missing
