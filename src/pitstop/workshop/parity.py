"""Is what ships what was trained? The exported adapter on the device's engine, beside the trained one.

Leaves `runs/<name>/parity.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pitstop import records
from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import PLAIN_BASE, Engine, Use, divergence
from pitstop.errors import Refused
from pitstop.progress import progress
from pitstop.retention.report import RetentionReport
from pitstop.retention.task import TaskResult, TaskRow, measure_task
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import Identity
from pitstop.workshop.check import checked, open_engine, sampling, task_rows
from pitstop.workshop.export.export import load_exported
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest

PARITY_FILE = "parity.json"
KL_ROWS = 40  # held-out rows whose expected answers are compared token by token


@dataclass(frozen=True)
class TaskScore:
    """The task on the same held-out rows; shares from 0 to 1."""

    exact: float  # answers equal to the expected one
    field_f1: float  # micro-F1 over the fields of JSON answers


@dataclass(frozen=True)
class Parity:
    """How far the exported adapter is from the trained one, on held-out rows."""

    inputs: str
    adapter_sha256: str  # of the trained weights
    artifact_sha256: str  # of the exported adapter
    base_sha256: str  # the base artifact both ran on
    scale: float
    kl_nats_per_token: float  # mean KL(trained || shipped) over answer tokens
    top1_agreement: float  # share of answer tokens where both would say the same
    tokens: int  # answer tokens compared
    rows: int  # rows answered for the scores
    trained: TaskScore
    shipped: TaskScore
    base: TaskScore  # the shipped base without an adapter
    allowed_kl: float  # nats per token

    @property
    def passed(self) -> bool:
        """Whether the exported adapter is near enough to the trained one."""
        return self.kl_nats_per_token <= self.allowed_kl


def parity(path: Path, *, force: bool = False) -> Parity:
    """Compare the exported adapter with the trained one and keep the result.

    Raises:
        UsageError: there is no exported adapter yet.
        Refused: they differ by more than the recipe allows; the result is kept all the same.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        exported, _ = load_exported(recipe)
        ref = base_model.load_ref(recipe.base.folder)
        rows = task_rows(recipe, ref)
        inputs = inputs_digest(identity, exported, recipe.check, recipe.export, str(recipe.scale), *rows)
        done = recipe.run / PARITY_FILE
        result = None if force else finished(done, Parity, inputs)
        if result is None:
            result = _compare(recipe, ref, rows, inputs, exported.artifact.sha256, identity)
            records.save_json(result, done)
    if not result.passed:
        raise Refused(
            f"the exported adapter differs from the trained one by {result.kl_nats_per_token:.4f} nats per token, "
            f"more than the {result.allowed_kl} allowed",
            where=done,
            cure="train on the shipped weights ([base] precision), or export with a higher [export] precision",
        )
    return result


def _compare(
    recipe: Recipe, ref: BaseRef, rows: Sequence[TaskRow], inputs: str, artifact_sha256: str, identity: Identity
) -> Parity:
    use = Use(recipe.name, recipe.scale)
    report = checked(recipe, identity, rows)
    with open_engine(recipe, ref, "torch") as trained, open_engine(recipe, ref, "llama") as shipped:
        kl, agreement, tokens = _divergence(trained, shipped, use, rows[:KL_ROWS], ref.prompting.eos_token)
        return Parity(
            inputs=inputs,
            adapter_sha256=identity.adapter_sha256,
            artifact_sha256=artifact_sha256,
            base_sha256=shipped.base_sha256,
            scale=recipe.scale,
            kl_nats_per_token=round(kl, 6),
            top1_agreement=round(agreement, 4),
            tokens=tokens,
            rows=len(rows),
            trained=_checked_score(report) or _score(trained, rows, use, recipe),
            shipped=_score(shipped, rows, use, recipe),
            base=_score(shipped, rows, PLAIN_BASE, recipe),
            allowed_kl=recipe.export.parity_kl,
        )


def _divergence(
    trained: Engine, shipped: Engine, use: Use, rows: Sequence[TaskRow], eos: str
) -> tuple[float, float, int]:
    """Return mean KL(trained || shipped), top-1 agreement and the number of answer tokens compared."""
    kl: list[np.ndarray] = []
    same: list[np.ndarray] = []
    with progress(f"parity {use.adapter}", len(rows), "rows") as advance:
        for row in rows:
            prompt = trained.tokenize(row.prompt)
            tokens = [*prompt, *trained.tokenize(row.expected + eos)][:-1]
            first = len(prompt) - 1
            one = trained.logits(tokens, use, first=first)
            other = shipped.logits(tokens, use, first=first)
            kl.append(divergence(one, other))
            same.append(one.argmax(-1) == other.argmax(-1))
            advance()
    every = np.concatenate(kl)
    return float(every.mean()), float(np.concatenate(same).mean()), len(every)


def _checked_score(report: RetentionReport | None) -> TaskScore | None:
    """Return the trained adapter's score if `check` has measured it on these rows: it is the same number."""
    if report is None or report.task is None:
        return None
    return TaskScore(exact=round(report.task.adapted.exact, 4), field_f1=round(report.task.adapted.f1, 4))


def _score(engine: Engine, rows: Sequence[TaskRow], use: Use, recipe: Recipe) -> TaskScore:
    result: TaskResult = measure_task(engine, rows, use, metric=recipe.check.metric, sampling=sampling(recipe))
    return TaskScore(exact=round(result.exact, 4), field_f1=round(result.f1, 4))
