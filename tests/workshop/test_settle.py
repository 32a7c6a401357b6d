"""An adapter that was trained on other weights comes near itself again on those that ship, without a label."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pitstop import records
from pitstop.errors import RecordError, UsageError
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.settle import RESULT_FILE, Settled, settle
from pitstop.workshop.train import train
from pitstop.workshop.training.loss import Head, divergence
from workbench import Project

TARGET = Path("runs", "lights-settled")


@pytest.fixture
def on_q8(project: Project, tiny_base: Path) -> Path:
    """A recipe whose adapter was trained on q8_0, while q4_0 is to ship."""
    Path("bases", "tiny").unlink()  # the base of all tests: this one gets another artifact
    shutil.copytree(tiny_base, Path("bases", "tiny"))
    base_model.prepare("bases/tiny/hf", Path("bases/tiny"), precisions=("q8_0", "q4_0"))
    recipe = project.recipe(retain={"rows": "general.jsonl", "share": 0.5}, check={"max_new_tokens": 24})
    train(recipe)
    return recipe


def test_it_comes_near_what_was_trained(on_q8: Path) -> None:
    settled = settle(on_q8, artifact="q4_0", steps=20)
    assert settled.kl_before > 0
    assert settled.kl_after < 0.7 * settled.kl_before
    loaded = recipes.load(TARGET)
    assert (loaded.run, loaded.base.artifact, loaded.base.precision) == (TARGET, "q4_0", "shipped")
    assert replace(loaded, folder=None, base=recipes.load(on_q8).base) == recipes.load(on_q8)
    identity = adapters.load_identity(loaded)
    assert identity.base_sha256 == base_model.load_ref(loaded.base.folder).artifact("q4_0").sha256
    assert identity.history[-1].method == "settle"
    before = load_file(Path("runs", "lights", "adapter", adapters.WEIGHTS_FILE))
    after = load_file(TARGET / "adapter" / adapters.WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_is_settled_is_kept_and_a_run_of_its_own(on_q8: Path) -> None:
    first = settle(on_q8, artifact="q4_0", steps=10)
    again = settle(on_q8, artifact="q4_0", steps=10)
    assert again == first == records.load_json(Settled, TARGET / RESULT_FILE)
    with pytest.raises(UsageError, match="nothing to settle"):
        settle(TARGET)
    with pytest.raises(UsageError, match="the run it is made of"):
        settle(on_q8, artifact="q4_0", to="lights")
    Path("runs", "mine").mkdir()
    Path("runs", "mine", "recipe.toml").write_text("name = 'mine'")
    with pytest.raises(UsageError, match="was not made of"):
        settle(on_q8, artifact="q4_0", to="mine")


def test_what_runs_on_its_own_weights_is_left_alone(on_q8: Path) -> None:
    with pytest.raises(UsageError, match="trained on q8_0: there is nothing to settle"):
        settle(on_q8)
    with pytest.raises(RecordError, match="has no q5_0 artifact"):
        settle(on_q8, artifact="q5_0")


def test_two_heads_are_told_apart() -> None:
    """KL between two models whose heads differ: against the definition, in float64."""
    torch.manual_seed(0)
    heads = [Head(torch.nn.Linear(8, 50, bias=False)) for _ in range(2)]
    student, teacher = torch.randn(70, 8, requires_grad=True), torch.randn(70, 8)
    loss = divergence(student, heads[0], teacher, base_head=heads[1])
    q = heads[1].logits(teacher).double().log_softmax(-1)
    p = heads[0].logits(student).double().log_softmax(-1)
    expected = (q.exp() * (q - p)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(expected, student)
    assert torch.allclose(gradient, wanted.float(), atol=1e-5)
