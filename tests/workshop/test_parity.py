"""What ships beside what was trained, and where a difference comes from."""

from pathlib import Path

import pytest

from pitstop.errors import Refused
from pitstop.workshop.export.export import export
from pitstop.workshop.parity import Causes, parity
from pitstop.workshop.train import train
from workbench import Project

CHECK = {"rows": 4, "max_new_tokens": 8}


def made(project: Project, **changes: dict[str, object]) -> Path:
    recipe = project.recipe(check=CHECK, **changes)
    train(recipe)
    export(recipe)
    return recipe


def test_each_part_of_the_way_is_measured_by_itself(project: Project) -> None:
    result = parity(made(project, export={"precision": "q8_0"}))
    assert result.causes.precision is not None
    assert 0 < result.causes.precision < result.allowed_kl
    assert result.causes.base > 0
    assert result.cause == result.causes.largest(result.kl_nats_per_token, trained_on="shipped", delivery="attached")


def test_a_file_in_32_bits_costs_no_precision(project: Project) -> None:
    assert parity(made(project, export={"precision": "f32"})).causes.precision is None


def test_another_base_than_it_was_trained_on_is_named(project: Project) -> None:
    recipe = made(project, base={"precision": "nf4"}, export={"parity_kl": 1e-9})
    with pytest.raises(Refused, match="most of it comes from the swap of bases"):
        parity(recipe)


@pytest.mark.parametrize(
    ("causes", "trained_on", "delivery", "said"),
    [
        (Causes(0.001, 0.04), "shipped", "attached", "own precision"),
        (Causes(0.04, 0.001), "shipped", "attached", "quantized arithmetic"),
        (Causes(0.04, 0.001), "nf4", "attached", "swap of bases"),
        (Causes(0.001, 0.001), "shipped", "attached", "conversion"),
        (Causes(0.001, None), "shipped", "merged", "quantizing the sum"),
    ],
)
def test_the_largest_part_is_said_in_words(causes: Causes, trained_on: str, delivery: str, said: str) -> None:
    assert said in causes.largest(0.05, trained_on=trained_on, delivery=delivery)
