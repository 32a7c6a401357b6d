"""The way through the candidates: uniform scales first, then a look at other shapes, then the best of each exactly."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedModel

from pitstop.progress import progress
from pitstop.workshop.adapter import FOLDER
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair import shapes
from pitstop.workshop.repair.material import Screen
from pitstop.workshop.repair.pairs import Pairs
from pitstop.workshop.repair.parts import Heads, layer_of
from pitstop.workshop.repair.screen import Probe, Slopes
from pitstop.workshop.repair.search import BUMP, HALVINGS, Aim, Screened, Search, Tried, screened
from pitstop.workshop.repair.shapes import Funnel, Method, Shape

CLIMB = 3  # halvings between the scale at which another shape does the task and its own size
FUNNEL_SHAPES = 5  # of modules, layers or heads, for the progress
OTHER_SHAPES = 2


def uniform(search: Search, source: Shape) -> tuple[Tried, float]:
    """Return the smallest uniform scale that keeps the task, and the largest one that is likely to pass."""
    whole = search.likely(search.source)
    with progress("repair, uniform scaling", HALVINGS * (1 if whole else 2), "scales") as advance:
        largest = 1.0 if whole else search.largest(source, 0.0, 1.0, advance)
        smallest = search.smallest(source, 0.0, 1.0, advance)
        return search.attempt(source, smallest), largest


def others(
    model: PreTrainedModel, recipe: Recipe, screen: Screen, pairs: Pairs, methods: Sequence[Method], scale: float
) -> list[Screened]:
    """Return what may keep more than this uniform scale at its task score: at most one shape of every other method."""
    wanted = [method for method in methods if method != "scale"]
    if not wanted:
        return []
    funnels = len({"modules", "layers", "heads"} & set(wanted))
    total = 2 + FUNNEL_SHAPES * funnels + OTHER_SHAPES * (len(wanted) - funnels)
    probe = Probe(model, recipe.run / FOLDER, screen, pairs, recipe.scale)
    try:
        with progress("repair, a look at other methods", total, "shapes") as advance:
            source = shapes.plain(pairs)
            aim = Aim.of(probe, source, scale)
            advance(note="the uniform scale")
            heads = Heads.of(model.config)
            # Where the shapes are to be used: at full size the loss bends too much for slopes to say anything.
            slopes = probe.slopes(source.scaled(scale), heads)
            advance(note="slopes")
            kinds = _kinds(pairs, probe, slopes, heads, wanted)
            found = [screened(probe, made, funnel, aim, advance) for made, funnel in kinds]
        return [one for one in found if one is not None]
    finally:
        probe.close()


def _kinds(
    pairs: Pairs, probe: Probe, slopes: Mapping[str, list[Slopes]], heads: Heads, methods: Sequence[Method]
) -> Iterator[tuple[list[Shape], Funnel | None]]:
    """Yield the shapes of one method after another, with the funnel they came from."""
    for funnel in shapes.funnels(pairs, slopes, heads, methods):
        yield list(funnel.shapes()), funnel
    if "ramp" in methods:
        yield shapes.ramps(pairs, max((layer_of(name) or 0 for name in pairs), default=0) + 1), None
    if "rank" in methods:
        yield shapes.ranks(pairs), None
    if "null-space" in methods:
        yield shapes.null_spaces(pairs, probe), None


def exactly(search: Search, found: Sequence[Screened], control: Tried) -> list[Tried]:
    """Measure screened shapes on the search's items; one that does the task worse is tried once more, larger."""
    tried: list[Tried] = []
    if found:
        with progress("repair, other methods", len(found), "shapes") as advance:
            for one in found:
                made = search.attempt(one.shape, one.scale)
                if not search.matches(made, control) and one.scale < 1.0:
                    made = search.attempt(one.shape, min(one.scale * BUMP, 1.0))
                tried.append(made)
                advance(note=one.shape.method)
    return tried


def reach(search: Search, best: Tried) -> float:
    """Return the largest scale of a shape that is likely to pass."""
    if not search.likely(best) or best.scale >= 1.0:
        return best.scale
    with progress(f"repair, {best.shape.method}", CLIMB, "scales") as advance:
        return search.largest(best.shape, best.scale, 1.0, advance, CLIMB)
