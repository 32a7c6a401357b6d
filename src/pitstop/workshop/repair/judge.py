"""The candidate that is kept: which shape, and how much of it passes on items the search has not seen."""

from collections.abc import Iterable, Sequence

from pitstop.progress import progress
from pitstop.retention.task import TaskResult
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair.material import Material
from pitstop.workshop.repair.points import Bench, Point, judge
from pitstop.workshop.repair.result import Look, is_retention
from pitstop.workshop.repair.search import Need, Search, Tried
from pitstop.workshop.repair.shapes import Shape

ROOM = 1.3  # times the safest scale: as far up is looked in any case


def winner(search: Search, uniform: Tried, others: Sequence[Tried]) -> Tried:
    """Return what surely keeps more of the base than the best uniform scale at its task score; else that scale."""
    better = [one for one in others if search.compare(one, uniform, len(others)).better]
    return min(better, key=lambda one: search.compare(one, uniform, len(others)).difference, default=uniform)


def rungs(safest: float, largest: float, measured: Iterable[float]) -> list[float]:
    """Return the scales to look at, out of those measured: the one that changes the adapter most comes first.

    Those a little above the safest one are among them even if they are not likely to pass: these rows may ask for a
    little more of the task than the search's did.
    """
    ceiling = max(largest, safest * ROOM)
    above = sorted(scale for scale in measured if safest < scale <= ceiling)
    if not above:
        return [safest]
    middle = (safest + above[-1]) / 2
    return sorted({safest, min(above, key=lambda scale: abs(scale - middle)), above[-1]})


class Sealed:
    """The items that only the verdict sees, and what base and adapter did on them."""

    def __init__(self, bench: Bench, material: Material, recipe: Recipe, base: Point, source: TaskResult, keep: float):
        """Take the base's figures and the unrepaired adapter's answers on these items."""
        self._bench, self._part, self._margins, self._base = bench, material.verdict, recipe.check.margins, base
        self._need = Need(base.task.exact, source.exact, keep, recipe.check.margins.min_task_score)

    def climb(self, shape: Shape, scales: Sequence[float]) -> tuple[list[Look], Look | None]:
        """Look at scales from the safest on while retention passes; the last one that passes in all is chosen.

        Tested in an order fixed beforehand and only as long as each passes, every look is at the full level: no
        correction for their number is needed (Maurer, Hothorn and Lehmacher 1995; Wiens, Pharmaceutical Statistics 2,
        2003).
        """
        looks: list[Look] = []
        with progress("repair, the verdict's items", len(scales), "looks") as advance:
            for scale in scales:
                looks.append(self.look(shape, scale))
                advance(note=f"{shape.method} {scale:.3f}")
                if not looks[-1].retention_passes:
                    break
        return looks, next((look for look in reversed(looks) if look.passes), None)

    def look(self, shape: Shape, scale: float) -> Look:
        """Let the gate judge one candidate here."""
        point = self._bench.point(shape.scaled(scale), self._part)
        verdict = judge(self._base, point, self._margins)
        judged = [one for one in verdict.criteria if one.outcome != "blind"]
        kept = [one for one in judged if is_retention(one)]
        exact = point.task.exact
        return Look(
            method=shape.method,
            words=shape.words(),
            scale=scale,
            criteria=verdict.criteria,
            retention_passes=bool(kept) and all(one.outcome == "pass" for one in kept),
            exact=exact,
            exact_kept=self._need.kept(exact),
            passes=verdict.outcome == "pass" and self._need.met(exact),
        )
