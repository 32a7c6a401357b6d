"""The candidates: how far uniform scaling goes, and what may keep more of the base at the same task score.

Uniform scaling is the control. Whatever else is tried was chosen on rows that are in no suite, is brought to the scale
at which it does the task as well as the best uniform one, and is then compared with that one on the search's items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pitstop.progress import Advance
from pitstop.retention.gate import Criterion, Verdict
from pitstop.retention.margins import Margins
from pitstop.retention.paired import Drop
from pitstop.retention.suite import Suite
from pitstop.workshop.adapter import Change
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair.material import Material
from pitstop.workshop.repair.points import Bench, Point, damage, judge
from pitstop.workshop.repair.result import Candidate, Comparison, is_retention
from pitstop.workshop.repair.screen import Losses, Probe
from pitstop.workshop.repair.shapes import Funnel, Shape

HALVINGS = 5  # of the range of scales: the last step is 1/32
TOLERANCE = 0.01  # share of the likelihood's gain by which candidates of one task score may differ
MATCHING = 3  # looks at the screen to bring a shape to the task's loss
TASK_SLACK = 0.02  # nats per token by which a shape's task loss on the screen may exceed the uniform scale's
BUMP = 1.15  # a shape that lost more of the task than the screen said is tried once more at so much more


@dataclass(frozen=True)
class Tried:
    """A shape at a scale, measured on the search's items."""

    shape: Shape
    scale: float
    point: Point
    verdict: Verdict

    @property
    def unchanged(self) -> bool:
        """Whether this is the adapter as it came."""
        return self.scale == 1.0 and not self.shape.steps


@dataclass(frozen=True)
class Need:
    """What must be left of the task."""

    base: float  # share of exact answers
    source: float
    keep: float  # share of the gain
    floor: float | None  # the recipe's own least score

    def kept(self, exact: float) -> float:
        """Return the share of the gain that is left; 1 if there was none to lose."""
        gain = self.source - self.base
        return (exact - self.base) / gain if gain > 0 else 1.0

    def met(self, exact: float) -> bool:
        """Tell whether enough is left."""
        return self.kept(exact) >= self.keep - 1e-9 and exact >= (self.floor or 0.0)


class Search:
    """Measures candidates on the search's items, each once."""

    def __init__(
        self, bench: Bench, material: Material, recipe: Recipe, base: Point, source: Tried, need: Need
    ) -> None:
        self._bench, self._material, self._recipe, self._base = bench, material, recipe, base
        self.source, self.need = source, need
        self.tried: list[Tried] = [source]
        self.compared: dict[int, Comparison] = {}  # by place in `tried`

    @property
    def margins(self) -> Margins:
        return self._recipe.check.margins

    def moved(self, bench: Bench) -> None:
        """Go on with another bench: the one of before was closed."""
        self._bench = bench

    def attempt(self, shape: Shape, scale: float) -> Tried:
        """Return a shape at a scale, measured."""
        for known in self.tried:
            if known.shape is shape and known.scale == scale:
                return known
        point = self._bench.point(shape.scaled(scale), self._material.search)
        made = Tried(shape, scale, point, judge(self._base, point, self.margins))
        self.tried.append(made)
        return made

    def keeps(self, tried: Tried) -> bool:
        """Tell whether enough of the task is left."""
        return self.need.met(tried.point.task.exact)

    def likely(self, tried: Tried) -> bool:
        """Tell whether the gate would pass the candidate's retention on the verdict's items, were they like these.

        Bounds shrink with the root of the number of groups, of which the verdict has more.
        """
        seen, sealed = (_groups(part.suites) for part in (self._material.search, self._material.verdict))
        narrower = (seen / max(sealed, 1)) ** 0.5
        return all(
            _reach(one, narrower) < one.margin
            for one in tried.verdict.criteria
            if is_retention(one) and one.outcome != "blind"
        )

    def hopeless(self, tried: Tried) -> bool:
        """Tell whether the gate is sure already that the candidate forgot too much."""
        return any(one.outcome == "fail" for one in tried.verdict.criteria if is_retention(one))

    def largest(self, shape: Shape, low: float, high: float, advance: Advance, steps: int = HALVINGS) -> float:
        """Return the largest scale of a shape that is likely to pass, between one that is and one that is not."""
        return self._halve(shape, low, high, steps, lambda tried: not self.likely(tried), advance)[0]

    def smallest(self, shape: Shape, low: float, high: float, advance: Advance, steps: int = HALVINGS) -> float:
        """Return the smallest scale of a shape that keeps the task, between one that does not and one that does."""
        return self._halve(shape, low, high, steps, self.keeps, advance)[1]

    def _halve(
        self, shape: Shape, low: float, high: float, steps: int, above: Callable[[Tried], bool], advance: Advance
    ) -> tuple[float, float]:
        for _ in range(steps):
            middle = (low + high) / 2
            tried = self.attempt(shape, middle)
            low, high = (low, middle) if above(tried) else (middle, high)
            advance(note=f"{shape.method} {middle:.3f}")
        return low, high

    def likelihood_kept(self, point: Point) -> float:
        """Return the share of the gain in the answers' likelihood that is left."""
        gain = self._base.answer_nats - self.source.point.answer_nats
        return (self._base.answer_nats - point.answer_nats) / gain if gain > 0 else 1.0

    def matches(self, tried: Tried, uniform: Tried) -> bool:
        """Tell whether a candidate does the task as well as a uniform scale, within the tolerance."""
        kept = self.likelihood_kept(tried.point) >= self.likelihood_kept(uniform.point) - TOLERANCE
        return kept and tried.point.task.exact >= uniform.point.task.exact - 1e-9 and self.keeps(tried)

    def compare(self, tried: Tried, uniform: Tried, methods: int) -> Comparison:
        """Put a candidate beside the best uniform scale: does it surely keep more of the base at this task score?

        Args:
            methods: that are compared; the test of each is as much stricter (Bonferroni).
        """
        level = 1.0 - (1.0 - self.margins.confidence) / methods
        drop = damage(uniform.point, tried.point, self._material.search, self.margins)
        matched, upper = self.matches(tried, uniform), drop.upper(level)
        made = Comparison(uniform.scale, drop.value, upper, matched, matched and upper is not None and upper < 0)
        self.compared[self.tried.index(tried)] = made
        return made

    def scales(self, shape: Shape) -> list[float]:
        """Return the scales at which a shape was measured, that of the adapter as it came left out."""
        return [tried.scale for tried in self.tried if tried.shape is shape and not tried.unchanged]

    def damage(self, tried: Tried) -> Drop:
        """Return how many more bits per byte a candidate needs than the base."""
        return damage(self._base, tried.point, self._material.search, self.margins)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return everything that was measured, as it is written down."""
        return tuple(self._candidate(at, tried) for at, tried in enumerate(self.tried))

    def _candidate(self, at: int, tried: Tried) -> Candidate:
        drop = self.damage(tried)
        exact = tried.point.task.exact
        return Candidate(
            method=tried.shape.method,
            words=tried.shape.words(),
            steps=tried.shape.steps,
            scale=tried.scale,
            exact=exact,
            exact_kept=self.need.kept(exact),
            answer_nats=tried.point.answer_nats,
            likelihood_kept=self.likelihood_kept(tried.point),
            damage=drop.value,
            damage_lower=drop.lower(self.margins.confidence),
            damage_upper=drop.upper(self.margins.confidence),
            kl=tried.point.kl,
            keeps_task=self.keeps(tried),
            likely=self.likely(tried),
            against_uniform=self.compared.get(at),
        )


@dataclass(frozen=True)
class Aim:
    """The best uniform scale as the screen sees it: shapes are brought to its task loss."""

    scale: float
    losses: Losses
    slope: float  # d task loss / d scale there, below zero

    @classmethod
    def of(cls, probe: Probe, shape: Shape, scale: float) -> "Aim":
        """Look at a uniform scale and a little beside it."""
        here, beside = probe.losses(shape.scaled(scale)), probe.losses(shape.scaled(scale * BUMP))
        slope = (beside.task - here.task) / (scale * (BUMP - 1.0))
        return cls(scale, here, min(slope, -1e-3))


@dataclass(frozen=True)
class Screened:
    """A shape at the scale at which it does the screen's task rows as well as the uniform one."""

    shape: Shape
    scale: float
    losses: Losses


