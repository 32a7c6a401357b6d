"""A batch in parts gives the gradient of the whole batch; memory that runs out makes the parts smaller."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pitstop import progress
from pitstop.engines.activation import Activation
from pitstop.errors import UsageError
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop import train as stage
from pitstop.workshop.training import attention, material
from pitstop.workshop.training import trainer as trainers
from pitstop.workshop.training.attach import attach
from pitstop.workshop.training.batches import Batches
from pitstop.workshop.training.lora import fuse
from workbench import Project

GENERAL = {"rows": "general.jsonl", "share": 1.0, "replay": 0.5}
INVOCATION = "<|im_start|>assistant\n"
Prepared = Callable[..., tuple[trainers.AnchoredTrainer, Batches]]


@pytest.fixture
def prepared(project: Project) -> Prepared:
    """Makes the trainer of a recipe on the tiny base in float32, its B not zero, and the batches."""

    def make(**train: object) -> tuple[trainers.AnchoredTrainer, Batches]:
        recipe = recipes.load(project.recipe(train={"batch": 6, **train}, retain=GENERAL))
        ref, tokenizer = base_model.load_ref(recipe.base.folder), base_model.load_tokenizer(recipe.base.folder)
        learned = material.load(recipe, ref, tokenizer)
        torch.manual_seed(0)
        model = base_model.load_weights(recipe.base.folder, ref, precision="shipped", artifact="q8_0").float()
        attention.use(model)
        adapted, activation = attach(model, recipe), Activation()
        fuse(adapted, activation)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        batches = Batches(learned.examples, learned.general, recipe.train, recipe.retain, pad=0)
        made = trainers.make(adapted, batches, recipe, activation=activation, invocation=learned.invocation)
        return made, batches

    return make


def gradients(trainer: trainers.AnchoredTrainer, batches: Batches) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(batches[0]))
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def equal(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("change", [{}, {"invocation": INVOCATION}])
def test_parts_add_up_to_the_batch(prepared: Prepared, change: dict[str, object]) -> None:
    trainer, batches = prepared(**change)
    whole = gradients(trainer, batches)
    assert any(gradient.abs().max() > 1e-4 for gradient in whole[1].values())
    for rows in (1, 2, 4):
        trainer.micro_batch = rows
        equal(whole, gradients(trainer, batches))


@pytest.mark.parametrize("change", [{}, {"invocation": INVOCATION}])
def test_checkpointed_layers_give_the_same_gradient(prepared: Prepared, change: dict[str, object]) -> None:
    whole = gradients(*prepared(**change))
    trainer, batches = prepared(**change, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    equal(whole, gradients(trainer, batches))


def fail_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the real layers run out of memory with more rows than that; return the rows they were called with."""
    seen: list[int] = []
    forward = LlamaDecoderLayer.forward

    def limited(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *args: object, **named: object) -> object:
        seen.append(len(hidden_states))
        if len(hidden_states) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, hidden_states, *args, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    return seen


def test_memory_that_runs_out_halves_the_rows_at_once_and_says_so(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, batches = prepared()
    whole = gradients(trainer, batches)
    progress.be_quiet(False)
    fail_above(3, monkeypatch)
    equal(whole, gradients(trainer, batches))
    assert trainer.micro_batch == 3
    rows = len(batches[0]["input_ids"])
    assert "out of memory: 3 rows at once" in capsys.readouterr().err.replace(
        f"{rows // 2} rows at once", "3 rows at once"
    )
    progress.be_quiet()
    seen = fail_above(3, monkeypatch)
    gradients(trainer, batches)
    assert max(seen) == 3, "it stays as small for the steps to come"


def test_a_single_row_that_does_not_fit_says_what_to_do(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batches = prepared()
    fail_above(0, monkeypatch)
    with pytest.raises(UsageError, match=r"single row at once[\s\S]*gradient_checkpointing"):
        gradients(trainer, batches)


def test_other_errors_are_no_lack_of_memory(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batches = prepared()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        gradients(trainer, batches)


def test_the_allocators_own_words_are_known() -> None:
    """A processor has no class for it: what torch's allocator says when it is asked for the impossible."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert trainers._is_out_of_memory(caught.value)


def test_losses_are_reported_where_asked(project: Project) -> None:
    pytest.importorskip("tensorboard")
    recipe = project.recipe(train={"steps": 6})
    stage.train(recipe, report_to=["tensorboard"])
    assert list((project.run / "tensorboard").glob("events.out.*"))
    with pytest.raises(UsageError, match="cannot report to nothing-like-it"):
        stage.train(recipe, force=True, report_to=["nothing-like-it"])


def test_how_it_fits_memory_is_no_other_training(project: Project) -> None:
    recipe = recipes.load(project.recipe())
    ref = base_model.load_ref(recipe.base.folder)
    smaller = replace(recipe, train=replace(recipe.train, micro_batch=1, gradient_checkpointing=True))
    assert stage._inputs(recipe, ref) == stage._inputs(smaller, ref)
    assert stage._inputs(recipe, ref) != stage._inputs(replace(recipe, train=replace(recipe.train, batch=5)), ref)


def test_the_smallest_recipe_of_every_precision_trains(project: Project) -> None:
    for precision in ("bf16", "nf4", "shipped"):
        for kept in ("blocks", "dequantized"):
            name = f"{precision}-{kept}"
            stage.train(
                project.recipe(
                    name=name, train={"steps": 2}, base={"precision": precision, "kept": kept}, data={"max_tokens": 128}
                )
            )
            assert (Path("runs") / name / "adapter" / "pitstop.json").is_file()
