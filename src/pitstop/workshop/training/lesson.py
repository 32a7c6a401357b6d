"""Learning from a teacher's predictions: KL(teacher || student) at every scored position, over the whole vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pitstop.engines.activation import Activation
from pitstop.engines.invocation import active_from
from pitstop.workshop.training.arithmetic import compute_dtype
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.loss import Head, divergence
from pitstop.workshop.training.trainer import last_hidden


class Lesson(Dataset[dict[str, torch.Tensor]]):
    """Batches, with what the teacher's last layer made of their scored positions as `taught`, (positions, width)."""

    def __init__(self, batches: Batches, taught: Sequence[torch.Tensor]) -> None:
        self.batches, self._taught = batches, taught

    def __len__(self) -> int:
        return len(self._taught)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return {**self.batches[step], "taught": self._taught[step]}


def teach(teacher: PeftModel, batches: Batches, activation: Activation, invocation: Sequence[int]) -> Lesson:
    """Keep what a teacher's last layer makes of every scored position of the batches."""
    with torch.no_grad():
        taught = [states(teacher, batches[step], activation, invocation) for step in range(len(batches))]
    return Lesson(batches, taught)


def states(
    model: PeftModel, batch: dict[str, torch.Tensor], activation: Activation, invocation: Sequence[int]
) -> torch.Tensor:
    """Return a model's last hidden states at the scored positions of a batch, shape (positions, width)."""
    tokens = batch["input_ids"].to(model.device)
    starts = [active_from(row, invocation) for row in tokens.tolist()] if invocation else None
    with activation.of(starts, tokens.shape[1], tokens.device):
        hidden = last_hidden(model, tokens)
    return hidden[(batch["scored"] | batch["scored_general"]).to(tokens.device)]


class Pupil(Trainer):
    """transformers' Trainer on a lesson."""

    def __init__(
        self,
        model: PeftModel,
        lesson: Lesson,
        teacher: Head,
        *,
        learning_rate: float,
        seed: int,
        activation: Activation,
        invocation: Sequence[int],
        callbacks: Sequence[TrainerCallback],
        scratch: str,
    ) -> None:
        """Prepare to learn a lesson from first to last.

        Args:
            teacher: its output embedding, which may differ from the student's by its quantization.
            scratch: a folder that nothing is left in.
        """
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=len(lesson),
            per_device_train_batch_size=1,  # one entry of a lesson is one whole batch
            learning_rate=learning_rate,
            warmup_steps=min(2, len(lesson) // 4),
            lr_scheduler_type="cosine",
            bf16=compute_dtype() is torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        super().__init__(
            model,
            arguments,
            data_collator=lambda rows: rows[0],
            train_dataset=lesson,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # the progress line says it
        self._teacher = teacher
        self._activation, self._invocation = activation, invocation

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Return KL(teacher || student) in nats per scored position."""
        peft = self.accelerator.unwrap_model(model)
        return self._divergence(peft, inputs)

    def _divergence(self, peft: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
        found = states(peft, batch, self._activation, self._invocation)
        return divergence(
            found, Head.of(peft.get_base_model()), batch["taught"].to(found.device), base_head=self._teacher
        )

    def distance(self, lesson: Lesson) -> float:
        """Return the mean KL(teacher || student) of a lesson, in nats per scored position."""
        peft = self.accelerator.unwrap_model(self.model)
        total, count = 0.0, 0
        with torch.no_grad():
            for step in range(len(lesson)):
                batch = lesson[step]
                total += float(self._divergence(peft, batch)) * len(batch["taught"])
                count += len(batch["taught"])
        return total / count

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # in Batches' order
