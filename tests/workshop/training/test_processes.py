"""Two processes train the adapter that one trains: each takes its share of every batch's rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pitstop
from pitstop.errors import UsageError
from pitstop.workshop.train import train
from workbench import Project

CONFIG = Path(__file__).parents[3] / "tools" / "accelerate_cpu.yaml"
TRAIN = {"steps": 12, "batch": 3, "checkpoint_every": 5}  # a share of two rows and a share of one
GENERAL = {"rows": "general.jsonl", "share": 0.34}


def launch(recipe: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    return subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "pitstop", "train", str(recipe)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pitstop.__file__).parents[1])},
    )


def test_a_launcher_that_would_shard_the_base_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"FSDP spreads[\s\S]*accelerate_ddp"):
        train(project.recipe())


def test_two_processes_train_what_one_trains(project: Project) -> None:
    train(project.recipe("one.toml", name="one", train=TRAIN, retain=GENERAL))
    done = launch(project.recipe("two.toml", name="two", train=TRAIN, retain=GENERAL))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rows to learn") == 1, "only one of them speaks"
    one, two = (load_file(Path("runs", name, "adapter", "adapter_model.safetensors")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    moved = sum(weight.norm() ** 2 for name, weight in one.items() if "lora_B" in name) ** 0.5
    apart = sum((one[name] - two[name]).norm() ** 2 for name in one if "lora_B" in name) ** 0.5
    assert torch.isfinite(moved)
    assert apart < 0.05 * moved, "more than the rounding of other sums"
    assert not Path("runs", "two", "checkpoints").exists()
    steps = Path("runs/one/training.jsonl").read_text().count("\n")
    assert Path("runs/two/training.jsonl").read_text().count("\n") == steps
