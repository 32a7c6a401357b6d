"""What counts as better than uniform scaling, and which of the scales that pass is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pitstop.retention.measure import ChoiceScore, SuiteResult, TextScore
from pitstop.retention.suite import ChoiceItem, Suite, TextItem, make
from pitstop.retention.task import TaskAnswer, TaskResult
from pitstop.workshop import recipe as recipes
from pitstop.workshop.repair.judge import rungs, winner
from pitstop.workshop.repair.material import Material, Part, Screen
from pitstop.workshop.repair.points import Bench, Point, damage, judge
from pitstop.workshop.repair.search import Need, Search, Tried
from pitstop.workshop.repair.shapes import Shape, Step, plain
from workbench import Project

ITEMS, ROWS = 60, 40
ABOUT = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}
TEXTS = make("texts", "text", [TextItem(str(at), str(at), "some text") for at in range(ITEMS)], **ABOUT)  # type: ignore[arg-type]
SOURCE = plain({})


def part(*suites: Suite) -> Part:
    return Part(suites, ())


def result(rise: float, noise: float = 0.0, seed: int = 0) -> SuiteResult:
    """Documents that need so many more bits per byte than the base does, give or take."""
    random = np.random.default_rng(seed)
    bits = 1.0 + np.random.default_rng(9).normal(size=ITEMS) * 0.2 + rise + noise * random.normal(size=ITEMS)
    scores = tuple(TextScore(str(at), str(at), float(bits[at] * 100 * np.log(2)), 100) for at in range(ITEMS))
    return SuiteResult("texts", "text", TEXTS.digest, "e", "b", 99, None, (), scores, ())


def point(rise: float, *, right: int = ROWS, nats: float = 0.1, noise: float = 0.0, seed: int = 0) -> Point:
    answers = tuple(TaskAnswer(str(at), str(at), "", at < right, True, 1, 1, int(at < right)) for at in range(ROWS))
    return Point(
        (result(rise, noise, seed),), (), TaskResult("text", answers, ()), {str(at): nats for at in range(ROWS)}
    )


BASE = point(0.0, right=0, nats=4.0)


@pytest.fixture
def search(project: Project) -> Search:
    recipe = recipes.load(project.recipe())
    material = Material(part(TEXTS), part(TEXTS), part(TEXTS), Screen((), ()))
    whole = point(0.5, nats=0.0)
    source = Tried(SOURCE, 1.0, whole, judge(BASE, whole, recipe.check.margins))
    bench = Bench.__new__(Bench)  # measures nothing here: what was measured is given
    return Search(bench, material, recipe, BASE, source, Need(0.0, 1.0, 0.98, None))


def tried(search: Search, shape: Shape, scale: float, measured: Point) -> Tried:
    made = Tried(shape, scale, measured, judge(BASE, measured, search.margins))
    search.tried.append(made)
    return made


OTHER = Shape("layers", (), {})


def test_what_surely_keeps_more_at_the_same_task_score_wins(search: Search) -> None:
    uniform = tried(search, SOURCE, 0.4, point(0.04))
    other = tried(search, OTHER, 0.4, point(0.01, noise=0.01))
    assert winner(search, uniform, [other]) is other
    comparison = search.compare(other, uniform, 1)
    assert comparison.matched
    assert comparison.difference == pytest.approx(-0.03, abs=0.005)
    assert comparison.upper is not None
    assert comparison.difference < comparison.upper < 0


def test_what_may_keep_more_by_chance_does_not_win(search: Search) -> None:
    uniform = tried(search, SOURCE, 0.4, point(0.04))
    other = tried(search, OTHER, 0.4, point(0.035, noise=0.05))
    comparison = search.compare(other, uniform, 1)
    assert comparison.upper is not None
    assert comparison.upper > 0
    assert winner(search, uniform, [other]) is uniform


@pytest.mark.parametrize("worse", [{"nats": 0.2}, {"right": ROWS - 1}])
def test_what_keeps_more_because_it_does_less_does_not_win(search: Search, worse: dict[str, float]) -> None:
    uniform = tried(search, SOURCE, 0.4, point(0.04))
    other = tried(search, OTHER, 0.2, point(0.001, **worse))  # type: ignore[arg-type]
    assert not search.compare(other, uniform, 1).matched
    assert winner(search, uniform, [other]) is uniform


def test_the_more_are_compared_the_surer_each_must_be(search: Search) -> None:
    uniform = tried(search, SOURCE, 0.4, point(0.04))
    other = tried(search, OTHER, 0.4, point(0.03, noise=0.03))
    alone, among = (search.compare(other, uniform, methods).upper for methods in (1, 6))
    assert alone is not None
    assert among is not None
    assert alone < among


def test_damage_counts_right_answers_whether_they_are_picked_or_not() -> None:
    suite = make("quiz", "choice", [ChoiceItem("a", "a", "q", ("no", "yes"), 1), *(
        ChoiceItem(str(at), str(at), "q", ("yes", "no"), 0) for at in range(11)
    )], **ABOUT)  # type: ignore[arg-type]  # fmt: skip

    def measured(right: float, wrong: float) -> Point:
        scores = [ChoiceScore("a", "a", False, 0, -0.1, (wrong, right), (2, 3))]
        scores += [ChoiceScore(str(at), str(at), True, 0, 0.1, (right, wrong), (3, 2)) for at in range(11)]
        found = SuiteResult("quiz", "choice", suite.digest, "e", "b", 99, 0.5, tuple(scores), (), ())
        return replace(BASE, results=(found,))

    drop = damage(measured(-3.0, -1.0), measured(-3.6, -9.0), part(suite), recipes.Check().margins)
    assert drop.value == pytest.approx(0.2 / np.log(2)), "0.6 nats over three bytes, whatever the wrong ones do"


def test_a_clozes_answer_counts_and_a_generated_one_does_not() -> None:
    def measured(nats: float) -> Point:
        clozes = tuple(ChoiceScore(str(at), str(at), True, 0, 0.1, (-nats,), (4,)) for at in range(12))
        said = tuple(ChoiceScore(str(at), str(at), True, 0, 0.0, (), (), "yes") for at in range(12))
        kinds = (("cloze", clozes), ("answer", said))
        found = [SuiteResult(kind, kind, kind, "e", "b", 99, None, scores, (), ()) for kind, scores in kinds]  # type: ignore[arg-type]
        return replace(BASE, results=tuple(found))

    drop = damage(measured(2.0), measured(4.0), part(), recipes.Check().margins)
    assert (drop.items, drop.value) == (12, pytest.approx(0.5 / np.log(2)))


def test_where_no_drift_is_wanted_a_rise_is_as_bad_as_a_drop(search: Search) -> None:
    shifted = tried(search, SOURCE, 0.5, point(0.01))
    assert search.likely(shifted)
    (kept, *rest) = shifted.verdict.criteria
    for drop, likely in ((0.2, False), (-0.2, False), (0.01, True)):
        either = replace(kept, drop=drop, lower=drop - 0.01, upper=drop + 0.01, two_sided=True)
        verdict = replace(shifted.verdict, criteria=(either, *rest))
        assert search.likely(replace(shifted, verdict=verdict)) is likely


def test_the_task_is_kept_by_share_of_its_gain_and_by_the_recipes_floor() -> None:
    need = Need(base=0.2, source=0.7, keep=0.98, floor=None)
    assert need.kept(0.69) == pytest.approx(0.98)
    assert (need.met(0.69), need.met(0.689)) == (True, False)
    assert not Need(base=0.2, source=0.7, keep=0.5, floor=0.6).met(0.5)


def test_scales_are_looked_at_from_the_safest_up() -> None:
    measured = [1.0, 0.5, 0.25, 0.75, 0.4, 0.3, 0.2]
    assert rungs(0.25, 0.75, measured) == [0.25, 0.5, 0.75]
    assert rungs(0.25, 0.25, measured) == [0.25, 0.3], "a little more of the task may be needed"
    assert rungs(0.75, 0.9, measured) == [0.75], "what was not measured is not looked at"
    assert rungs(1.0, 1.0, measured) == [1.0]


def test_the_adapter_as_it_came_is_never_a_repair(search: Search) -> None:
    assert search.source.unchanged
    tried(search, SOURCE, 0.5, point(0.2))
    assert search.scales(SOURCE) == [0.5]
    other = tried(search, Shape("rank", (Step("rank", {"rank": 1.0}),), {}), 1.0, point(0.1))
    assert not other.unchanged
    assert search.scales(other.shape) == [1.0]


def test_halving_finds_both_edges(search: Search) -> None:
    """The base loses as the scale rises; the task is there from three tenths on."""

    class Curve(Bench):
        def point(self, pairs: object, part: Part, *, shown: bool = False) -> Point:
            return at[0]

    at = [point(0.0)]

    class Watched(Search):
        def attempt(self, shape: Shape, scale: float) -> Tried:
            at[0] = point(0.1 * scale**2, right=ROWS if scale >= 0.3 else 0, noise=0.001)
            return super().attempt(shape, scale)

    watched = Watched(Curve.__new__(Curve), search._material, search._recipe, BASE, search.source, search.need)
    steps: list[str] = []

    def advance(done: float = 1, note: str = "") -> None:
        steps.append(note)

    assert watched.smallest(SOURCE, 0.0, 1.0, advance) == pytest.approx(0.3, abs=1 / 32)
    largest = watched.largest(SOURCE, 0.0, 1.0, advance)
    assert largest == pytest.approx(0.5**0.5, abs=1 / 32), "the margin is 0.05 bits per byte"
    assert len(steps) == 10
    assert len(watched.tried) < 11, "what was measured is not measured again"


def test_the_run_folder_of_a_recipe_may_have_another_name(project: Project) -> None:
    assert recipes.load(project.recipe()).run == Path("runs/lights")
    assert recipes.load(project.recipe(folder="runs/other")).run == Path("runs/other")
