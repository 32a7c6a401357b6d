"""What the calibration says of the gate follows from the outcomes it was given."""

import json
import random
from pathlib import Path
from typing import Any

import calibration_report
import numpy as np
import pytest
from calibration_report import at_margin, auc, decide, drawn, expected_drop, knowledge, outcomes, rates, report
from zoo import ZOOS

from pitstop.retention import looks
from pitstop.retention.paired import Drop, Paired

ITEMS, TEXTS = 800, 80


def packed(right: np.ndarray) -> str:
    return f"{int('1' + ''.join(str(int(bit)) for bit in right), 2):x}"


def entry(kind: str, lost: float, rise: float, kl: float) -> dict[str, Any]:
    """What a specimen gave that lost a share of the right answers, and needs so many more nats a byte."""
    chance = np.random.default_rng(int(1000 * lost))
    kept = BASE & (chance.random(ITEMS) >= lost)
    return {
        "kind": kind,
        "right": {"facts": packed(kept)},
        "texts": {"prose": [[100.0 + 400 * rise + chance.normal(), 400] for _ in range(TEXTS)]},
        "kl": {"kl-general": kl},
        "seconds": 100.0,
    }


BASE = np.random.default_rng(0).random(ITEMS) < 0.8
BASE[:3] = False  # zeros in front must not get lost


@pytest.fixture
def results() -> dict[str, Any]:
    suite = {"digest": "d", "purpose": "retention", "guards": "knowledge", "groups": None}
    specimens = {
        "base": {"right": {"facts": packed(BASE)}, "texts": {"prose": [[100.0, 400]] * TEXTS}, "seconds": 90.0},
        "null": entry("null", 0.0, 0.0, 0.0),
        "benign": entry("benign", 0.004, 0.001, 0.02),
        "awful": entry("forgetful", 0.3, 0.2, 2.0),
        "bad": entry("boundary", 0.12, 0.0, 0.5),
    }
    return {
        "zoo": "smollm2-135m",
        "suites": {
            "facts": {**suite, "kind": "choice", "chance": 0.25, "items": ITEMS, "whole": ITEMS},
            "prose": {**suite, "kind": "text", "chance": None, "items": TEXTS, "whole": TEXTS},
        },
        "displacement": {"null": 0.0, "benign": 0.01, "awful": 0.5, "bad": 0.2},
        "measured": {"torch q8_0": specimens, "llama q8_0": {**specimens, "bad": specimens["null"]}},
    }


def test_outcomes_are_read_as_they_were_written(results: dict[str, Any]) -> None:
    found = {outcome.name: outcome for outcome in outcomes(results, "torch q8_0")}
    assert list(found) == ["null", "benign", "awful", "bad"]
    facts, prose = found["null"].pairs
    assert facts.baseline == facts.adapted == tuple(map(float, BASE))
    assert prose.score[0] == pytest.approx(100 / 400 / np.log(2))
    assert found["awful"].drop == pytest.approx(0.24, abs=0.03)
    assert [found[name].moved for name in found] == [0.0, 0.01, 0.5, 0.2]


def test_clear_cases_are_judged_right(results: dict[str, Any]) -> None:
    found = {outcome.name: decide(outcome.pairs)[0].outcome for outcome in outcomes(results, "torch q8_0")}
    assert (found["null"], found["awful"]) == ("pass", "fail")


def test_the_sealed_half_is_about_half_and_always_the_same(results: dict[str, Any]) -> None:
    one, other = (outcomes(results, "torch q8_0")[at].sealed() for at in (0, 2))
    assert [pair.groups for pair in one] == [pair.groups for pair in other]
    assert 300 < len(one[0].groups) < 500


def test_damage_is_undone_to_the_target(results: dict[str, Any]) -> None:
    awful = outcomes(results, "torch q8_0")[2]
    chance = random.Random(0)
    drops = []
    for _ in range(50):
        sample = at_margin([drawn(pair, 800, chance) for pair in awful.pairs], awful.drop, 0.03, chance)
        drops.append(Drop(knowledge(sample), resamples=1, seed=0).value)
        assert sample[1].adapted == sample[1].baseline
    assert np.mean(drops) == pytest.approx(0.03, abs=0.003)


def test_a_drop_counts_suites_as_large_as_they_are_drawn() -> None:
    """Else what was measured on as many items of each is not at the margin once large suites weigh more."""
    pairs = [
        Paired(name, "choice", tuple(map(str, range(40))), (1.0,) * 40, (after,) * 40, (1.0,) * 40, 0.25, "knowledge")
        for name, after in (("small", 0.0), ("large", 1.0))
    ]
    assert expected_drop(pairs, (100, 900)) == pytest.approx(0.1)
    assert expected_drop(pairs, (40, 40)) == pytest.approx(0.5)


def test_what_is_far_from_the_margin_is_never_judged_wrong(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_report, "DRAWS", 8)
    found = outcomes(results, "torch q8_0")
    assert rates(found[:1], None)["fail"] == 0
    assert rates(found[2:3], None) == {"fail": 8}
    assert rates(found[:2], 0.03) == {}, "what lost less than the margin cannot be brought to it"


