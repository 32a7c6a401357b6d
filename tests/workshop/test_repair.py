"""A forgetful adapter is repaired by the least change that passes, or left as it was."""

import json
import random
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pitstop import cli, records
from pitstop.errors import Busy, Refused, UsageError
from pitstop.files import sha256_file
from pitstop.progress import be_quiet
from pitstop.retention import suite as suites
from pitstop.retention.suite import TextItem
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model, train
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import check
from pitstop.workshop.export.export import export
from pitstop.workshop.repair import edits, run_folder
from pitstop.workshop.repair.material import Material, Part, divide, gather
from pitstop.workshop.repair.pairs import read, write
from pitstop.workshop.repair.points import Bench, Point
from pitstop.workshop.repair.repair import repair
from pitstop.workshop.repair.result import Repair, require_repaired
from pitstop.workshop.runs import exclusive
from workbench import Project

WORDS = "river bread book window rain prime number hill salt water time sea letter garden stone paper winter road"
REPAIRED = Path("runs", "lights-repaired")
# Between what the whole adapter surely loses (0.011 and more) and what it surely loses at a third of its size.
MARGINS = {"bits_per_byte": 0.008}


def texts(count: int, seed: int) -> list[str]:
    words = random.Random(seed)
    return [" ".join(words.choices(WORDS.split(), k=14)) + "." for _ in range(count)]


def settings(**changes: object) -> dict[str, object]:
    """A task of one answer: learned in seconds, and it makes the model say it everywhere."""
    return {
        "data": {"train": "orders.jsonl", "test_share": 0.5},
        "train": {"steps": 60},
        "check": {"metric": "text", "rows": 40, "max_new_tokens": 4, "margins": MARGINS},
        **changes,
    }


def prepare(project: Project) -> None:
    """Write the task, the suites and general rows that none of them holds."""
    orders = [{"prompt": f"order {at}", "completion": "yes", "group": str(at)} for at in range(80)]
    project.rows("orders.jsonl", orders)
    about = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}
    for name, count, seed, purpose in (("mine", 90, 1, "retention"), ("probe", 12, 3, "drift")):
        items = [TextItem(str(at), str(at), text) for at, text in enumerate(texts(count, seed))]
        suites.save(suites.make(name, "text", items, purpose=purpose, **about), Path("suites", name))  # type: ignore[arg-type]
    project.rows("suites/replay.jsonl", [{"text": text} for text in texts(32, 2)])


@pytest.fixture(scope="module")
def forgetful_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetful")
    with chdir(folder):
        (folder / "bases").mkdir()
        (folder / "bases" / "tiny").symlink_to(tiny_base)
        made = Project(folder)
        prepare(made)
        train.train(made.recipe(**settings()))
    return folder


