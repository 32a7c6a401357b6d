"""What presets cost is measured once for a base file and a rank, and told when a training begins."""

from pathlib import Path

import pytest

from pitstop import progress
from pitstop.files import sha256_file
from pitstop.workshop import train as stage
from pitstop.workshop.recipe import PRESETS
from pitstop.workshop.training import costs
from workbench import Project

BASE = Path("bases/tiny/gguf/q8_0.gguf")


def test_every_preset_has_its_size_and_speed_and_is_measured_once(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = costs.costs(BASE, sha256_file(BASE), 8, Path("measured"))
    cost = {one.preset: one for one in found.presets}
    assert cost.keys() == PRESETS.keys()
    assert cost["qv"].mib < cost["attention"].mib < cost["mlp"].mib < cost["all-linear"].mib
    # 2 layers of rank 8 in 16 bits; 64 wide, 32 for keys and values, 160 between
    values = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 160) + (160 + 64))
    assert cost["all-linear"].mib == pytest.approx(2 * values / (1 << 20), abs=0.02)
    assert all(0.05 < one.speed < 3 for one in found.presets)
    monkeypatch.setattr(costs, "_measured", None)
    assert costs.costs(BASE, sha256_file(BASE), 8, Path("measured")) == found


def test_a_training_tells_them_to_who_listens(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    stage.train(project.recipe(train={"steps": 1}))
    assert "rank" not in capsys.readouterr().err
    progress.be_quiet(False)
    stage.train(project.recipe(train={"steps": 1}), force=True)
    said = capsys.readouterr().err
    assert "modules 'all-linear': 0.0 MiB at rank 4; decodes at " in said
    assert "adapter: rank 4, " in said
    assert "data: " in said
