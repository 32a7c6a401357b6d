"""Did the adapter learn its task, and what did the base forget? Leaves `runs/<name>/retention.json` and `.html`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pitstop import records
from pitstop.bundle.manifest import BaseRef, Prompting
from pitstop.engines.base import PLAIN_BASE, Engine, Use
from pitstop.engines.opening import engine_for
from pitstop.engines.torch import TorchEngine
from pitstop.errors import UsageError
from pitstop.progress import say
from pitstop.retention.drift import drift, scale_curve
from pitstop.retention.looks import look_at
from pitstop.retention.margins import Margins
from pitstop.retention.measure import join, measure
from pitstop.retention.overlap import set_aside, set_documents_aside, trained_on
from pitstop.retention.plan import shortages
from pitstop.retention.report import Measured, RetentionReport, make_report, write_html
from pitstop.retention.suite import Suite, TextItem, default_folder, load_all
from pitstop.retention.task import TaskResult, TaskRow, measure_task
from pitstop.retention.tripwire import for_base
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.dataset import general_texts, load_split
from pitstop.workshop.displacement import displacement
from pitstop.workshop.recipe import Check, Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.shipped import Shipped, load_shipped, result_file
from pitstop.workshop.task import CONTEXT, open_exported, open_trained, sampling, task_rows

REPORT_FILE = "retention.json"
DISPLACED = 16  # texts that F_delta is measured on
EngineName = Literal["torch", "llama", "onnx"]


@dataclass(frozen=True)
class _Subject:
    """What is measured, and on what."""

    engine: Engine
    recipe: Recipe
    prompting: Prompting  # of the base itself
    use: Use
    invocation: Sequence[int]
    suites: Sequence[Suite]
    rows: Sequence[TaskRow]
    margins: Margins
    trained_on: Mapping[str, frozenset[str]]  # ids of items by suite: they do not count
    ships: Shipped | None

    @property
    def cache(self) -> Path:
        """Folder for the plain base's figures."""
        return self.recipe.base.folder / "measured"