def matched(probe: Probe, shape: Shape, aim: Aim) -> Screened | None:
    """Bring a shape to the task loss of the best uniform scale; None if it does not get there."""
    scale, best = aim.scale, None
    for _ in range(MATCHING):
        losses = probe.losses(shape.scaled(scale))
        missing = losses.task - aim.losses.task
        if missing <= TASK_SLACK and (best is None or losses.general < best.losses.general):
            best = Screened(shape, scale, losses)
        if abs(missing) <= TASK_SLACK or (scale == 1.0 and missing > 0):
            break
        # By the uniform scale's slope, and never by more than a third: losses bend.
        step = min(max(-missing / aim.slope, -scale / 3), scale / 3)
        scale = min(scale + step, 1.0)
    return best


def screened(
    probe: Probe, shapes: Sequence[Shape], funnel: Funnel | None, aim: Aim, advance: Advance
) -> Screened | None:
    """Return the shape of one method that keeps most at the aim's task loss, if it keeps more than the aim.

    A funnel goes on around its best number of parts.
    """
    found = []
    for shape in shapes:
        found.append(matched(probe, shape, aim))
        advance(note=shape.method)
    best = _best(found)
    if funnel is not None and best is not None:
        count = len(best.shape.steps[0].parameters)
        for other in {round(count * 0.7), min(round(count * 1.4), len(funnel.parts))} - {0, count}:
            found.append(matched(probe, funnel.without(other), aim))
            advance(note=funnel.method)
        best = _best(found)
    return best if best is not None and best.losses.general < aim.losses.general else None


def _best(found: Sequence[Screened | None]) -> Screened | None:
    return min((one for one in found if one is not None), key=lambda one: one.losses.general, default=None)


def changes(shape: Shape, scale: float, adapter_sha256: str) -> tuple[Change, ...]:
    """Return what was done to the adapter of this digest, as its history keeps it."""
    made = [Change(step.method, step.parameters, adapter_sha256) for step in shape.steps]
    if scale != 1.0:
        made.append(Change("scale", {"scale": scale}, adapter_sha256))
    return tuple(made)


def _reach(criterion: Criterion, narrower: float) -> float:
    """Return the drop that bounds so much narrower would leave possible; up or down, where neither is wanted."""
    drop, lower, upper = criterion.drop, criterion.lower, criterion.upper
    high = drop if upper is None else drop + (upper - drop) * narrower
    low = drop if lower is None else drop + (lower - drop) * narrower
    return max(high, -low) if criterion.two_sided else high


def _groups(suites: Sequence[Suite]) -> int:
    return sum(len({item.group for item in suite.items}) for suite in suites if suite.record.purpose == "retention")
