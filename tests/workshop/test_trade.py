"""What is chosen of several artifacts: never one that is too far from what was trained, nor one that does not fit."""

from dataclasses import replace

import pytest

from pitstop import profiles
from pitstop.profiles import DeviceProfile
from pitstop.workshop import train
from pitstop.workshop.export.export import export
from pitstop.workshop.parity import TaskScore
from pitstop.workshop.trade import Option, cells, choose, trade
from pitstop.workshop.trade.page import page
from workbench import Project

INT8 = Option("int8", "onnx", 149_000_000, 10_000_000, 0.004, 0.97, TaskScore(0.6, 0.8), 800.0, 150.0)
INT4 = replace(INT8, base="int4", base_bytes=114_000_000, kl_nats_per_token=0.2, decode_tokens_per_s=230.0)
GGUF = replace(INT8, base="q8_0", format="gguf", decode_tokens_per_s=120.0)


def board(budget_mib: int, formats: tuple[str, ...] = ("gguf", "onnx")) -> DeviceProfile:
    known = profiles.load("raspberry-pi-5")
    return replace(known, budget_mib=budget_mib, adapter_budget_mib=10, formats=formats)


def test_the_fastest_of_those_that_are_near_enough() -> None:
    chosen, reasons = choose([GGUF, INT8, INT4], 0.01, None)
    assert chosen == "int8"
    assert any(reason.startswith("int4 differs by 0.2000") for reason in reasons)
    assert any(reason.startswith("q8_0 decodes 120.0") for reason in reasons)


def test_damage_is_never_chosen_silently() -> None:
    assert choose([INT4], 0.01, None) == (
        None,
        ("int4 differs by 0.2000 nats per token, 0.01 are allowed",),
    )
    assert choose([INT4, INT8], 0.5, None)[0] == "int4", "with a wider budget it may be"
    assert choose([replace(INT8, kl_nats_per_token=float("nan"))], 0.5, None)[0] is None


def test_a_board_takes_what_it_runs_and_has_room_for() -> None:
    assert choose([GGUF, INT8], 0.01, board(4096, ("gguf",)))[0] == "q8_0"
    chosen, reasons = choose([GGUF, INT8], 0.01, board(100))
    assert chosen is None
    assert "int8 takes 149 MB" in reasons[1]


def test_a_run_is_measured_on_every_artifact(onnx_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = onnx_project.recipe(export={"also": ["int8"], "parity_kl": 0.05}, check={"rows": 6, "max_new_tokens": 12})
    train.train(recipe)
    export(recipe)
    result = trade(recipe)
    assert [(one.base, one.format) for one in result.options] == [("q8_0", "gguf"), ("int8", "onnx")]
    assert all(0 <= one.kl_nats_per_token < 0.05 for one in result.options)
    assert all(one.decode_tokens_per_s > 0 and one.prefill_tokens_per_s > 0 for one in result.options)
    assert result.chosen in ("q8_0", "int8")
    html = (onnx_project.run / "export" / "trade.html").read_text()
    assert html == page(result)
    assert all(cell in html for one in result.options for cell in cells(one))

    # What was measured is not measured again, but it is judged again.
    monkeypatch.setattr("pitstop.workshop.trade.measure._measure", None)
    assert trade(recipe) == result
    assert trade(recipe, profile=board(11)).chosen is None
