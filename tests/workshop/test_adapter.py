"""An adapter is what its identity says, or it is refused."""

from pathlib import Path

import pytest

from pitstop import records
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import Identity
from pitstop.workshop.recipe import Recipe
from workbench import Project


@pytest.fixture
def recipe(project: Project) -> Recipe:
    return recipes.load(project.recipe())


@pytest.fixture
def adapter(recipe: Recipe) -> Path:
    """An adapter folder whose weights are just bytes: its identity is about nothing else."""
    folder = recipe.run / adapters.FOLDER
    folder.mkdir(parents=True)
    (folder / adapters.WEIGHTS_FILE).write_bytes(b"weights")
    digest = sha256_file(folder / adapters.WEIGHTS_FILE)
    identity = Identity("lights", "tiny", "0" * 64, "shipped", digest, "inputs", 1, 0, 1, 1.0, 1.0)
    records.save_json(identity, folder / adapters.IDENTITY_FILE)
    return folder


def test_the_weights_that_were_trained_are_accepted(recipe: Recipe, adapter: Path) -> None:
    assert adapters.load_identity(recipe).base_name == "tiny"


def test_other_weights_are_refused(recipe: Recipe, adapter: Path) -> None:
    (adapter / adapters.WEIGHTS_FILE).write_bytes(b"Weights")
    with pytest.raises(BrokenInput, match="--force"):
        adapters.load_identity(recipe)


def test_weights_that_are_gone_are_refused(recipe: Recipe, adapter: Path) -> None:
    (adapter / adapters.WEIGHTS_FILE).unlink()
    with pytest.raises(BrokenInput):
        adapters.load_identity(recipe)


def test_nothing_trained_names_the_command(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="pitstop train runs/lights"):
        adapters.load_identity(recipe)
