"""What `check` measures, on which bytes, and what of it counts."""

import shutil
from pathlib import Path

import pytest

from pitstop.errors import UsageError
from pitstop.progress import be_quiet
from pitstop.retention import suite as suites
from pitstop.retention.report import regate
from pitstop.retention.suite import TextItem
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import check, load_suites
from pitstop.workshop.export.export import export
from pitstop.workshop.merge import merge
from workbench import TEXTS, Project, light_rows

LEARNED = 'make the kitchen red {"room": "kitchen", "color": "red"}'  # a row of the dataset, with its answer


@pytest.fixture
def checkable(exported: Project) -> Project:
    """A trained and exported run with a small suite, one item of which was trained on."""
    items = [TextItem(str(number), str(number), text) for number, text in enumerate((*TEXTS, LEARNED))]
    mine = suites.make("mine", "text", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(mine, Path("suites", "mine"))
    return exported


def test_items_that_were_trained_on_do_not_count(checkable: Project) -> None:
    report = check(checkable.recipe(check={"rows": 4, "max_new_tokens": 8}))
    (summary,) = report.suites
    assert (summary.items, summary.trained_on) == (len(TEXTS), 1)
    assert (report.engine, report.artifact_sha256) == ("torch", None)
    assert "trained on" in (checkable.run / "retention.html").read_text()


def test_general_rows_were_trained_on_too(checkable: Project) -> None:
    recipe = checkable.recipe(check={"rows": 4, "max_new_tokens": 8}, retain={"rows": "other.jsonl"})
    checkable.rows("other.jsonl", [{"text": TEXTS[0]}, {"prompt": "Say it:", "completion": TEXTS[1]}])
    assert check(recipe).suites[0].trained_on == 3


def test_a_report_names_the_file_that_ships(checkable: Project) -> None:
    settings = {"check": {"rows": 4, "max_new_tokens": 8}}
    recipe = checkable.recipe(**settings)
    first = check(recipe, engine="llama")
    assert first.artifact_sha256 == export(recipe).artifact.sha256
    recipe = checkable.recipe(**settings, export={"precision": "f32"})
    exported = export(recipe).artifact.sha256
    assert check(recipe, engine="llama").artifact_sha256 == exported != first.artifact_sha256, "measured again"
    recipe = checkable.recipe(**settings, export={"delivery": "merged"})
    merged = merge(recipe).artifact.sha256
    report = check(recipe)
    assert report.engine.startswith("llama")
    assert report.artifact_sha256 == merged, "a merged model is measured as it ships"


@pytest.fixture
def long_suite(exported: Project) -> Project:
    """A trained run with a suite that is long enough for several looks."""
    items = [TextItem(f"{at}", f"{at}", f"Number {at}: {TEXTS[at % len(TEXTS)]}") for at in range(200)]
    suite = suites.make("long", "text", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(suite, Path("suites", "long"))
    return exported


def test_a_clear_verdict_ends_the_looking(long_suite: Project) -> None:
    rows = [
        {**row, "prompt": f"{row['prompt']}, please", "group": f"new {at}"} for at, row in enumerate(light_rows()[:40])
    ]
    data = {"test": str(long_suite.rows("test.jsonl", rows))}
    settings = {"rows": 40, "max_new_tokens": 2, "margins": {"min_task_score": 0.5}}  # two tokens answer nothing
    first = check(long_suite.recipe(data=data, check=settings))
    assert first.verdict.outcome == "fail"
    assert (first.look, first.suites[0].items) == (1, 50)
    assert regate(first) == first.verdict


def test_what_is_undecided_is_looked_at_further(long_suite: Project, capsys: pytest.CaptureFixture[str]) -> None:
    be_quiet(False)
    recipe = long_suite.recipe(check={"rows": 4, "max_new_tokens": 8, "margins": {"bits_per_byte": 9.0}})
    report = check(recipe)  # four rows cannot show that the task was learned
    assert report.verdict.outcome == "inconclusive"
    assert (report.look, report.suites[0].items) == (3, 200)
    assert "not decided by 25% of the items, looking at 50%" in capsys.readouterr().err
    measured = sorted(Path("bases/tiny/measured").glob("long-*.json"))
    assert len(measured) == 3, "no item of the base is measured twice"
    at_once = check(long_suite.recipe(check={"rows": 4, "max_new_tokens": 8, "margins": {"looks": [1.0]}}))
    assert (at_once.look, at_once.suites[0].items) == (0, 200)
    assert at_once.suites[0].baseline == pytest.approx(report.suites[0].baseline)


def test_where_no_suites_are_built_those_that_come_with_pitstop_are_taken(exported: Project) -> None:
    shutil.rmtree("suites", ignore_errors=True)
    found = load_suites(recipes.load(exported.recipe()))
    assert {suite.name for suite in found} >= {"wordnet", "capitals", "agreement", "kl-general", "kl-chat"}
    with pytest.raises(UsageError, match="no suites at mine"):
        load_suites(recipes.load(exported.recipe(check={"suites": "mine"})))
