"""Is what ships what was trained? The exported adapter or merged model on the device's engine, beside the trained one.

Leaves `runs/<name>/parity.json`.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pitstop import records
from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import PLAIN_BASE, Engine, Use
from pitstop.errors import Refused
from pitstop.retention.report import RetentionReport
from pitstop.retention.task import TaskResult, TaskRow, measure_task
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import Identity
from pitstop.workshop.check import checked, open_shipped
from pitstop.workshop.comparison import KL_ROWS, compare_answers
from pitstop.workshop.export.export import write_adapter
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.shipped import Shipped, load_shipped, result_file
from pitstop.workshop.task import open_trained, sampling, task_rows

PARITY_FILE = "parity.json"
EXACT = "in 32-bit floats"  # the name under which the same adapter is loaded to see what its precision costs


@dataclass(frozen=True)
class TaskScore:
    """The task on the same held-out rows; shares from 0 to 1."""

    exact: float  # answers equal to the expected one
    field_f1: float  # micro-F1 over the fields of JSON answers


@dataclass(frozen=True)
class Causes:
    """Where a difference comes from: each part by itself, as mean KL in nats per token on the same answer tokens."""

    base: float  # the base as it was trained on || the base that ships, both without an adapter
    precision: float | None  # the adapter file in 32-bit floats || as it ships; None: it is in these, or is merged

    def largest(self, whole: float, *, trained_on: str, delivery: str) -> str:
        """Return in words what most of a difference of ``whole`` nats per token comes from."""
        if self.precision is not None and self.precision > max(self.base, whole / 2):
            return "the adapter file's own precision"
        if self.base > whole / 2:
            return "the swap of bases" if trained_on != "shipped" else "the quantized arithmetic of the engine"
        return "quantizing the sum of base and adapter" if delivery == "merged" else "the conversion"


@dataclass(frozen=True)
class Parity:
    """How far what ships is from the trained adapter, on held-out rows."""

    inputs: str
    adapter_sha256: str  # of the trained weights
    artifact_sha256: str  # of what ships
    base_sha256: str  # the base artifact both ran on
    scale: float  # of the trained adapter
    kl_nats_per_token: float  # mean KL(trained || shipped) over answer tokens
    top1_agreement: float  # share of answer tokens where both would say the same
    tokens: int  # answer tokens compared
    rows: int  # rows answered for the scores
    trained: TaskScore
    shipped: TaskScore
    base: TaskScore  # the shipped base without an adapter
    allowed_kl: float  # nats per token
    causes: Causes
    cause: str  # what most of the difference comes from

    @property
    def passed(self) -> bool:
        """Whether what ships is near enough to what was trained."""
        return self.kl_nats_per_token <= self.allowed_kl


def parity(path: Path, *, artifact: str | None = None, force: bool = False) -> Parity:
    """Compare what ships with the trained adapter and keep the result.

    Args:
        artifact: precision of the base artifact beside which it ships; None: the one the recipe trains on.

    Raises:
        UsageError: there is nothing to ship yet.
        Refused: they differ by more than the recipe allows; the result is kept all the same.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        shipped = load_shipped(recipe, artifact)
        ref = base_model.load_ref(recipe.base.folder)
        rows = task_rows(recipe, ref)
        inputs = inputs_digest(identity, shipped.artifact, recipe.check, recipe.export, str(recipe.scale), *rows)
        done = result_file(PARITY_FILE, recipe, shipped.base)
        result = None if force else finished(done, Parity, inputs)
        if result is None:
            result = _compare(recipe, ref, rows, inputs, shipped, identity)
            records.save_json(result, done)
    if not result.passed:
        raise Refused(
            f"what ships differs from the trained adapter by {result.kl_nats_per_token:.4f} nats per token, "
            f"more than the {result.allowed_kl} allowed; most of it comes from {result.cause}",
            where=done,
            cure=too_far(recipe),
        )
    return result


def too_far(recipe: Recipe) -> str:
    """Return what to do about a shipped file that differs too much from what was trained."""
    if recipe.export.delivery == "merged":
        return "the sum is rounded again when it is quantized: ship it attached, on the base ([export] delivery)"
    return "train on the shipped weights ([base] precision), or export with a higher [export] precision"


def _compare(
    recipe: Recipe, ref: BaseRef, rows: Sequence[TaskRow], inputs: str, ships: Shipped, identity: Identity
) -> Parity:
    uses = Use(recipe.name, recipe.scale), ships.use(recipe.name)
    report = checked(recipe, identity, rows)
    with open_trained(recipe, ref) as trained, open_shipped(recipe, ref, ships) as shipped:
        eos = ref.prompting.eos_token
        kl, agreement, tokens = compare_answers(trained, shipped, uses, rows[:KL_ROWS], eos)
        causes = _causes(recipe, ref, ships, trained, shipped, rows[:KL_ROWS])
        return Parity(
            inputs=inputs,
            adapter_sha256=identity.adapter_sha256,
            artifact_sha256=ships.artifact.sha256,
            base_sha256=shipped.base_sha256,
            scale=recipe.scale,
            kl_nats_per_token=round(kl, 6),
            top1_agreement=round(agreement, 4),
            tokens=tokens,
            rows=len(rows),
            trained=_checked_score(report) or score(trained, rows, uses[0], recipe),
            shipped=score(shipped, rows, uses[1], recipe),
            base=score(shipped, rows, PLAIN_BASE, recipe),
            allowed_kl=recipe.export.parity_kl,
            causes=causes,
            cause=causes.largest(kl, trained_on=recipe.base.precision, delivery=recipe.export.delivery),
        )


def _causes(
    recipe: Recipe, ref: BaseRef, ships: Shipped, trained: Engine, shipped: Engine, rows: Sequence[TaskRow]
) -> Causes:
    """Measure each part of the way by itself."""
    eos = ref.prompting.eos_token
    base, _, _ = compare_answers(trained, shipped, (PLAIN_BASE, PLAIN_BASE), rows, eos)
    if ships.artifact.role == "merged" or ships.artifact.precision == "f32":
        return Causes(round(base, 9), None)
    path = base_model.artifact_path(recipe.base.folder, ref, ships.base)
    with tempfile.TemporaryDirectory() as folder:
        exact = write_adapter(recipe, ships.artifact.format, path, ships.base_sha256, Path(folder), "f32")
        shipped.load_adapter(EXACT, exact)
        uses = Use(EXACT, ships.scale), ships.use(recipe.name)
        precision, _, _ = compare_answers(shipped, shipped, uses, rows, eos)
        shipped.unload_adapter(EXACT)
    return Causes(round(base, 9), round(precision, 9))


def _checked_score(report: RetentionReport | None) -> TaskScore | None:
    """Return the trained adapter's score if `check` has measured it on these rows: it is the same number."""
    if report is None or report.task is None:
        return None
    return TaskScore(exact=round(report.task.adapted.exact, 4), field_f1=round(report.task.adapted.f1, 4))


def score(engine: Engine, rows: Sequence[TaskRow], use: Use, recipe: Recipe) -> TaskScore:
    """Return how the rows are answered, as the recipe compares them."""
    result: TaskResult = measure_task(engine, rows, use, metric=recipe.check.metric, sampling=sampling(recipe))
    return TaskScore(exact=round(result.exact, 4), field_f1=round(result.f1, 4))