def check(
    path: Path, *, engine: EngineName | None = None, artifact: str | None = None, force: bool = False
) -> RetentionReport:
    """Measure a run's adapter beside its base, on the same engine and prompts, and judge it.

    Args:
        path: recipe file or run folder.
        engine: ``torch`` measures the adapter as it was trained, ``llama`` or ``onnx`` what ships, whichever runs it;
            None: the trained one, but a merged model as it ships, for its weights are rounded anew.
        artifact: precision of the base artifact beside which it is measured as it ships; None: the one the recipe
            trains on, or the first one of the export that ``engine`` runs.
        force: measure again though the same was measured before.

    Raises:
        UsageError: nothing is trained (or made to ship) yet, there are no suites, or another engine runs what ships.
        DatasetError: suites or test rows that cannot be used.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        ref = base_model.load_ref(recipe.base.folder)
        suites = load_suites(recipe)
        rows = task_rows(recipe, ref)
        base = _beside(engine, artifact, recipe, ref)
        ships = None if base is None else load_shipped(recipe, base)
        inputs = _inputs(recipe, identity, ships, rows, suites)
        done = result_file(REPORT_FILE, recipe, base)
        if not force and (known := finished(done, RetentionReport, inputs)):
            return known
        for shortage in shortages(suites, recipe.check.margins):
            say(shortage.words)
        with open_shipped(recipe, ref, ships) if ships else open_trained(recipe, ref) as opened:
            report = _judge(_subject(opened, recipe, ref, suites, rows, ships), recipe, identity, inputs)
        write_html(report, done.with_suffix(".html"))
        records.save_json(report, done)
        return report


def report_file(recipe: Recipe, engine: EngineName | None = None, artifact: str | None = None) -> Path:
    """Return where `check` leaves its report if it is asked for these; its page lies beside it, as HTML."""
    base = _beside(engine, artifact, recipe, base_model.load_ref(recipe.base.folder))
    return result_file(REPORT_FILE, recipe, base)


def _beside(engine: EngineName | None, artifact: str | None, recipe: Recipe, ref: BaseRef) -> str | None:
    """Return the base artifact beside which what ships is measured; None: the adapter as it was trained is meant."""
    if engine is None and artifact is None:
        return None if recipe.export.delivery == "attached" else recipe.base.artifact
    if engine == "torch" and artifact is None:
        return None
    wanted = (artifact,) if artifact else (recipe.base.artifact, *recipe.export.also)
    runs = {base: engine_for(ref.artifact(base)) for base in wanted}
    found = next((base for base, name in runs.items() if engine in (None, name)), None)
    if found is None:
        listed = ", ".join(f"{base} ({name})" for base, name in runs.items())
        raise UsageError(
            f"the {engine} engine runs nothing of what {recipe.name} is checked for: {listed}",
            cure="leave --engine out, or export it for an artifact that engine runs ([export] also)",
        )
    return found


def checked(recipe: Recipe, identity: adapters.Identity, rows: Sequence[TaskRow]) -> RetentionReport | None:
    """Return the report about this very adapter as it was trained, if it was checked with the recipe as it is now."""
    inputs = _inputs(recipe, identity, None, rows, load_suites(recipe))
    return finished(recipe.run / REPORT_FILE, RetentionReport, inputs)


def _inputs(
    recipe: Recipe, identity: adapters.Identity, ships: Shipped | None, rows: Sequence[TaskRow], suites: Sequence[Suite]
) -> str:
    measured = f"shipped {ships.artifact.sha256}" if ships else "torch"
    digests = (suite.record for suite in suites)
    return inputs_digest(identity, recipe.check, measured, str(recipe.scale), *rows, *digests)


def _subject(
    engine: Engine,
    recipe: Recipe,
    ref: BaseRef,
    suites: Sequence[Suite],
    rows: Sequence[TaskRow],
    ships: Shipped | None,
) -> _Subject:
    return _Subject(
        engine=engine,
        recipe=recipe,
        prompting=ref.prompting,
        use=ships.use(recipe.name) if ships else Use(recipe.name, recipe.scale),
        invocation=engine.invocation(recipe.name),
        suites=suites,
        rows=rows,
        margins=for_base(recipe.check.margins, ref.weights_sha256),
        trained_on=trained_on(suites, training_texts(recipe)),
        ships=ships,
    )


def _judge(subject: _Subject, recipe: Recipe, identity: adapters.Identity, inputs: str) -> RetentionReport:
    """Measure look by look until the verdict is clear, or there is nothing more to look at."""
    looks = recipe.check.margins.looks
    measured = _first(subject)
    moved = _displacement(subject)
    for look in range(1, len(looks) + 1):
        measured = _further(subject, measured, looks, look)
        report = make_report(
            subject.engine,
            _without_trained_on(measured, subject.trained_on),
            adapter=recipe.name,
            adapter_sha256=identity.adapter_sha256,
            scale=recipe.scale,
            margins=subject.margins,
            inputs=inputs,
            look=look if len(looks) > 1 else 0,
            displacement=moved,
            artifact_sha256=subject.ships.artifact.sha256 if subject.ships else None,
        )
        if report.verdict.outcome != "inconclusive":
            break
        if look < len(looks):
            say(f"not decided by {looks[look - 1]:.0%} of the items, looking at {looks[look]:.0%}")
    return report


def _displacement(subject: _Subject) -> float | None:
    texts = [item.text for suite in subject.suites if suite.record.purpose == "drift" for item in suite.of(TextItem)]
    if not texts or not isinstance(subject.engine, TorchEngine) or subject.invocation:
        return None  # an activated adapter moves nothing where it does not act
    rows = [subject.engine.tokenize(text)[:CONTEXT] for text in texts[:DISPLACED]]
    return displacement(subject.engine, subject.recipe.name, rows, subject.recipe.scale)


def _first(subject: _Subject) -> Measured:
    """Measure what every look needs whole: the task, and KL to the base."""
    engine, recipe, rows = subject.engine, subject.recipe, subject.rows
    with exclusive(subject.cache, wait=True):  # two checks at once measure the base once
        base = _base_task(engine, recipe, rows, subject.cache)
    adapted = measure_task(engine, rows, subject.use, metric=recipe.check.metric, sampling=sampling(recipe))
    moved = drift(engine, subject.suites, subject.use, subject.prompting, invocation=subject.invocation)
    scales = not (subject.ships and recipe.export.delivery == "merged")  # a merged model has one
    settings = subject.prompting, rows
    curve = scale_curve(engine, subject.suites, subject.use, *settings, invocation=subject.invocation) if scales else ()
    return Measured(subject.suites, (), (), moved, base, adapted, curve)


def _further(subject: _Subject, measured: Measured, looks: Sequence[float], look: int) -> Measured:
    """Measure the items that a look sees for the first time."""
    parts = [suite for suite in (look_at(suite, looks, look) for suite in subject.suites) if suite.items]
    score = partial(
        measure, subject.engine, parts, cache=subject.cache, invocation=subject.invocation, prompting=subject.prompting
    )
    with exclusive(subject.cache, wait=True):
        base = score()
    adapted = score(subject.use)
    return replace(measured, base=join(measured.base, base), adapted=join(measured.adapted, adapted))


def _without_trained_on(measured: Measured, aside: Mapping[str, frozenset[str]]) -> Measured:
    return replace(
        measured,
        base=set_aside(measured.base, aside),
        adapted=set_aside(measured.adapted, aside),
        drift=set_documents_aside(measured.drift, aside),
    )


def training_texts(recipe: Recipe) -> Iterator[str]:
    """Yield every text that the adapter is trained on."""
    training, _ = load_split(recipe.data)
    yield from (row.text for row in training)
    if recipe.retain.rows and recipe.retain.share:
        yield from general_texts(recipe.retain.rows)


def open_shipped(recipe: Recipe, ref: BaseRef, ships: Shipped) -> Engine:
    """Open the device's engine with what the run ships, under the recipe's name."""
    return open_exported(recipe, ref, ships.base, ships.path, ships.artifact.sha256)


def load_suites(recipe: Recipe) -> list[Suite]:
    """Return the suites a recipe is checked with; those that come with pitstop, where it names none and none are built.

    Raises:
        UsageError: the folder that the recipe names is not there.
        BrokenInput, RecordError, DatasetError: as for `load_all`.
    """
    folder = recipe.check.suites
    if not folder.is_dir():
        if folder != Check().suites:
            raise UsageError(f"no suites at {folder}", cure="build them: pitstop suites build")
        folder = default_folder()
        say("no suites are built here (pitstop suites build): measuring the small ones that come with pitstop")
    return load_all(folder)


def _base_task(engine: Engine, recipe: Recipe, rows: Sequence[TaskRow], cache: Path) -> TaskResult:
    """Let the plain base answer the task's rows, once for the same rows."""
    key = inputs_digest(engine.name, engine.base_sha256, recipe.check.metric, str(recipe.check.max_new_tokens), *rows)
    path = cache / f"task-{key[:24]}.json"
    if path.is_file():
        return records.load_json(TaskResult, path)
    result = measure_task(engine, rows, PLAIN_BASE, metric=recipe.check.metric, sampling=sampling(recipe))
    records.save_json(result, path)
    return result
