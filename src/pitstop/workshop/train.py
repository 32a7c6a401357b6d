"""Recipe to adapter: LoRA on the frozen base, loss on the answers, held near the base by general rows.

Leaves `runs/<name>/adapter/` (PEFT, plus `pitstop.json`: what it was trained on), `training.jsonl` (a line per logged
step) and `checkpoints/` while it is not finished.
"""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pitstop import records
from pitstop.bundle.manifest import BaseRef
from pitstop.engines.activation import Activation
from pitstop.engines.invocation import active_from
from pitstop.errors import RecordError
from pitstop.files import sha256_file, write_bytes
from pitstop.progress import progress
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import FOLDER, IDENTITY_FILE, WEIGHTS_FILE, Identity, refuse_imported
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.training import material
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.lora import fuse
from pitstop.workshop.training.loss import Head, cross_entropy, divergence


def train(path: Path, *, force: bool = False) -> Path:
    """Train the adapter of a recipe and return its folder; a finished one is kept, a stopped one goes on.

    Raises:
        UsageError: files that are missing, another process training this recipe, or an imported adapter in its place.
        RecordError: every problem of the recipe, those only the base can show included.
        DatasetError: rows that cannot be used.
    """
    recipe = recipes.load(path)
    run = recipe.run
    with exclusive(run):
        ref = base_model.load_ref(recipe.base.folder)
        inputs = _inputs(recipe, ref)
        recipes.keep(path, run)
        known = finished(run / FOLDER / IDENTITY_FILE, Identity, inputs)
        if known is not None and not force:
            return run / FOLDER
        if not force:
            refuse_imported(run)
        _clear(run, inputs, force=force)
        return _train(recipe, ref, run, inputs)


def _inputs(recipe: Recipe, ref: BaseRef) -> str:
    # Not the whole base.json: another artifact of the same base changes nothing here.
    base = (ref.artifact(recipe.base.artifact), ref.weights_sha256, ref.tokenizer_sha256, ref.template_sha256)
    return inputs_digest(recipe.base, recipe.data, recipe.train, recipe.retain, *base)


def _train(recipe: Recipe, ref: BaseRef, run: Path, inputs: str) -> Path:
    tokenizer = base_model.load_tokenizer(recipe.base.folder)
    learned = material.load(recipe, ref, tokenizer)
    records.save_json(learned.report, run / material.REPORT_FILE)
    material.tell(learned.report)
    torch.manual_seed(recipe.train.seed)
    model = base_model.load_weights(
        recipe.base.folder, ref, precision=recipe.base.precision, artifact=recipe.base.artifact
    )
    if model.device.type == "cpu":
        # The fused attention's backward takes 18 ms a layer in bfloat16 here, the plain one 5 (12 rows of 48 tokens).
        model.set_attn_implementation("eager")
    adapted = attach(model, recipe)
    activation = Activation()
    fuse(adapted, activation)
    activation.watch(adapted, "default")
    batches = Batches(learned.examples, learned.general, recipe.train, recipe.retain, pad=tokenizer.pad_token_id or 0)
    trainer = _trainer(adapted, batches, recipe, run, activation, learned.invocation)
    begun = time.monotonic()
    _run_stoppable(trainer, run)
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
        final_loss=_final_loss(run),
    )
    return _save(adapted, identity, ref, run, learned.invocation)


