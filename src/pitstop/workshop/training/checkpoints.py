"""A training that can be stopped: it shows how far it is, keeps its log, and goes on from its newest checkpoint."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pitstop.files import write_bytes
from pitstop.progress import progress, say
from pitstop.workshop.training import processes
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.trainer import AnchoredTrainer

LOG_FILE = "training.jsonl"
FOLDER = "checkpoints"


class _Show(TrainerCallback):
    """Moves the progress line, keeps training.jsonl, and turns Ctrl-C into a checkpoint."""

    def __init__(self, run: Path, advance: Any, tokens: list[int]) -> None:
        self._log = run / LOG_FILE
        self._advance, self._tokens = advance, tokens
        self._loss = ""
        self.stop = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(self._tokens[state.global_step - 1], f"step {state.global_step}/{state.max_steps} {self._loss}")
        if self.stop:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self._loss = f"loss {logs['loss']:.3f}"
            with self._log.open("a", encoding="utf-8") as file:
                line = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]}
                file.write(json.dumps(line) + "\n")


def run_stoppable(trainer: AnchoredTrainer, run: Path) -> None:
    """Train from the newest checkpoint; Ctrl-C saves one more and then stops."""
    checkpoint = _newest(run)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    batches = trainer.train_dataset
    assert isinstance(batches, Batches)
    tokens = batches.tokens_per_step
    if processes.is_first():
        _cut_log(run, done)
    with progress(f"train {run.name}", sum(tokens), "tokens") as advance:
        if done:
            say(f"train {run.name}: goes on from step {done}")
            advance(sum(tokens[:done]))
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


def clear(run: Path, inputs: str, *, force: bool) -> None:
    """Drop checkpoints made from other inputs: resuming them would train something the recipe does not say."""
    mark = run / FOLDER / "inputs"
    if force or not mark.is_file() or mark.read_text() != inputs:
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        (run / LOG_FILE).unlink(missing_ok=True)
        write_bytes(mark, inputs.encode())


def final_loss(run: Path) -> float | None:
    """Return the mean loss of the last logged steps; None if there was none to log."""
    lines = (run / LOG_FILE).read_text().splitlines() if (run / LOG_FILE).is_file() else []
    losses = [json.loads(line)["loss"] for line in lines[-5:]]
    return round(sum(losses) / len(losses), 4) if losses else None


def _cut_log(run: Path, done: int) -> None:
    """Drop the lines of steps after the checkpoint: a killed training did them, and they are done again."""
    log = run / LOG_FILE
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without an end was cut short by the kill.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_bytes(log, "".join(kept).encode())


def _newest(run: Path) -> Path | None:
    # trainer_state.json is written last: a checkpoint without it was cut short by a kill.
    whole = [folder for folder in (run / FOLDER).glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
