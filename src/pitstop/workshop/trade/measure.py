"""Which artifact of the base should a device run? The exported adapter on each of them, measured side by side.

Leaves `runs/<name>/export/trade.json` and `trade.html`.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter

from pitstop import records
from pitstop.bundle.manifest import Artifact, BaseRef
from pitstop.engines.base import Engine, Sampling, Usage, Use
from pitstop.files import write_bytes
from pitstop.profiles import DeviceProfile
from pitstop.retention.task import TaskRow
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.comparison import KL_ROWS, compare_answers
from pitstop.workshop.export import export
from pitstop.workshop.parity import score
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.task import open_exported, open_trained, task_rows
from pitstop.workshop.trade.page import page
from pitstop.workshop.trade.result import Option, Trade, choose

RESULT_FILE = "trade.json"
PAGE_FILE = "trade.html"
SCORED_ROWS = 40  # held-out rows answered on each; parity and check answer all of them, on what ships
TIMED_ROWS = 5
TIMED_TOKENS = 48


def trade(path: Path, *, profile: DeviceProfile | None = None, force: bool = False) -> Trade:
    """Measure the adapter on every artifact it was exported for, and choose among those that are near enough.

    Raises:
        UsageError: nothing is exported yet.
        BrokenInput: an exported file is not the one that was made.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        exported, _ = export.load_exported(recipe)
        ref = base_model.load_ref(recipe.base.folder)
        rows = task_rows(recipe, ref)[:KL_ROWS]
        inputs = inputs_digest(identity, exported, recipe.check, recipe.export, str(recipe.scale), *rows)
        done = recipe.run / export.FOLDER / RESULT_FILE
        known = None if force else finished(done, Trade, inputs)
        options = known.options if known else _measure(recipe, ref, exported, rows)
        allowed = recipe.export.parity_kl
        chosen, reasons = choose(options, allowed, profile)
        board = None if profile is None else profile.name
        result = Trade(inputs, recipe.name, identity.adapter_sha256, allowed, board, options, chosen, reasons)
        write_bytes(done.with_name(PAGE_FILE), page(result).encode())
        records.save_json(result, done)
        return result


def _measure(recipe: Recipe, ref: BaseRef, exported: export.Exported, rows: Sequence[TaskRow]) -> tuple[Option, ...]:
    files = [(recipe.base.artifact, exported.artifact)] + [(one.base, one.artifact) for one in exported.also]
    with closing(open_trained(recipe, ref)) as trained:
        return tuple(_measure_one(recipe, ref, trained, base, artifact, rows) for base, artifact in files)


def _measure_one(
    recipe: Recipe, ref: BaseRef, trained: Engine, base: str, artifact: Artifact, rows: Sequence[TaskRow]
) -> Option:
    use = Use(recipe.name, recipe.scale)
    path = recipe.run / export.FOLDER / artifact.name
    with open_exported(recipe, ref, base, path, artifact.sha256) as engine:
        kl, agreement, _ = compare_answers(trained, engine, (use, use), rows, ref.prompting.eos_token)
        answered = score(engine, rows[:SCORED_ROWS], use, recipe)
        prefill, decode = _speed(engine, rows, use)
    size = base_model.bytes_of(recipe.base.folder, ref.artifact(base))
    return Option(
        base, artifact.format, size, artifact.size, round(kl, 6), round(agreement, 4), answered, prefill, decode
    )


def _speed(engine: Engine, rows: Sequence[TaskRow], use: Use) -> tuple[float, float]:
    """Return tokens per second of reading prompts and of making answers, medians over some rows."""
    speeds = []
    for row in [rows[0], *rows[:TIMED_ROWS]]:
        usage = Usage()
        began = perf_counter()
        for _ in engine.generate(engine.tokenize(row.prompt), use, Sampling(max_tokens=TIMED_TOKENS), usage):
            pass
        first, all_of_it = usage.first_token_seconds, perf_counter() - began
        read = (usage.prompt_tokens - usage.reused_tokens) / first
        speeds.append((read, max(1, usage.completion_tokens - 1) / (all_of_it - first)))
    reading, making = zip(*speeds[1:], strict=True)  # the first one warms up
    return round(median(reading), 1), round(median(making), 1)
