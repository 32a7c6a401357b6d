"""A finished adapter that forgets to the least change of it that passes. Leaves `runs/<name>-repaired/`.

The repaired run is a run like any other: the recipe (with its own `folder`, so that the adapter keeps its name), the
adapter with the history of what was done to it, `repair.json` and `repair.html`. `check` is next, as after a training.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pitstop.bundle.manifest import BaseRef
from pitstop.engines.torch import TorchEngine
from pitstop.errors import UsageError
from pitstop.retention.gate import Verdict
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model, successor
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import checked
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair import explore
from pitstop.workshop.repair.judge import Sealed, rungs, winner
from pitstop.workshop.repair.material import Material, gather
from pitstop.workshop.repair.pairs import Pair, read
from pitstop.workshop.repair.points import Bench, judge, part_of
from pitstop.workshop.repair.result import Look, Repair, is_retention, nearest
from pitstop.workshop.repair.run_folder import RESULT_FILE, save
from pitstop.workshop.repair.search import TOLERANCE, Need, Search, Tried
from pitstop.workshop.repair.shapes import METHODS, Method, plain
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.task import CONTEXT

KEEP = 0.98  # share of the gain in exact answers that must be left


def repair(
    path: Path,
    *,
    to: str | None = None,
    methods: Sequence[Method] = METHODS,
    keep: float = KEEP,
    force: bool = False,
) -> Repair:
    """Find the least change to a run's adapter that passes the gate, and write it as a run of its own.

    Args:
        path: recipe file or run folder.
        to: name of the new run folder below `runs/`; None: the old one's with "-repaired" behind it.
        methods: what is tried; uniform scaling always is.
        keep: share of the gain in exact answers, over the base, that must be left.
        force: search again though the same was searched before.

    Returns:
        What was tried and chosen. Unless its outcome is "repaired", nothing was written.

    Raises:
        UsageError: nothing is trained, there are no suites, or the new folder holds something else.
        RecordError: an adapter of a kind that cannot be repaired.
        BrokenInput: weights that are damaged, or not the ones that were trained.
    """
    recipe = recipes.load(path)
    file = path / recipes.RECIPE_FILE if path.is_dir() else path
    target = successor.run_of(recipe, to, "repaired")
    if not 0 < keep <= 1:
        raise UsageError(f"keep is {keep}, it must be above 0 and at most 1", cure="leave it out, or say --keep 0.95")
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        pairs = read(recipe.run / adapters.FOLDER)
        ref = base_model.load_ref(recipe.base.folder)
        tokenizer = base_model.load_tokenizer(recipe.base.folder)
        material = gather(recipe, ref, tokenizer)
        inputs = _inputs(recipe, identity, material, f"{keep} {tuple(methods)}")
        if not force and (known := finished(target / RESULT_FILE, Repair, inputs)) and _whole(target, known):
            return known
        successor.refuse_another(target, RESULT_FILE, recipe.run)
        job = _Job(
            recipe,
            ref,
            tokenizer,
            identity,
            material,
            pairs,
            tuple(methods),
            keep,
            inputs,
            file,
            target,
            time.monotonic(),
        )
        return _repair(job)


@dataclass(frozen=True)
class _Job:
    """Everything a repair is made from."""

    recipe: Recipe
    ref: BaseRef
    tokenizer: PreTrainedTokenizerBase
    identity: adapters.Identity
    material: Material
    pairs: dict[str, Pair]
    methods: tuple[Method, ...]
    keep: float
    inputs: str
    file: Path  # the recipe's
    target: Path
    begun: float


def _inputs(recipe: Recipe, identity: adapters.Identity, material: Material, asked: str) -> str:
    records = [suite.record for suite in material.whole.suites]
    looked_at = repr(material.screen)
    return inputs_digest(identity, recipe.check, str(recipe.scale), asked, looked_at, *records, *material.whole.rows)


def chosen_methods(listed: str | None) -> tuple[Method, ...]:
    """Return the methods of a list with commas; all of them without one.

    Raises:
        UsageError: a method that does not exist.
    """
    names = METHODS if listed is None else [name.strip() for name in listed.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UsageError(f"there is no method {unknown[0]!r}", cure=f"choose from: {','.join(METHODS)}")
    return tuple(method for method in METHODS if method in names)


def _whole(target: Path, known: Repair) -> bool:
    return known.adapter_sha256 is not None and successor.whole(target, known.adapter_sha256)


def _repair(job: _Job) -> Repair:
    report = checked(job.recipe, job.identity, job.material.whole.rows)
    if report is not None and (early := _settled(job, report.verdict)):
        return early
    model = base_model.load_weights(
        job.recipe.base.folder, job.ref, precision=job.recipe.base.precision, artifact=job.recipe.base.artifact
    )
    material, sealed_part = job.material, job.material.verdict
    source = plain(job.pairs)
    with _bench(job, model) as bench:
        base = bench.base(material.whole, job.pairs)
        if report is None:
            everything = bench.point(job.pairs, material.whole, shown=True)
            if early := _settled(job, judge(base, everything, job.recipe.check.margins)):
                return early
            point, sealed_task = part_of(everything, material.search), part_of(everything, sealed_part).task
        else:
            point = bench.point(job.pairs, material.search, shown=True)
            sealed_task = bench.task(job.pairs, sealed_part.rows)
        seen = part_of(base, material.search)
        need = Need(seen.task.exact, point.task.exact, job.keep, job.recipe.check.margins.min_task_score)
        first = Tried(source, 1.0, point, judge(seen, point, job.recipe.check.margins))
        search = Search(bench, material, job.recipe, seen, first, need)
        uniform, largest = explore.uniform(search, source)
    found = explore.others(model, job.recipe, material.screen, job.pairs, job.methods, uniform.scale)
    with _bench(job, model) as bench:
        search.moved(bench)
        best = winner(search, uniform, explore.exactly(search, found, uniform))
        if best is not uniform:
            largest = explore.reach(search, best)
        if search.hopeless(best) or best.unchanged:
            return _refused(job, search, [], best)
        sealed = Sealed(bench, material, job.recipe, part_of(base, sealed_part), sealed_task, job.keep)
        looks, chosen = sealed.climb(best.shape, rungs(best.scale, largest, search.scales(best.shape)))
    if chosen is None:
        return _refused(job, search, looks, best)
    return _keep(job, search, looks, chosen, best, uniform)


@contextmanager
def _bench(job: _Job, model: PreTrainedModel) -> Iterator[Bench]:
    base_sha256 = job.ref.artifact(job.recipe.base.artifact).sha256
    length = min(job.ref.context_length, CONTEXT)
    engine = TorchEngine(model, job.tokenizer, base_sha256=base_sha256, context_length=length)
    with engine, tempfile.TemporaryDirectory() as scratch:
        yield Bench(engine, job.recipe, job.ref, Path(scratch))


def _settled(job: _Job, verdict: Verdict) -> Repair | None:
    """Return the result if the adapter passes as it is, or no change of it could make it pass."""
    if verdict.outcome == "pass":
        said = f"{job.recipe.name} passes the gate as it is: there is nothing to repair"
        return _result(job, "passing", None, (said,))
    kept = [one for one in verdict.criteria if is_retention(one)]
    task = [one for one in verdict.criteria if not is_retention(one)]
    if not task or any(one.outcome != "pass" for one in task):
        what = "the task is not surely learned, and a repair only ever takes away from an adapter"
        return _result(job, "refused", None, (what, *(one.words for one in task if one.outcome != "pass")))
    if all(one.outcome in ("pass", "blind") for one in kept):
        return _result(job, "refused", None, ("it is not retention that stands in the way", *verdict.reasons))
    return None


def _refused(job: _Job, search: Search, looks: list[Look], best: Tried) -> Repair:
    how = (
        "the adapter as it is" if best.unchanged else f"{best.shape.words() or 'all of it'}, scaled by {best.scale:.3f}"
    )
    kept = f"{search.need.kept(best.point.task.exact):.1%} of the gain in exact answers left"
    reasons = [f"no change keeps {job.keep:.0%} of the task's gain and passes the gate", f"nearest: {how}, with {kept}"]
    if looks:
        reasons += [f"on the verdict's items: {one.words}" for one in looks[0].criteria if one.outcome != "pass"]
        if looks[0].retention_passes:
            reasons.append(f"retention passes there, but only {looks[0].exact_kept:.1%} of the task's gain is left")
    else:
        reasons += [one.words for one in best.verdict.criteria if one.outcome == "fail"]
    return _result(job, "refused", search, tuple(reasons), looks)


def _keep(job: _Job, search: Search, looks: list[Look], chosen: Look, best: Tried, uniform: Tried) -> Repair:
    """Write the repaired run and say what was chosen."""
    how = f"{best.shape.words()}, then scaled" if best is not uniform else "scaled"
    reasons = [
        f"chosen: {how} by {chosen.scale:.3f}; {chosen.exact_kept:.1%} of the task's gain is left, and the gate passes "
        "it on items the search has not seen",
        _won_back(search, search.attempt(best.shape, chosen.scale)),
        nearest(chosen),
        _against(search, best, uniform) if len(job.methods) > 1 else "nothing but uniform scaling was asked for",
    ]
    result = _result(job, "repaired", search, tuple(reasons), looks, chosen)
    text = successor.recipe_text(job.recipe, job.file, job.target, "pitstop repair")
    return save(result, text, job.identity, best.shape, chosen.scale)


def _won_back(search: Search, taken: Tried) -> str:
    before, after = search.damage(search.source).value, search.damage(taken).value
    share = f": {1 - after / before:.0%} of it is back" if before > 0 else ""
    return f"the base lost {before:.3f} bits per byte on the search's items, now {after:.3f}{share}"


def _against(search: Search, best: Tried, uniform: Tried) -> str:
    """Say how the other methods did beside uniform scaling."""
    if not search.compared:
        return "only uniform scaling was worth measuring: nothing else kept more at its task score on the screen"
    if best is uniform:
        return f"no other method surely keeps more than the uniform scale {uniform.scale:.3f} at its task score"
    comparison = search.compared[search.tried.index(best)]
    return (
        f"{best.shape.method} surely keeps more than the uniform scale {uniform.scale:.3f} at its task score: "
        f"{-comparison.difference:.3f} bits per byte, at least {-(comparison.upper or 0.0):.3f}"
    )


def _result(
    job: _Job,
    outcome: Any,
    search: Search | None,
    reasons: tuple[str, ...],
    looks: Sequence[Look] = (),
    chosen: Look | None = None,
) -> Repair:
    searched, sealed = job.material.search, job.material.verdict
    return Repair(
        inputs=job.inputs,
        outcome=outcome,
        name=job.recipe.name,
        source=str(job.recipe.run),
        run=str(job.target) if outcome == "repaired" else None,
        source_sha256=job.identity.adapter_sha256,
        adapter_sha256=None,
        keep=job.keep,
        tolerance=TOLERANCE,
        base_exact=search.need.base if search else 0.0,
        source_exact=search.need.source if search else 0.0,
        search_items=sum(len(suite.items) for suite in searched.suites),
        search_rows=len(searched.rows),
        verdict_items=sum(len(suite.items) for suite in sealed.suites),
        verdict_rows=len(sealed.rows),
        candidates=search.candidates() if search else (),
        looks=tuple(looks),
        chosen=chosen,
        reasons=reasons,
        seconds=round(time.monotonic() - job.begun, 1),
    )
