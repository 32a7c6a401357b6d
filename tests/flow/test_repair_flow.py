"""The demo's forgetful adapter on the real base: refused, repaired, checked again, exported."""

import json
from pathlib import Path

import pytest

from pitstop.demo import forgetful, smollm2
from pitstop.packages import cache_folder
from pitstop.progress import be_quiet
from pitstop.retention import library
from pitstop.retention import suite as suites
from pitstop.retention.suite import TextItem, make
from pitstop.workshop import base_model
from pitstop.workshop.check import check
from pitstop.workshop.export.export import export
from pitstop.workshop.repair.repair import repair
from pitstop.workshop.train import train

RECIPE = Path(forgetful.__file__).with_suffix(".toml")
DOCUMENTS = 48


@pytest.fixture
def project(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    be_quiet()
    prepared = cache_folder() / "tests" / "bases" / smollm2.NAME
    base_model.prepare(str(smollm2_gguf), prepared, license=smollm2.LICENSE, origin=smollm2.WHEEL.requirement)
    monkeypatch.chdir(tmp_path)
    Path("bases").mkdir()
    Path("bases", smollm2.NAME).symlink_to(prepared)
    forgetful.build(Path("data/forgetful"))
    items = [TextItem(str(at), str(at), text) for at, text in enumerate(library.functions(library.SUITE_MODULES))]
    code = make("code", "text", items[:DOCUMENTS], license="PSF-2.0", source="Python", description="functions")
    suites.save(code, Path("suites", "code"))
    replay = "".join(f"{json.dumps({'text': text.text})}\n" for text in items[DOCUMENTS : DOCUMENTS + 32])
    Path("suites", "replay.jsonl").write_text(replay)
    recipe = Path("forgetful.toml")
    recipe.write_text(RECIPE.read_text().replace('"quick-suites"', '"suites"'))
    return recipe


@pytest.mark.slow
def test_a_forgetful_adapter_is_repaired_without_training(project: Path) -> None:
    train(project)
    refused = check(project)
    assert refused.verdict.outcome == "fail"
    result = repair(project, methods=("scale",))
    assert result.outcome == "repaired"
    assert result.run is not None
    passed = check(Path(result.run))
    assert passed.verdict.outcome == "pass"
    assert refused.task is not None
    assert passed.task is not None
    assert passed.task.adapted.exact >= 0.98 * refused.task.adapted.exact
    lost, left = (report.verdict.criteria[0].drop for report in (refused, passed))
    assert left < lost / 4
    assert export(Path(result.run)).adapter_sha256 == result.adapter_sha256
