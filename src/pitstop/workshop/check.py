"""Did the adapter learn its task, and what did the base forget? Leaves `runs/<name>/retention.json` and `.html`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from pitstop import records
from pitstop.bundle.manifest import BaseRef, Prompting
from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.torch import TorchEngine
from pitstop.errors import UsageError
from pitstop.retention.measure import drift, measure
from pitstop.retention.overlap import set_aside, set_documents_aside, trained_on
from pitstop.retention.report import Measured, RetentionReport, make_report, write_html
from pitstop.retention.suite import Suite, load_all
from pitstop.retention.task import TaskResult, TaskRow, measure_task
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.dataset import general_texts, load_split, prompt_text, spread
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.shipped import Shipped, load_shipped

REPORT_FILE = "retention.json"
PAGE_FILE = "retention.html"
CONTEXT = 1024  # tokens an item may have
EngineName = Literal["torch", "llama"]


def check(path: Path, *, engine: EngineName | None = None, force: bool = False) -> RetentionReport:
    """Measure a run's adapter beside its base, on the same engine and prompts, and judge it.

    Args:
        path: recipe file or run folder.
        engine: ``torch`` measures the adapter as it was trained, ``llama`` what ships; None: the trained one, but a
            merged model as it ships, for its weights are rounded anew.
        force: measure again though the same was measured before.

    Raises:
        UsageError: nothing is trained (or made to ship) yet, or there are no suites.
        DatasetError: suites or test rows that cannot be used.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        ref = base_model.load_ref(recipe.base.folder)
        suites = _suites(recipe)
        rows = task_rows(recipe, ref)
        engine = engine or ("torch" if recipe.export.delivery == "attached" else "llama")
        ships = load_shipped(recipe) if engine == "llama" else None
        inputs = _inputs(recipe, identity, ships, rows, suites)
        done = recipe.run / REPORT_FILE
        if not force and (known := finished(done, RetentionReport, inputs)):
            return known
        with open_shipped(recipe, ref, ships) if ships else open_trained(recipe, ref) as opened:
            report = _measure(opened, recipe, ref, identity, suites, rows, inputs, ships)
        write_html(report, recipe.run / PAGE_FILE)
        records.save_json(report, done)
        return report


def checked(recipe: Recipe, identity: adapters.Identity, rows: Sequence[TaskRow]) -> RetentionReport | None:
    """Return the report about this very adapter as it was trained, if it was checked with the recipe as it is now."""
    inputs = _inputs(recipe, identity, None, rows, _suites(recipe))
    return finished(recipe.run / REPORT_FILE, RetentionReport, inputs)


def _inputs(
    recipe: Recipe, identity: adapters.Identity, ships: Shipped | None, rows: Sequence[TaskRow], suites: Sequence[Suite]
) -> str:
    measured = f"llama {ships.artifact.sha256}" if ships else "torch"
    digests = (suite.record for suite in suites)
    return inputs_digest(identity, recipe.check, measured, str(recipe.scale), *rows, *digests)


def _measure(
    engine: Engine,
    recipe: Recipe,
    ref: BaseRef,
    identity: adapters.Identity,
    suites: Sequence[Suite],
    rows: Sequence[TaskRow],
    inputs: str,
    ships: Shipped | None,
) -> RetentionReport:
    use = ships.use(recipe.name) if ships else Use(recipe.name, recipe.scale)
    invocation = engine.invocation(recipe.name)
    cache = recipe.base.folder / "measured"
    with exclusive(cache, wait=True):  # two checks at once measure the base once
        base = measure(engine, suites, cache=cache, invocation=invocation)
        base_task = _base_task(engine, recipe, rows, cache)
    adapted_task = measure_task(engine, rows, use, metric=recipe.check.metric, sampling=sampling(recipe))
    aside = trained_on(suites, _training_texts(recipe))
    measured = Measured(
        suites=suites,
        base=set_aside(base, aside),
        adapted=set_aside(measure(engine, suites, use, invocation=invocation), aside),
        drift=set_documents_aside(drift(engine, suites, use, ref.prompting, invocation=invocation), aside),
        task_base=base_task,
        task_adapted=adapted_task,
    )
    return make_report(
        engine,
        measured,
        adapter=recipe.name,
        adapter_sha256=identity.adapter_sha256,
        scale=recipe.scale,
        margins=recipe.check.margins,
        inputs=inputs,
        artifact_sha256=ships.artifact.sha256 if ships else None,
    )


