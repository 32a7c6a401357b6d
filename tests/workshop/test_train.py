"""A recipe becomes an adapter: it learns, it stays near the base if asked to, and a stopped training goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pitstop import records
from pitstop.demo import smollm2
from pitstop.engines.base import PLAIN_BASE, Use, log_softmax
from pitstop.engines.torch import TorchEngine
from pitstop.errors import Busy, DatasetError, RecordError
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop import train as training
from pitstop.workshop.adapter import Identity
from pitstop.workshop.dataset import load_split
from pitstop.workshop.recipe import Data
from pitstop.workshop.runs import exclusive
from pitstop.workshop.train import train
from workbench import TEXTS, Project, light_rows

PATIENCE = 240  # seconds a process may take until it is where the test wants it


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / adapters.FOLDER / adapters.WEIGHTS_FILE)


def written(run: Path) -> int:
    """Return when the weights were written: a stage that does nothing leaves it."""
    return (run / adapters.FOLDER / adapters.WEIGHTS_FILE).stat().st_mtime_ns


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]


def identity(run: Path) -> Identity:
    return records.load_json(Identity, run / adapters.FOLDER / adapters.IDENTITY_FILE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_a_few_steps_lower_the_loss(project: Project) -> None:
    train(project.recipe(train={"steps": 40}))
    losses = [line["loss"] for line in log(project.run)]
    assert losses[-1] < losses[0] - 0.5
    assert identity(project.run).final_loss == pytest.approx(np.mean(losses[-5:]), abs=1e-3)


def test_the_adapter_says_what_it_is_and_belongs_to(project: Project) -> None:
    recipe = project.recipe(train={"steps": 2})
    folder = train(recipe)
    found = identity(project.run)
    ref = base_model.load_ref(Path("bases/tiny"))
    assert found.base_sha256 == ref.artifact("q8_0").sha256
    assert found.adapter_sha256 == sha256_file(folder / adapters.WEIGHTS_FILE)
    assert (found.base_name, found.precision) == ("tiny", "shipped")
    rows, _ = load_split(Data(Path("rows.jsonl"), test_share=0.3))
    assert found.rows == len(rows) < len(light_rows())
    assert (project.run / "recipe.toml").read_bytes() == recipe.read_bytes()
    assert not (project.run / "checkpoints").exists()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_rows_too_long_are_counted(project: Project) -> None:
    training_rows, _ = load_split(Data(Path("rows.jsonl"), test_share=0.3))
    group = training_rows[0].group
    long = [{"prompt": f"say {number}", "completion": "word " * 200, "group": group} for number in range(3)]
    project.rows("rows.jsonl", [*light_rows(), *long])
    train(project.recipe(train={"steps": 1}))
    assert identity(project.run).rows_too_long == 3
    assert identity(project.run).rows == len(training_rows)
    project.recipe(name="short", data={"max_tokens": 5})
    with pytest.raises(DatasetError, match="longer than 5 tokens"):
        train(Path("recipe.toml"))


def test_what_is_trained_is_not_trained_again(project: Project) -> None:
    recipe = project.recipe(train={"steps": 2})
    train(recipe)
    first, begun = weights(project.run), written(project.run)
    train(recipe)
    train(project.run)
    assert written(project.run) == begun
    train(recipe, force=True)
    assert written(project.run) > begun
    assert same(weights(project.run), first)


def test_what_does_not_decide_the_training_does_not_repeat_it(project: Project) -> None:
    base = project.folder / "bases" / "own"
    shutil.copytree("bases/tiny", base)
    changes: dict[str, Any] = {"base": {"folder": "bases/own"}, "train": {"steps": 2}}
    train(project.recipe(**changes))
    begun = written(project.run)
    base_model.prepare(str(base), base, precisions=["q8_0", "q4_0"])
    assert len(base_model.load_ref(base).artifacts) == 2, "the one it has and one more"
    train(project.recipe(**changes, scale=0.5, version="1.0.1"))
    assert written(project.run) == begun
    assert recipes.load(project.run).scale == 0.5, "the run keeps the recipe as it is now"


@pytest.mark.parametrize("change", ["recipe", "rows"])
def test_what_decides_the_training_repeats_it(project: Project, change: str) -> None:
    train(project.recipe(train={"steps": 2}))
    begun = written(project.run)
    if change == "rows":
        project.rows("rows.jsonl", light_rows()[:-1])
    train(project.recipe(train={"steps": 2, "seed": int(change == "recipe")}))
    assert written(project.run) > begun


def test_modules_and_layers_the_base_has_not_are_told_at_once(project: Project) -> None:
    recipe = project.recipe(train={"modules": ["q_proj", "query", "lm_head"], "first_layer": 2})
    with pytest.raises(RecordError) as caught:
        train(recipe)
    assert len(caught.value.problems) == 3
    for word in ("query", "lm_head", "2 layers"):
        assert word in str(caught.value)


def test_only_the_chosen_modules_and_layers_are_trained(project: Project) -> None:
    train(project.recipe(train={"steps": 2, "modules": ["qv"], "first_layer": 1}))
    names = {name.partition(".layers.")[2].rpartition(".lora_")[0] for name in weights(project.run)}
    assert names == {"1.self_attn.q_proj", "1.self_attn.v_proj"}


def test_one_at_a_time(project: Project) -> None:
    recipe = project.recipe(train={"steps": 2})
    with exclusive(project.run), pytest.raises(Busy):
        train(recipe)


def kl_to_base(project: Project, recipe: Path) -> float:
    """Return mean KL(base || adapted) over the general texts, nats per token."""
    loaded = recipes.load(recipe)
    ref = base_model.load_ref(loaded.base.folder)
    model = base_model.load_weights(loaded.base.folder, ref, precision="shipped", artifact="q8_0")
    tokenizer = base_model.load_tokenizer(loaded.base.folder)
    base_sha256 = ref.artifact("q8_0").sha256
    with TorchEngine(model, tokenizer, base_sha256=base_sha256, context_length=128) as engine:
        engine.load_adapter("it", loaded.run / adapters.FOLDER)
        found = []
        for text in TEXTS:
            tokens = engine.tokenize(text)
            base, adapted = (log_softmax(engine.logits(tokens, use)) for use in (PLAIN_BASE, Use("it")))
            found.append((np.exp(base) * (base - adapted)).sum(-1).mean())
    return float(np.mean(found))


def test_the_anchor_holds_the_adapter_near_the_base(project: Project) -> None:
    general = {"rows": "general.jsonl", "share": 1.0}
    free = project.recipe("free.toml", name="free")
    held = project.recipe("held.toml", name="held", retain={**general, "kl": 5.0})
    train(free)
    train(held)
    assert kl_to_base(project, held) < 0.3 * kl_to_base(project, free)


def test_replay_teaches_the_general_rows(project: Project) -> None:
    """With a share of zero the rows are not even read."""
    general = {"rows": "general.jsonl", "share": 1.0, "kl": 0.0}
    train(project.recipe("with.toml", name="with", retain={**general, "replay": 1.0}))
    train(project.recipe("without.toml", name="without", retain={**general, "share": 0.0}))
    assert log(Path("runs/with"))[0]["loss"] > 1.5 * log(Path("runs/without"))[0]["loss"]


@contextmanager
def training_process(project: Project, recipe: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from pitstop.cli import main; main()", "train", str(recipe)]
    process = subprocess.Popen(
        command, cwd=project.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(os.environ)
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def finished_checkpoint(run: Path) -> int:
    """Return the step of the newest whole checkpoint, 0 if there is none."""
    found = (run / "checkpoints").glob("checkpoint-*/trainer_state.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


LONG = {"steps": 120, "checkpoint_every": 10, "dropout": 0.1}


@pytest.fixture
def uninterrupted(project: Project) -> Path:
    """The run of the long recipe, trained in one go."""
    train(project.recipe("whole.toml", name="whole", train=LONG))
    return Path("runs/whole")


def mark_first_line(run: Path) -> None:
    """Put a word into the log that only a training that goes on will keep."""
    first, *rest = (run / "training.jsonl").read_text().splitlines(keepends=True)
    (run / "training.jsonl").write_text(first.replace("{", '{"kept": true, ', 1) + "".join(rest))


def finish(project: Project, recipe: Path, uninterrupted: Path) -> None:
    """Train to the end, and compare with a training that was never stopped."""
    mark_first_line(project.run)
    train(recipe)
    assert log(project.run)[0]["kept"], "it began again instead of going on"
    assert [line["step"] for line in log(project.run)] == [line["step"] for line in log(uninterrupted)]
    assert same(weights(project.run), weights(uninterrupted))
    assert identity(project.run).inputs == identity(uninterrupted).inputs


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(project: Project, uninterrupted: Path) -> None:
    recipe = project.recipe(train=LONG)
    with training_process(project, recipe) as process:
        wait_until(process, lambda: (project.run / "training.jsonl").is_file())
        with pytest.raises(Busy):
            train(recipe)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert 0 < finished_checkpoint(project.run) < LONG["steps"]
    assert not (project.run / adapters.FOLDER / adapters.IDENTITY_FILE).exists()
    finish(project, recipe, uninterrupted)


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint(project: Project, uninterrupted: Path) -> None:
    recipe = project.recipe(train=LONG)
    with training_process(project, recipe) as process:
        wait_until(process, lambda: finished_checkpoint(project.run) >= 20)
        process.kill()
        process.wait(PATIENCE)
    assert 20 <= finished_checkpoint(project.run) < LONG["steps"]
    with (project.run / "training.jsonl").open("a") as file:
        file.write('{"step": 119, "lo')  # what a kill in the middle of a line leaves
    finish(project, recipe, uninterrupted)


def train_without_saving(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train to the end, and stop before the adapter is saved."""

    def killed(*_: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, force=True)


