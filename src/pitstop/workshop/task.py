"""The task that a recipe teaches, as what is measured needs it: its held-out rows, and engines that answer them."""

from dataclasses import replace
from pathlib import Path

import torch

from pitstop.bundle.formats import read_gguf
from pitstop.bundle.manifest import BaseRef, Prompting
from pitstop.engines.base import Engine, Sampling
from pitstop.engines.opening import engine_class, engine_for
from pitstop.engines.torch import TorchEngine
from pitstop.retention.classes import classes_of
from pitstop.retention.task import TaskRow
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop.dataset import load_split, prompt_text, spread
from pitstop.workshop.recipe import Recipe

CONTEXT = 1024  # tokens an item may have
ROOM = 1 << 30  # bytes that answers on their way may take beside the model


def task_rows(recipe: Recipe, ref: BaseRef) -> list[TaskRow]:
    """Return the held-out rows the task is scored on, spread over the groups, rendered for this base."""
    training, test = load_split(recipe.data)
    prompting = task_prompting(recipe, ref)
    classes = classes_of(row.answer for row in training) if recipe.check.metric == "class" else ()
    return [
        TaskRow(row.id, row.group, prompt_text(row, prompting), row.answer, classes, recipe.check.tolerance)
        for row in spread(test, recipe.check.rows)
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


def open_exported(recipe: Recipe, ref: BaseRef, precision: str, adapter: Path, sha256: str) -> Engine:
    """Open the device's engine for one artifact of the base, with an adapter file under the recipe's name."""
    base = ref.artifact(precision)
    path = base_model.artifact_path(recipe.base.folder, ref, precision)
    length = min(ref.context_length, CONTEXT)
    # llama.cpp's threads wait for each other by spinning: more of them than this process's share of the cores, and
    # everything stands still. torch's number follows OMP_NUM_THREADS.
    name = engine_for(base)
    batched = {"sequences": _sequences(path, length), "own_products": True} if name == "llama" else {"sequences": 1}
    engine: Engine = engine_class(name)(
        path, base_sha256=base.sha256, context_length=length, threads=torch.get_num_threads(), **batched
    )
    engine.load_adapter(recipe.name, adapter, sha256=sha256)
    return engine


def _sequences(base: Path, length: int) -> int:
    """Return how many answers are generated side by side: as many as there is room for."""
    from pitstop.engines.llama import context_bytes

    header = read_gguf(base)
    return next((many for many in (32, 16, 8, 4, 2) if context_bytes(header, length, many) <= ROOM), 1)