def _training_texts(recipe: Recipe) -> Iterator[str]:
    training, _ = load_split(recipe.data.train, recipe.data.test, recipe.data.test_share)
    yield from (row.text for row in training)
    if recipe.retain.rows and recipe.retain.share:
        yield from general_texts(recipe.retain.rows)


def task_rows(recipe: Recipe, ref: BaseRef) -> list[TaskRow]:
    """Return the held-out rows the task is scored on, spread over the groups, rendered for this base."""
    _, test = load_split(recipe.data.train, recipe.data.test, recipe.data.test_share)
    prompting = task_prompting(recipe, ref)
    return [
        TaskRow(row.id, row.group, prompt_text(row, prompting), row.answer) for row in spread(test, recipe.check.rows)
    ]


def task_prompting(recipe: Recipe, ref: BaseRef) -> Prompting:
    """Return the base's prompting with the adapter's own system message."""
    return replace(ref.prompting, system=recipe.data.system)


def sampling(recipe: Recipe) -> Sampling:
    """Return how task answers are generated: greedily."""
    return Sampling(max_tokens=recipe.check.max_new_tokens)


def open_trained(recipe: Recipe, ref: BaseRef) -> Engine:
    """Open the weights of the training with the run's adapter as it was trained, under its own name.

    Raises:
        UsageError: nothing is trained yet.
    """
    model = base_model.load_weights(
        recipe.base.folder, ref, precision=recipe.base.precision, artifact=recipe.base.artifact
    )
    tokenizer = base_model.load_tokenizer(recipe.base.folder)
    base_sha256 = ref.artifact(recipe.base.artifact).sha256
    engine = TorchEngine(model, tokenizer, base_sha256=base_sha256, context_length=min(ref.context_length, CONTEXT))
    engine.load_adapter(recipe.name, recipe.run / adapters.FOLDER)
    return engine


def open_shipped(recipe: Recipe, ref: BaseRef, ships: Shipped) -> Engine:
    """Open the device's engine with what the run ships, under the recipe's name."""
    # llama.cpp's threads wait for each other by spinning: more of them than this process's share of the cores, and
    # everything stands still. torch's number follows OMP_NUM_THREADS.
    engine = LlamaEngine(
        base_model.artifact_path(recipe.base.folder, ref, recipe.base.artifact),
        base_sha256=ref.artifact(recipe.base.artifact).sha256,
        context_length=min(ref.context_length, CONTEXT),
        sequences=1,
        threads=torch.get_num_threads(),
    )
    engine.load_adapter(recipe.name, ships.path, sha256=ships.artifact.sha256)
    return engine


def _suites(recipe: Recipe) -> list[Suite]:
    if not recipe.check.suites.is_dir():
        raise UsageError(f"no suites at {recipe.check.suites}", cure="build them: pitstop suites build")
    return load_all(recipe.check.suites)


def _base_task(engine: Engine, recipe: Recipe, rows: Sequence[TaskRow], cache: Path) -> TaskResult:
    """Let the plain base answer the task's rows, once for the same rows."""
    key = inputs_digest(engine.name, engine.base_sha256, recipe.check.metric, str(recipe.check.max_new_tokens), *rows)
    path = cache / f"task-{key[:24]}.json"
    if path.is_file():
        return records.load_json(TaskResult, path)
    result = measure_task(engine, rows, PLAIN_BASE, metric=recipe.check.metric, sampling=sampling(recipe))
    records.save_json(result, path)
    return result