def test_a_checkpoint_that_was_cut_short_is_not_used(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project.recipe(train={"steps": 6, "checkpoint_every": 2})
    train(recipe)
    whole = weights(project.run)

    train_without_saving(recipe, monkeypatch)
    assert finished_checkpoint(project.run) == 6, "all was done but saving it"
    cut = project.run / "checkpoints" / "checkpoint-8"
    cut.mkdir()
    (cut / "adapter_model.safetensors").write_bytes(b"half")
    train(recipe)
    assert same(weights(project.run), whole)


def test_checkpoints_of_another_recipe_are_dropped(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    train_without_saving(project.recipe(train={"steps": 4, "checkpoint_every": 2, "seed": 1}), monkeypatch)
    changed = {"steps": 4, "checkpoint_every": 2, "seed": 2}
    train(project.recipe(train=changed))
    train(project.recipe("fresh.toml", name="fresh", train=changed))
    assert same(weights(project.run), weights(Path("runs/fresh")))


REAL = {"base": {"folder": f"bases/{smollm2.NAME}"}, "data": {"max_tokens": 96}}


@pytest.mark.slow
def test_the_real_base_learns(real_project: Project) -> None:
    train(real_project.recipe(**REAL, train={"steps": 10, "batch": 4, "learning_rate": 1e-3, "modules": ["qv"]}))
    losses = [line["loss"] for line in log(real_project.run)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_nf4_trains_on_the_cpu(real_project: Project) -> None:
    base = {**REAL["base"], "precision": "nf4"}
    train(real_project.recipe(base=base, data=REAL["data"], train={"steps": 2, "batch": 2, "modules": ["qv"]}))
    assert identity(real_project.run).precision == "nf4"
    assert any(tensor.abs().max() > 0 for name, tensor in weights(real_project.run).items() if "lora_B" in name)
