"""A recipe says everything that is wrong with it at once, and the template is one that works."""

import tomllib
from pathlib import Path

import pytest
from tables_as_toml import toml

from pitstop.errors import RecordError, UsageError
from pitstop.workshop import recipe as recipes
from pitstop.workshop.recipe import LINEAR_MODULES, Recipe
from workbench import Project


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(RecordError) as caught:
        recipes.load(path)
    return caught.value.problems


def test_a_good_recipe_loads(project: Project) -> None:
    recipe = recipes.load(project.recipe())
    assert recipe.name == "lights"
    assert recipe.run == Path("runs/lights")
    assert recipe.train.steps == 20
    assert recipe.retain.rows is None


def test_three_mistakes_are_three_problems(project: Project) -> None:
    path = project.recipe(name="My Lights", data={"train": "none.jsonl"}, train={"steps": 0})
    problems = problems_of(path)
    assert len(problems) == 3
    assert {problem.partition(":")[0] for problem in problems} == {"name", "data.train", "train.steps"}


def test_three_keys_of_a_wrong_kind_are_three_problems(project: Project) -> None:
    path = project.recipe(scale="half", data={"max_tokens": 1.5}, train={"rank": True})
    assert len(problems_of(path)) == 3


def test_mistakes_of_every_kind_are_told_together(project: Project) -> None:
    path = project.recipe(
        scale="half", data={"train": "none.jsonl"}, train={"rnak": 8, "steps": 0}, base={"folder": "bases/none"}
    )
    problems = problems_of(path)
    assert {problem.partition(":")[0] for problem in problems} == {
        *("scale", "train.rnak", "data.train", "train.steps", "base.folder")
    }


def test_an_unknown_key_suggests_the_right_one(project: Project) -> None:
    (problem,) = problems_of(project.recipe(train={"learning_rat": 1e-4}))
    assert "train.learning_rat" in problem
    assert "'learning_rate'" in problem


def test_problems_of_margins_are_listed_with_the_rest(project: Project) -> None:
    path = project.recipe(version="one", check={"margins": {"accuracy": 3.0, "confidence": 0.2}})
    problems = problems_of(path)
    assert len(problems) == 3
    assert sum(problem.startswith("check.margins.") for problem in problems) == 2


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("train", "learning_rate", float("inf")),
        ("train", "learning_rate", float("nan")),
        ("train", "dropout", 1.0),
        ("train", "seed", -1),
        ("train", "warmup_steps", 21),
        ("train", "modules", []),
        ("data", "test_share", 0.9),
        ("retain", "kl", -1.0),
        ("export", "parity_kl", 0.0),
    ],
)
def test_numbers_out_of_range_are_named(project: Project, table: str, key: str, value: object) -> None:
    path = project.recipe(**{table: {key: value}})
    path.write_text(path.read_text().replace("Infinity", "inf").replace("NaN", "nan"))
    (problem,) = problems_of(path)
    assert problem.startswith(f"{table}.{key}")


def test_a_base_that_is_not_prepared_names_the_command(project: Project) -> None:
    (problem,) = problems_of(project.recipe(base={"folder": "bases/none"}))
    assert "pitstop base" in problem


def test_text_that_is_not_toml_is_a_record_error(project: Project) -> None:
    (project.folder / "recipe.toml").write_text("name = \n")
    (problem,) = problems_of(Path("recipe.toml"))
    assert problem.startswith("not TOML")


def test_no_recipe_names_the_command_that_makes_one(project: Project) -> None:
    with pytest.raises(UsageError, match="pitstop init"):
        recipes.load(Path("nothing.toml"))


def test_a_run_folder_stands_for_its_recipe(project: Project) -> None:
    run = project.folder / "runs" / "lights"
    run.mkdir(parents=True)
    project.recipe("runs/lights/recipe.toml")
    assert recipes.load(run) == recipes.load(Path("runs/lights/recipe.toml"))


def test_the_template_loads_once_its_files_are_there(project: Project) -> None:
    path = recipes.init(Path("mine.toml"))
    problems = problems_of(path)
    assert {problem.partition(":")[0] for problem in problems} == {"data.train", "retain.rows", "base.folder"}
    (project.folder / "data").mkdir()
    (project.folder / "suites").mkdir()
    (project.folder / "rows.jsonl").rename(project.folder / "data" / "train.jsonl")
    (project.folder / "general.jsonl").rename(project.folder / "suites" / "replay.jsonl")
    (project.folder / "bases" / "tiny").rename(project.folder / "bases" / "smollm2-135m-instruct")
    assert recipes.load(path).name == "my-adapter"


def test_the_template_shows_the_defaults(project: Project) -> None:
    """What the template says of a key is what leaving the key out would mean."""
    template = tomllib.loads(recipes.TEMPLATE)
    own = {("name",), ("base", "folder"), ("data", "train"), ("data", "system"), ("retain", "rows")}
    recipe = Recipe("x", recipes.BaseChoice(Path("b")), recipes.Data(Path("t")))
    for path, value in _leaves(template):
        if path not in own:
            default: object = recipe
            for name in path:
                default = getattr(default, name)
            assert (list(default) if isinstance(default, tuple) else default) == _plain(value, default), path


def _leaves(table: dict[str, object], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    found = []
    for key, value in table.items():
        found += _leaves(value, (*at, key)) if isinstance(value, dict) else [((*at, key), value)]
    return found


def _plain(value: object, default: object) -> object:
    return Path(value) if isinstance(value, str) and isinstance(default, Path) else value


def test_init_does_not_overwrite(project: Project) -> None:
    path = recipes.init(Path("mine.toml"))
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        recipes.init(path)
    assert path.read_text() == "mine"


def test_presets_expand_in_order_and_once() -> None:
    assert recipes.module_names(("all-linear",)) == LINEAR_MODULES
    assert recipes.module_names(("qv", "attention", "down_proj")) == (
        "q_proj",
        "v_proj",
        "k_proj",
        "o_proj",
        "down_proj",
    )


def test_the_writer_of_these_tests_writes_toml() -> None:
    tables = {"a": 1, "b": {"c": [1, 2], "d": {"e": "x"}}, "f": {"g": True}}
    assert tomllib.loads(toml(tables)) == tables
