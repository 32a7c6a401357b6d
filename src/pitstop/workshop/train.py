"""Recipe to adapter: LoRA on the frozen base, loss on the answers, held near the base by general rows.

Leaves `runs/<name>/adapter/` (PEFT, plus `pitstop.json`: what it was trained on), `training.jsonl` (a line per logged
step) and `checkpoints/` while it is not finished.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from pitstop import records
from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.bundle.manifest import BaseRef
from pitstop.engines.activation import Activation
from pitstop.files import sha256_file
from pitstop.progress import is_quiet, quietly, say
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import FOLDER, IDENTITY_FILE, WEIGHTS_FILE, Identity, refuse_imported
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.training import checkpoints, costs, material, processes
from pitstop.workshop.training import trainer as trainers
from pitstop.workshop.training.attach import attach
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.fast import make_fast


def train(path: Path, *, force: bool = False, report_to: Sequence[str] = ()) -> Path:
    """Train the adapter of a recipe and return its folder; a finished one is kept, a stopped one goes on.

    Raises:
        UsageError: files that are missing, another process training this recipe, or an imported adapter in its place.
        RecordError: every problem of the recipe, those only the base can show included.
        DatasetError: rows that cannot be used.
    """
    processes.refuse_sharding()
    recipe = recipes.load(path)
    run = recipe.run
    first = processes.is_first()
    with exclusive(run) if first else quietly():
        ref = base_model.load_ref(recipe.base.folder)
        inputs = _inputs(recipe, ref)
        known = finished(run / FOLDER / IDENTITY_FILE, Identity, inputs)
        processes.wait()  # until all have looked: from here on the first one changes the folder
        if first:
            recipes.keep(path, run)
        if known is not None and not force:
            return run / FOLDER
        if not force:
            refuse_imported(run)
        with processes.first_goes_first():
            if first:
                checkpoints.clear(run, inputs, force=force)
                (run / FOLDER / IDENTITY_FILE).unlink(missing_ok=True)
        return _train(recipe, ref, run, inputs, report_to)


def _inputs(recipe: Recipe, ref: BaseRef) -> str:
    # Not the whole base.json: another artifact of the same base changes nothing here.
    base = (ref.artifact(recipe.base.artifact), ref.weights_sha256, ref.tokenizer_sha256, ref.template_sha256)
    # Nor how the training is fitted into memory: it is the same training.
    weights = replace(recipe.base, kept="auto")
    steps = replace(recipe.train, micro_batch=None, gradient_checkpointing=False)
    return inputs_digest(weights, recipe.data, steps, recipe.retain, *base)


def _train(recipe: Recipe, ref: BaseRef, run: Path, inputs: str, report_to: Sequence[str]) -> Path:
    tokenizer = base_model.load_tokenizer(recipe.base.folder)
    learned = material.load(recipe, ref, tokenizer)
    material.tell(learned.report)
    adapted, activation = _adapted(recipe, ref)
    _tell_costs(recipe, ref, adapted)
    batches = Batches(learned.examples, learned.general, recipe.train, recipe.retain, pad=tokenizer.pad_token_id or 0)
    trainer = trainers.make(
        adapted, batches, recipe, activation=activation, invocation=learned.invocation, report_to=report_to
    )
    begun = time.monotonic()
    checkpoints.run_stoppable(trainer, run)
    with processes.first_goes_first():
        if not processes.is_first():
            return run / FOLDER
        records.save_json(learned.report, run / material.REPORT_FILE)
        identity = Identity(
            name=recipe.name,
            base_name=ref.name,
            base_sha256=ref.artifact(recipe.base.artifact).sha256,
            precision=recipe.base.precision,
            adapter_sha256="",
            inputs=inputs,
            rows=len(learned.examples),
            rows_too_long=learned.report.too_long,
            tokens=batches.tokens,
            seconds=round(time.monotonic() - begun, 1),
            final_loss=checkpoints.final_loss(run),
        )
        return _save(adapted, identity, ref, run, learned.invocation)


def _adapted(recipe: Recipe, ref: BaseRef) -> tuple[PeftModel, Activation]:
    """Return the frozen base with a fresh adapter, and what says where it acts."""
    torch.manual_seed(recipe.train.seed)
    base = recipe.base
    with processes.first_goes_first():  # what is dequantized for the first time is written down
        model = base_model.load_weights(
            base.folder, ref, precision=base.precision, artifact=base.artifact, kept=base.kept
        )
    adapted = attach(model, recipe, _ships_beside(recipe, ref))
    return adapted, make_fast(adapted)


def _tell_costs(recipe: Recipe, ref: BaseRef, adapted: PeftModel) -> None:
    """Say what the adapter and the presets it could have had cost the device, unless nobody listens."""
    artifact = ref.artifact(recipe.base.artifact)
    if recipe.export.delivery == "merged":
        why = "DoRA and whole norms fit no adapter file" if recipe.train.dora or recipe.train.save_modules else "chosen"
        say(f"ships merged, {artifact.size / 1e6:,.0f} MB beside the base ({why})")
        return
    rank = max(module.r["default"] for module in adapted.modules() if isinstance(module, LoraLayer))
    values = sum(weight.numel() for name, weight in adapted.named_parameters() if ".lora_" in name)
    say(f"adapter: rank {rank}, {values:,} values, {2 * values / (1 << 20):,.1f} MiB in f16")
    if artifact.format == "gguf" and not is_quiet():
        file = base_model.artifact_path(recipe.base.folder, ref, recipe.base.artifact)
        costs.tell(costs.costs(file, artifact.sha256, rank, recipe.base.folder / "measured"))


def _ships_beside(recipe: Recipe, ref: BaseRef) -> GgufHeader | None:
    """Return the base file's header; none of an artifact of another format."""
    if ref.artifact(recipe.base.artifact).format != "gguf":
        return None
    return read_gguf(base_model.artifact_path(recipe.base.folder, ref, recipe.base.artifact))


def _save(adapted: PeftModel, identity: Identity, ref: BaseRef, run: Path, invocation: Sequence[int]) -> Path:
    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    adapted.peft_config["default"].base_model_name_or_path = ref.name
    if invocation:
        config: Any = adapted.peft_config["default"]
        config.alora_invocation_tokens = list(invocation)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    identity = replace(identity, adapter_sha256=sha256_file(folder / WEIGHTS_FILE))
    records.save_json(identity, folder / IDENTITY_FILE)  # written last: without it the adapter is not finished
    shutil.rmtree(run / checkpoints.FOLDER, ignore_errors=True)
    return folder
