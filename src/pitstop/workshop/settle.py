"""A finished adapter from the weights it was trained on to those that ship: a few steps of distillation, no labels.

The teacher is what was trained: its own base (NF4 or unquantized) with the adapter. It answers prompts of the task, and
the same adapter on the shipped weights learns to say what it says, token by token: KL(teacher || settled) over the
whole vocabulary, on those answers and on general text (Hinton et al., arXiv:1503.02531, at temperature 1; on the
teacher's own sequences as in Kim and Rush, arXiv:1606.07947). Teacher and student are never in memory together: what
the teacher's head sees is small, and is kept.

Leaves a run of its own, `runs/<name>-settled/`, with `settle.json`.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from pitstop import records
from pitstop.bundle.manifest import BaseRef
from pitstop.engines.activation import Activation
from pitstop.engines.base import Engine, Sampling, Use
from pitstop.engines.torch import TorchEngine
from pitstop.errors import UsageError
from pitstop.files import sha256_file, write_bytes
from pitstop.progress import progress
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model, successor
from pitstop.workshop import recipe as recipes
from pitstop.workshop.dataset import Example, encode, encode_general, load_split, prompt_text, spread
from pitstop.workshop.foreign import CONFIG_FILE
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.task import CONTEXT, sampling, task_prompting
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.fast import make_fast
from pitstop.workshop.training.lesson import Lesson, Pupil, teach
from pitstop.workshop.training.loss import Head
from pitstop.workshop.training.material import invocation_tokens

RESULT_FILE = "settle.json"
SHARE = 0.1  # of the steps that the adapter was trained for
LEAST_STEPS = 10
ROWS = 3  # a step, for each of the training's
LEARNING_RATE = 5e-4
HELD_OUT = 16  # prompts whose answers are not learned from: what was won is measured on them
TOGETHER = 32  # prompts that are answered at once


@dataclass(frozen=True)
class Settled:
    """`settle.json`: what was done, and how near the adapter came."""

    inputs: str
    source: str  # the run that was settled
    run: str  # where it is now
    adapter_sha256: str  # of the settled weights
    trained_on: str  # precision of the teacher's base
    artifact: str  # of the base, that it runs on now
    base_sha256: str  # of that artifact
    steps: int
    tokens: int
    seconds: float
    kl_before: float  # KL(teacher || adapter on the shipped weights) on held-out prompts, nats per token
    kl_after: float


@dataclass(frozen=True)
class _Job:
    recipe: Recipe
    ref: BaseRef
    identity: adapters.Identity
    tokenizer: PreTrainedTokenizerBase
    artifact: str
    steps: int


def settle(
    path: Path, *, artifact: str | None = None, steps: int | None = None, to: str | None = None, force: bool = False
) -> Settled:
    """Move a run's adapter onto the weights that ship, in a run of its own.

    Args:
        path: recipe file or run folder.
        artifact: of the base; None: the recipe's.
        steps: of distillation; None: a tenth of the training's.
        to: name of the new run below runs/; None: the old one's with -settled.

    Raises:
        UsageError: nothing is trained, or it was trained on the shipped weights.
        RecordError: the base has no such artifact.
        DatasetError: rows that cannot be used.
    """
    recipe = recipes.load(path)
    target = successor.run_of(recipe, to, "settled")
    with exclusive(recipe.run):
        ref = base_model.load_ref(recipe.base.folder)
        identity = adapters.load_identity(recipe)
        chosen = artifact or recipe.base.artifact
        if identity.precision == "shipped" and identity.base_sha256 == ref.artifact(chosen).sha256:
            raise UsageError(f"{recipe.name} was trained on {chosen}: there is nothing to settle", where=recipe.run)
        job = _Job(
            recipe,
            ref,
            identity,
            base_model.load_tokenizer(recipe.base.folder),
            chosen,
            steps or max(LEAST_STEPS, round(SHARE * recipe.train.steps)),
        )
        inputs = inputs_digest(identity, recipe.data, recipe.retain, ref.artifact(chosen), str(job.steps))
        known = None if force else finished(target / RESULT_FILE, Settled, inputs)
        if known is not None and successor.whole(target, known.adapter_sha256):
            return known
        successor.refuse_another(target, RESULT_FILE, recipe.run)
        file = path / recipes.RECIPE_FILE if path.is_dir() else path
        base = {"precision": "shipped", "artifact": chosen}
        text = successor.recipe_text(recipe, file, target, "pitstop settle", base)
        return _settle(job, target, text, inputs)


def _settle(job: _Job, target: Path, recipe: str, inputs: str) -> Settled:
    begun = time.monotonic()
    lesson, held_out, head = _taught(job)
    adapted = _student(job)
    before, after = _learn(job, adapted, lesson, held_out, head)
    artifact = job.ref.artifact(job.artifact)
    with exclusive(target), tempfile.TemporaryDirectory(dir=target, prefix=".settle-") as scratch:
        fresh = Path(scratch, adapters.FOLDER)
        identity = _save(adapted, fresh, job)
        result = Settled(
            inputs=inputs,
            source=str(job.recipe.run),
            run=str(target),
            adapter_sha256=identity.adapter_sha256,
            trained_on=job.identity.precision,
            artifact=job.artifact,
            base_sha256=artifact.sha256,
            steps=job.steps,
            tokens=lesson.batches.tokens,
            seconds=round(time.monotonic() - begun, 1),
            kl_before=round(before, 6),
            kl_after=round(after, 6),
        )
        successor.put(fresh, target)
        records.save_json(result, target / RESULT_FILE)
        write_bytes(target / recipes.RECIPE_FILE, recipe.encode())  # last: without it no stage takes it for a run
    return result


def _save(adapted: PeftModel, folder: Path, job: _Job) -> adapters.Identity:
    """Write the settled adapter in the types and with the settings that it had."""
    source = job.recipe.run / adapters.FOLDER
    settled = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    stored = load_file(source / adapters.WEIGHTS_FILE)
    folder.mkdir()
    save_file(
        {name: settled[name].detach().to(tensor.dtype).contiguous() for name, tensor in stored.items()},
        folder / adapters.WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    shutil.copyfile(source / CONFIG_FILE, folder / CONFIG_FILE)
    before = job.identity
    identity = replace(
        before,
        base_sha256=job.ref.artifact(job.artifact).sha256,
        precision="shipped",
        adapter_sha256=sha256_file(folder / adapters.WEIGHTS_FILE),
        history=(*before.history, adapters.Change("settle", {"steps": float(job.steps)}, before.adapter_sha256)),
    )
    records.save_json(identity, folder / adapters.IDENTITY_FILE)
    return identity


def _taught(job: _Job) -> tuple[Lesson, Lesson, Head]:
    """Let the teacher answer, and return what it says at every scored position: of the lesson, and held out."""
    recipe = job.recipe
    model = base_model.load_weights(
        recipe.base.folder, job.ref, precision=job.identity.precision, artifact=_teacher_artifact(job)
    )
    examples = _answered(job, model)
    invocation = invocation_tokens(recipe, job.tokenizer)
    kept = recipe.retain
    general = (
        encode_general(kept.rows, job.tokenizer, job.ref.prompting, kept.max_tokens, invocation)
        if kept.rows and kept.share
        else []
    )
    batch, pad = ROWS * recipe.train.batch, job.tokenizer.pad_token_id or 0
    lesson, held_out = (
        Batches(rows, others, replace(recipe.train, steps=steps, batch=batch), kept, pad=pad)
        for rows, others, steps in (
            (examples[HELD_OUT:], general, job.steps),
            (examples[:HELD_OUT], [], math.ceil(HELD_OUT / batch)),
        )
    )
    adapted = PeftModel.from_pretrained(model, str(recipe.run / adapters.FOLDER))
    activation = Activation()
    activation.watch(adapted, "default")
    with rescale_adapter_scale(adapted, recipe.scale):
        taught = [teach(adapted, batches, activation, invocation) for batches in (lesson, held_out)]
    return taught[0], taught[1], Head.of(adapted.get_base_model())


def _teacher_artifact(job: _Job) -> str:
    """Return the artifact whose weights the teacher was trained on; for other precisions it does not matter."""
    for artifact in job.ref.artifacts:
        if artifact.sha256 == job.identity.base_sha256:
            return artifact.precision
    return job.artifact


def _answered(job: _Job, model: PreTrainedModel) -> list[Example]:
    """Return prompts of the task with the teacher's own answers."""
    recipe = job.recipe
    rows, _ = load_split(recipe.data)
    chosen = spread(rows, HELD_OUT + ROWS * recipe.train.batch * job.steps, recipe.train.seed)
    prompting = task_prompting(recipe, job.ref)
    length = min(job.ref.context_length, CONTEXT)
    with TorchEngine(model, job.tokenizer, base_sha256=job.identity.base_sha256, context_length=length) as engine:
        engine.load_adapter(recipe.name, recipe.run / adapters.FOLDER)
        prompts = [engine.tokenize(prompt_text(row, prompting)) for row in chosen]
        fitting = [at for at, prompt in enumerate(prompts) if len(prompt) <= recipe.data.max_tokens]
        answers = _generate(engine, [prompts[at] for at in fitting], Use(recipe.name, recipe.scale), sampling(recipe))
    said = [
        replace(chosen[at], messages=(*chosen[at].prompt, {"role": "assistant", "content": answer}))
        for at, answer in zip(fitting, answers, strict=True)
    ]
    return list(encode(said, job.tokenizer, prompting, length, one_answer=True).examples)


