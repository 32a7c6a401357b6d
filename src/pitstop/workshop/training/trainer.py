"""transformers' Trainer with our loss and our way through a batch: in parts that fit, alike on every process."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from pitstop.engines.activation import Activation
from pitstop.engines.invocation import active_from
from pitstop.errors import UsageError
from pitstop.progress import say
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.training import processes
from pitstop.workshop.training.arithmetic import compute_dtype
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.loss import Head, cross_entropy, divergence


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss count."""

    kl: float  # of KL(base || adapted) on general rows
    replay: float  # of the ordinary loss on general rows


@dataclass(frozen=True)
class Counts:
    """Scored positions of a whole batch, over all its parts and processes."""

    task: int
    general: int


class AnchoredTrainer(Trainer):
    """Learns the answers of the task rows, and stays near the base on the general ones."""

    def __init__(
        self,
        *args: Any,
        weights: Weights,
        activation: Activation,
        invocation: Sequence[int],
        micro_batch: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._weights = weights
        self._activation, self._invocation = activation, invocation
        self.micro_batch = micro_batch  # rows evaluated at once; None: all of a kind

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Leave the gradient of a whole batch, and return its loss; what does not fit is done in smaller parts."""
        model.train()
        batch = self._prepare_inputs(inputs)
        counts = Counts(int(batch["scored"].sum()), int(batch["scored_general"].sum()))
        state = torch.get_rng_state()
        while True:
            try:
                return self._in_parts(batch, counts)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            # Here, not above: the error holds what the failed part had made.
            self._halve(len(batch["input_ids"]), said)
            model.zero_grad()
            torch.set_rng_state(state)

    def _in_parts(self, batch: dict[str, torch.Tensor], counts: Counts) -> torch.Tensor:
        total = torch.zeros((), device=batch["input_ids"].device)
        for part in self._parts(batch):
            # Layers that are evaluated again in backward (gradient checkpointing) must act where they acted.
            with self._acting_on(part["input_ids"]):
                loss = self._loss(part, counts)
                self.accelerator.backward(loss)
            total += loss.detach()
        processes.add_up(self.accelerator.unwrap_model(self.model).parameters(), total)
        return total

    def _parts(self, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield task rows, then general rows, at most ``micro_batch`` at once and no wider than they need be."""
        for kind in ("scored", "scored_general"):
            rows = batch[kind].any(dim=1).nonzero().flatten()  # rows with nothing to score are not evaluated
            rows = rows[processes.rank() :: processes.count()]
            for chosen in rows.split(self.micro_batch or max(1, len(rows))):
                if len(chosen):
                    # The last scored position is the last but one token of the longest row.
                    width = int(batch[kind][chosen].any(dim=0).nonzero().max()) + 2
                    yield {name: tensor[chosen, :width] for name, tensor in batch.items()}

    def _loss(self, part: dict[str, torch.Tensor], counts: Counts) -> torch.Tensor:
        """Return what one part adds to the loss of its batch."""
        peft = self.accelerator.unwrap_model(self.model)
        head = Head.of(peft.get_base_model())
        tokens, task, general = part["input_ids"], part["scored"], part["scored_general"]
        hidden = last_hidden(peft, tokens)
        if task.any():
            return cross_entropy(hidden[task], head, _following(tokens, task), counts.task)
        loss = torch.zeros((), device=tokens.device)
        if self._weights.kl:
            with torch.no_grad(), peft.disable_adapter():
                plain = last_hidden(peft, tokens)[general]
            loss = loss + self._weights.kl * divergence(hidden[general], head, plain, counts.general)
        if self._weights.replay:
            aims = _following(tokens, general)
            loss = loss + self._weights.replay * cross_entropy(hidden[general], head, aims, counts.general)
        return loss

    def _acting_on(self, tokens: torch.Tensor) -> Any:
        starts = [active_from(row, self._invocation) for row in tokens.tolist()] if self._invocation else None
        return self._activation.of(starts, tokens.shape[1], tokens.device)

    def _halve(self, rows: int, said: str) -> None:
        before = min(self.micro_batch or rows, rows)
        if before == 1:
            raise UsageError(
                f"out of memory with a single row at once: {said}",
                cure='lower [data] max_tokens, set [train] gradient_checkpointing = true or [base] kept = "blocks"',
            )
        self.micro_batch = before // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory: {self.micro_batch} rows at once from here on, the same {rows} rows a step")

    def get_train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Return every batch for every process: each takes its rows of it.

        The order is already in Batches, so that a resumed training sees what it would have seen.
        """
        assert isinstance(self.train_dataset, Batches)
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's own class on a GPU; on a processor its allocator says so in a RuntimeError, and oneDNN in its own words.
    words = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def last_hidden(peft: PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return a model's last hidden states, shape (rows, longest, width), of tokens padded on the right."""
    inner: Any = peft.get_base_model()
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model
    return body(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _following(tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the token after each scored position, in the order of ``hidden[scored]``."""
    return tokens[:, 1:][scored[:, :-1]]


def make(
    adapted: PeftModel,
    batches: Batches,
    recipe: Recipe,
    *,
    activation: Activation,
    invocation: Sequence[int],
    report_to: Sequence[str] = (),
) -> AnchoredTrainer:
    """Return the trainer of a recipe.

    Raises:
        UsageError: a tracker to report to that is not installed.
    """
    if recipe.train.gradient_checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
    trainer = AnchoredTrainer(
        adapted,
        _arguments(recipe),
        data_collator=lambda rows: rows[0],
        train_dataset=batches,
        callbacks=_reporters(recipe, report_to),
        weights=Weights(recipe.retain.kl, recipe.retain.replay),
        activation=activation,
        invocation=invocation,
        micro_batch=recipe.train.micro_batch,
    )
    trainer.remove_callback(PrinterCallback)  # the progress line says it
    return trainer


def _reporters(recipe: Recipe, report_to: Sequence[str]) -> list[TrainerCallback]:
    try:
        reporters = [kind() for kind in get_reporting_integration_callbacks(list(report_to))]
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot report to {', '.join(report_to)}: {error}", cure="install it, or leave --report-to out"
        ) from error
    for reporter in reporters:
        if isinstance(reporter, TensorBoardCallback) and reporter.logging_dir is None:
            reporter.logging_dir = str(recipe.run / "tensorboard")
    return reporters


def _arguments(recipe: Recipe) -> TrainingArguments:
    chosen = recipe.train
    return TrainingArguments(
        output_dir=str(recipe.run / "checkpoints"),
        run_name=recipe.name,
        max_steps=chosen.steps,
        per_device_train_batch_size=1,  # one entry of Batches is one whole batch
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        warmup_steps=chosen.warmup_steps,
        lr_scheduler_type="cosine",
        optim=chosen.optimizer,
        bf16=compute_dtype() is torch.bfloat16,
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