@pytest.fixture
def forgetful(forgetful_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a trained adapter that loses more than its margins allow."""
    shutil.copytree(forgetful_folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


@pytest.fixture(scope="module")
def repaired_folder(forgetful_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repaired")
    shutil.copytree(forgetful_folder, folder, symlinks=True, dirs_exist_ok=True)
    be_quiet()
    with chdir(folder):
        repair(Path("runs", "lights"))
    return folder


@pytest.fixture
def repaired(repaired_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repair:
    """The result of a repair, with its project as the current folder."""
    shutil.copytree(repaired_folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return repair(Path("runs", "lights"))


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def material_of(project: Project) -> Material:
    recipe = recipes.load(project.run)
    ref = base_model.load_ref(recipe.base.folder)
    return gather(recipe, ref, base_model.load_tokenizer(recipe.base.folder))


def test_the_repaired_adapter_passes_the_whole_check_and_the_old_one_does_not(repaired: Repair) -> None:
    assert repaired.outcome == "repaired"
    assert repaired.chosen is not None
    assert repaired.chosen.passes
    assert check(Path("runs", "lights")).verdict.outcome == "fail"
    report = check(REPAIRED)
    assert report.verdict.outcome == "pass"
    assert (report.adapter, report.adapter_sha256) == ("lights", repaired.adapter_sha256)
    assert report.task is not None
    assert report.task.adapted.exact == 1.0


def test_the_repaired_run_is_a_run_of_its_own_under_the_adapters_name(repaired: Repair) -> None:
    recipe = recipes.load(REPAIRED)
    assert (recipe.name, recipe.run) == ("lights", REPAIRED)
    identity = adapters.load_identity(recipe)
    old = adapters.load_identity(recipes.load(Path("runs", "lights")))
    assert (identity.adapter_sha256, old.adapter_sha256) == (repaired.adapter_sha256, repaired.source_sha256)
    assert identity.history
    assert {change.adapter_sha256 for change in identity.history} == {repaired.source_sha256}
    assert export(REPAIRED).adapter_sha256 == repaired.adapter_sha256
    trained = sha256_file(REPAIRED / "adapter" / adapters.WEIGHTS_FILE)
    train.train(REPAIRED)
    assert sha256_file(REPAIRED / "adapter" / adapters.WEIGHTS_FILE) == trained, "trained over"


def test_the_repaired_adapter_is_an_ordinary_one(repaired: Repair) -> None:
    base = AutoModelForCausalLM.from_pretrained("bases/tiny/hf", dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, str(REPAIRED / "adapter")).eval()(input_ids=tokens).logits
    assert (plain - adapted).abs().max() > 1e-3
    before, after = (read(Path("runs", name, "adapter")) for name in ("lights", "lights-repaired"))
    assert {name: (pair.a.shape, pair.b.shape) for name, pair in before.items()} == {
        name: (pair.a.shape, pair.b.shape) for name, pair in after.items()
    }


def test_the_page_shows_every_candidate_and_needs_nothing_else(repaired: Repair) -> None:
    page = (REPAIRED / "repair.html").read_text()
    assert page.count("<td class=n>") > 6 * len(repaired.candidates)
    assert "chosen</text>" in page
    assert "://" not in page
    assert "<script" not in page


def test_what_was_repaired_is_not_repaired_again(repaired: Repair) -> None:
    before = (REPAIRED / "repair.json").stat().st_mtime_ns
    assert repair(Path("runs", "lights")) == repaired
    assert (REPAIRED / "repair.json").stat().st_mtime_ns == before
    assert repair(REPAIRED).outcome == "passing", "nothing to do on it either"


def test_uniform_scaling_is_tried_from_both_sides(repaired: Repair) -> None:
    uniform = [one for one in repaired.candidates if one.method == "scale"]
    assert uniform[0].scale == 1.0
    assert {one.keeps_task for one in uniform} == {True, False}
    assert {one.likely for one in uniform} == {True, False}
    ordered = sorted(uniform, key=lambda one: one.scale)
    assert ordered[0].damage < ordered[-1].damage
    assert all(one.scale < 1.0 for one in repaired.looks)


def test_the_search_sees_no_item_of_the_verdict(forgetful: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    material = material_of(forgetful)
    search, sealed = material.search, material.verdict
    for one, other in zip(search.suites, sealed.suites, strict=True):
        assert one.items
        assert other.items
        assert {item.group for item in one.items}.isdisjoint(item.group for item in other.items)
    assert {row.group for row in search.rows}.isdisjoint(row.group for row in sealed.rows)
    check(forgetful.run)  # so that not even the whole adapter has to be measured
    seen: list[tuple[Part, bool]] = []
    opened = Bench.point

    def watched(self: Bench, pairs: object, part: Part, *, shown: bool = False) -> Point:
        seen.append((part, part.ids() == sealed.ids()))
        return opened(self, pairs, part, shown=shown)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "point", watched)
    result = repair(forgetful.run)
    looked = [at for at, (_, is_sealed) in enumerate(seen) if is_sealed]
    assert looked == list(range(len(seen) - len(result.looks), len(seen))), "only when the search was over"
    assert all(part.ids() == search.ids() and part.rows == search.rows for part, is_sealed in seen if not is_sealed)
    assert len(seen) == len(result.candidates) + len(result.looks)


def test_groups_stay_together() -> None:
    items = [TextItem(str(at), str(at // 3), "text") for at in range(90)]
    one, other = divide(items, 1 / 3)
    assert (len(one), len(other)) == (30, 60)
    assert {item.group for item in one}.isdisjoint(item.group for item in other)


def test_what_cannot_be_split_is_refused(forgetful: Project) -> None:
    about = {"license": "CC0-1.0", "source": "made here", "description": "for a test"}
    one = suites.make("one", "text", [TextItem("a", "a", texts(1, 7)[0])], **about)  # type: ignore[arg-type]
    suites.save(one, Path("suites", "one"))
    with pytest.raises(UsageError, match="suite one cannot be split"):
        repair(forgetful.run)


def test_items_that_were_trained_on_are_in_no_part(forgetful: Project) -> None:
    forgetful.rows("orders.jsonl", [
        {"prompt": f"order {at}", "completion": "yes", "group": str(at)} for at in range(80)
    ] + [{"prompt": "say", "completion": texts(1, 1)[0], "group": "1"}])  # fmt: skip
    material = material_of(forgetful)
    mine = [suite for part in (material.whole, material.search, material.verdict) for suite in part.suites]
    assert all(item.id != "0" for suite in mine if suite.name == "mine" for item in suite.items)
    assert sum(len(suite.items) for suite in material.whole.suites) == 101, "all the others"


def test_of_large_suites_a_part_is_measured(forgetful: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitstop.workshop.repair.material.SEARCH_GROUPS", 4)
    monkeypatch.setattr("pitstop.workshop.repair.material.VERDICT_GROUPS", 6)
    material = material_of(forgetful)
    for search, verdict, whole in zip(
        material.search.suites, material.verdict.suites, material.whole.suites, strict=True
    ):
        assert len({item.group for item in search.items}) <= 4
        assert len({item.group for item in verdict.items}) <= 6
        assert whole.items == search.items + verdict.items


def test_an_adapter_that_passes_is_left_alone(forgetful: Project) -> None:
    forgetful.recipe(**settings(check={"metric": "text", "rows": 40, "max_new_tokens": 4}))
    before = contents(Path("runs"))
    result = repair(Path("recipe.toml"))
    assert (result.outcome, result.run) == ("passing", None)
    assert require_repaired(result) is result
    assert contents(Path("runs")) == before


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(forgetful: Project) -> None:
    margins = {"bits_per_byte": 1e-5}
    recipe = forgetful.recipe(**settings(check={"metric": "text", "rows": 40, "max_new_tokens": 4, "margins": margins}))
    before = contents(Path("runs"))
    result = repair(recipe, methods=("scale", "rank"))
    assert (result.outcome, result.run, result.chosen) == ("refused", None, None)
    assert contents(Path("runs")) == before
    assert not REPAIRED.exists()
    with pytest.raises(Refused, match="train it again") as refused:
        require_repaired(result)
    assert "nearest: " in str(refused.value)


def test_an_adapter_that_did_not_learn_is_refused(forgetful: Project) -> None:
    forgetful.rows("orders.jsonl", [
        {"prompt": f"order {at}", "completion": "no", "group": str(at)} for at in range(80)
    ])  # fmt: skip
    result = repair(forgetful.run)
    assert result.outcome == "refused"
    assert "not surely learned" in result.reasons[0]
    assert result.candidates == ()
    said = CliRunner().invoke(cli.app, ["repair", "runs/lights", "--json", "out.json"])
    be_quiet()
    assert said.exit_code == 1
    assert "runs/lights is as it was" in said.output
    assert "not surely learned" in said.output
    assert json.loads(Path("out.json").read_bytes())["outcome"] == "refused"


def test_the_null_adapter_is_refused_for_its_task(forgetful: Project) -> None:
    folder = forgetful.run / "adapter"
    write(edits.scale(read(folder), 0.0), folder, Path("null"))
    Path("null", adapters.WEIGHTS_FILE).rename(folder / adapters.WEIGHTS_FILE)
    identity = records.load_json(adapters.Identity, folder / adapters.IDENTITY_FILE)
    digest = sha256_file(folder / adapters.WEIGHTS_FILE)
    records.save_json(replace(identity, adapter_sha256=digest), folder / adapters.IDENTITY_FILE)
    result = repair(forgetful.run)
    assert (result.outcome, result.candidates) == ("refused", ())
    assert "not surely learned" in result.reasons[0]


def test_an_activated_adapter_stays_one(forgetful: Project) -> None:
    recipe = forgetful.recipe(**settings(name="waits", train={"steps": 60, "invocation": "<|im_start|>assistant\n"}))
    train.train(recipe)
    check(recipe)
    result = repair(recipe, methods=("scale", "layers", "null-space"))
    assert (result.outcome, result.run) == ("repaired", "runs/waits-repaired")
    old, new = (
        json.loads(Path("runs", name, "adapter/adapter_config.json").read_bytes())
        for name in ("waits", "waits-repaired")
    )
    assert new["alora_invocation_tokens"] == old["alora_invocation_tokens"] != []
    assert check(Path(result.run or "")).verdict.outcome == "pass"


def test_another_run_is_not_written_over(forgetful: Project) -> None:
    shutil.copytree("runs/lights", "runs/mine")
    before = contents(Path("runs"))
    with pytest.raises(UsageError, match="--to NAME"):
        repair(forgetful.run, to="mine")
    Path("runs", "mine", "repair.json").write_text("{}[")
    before = contents(Path("runs"))
    with pytest.raises(UsageError, match="--to NAME"):
        repair(forgetful.run, to="mine")
    with pytest.raises(UsageError, match="the run it is made of"):
        repair(forgetful.run, to="lights")
    with pytest.raises(UsageError, match="cannot be a run folder"):
        repair(forgetful.run, to="../elsewhere")
    assert contents(Path("runs")) == before


def test_two_at_once_are_told(forgetful: Project) -> None:
    with exclusive(forgetful.run), pytest.raises(Busy):
        repair(forgetful.run)


def test_what_is_stopped_while_it_is_written_is_no_run_and_done_again(
    repaired: Repair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(REPAIRED)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.records, "save_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            repair(Path("runs", "lights"), methods=("scale",))
    with pytest.raises(UsageError, match="no recipe"):
        check(REPAIRED)
    assert [path.name for path in REPAIRED.iterdir() if path.name != ".lock"] == []
    assert repair(Path("runs", "lights"), methods=("scale",)).outcome == "repaired"


def test_a_damaged_result_is_made_again(repaired: Repair) -> None:
    (REPAIRED / "adapter" / adapters.WEIGHTS_FILE).write_bytes(b"damaged")
    again = repair(Path("runs", "lights"))
    assert again.adapter_sha256 == repaired.adapter_sha256, "the same repair of the same adapter"
    assert sha256_file(REPAIRED / "adapter" / adapters.WEIGHTS_FILE) == again.adapter_sha256


def test_the_command_says_what_it_did(forgetful: Project) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["repair", "runs/lights", *arguments])
        be_quiet()
        return result.exit_code, result.output

    code, said = run("--methods", "scale", "--to", "smaller", "--json", "out.json")
    assert code == 0, said
    assert "pitstop check runs/smaller" in said
    assert json.loads(Path("out.json").read_bytes())["outcome"] == "repaired"
    assert run("--methods", "magic") == (2, "there is no method 'magic'\n  do:    choose from: "
        "scale,modules,layers,heads,ramp,rank,null-space\n")  # fmt: skip
    assert run("--keep", "2")[0] == 2