def attach(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put a fresh LoRA on the frozen model.

    Raises:
        RecordError: projections or layers the base does not have.
    """
    wanted = recipes.module_names(recipe.train.modules)
    present = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    layers = model.config.num_hidden_layers
    problems = [
        f"train.modules: this base has no {name}; it has {', '.join(sorted(present - {'lm_head'}))}"
        for name in wanted
        if name not in present or name == "lm_head"
    ]
    if recipe.train.first_layer >= layers:
        problems.append(f"train.first_layer: {recipe.train.first_layer}, but this base has {layers} layers")
    if problems:
        raise RecordError(problems, where=recipe.run / recipes.RECIPE_FILE)
    config = LoraConfig(
        r=recipe.train.rank,
        lora_alpha=recipe.train.alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        use_rslora=recipe.train.rslora,
        lora_dropout=recipe.train.dropout,
        target_modules=list(wanted),
        layers_to_transform=list(range(recipe.train.first_layer, layers)) if recipe.train.first_layer else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


class AnchoredTrainer(Trainer):
    """transformers' Trainer with our loss: answers of the task rows, and KL to the base on the general ones."""

    def __init__(
        self,
        *args: Any,
        kl: float,
        replay: float,
        activation: Activation,
        invocation: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._kl, self._replay = kl, replay
        self._activation, self._invocation = activation, invocation

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Return CE(task) + kl · KL(base || adapted) + replay · CE(general), each in nats per scored token."""
        peft = self.accelerator.unwrap_model(model)
        head = Head.of(peft.get_base_model())
        tokens, task, general = inputs["input_ids"], inputs["scored"], inputs["scored_general"]
        with self._acting_on(tokens):
            hidden = _hidden(peft, tokens)
        loss = cross_entropy(hidden[task], head, _following(tokens, task))
        if general.any():
            if self._kl:
                rows = general.any(dim=1)
                until = int(general.any(dim=0).nonzero().max()) + 1  # what the task rows pad them to is of no use
                with torch.no_grad(), peft.disable_adapter():
                    plain = _hidden(peft, tokens[rows, :until])[general[rows, :until]]
                loss = loss + self._kl * divergence(hidden[general], head, plain)
            if self._replay:
                loss = loss + self._replay * cross_entropy(hidden[general], head, _following(tokens, general))
        return loss

    def _acting_on(self, tokens: torch.Tensor) -> AbstractContextManager[None]:
        starts = [active_from(row, self._invocation) for row in tokens.tolist()] if self._invocation else None
        return self._activation.of(starts, tokens.shape[1], tokens.device)

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
        # The order is already in Batches, so that a resumed training sees what it would have seen.
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _hidden(peft: PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    inner: Any = peft.get_base_model()
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model
    return body(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _following(tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the token after each scored position, in the order of ``hidden[scored]``."""
    return tokens[:, 1:][scored[:, :-1]]


class _Show(TrainerCallback):
    """Moves the progress line, keeps training.jsonl, and turns Ctrl-C into a checkpoint."""

    def __init__(self, run: Path, advance: Any, tokens: list[int]) -> None:
        self._log = run / "training.jsonl"
        self._advance, self._tokens = advance, tokens
        self._loss = ""
        self.stop = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(self._tokens[state.global_step - 1], f"step {state.global_step}/{state.max_steps} {self._loss}")
        if self.stop:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f}"
            with self._log.open("a", encoding="utf-8") as file:
                line = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]}
                file.write(json.dumps(line) + "\n")


def _trainer(
    adapted: PeftModel,
    batches: Batches,
    recipe: Recipe,
    run: Path,
    activation: Activation,
    invocation: Sequence[int],
) -> AnchoredTrainer:
    chosen = recipe.train
    arguments = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        max_steps=chosen.steps,
        per_device_train_batch_size=1,  # one entry of Batches is one whole batch
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        warmup_steps=chosen.warmup_steps,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=chosen.seed,
        save_steps=chosen.checkpoint_every,
        save_total_limit=1,
        logging_steps=5,
        logging_first_step=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=False,
    )
    trainer = AnchoredTrainer(
        adapted,
        arguments,
        data_collator=lambda rows: rows[0],
        train_dataset=batches,
        kl=recipe.retain.kl,
        replay=recipe.retain.replay,
        activation=activation,
        invocation=invocation,
    )
    trainer.remove_callback(PrinterCallback)  # the progress line says it
    return trainer


def _run_stoppable(trainer: AnchoredTrainer, run: Path) -> None:
    """Train from the newest checkpoint; Ctrl-C saves one more and then stops."""
    checkpoint = _newest_checkpoint(run)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    batches = trainer.train_dataset
    assert isinstance(batches, Batches)
    tokens = batches.tokens_per_step
    _cut_log(run, done)
    with progress(f"train {run.name}", sum(tokens), "tokens") as advance:
        if done:
            advance(sum(tokens[:done]), f"resumed at step {done}")
        show = _Show(run, advance, tokens)
        trainer.add_callback(show)
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *_: setattr(show, "stop", True))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            signal.signal(signal.SIGINT, before)
    if show.stop:
        raise KeyboardInterrupt


def _cut_log(run: Path, done: int) -> None:
    """Drop the lines of steps after the checkpoint: a killed training did them, and they are done again."""
    log = run / "training.jsonl"
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without an end was cut short by the kill.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_bytes(log, "".join(kept).encode())


def _newest_checkpoint(run: Path) -> Path | None:
    # trainer_state.json is written last: a checkpoint without it was cut short by a kill.
    whole = [
        folder for folder in (run / "checkpoints").glob("checkpoint-*") if (folder / "trainer_state.json").is_file()
    ]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _clear(run: Path, inputs: str, *, force: bool) -> None:
    """Drop checkpoints made from other inputs: resuming them would train something the recipe does not say."""
    mark = run / "checkpoints" / "inputs"
    if force or not mark.is_file() or mark.read_text() != inputs:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        (run / "training.jsonl").unlink(missing_ok=True)
        write_bytes(mark, inputs.encode())
    (run / FOLDER / IDENTITY_FILE).unlink(missing_ok=True)


def _final_loss(run: Path) -> float | None:
    lines = (run / "training.jsonl").read_text().splitlines() if (run / "training.jsonl").is_file() else []
    losses = [json.loads(line)["loss"] for line in lines[-5:]]
    return round(sum(losses) / len(losses), 4) if losses else None


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
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return folder
