"""The demo's recipes are recipes, judge by the defaults, and only the one that shall forget goes without remedy."""

from importlib import resources

import pytest

from pitstop import records
from pitstop.demo.story import RECIPES
from pitstop.retention.margins import Margins
from pitstop.workshop.recipe import Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_judged_by_the_default_margins(name: str) -> None:
    with resources.as_file(resources.files("pitstop.demo") / f"{name}.toml") as path:
        recipe = records.load_toml(Recipe, path)
    assert recipe.name == name
    assert recipe.check.margins == Margins()
    assert (recipe.retain.rows is None) == (name == "forgetful")
