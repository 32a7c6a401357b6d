"""What the gate's figures mean, in words: of each criterion, of the whole verdict, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pitstop.retention.paired import LEAST_GROUPS
from pitstop.retention.tripwire import level

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pitstop.retention.gate import Criterion, Unit
    from pitstop.retention.margins import Margins
    from pitstop.retention.paired import Paired

TASK = "task beats the base"
TASK_SCORE = "task score"


def words(criterion: Criterion, *, enough: bool) -> str:
    """Say what was measured, and what follows from it."""
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


def misleads(suite: Paired) -> bool:
    """Return whether a suite is known to rise with forgetting.

    TruthfulQA does: over 1,035 LoRA runs its score was the higher, the more else was forgotten (UIOrthoLoRA).
    """
    return "truthfulqa" in suite.name.lower().replace("_", "").replace("-", "")


def blind_words(suite: Paired) -> str:
    """Say why a suite does not count."""
    if misleads(suite):
        return f"{suite.name}: TruthfulQA rises the more a model forgets, so it says nothing here; it does not count"
    return (
        f"{suite.name}: blind. The base itself has {suite.score[0]:.1%} where guessing gives {suite.chance or 0:.1%}, "
        "so there is nothing here that could be forgotten; it does not count"
    )


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
    if criterion.two_sided:
        return f"surely moved by less than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"
    return f"surely less than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"


def _failure(criterion: Criterion) -> str:
    if criterion.name == TASK:
        return "surely worse than the base"
    if criterion.name == TASK_SCORE:
        return "surely not reached"
    if criterion.two_sided:
        return f"surely moved by more than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"
    return f"surely more than its margin of {amount(criterion.margin, criterion.unit, sign=False)}"


def looked(look: int, margins: Margins) -> str:
    """Say how much was looked at for a verdict."""
    share = margins.looks[look - 1]
    return f"Look {look} of {len(margins.looks)}, {share:.0%} of the items"


def warnings(drift: Mapping[str, float], blind: Sequence[Paired], margins: Margins) -> tuple[str, ...]:
    """Say what does not stand in the way of a pass, but ought to be looked at."""
    unknown = " (no value is calibrated for this base)" if margins.kl_warn is None else ""
    found = [
        f"{name}: KL to the base is {value:.3f} nats per token, above {level(margins):g}{unknown}: the model changed "
        "where the task does not need it; look closely even if the suites pass"
        for name, value in drift.items()
        if not value <= level(margins)
    ]
    return (*found, *(_uncounted(suite) for suite in blind))


def _uncounted(suite: Paired) -> str:
    return blind_words(suite) if misleads(suite) else f"{suite.name} is blind for this base and was not counted"


def advice(criteria: Sequence[Criterion], missing: Sequence[str]) -> tuple[str, ...]:
    """Say what to do next."""
    kept = [criterion for criterion in criteria if criterion.name not in (TASK, TASK_SCORE)]
    task = [criterion for criterion in criteria if criterion.name in (TASK, TASK_SCORE)]
    failed = {criterion.guards for criterion in kept if criterion.outcome == "fail"}
    found = []
    if failed == {"format"}:
        found.append(
            "it still knows, but no longer answers in the form it is asked for (format drift): mix rows with other "
            "forms of answer into the training, or put examples before such requests"
        )
    elif failed:
        found.append(
            "it forgets: take the least away that passes (pitstop repair), or train again with more replay, a stronger "
            "KL anchor, a lower learning rate or fewer modules"
        )
    if any(criterion.outcome == "inconclusive" for criterion in kept):
        found.append("retention is undecided: measure larger suites, or reduce the drop as for an adapter that forgets")
    if any(criterion.outcome != "pass" for criterion in task):
        found.append("the task is not surely learned: train longer or on more rows, or hold out more rows to be sure")
    if any(line.startswith("retention") for line in missing):
        found.append("add suites this base is clearly better at than guessing, or text suites")
    if any(line.startswith("task") for line in missing):
        found.append("hold out rows of the task and measure them")
    return tuple(found) or (
        "make what ships of it (pitstop export, or merge), compare the two (pitstop parity), and pack it",
    )


def amount(value: float | None, unit: Unit, *, sign: bool = True) -> str:
    """Return a drop in the unit people read it in: points of accuracy, or bits per byte."""
    if value is None:
        return "?"
    shown = value * 100 if unit == "accuracy" else value
    digits = 1 if unit == "accuracy" else 3
    text = f"{shown + 0.0:+.{digits}f}" if sign else f"{shown:.{digits}f}"
    return f"{text} points" if unit == "accuracy" else f"{text} bits per byte"