def test_a_perfect_predictor_has_the_whole_area() -> None:
    assert auc([0.1, 0.2, 0.9], [False, False, True]) == 1.0
    assert auc([0.9, 0.2], [False, True]) == 0.0
    assert auc([0.5, 0.5], [False, True]) == 0.5


def test_the_page_tells_it_all(results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_report, "DRAWS", 4)
    file = tmp_path / "smollm2.json"
    file.write_text(json.dumps(results))
    page = report([file])
    assert f"4 of the zoo's {len(ZOOS['smollm2-135m']())} adapters (1 null, 1 benign, 1 forgetful, 1 boundary)" in page
    assert "| false fail: null and benign | 0.0%" in page
    assert "| awful | forgetful |" in page
    assert "| llama q8_0 | 4 | 3 of 4 | 100 |" in page
    assert "Other verdicts: bad (fail; pass on llama q8_0)." in page
    assert "nan" not in page


@pytest.mark.parametrize(("name", "least"), [("smollm2-135m", 60), ("tiny-gemma3", 12)])
def test_a_zoo_is_as_large_and_as_varied_as_it_must_be(name: str, least: int) -> None:
    specimens = ZOOS[name]()
    assert len(specimens) == len({specimen.name for specimen in specimens}) >= least
    assert {specimen.kind for specimen in specimens} == {"null", "benign", "forgetful", "boundary", "adversarial"}
    trained = {specimen.name for specimen in specimens if not specimen.parent}
    assert all(specimen.parent in trained for specimen in specimens if specimen.parent)


def test_a_suite_that_the_base_guesses_at_is_named_and_not_pooled(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_report, "DRAWS", 4)
    results["suites"]["facts"]["chance"] = 0.79
    file = tmp_path / "smollm2.json"
    file.write_text(json.dumps(results))
    assert "Blind for this base: facts." in report([file])
    assert knowledge(outcomes(results, "torch q8_0")[0].pairs) == ()


def test_suites_that_the_base_guesses_at_are_not_drawn(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some draws they would see, lose nothing, and make of a pooled drop at the margin one below it."""
    results["suites"]["facts"]["chance"] = 0.79
    names = []

    def record(pair: Paired, size: int, chance: random.Random) -> Paired:
        names.append(pair.name)
        return drawn(pair, size, chance)

    monkeypatch.setattr(calibration_report, "DRAWS", 1)
    monkeypatch.setattr(calibration_report, "drawn", record)
    rates(outcomes(results, "torch q8_0"), None)
    assert set(names) == {"prose"}


def test_what_stopped_at_an_early_look_is_judged_by_what_it_saw(results: dict[str, Any]) -> None:
    llama = results["measured"]["llama q8_0"]
    seen = looks.seen(ITEMS, calibration_report.MARGINS.looks, looks.LEAST)[0]
    texts = looks.seen(TEXTS, calibration_report.MARGINS.looks, looks.LEAST_TEXTS)[0]
    right = np.array([bit == "1" for bit in f"{int(llama['awful']['right']['facts'], 16):b}"[1:]])
    llama["awful"] = {
        **llama["awful"],
        "looks": 1,
        "right": {"facts": packed(right[:seen])},
        "texts": {"prose": llama["awful"]["texts"]["prose"][:texts]},
    }
    awful = next(one for one in outcomes(results, "llama q8_0") if one.name == "awful")
    facts = awful.pairs[0]
    assert facts.adapted == tuple(map(float, right[:seen]))
    assert facts.baseline == tuple(map(float, BASE[:seen]))
    verdict, look = awful.decided()
    assert (verdict.outcome, look) == ("fail", 1)


def test_the_page_says_how_damage_that_hides_is_judged(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_report, "DRAWS", 4)
    for measured in results["measured"].values():
        measured["awful"]["kind"] = "adversarial"
    file = tmp_path / "smollm2.json"
    file.write_text(json.dumps(results))
    page = report([file])
    (row,) = [line for line in page.splitlines() if line.startswith("| awful |") and "adversarial" not in line]
    assert row.endswith("| 0 | 0 | 4 |"), "it fails each of 4 gates"
    assert "all knowledge suites" in row


def test_the_page_says_what_repairs_won_back(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_report, "DRAWS", 4)
    beside = {"method": "layers", "scale": 0.5, "difference": -0.01, "upper": 0.002, "matched": True, "better": False}
    repaired = {
        "outcome": "repaired",
        "method": "scale",
        "scale": 0.5,
        "won_back": 0.9,
        "given_up": 0.0,
        "seconds": 120,
    }
    results["repairs"] = {
        "one": {**repaired, "beside_uniform": [beside]},
        "other": {**repaired, "won_back": 0.8, "given_up": 0.02, "beside_uniform": []},
        "lost": {"outcome": "refused", "seconds": 60, "beside_uniform": []},
    }
    file = tmp_path / "smollm2.json"
    file.write_text(json.dumps(results))
    page = report([file])
    assert "Medians of 3 narrow, forgetful adapters: 80.0% of the damage won back (goal ≥ 80 %), 0.0% of" in page
    assert "| lost | refused | 0.0% | 0.0% | 1 |" in page
    assert "0 of 1 other repairs surely keep more" in page
    assert "| one | layers | +0.0100 | -0.0020 | yes |" in page