def _generate(engine: Engine, prompts: Sequence[Sequence[int]], use: Use, settings: Sampling) -> list[str]:
    answers: list[str] = []
    with progress(f"answers of {use.adapter}", len(prompts), "prompts") as advance:
        for begin in range(0, len(prompts), TOGETHER):
            answers += engine.generate_batch(prompts[begin : begin + TOGETHER], use, settings)
            advance(min(TOGETHER, len(prompts) - begin))
    return answers


def _student(job: _Job) -> PeftModel:
    """Return the shipped weights with the adapter, its matrices to be trained."""
    model = base_model.load_weights(job.recipe.base.folder, job.ref, precision="shipped", artifact=job.artifact)
    return PeftModel.from_pretrained(model, str(job.recipe.run / adapters.FOLDER), is_trainable=True)


def _learn(job: _Job, adapted: PeftModel, lesson: Lesson, held_out: Lesson, teacher: Head) -> tuple[float, float]:
    """Learn the lesson; return KL(teacher || student) on what is held out, before and after."""
    activation = make_fast(adapted)
    scaled = rescale_adapter_scale(adapted, job.recipe.scale)
    with scaled, tempfile.TemporaryDirectory() as scratch, _shown(job, lesson) as show:
        pupil = Pupil(
            adapted,
            lesson,
            teacher,
            learning_rate=LEARNING_RATE,
            seed=job.recipe.train.seed,
            activation=activation,
            invocation=invocation_tokens(job.recipe, job.tokenizer),
            callbacks=[show],
            scratch=scratch,
        )
        before = pupil.distance(held_out)
        pupil.train()
        return before, pupil.distance(held_out)


@contextmanager
def _shown(job: _Job, lesson: Lesson) -> Iterator[TrainerCallback]:
    batches = lesson.batches
    with progress(f"settle {job.recipe.name}", batches.tokens, "tokens") as advance:
        yield _Show(advance, batches.tokens_per_step)


class _Show(TrainerCallback):
    """Moves the progress line."""

    def __init__(self, advance: Callable[..., None], tokens: Sequence[int]) -> None:
        self._advance, self._tokens = advance, tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(self._tokens[state.global_step - 1], f"step {state.global_step}/{state.max_steps}")
