"""A bundle is packed only with proofs about these very bytes, judged by the recipe as it is now."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pitstop import records
from pitstop.bundle.manifest import Bundle, check_bundle
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import RecordError, Refused, StorageError, UsageError
from pitstop.files import sha256_file
from pitstop.retention import suite as suites
from pitstop.retention.measure import ChoiceScore, SuiteResult
from pitstop.retention.report import Measured, RetentionReport, make_report
from pitstop.retention.suite import ChoiceItem
from pitstop.retention.task import TaskAnswer, TaskResult
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import pack as packing
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import REPORT_FILE
from pitstop.workshop.export.export import load_exported
from pitstop.workshop.merge import merge
from pitstop.workshop.pack import pack
from pitstop.workshop.parity import PARITY_FILE, Causes, Parity, TaskScore
from pitstop.workshop.train import train
from workbench import Project

ITEMS = 300
SUITE = suites.make(
    "facts",
    "choice",
    [ChoiceItem(f"q{number}", f"q{number}", "It is", ("so", "not so"), 0) for number in range(ITEMS)],
    license="CC0-1.0",
    source="made here",
    description="what is so",
)


def answered(wrong: int, base_sha256: str) -> SuiteResult:
    """Return what a model gives that answers some of the suite's items wrongly."""
    choices = tuple(
        ChoiceScore(
            item.id,
            item.group,
            correct=number >= wrong,
            picked=int(number < wrong),
            margin=1.0,
            logprobs=(-1.0, -2.0),
            bytes=(3, 7),
        )
        for number, item in enumerate(SUITE.items)
    )
    return SuiteResult("facts", "choice", SUITE.digest, "llama", base_sha256, 64, 0.5, choices, (), ())


def done(right: int) -> TaskResult:
    """Return a task of which the first rows were answered rightly."""
    rows = (TaskAnswer(str(row), str(row), "x", row < right, True, 1, 1, int(row < right)) for row in range(60))
    return TaskResult("text", tuple(rows), ())


@pytest.fixture
def write_report(exported: Project) -> Callable[..., RetentionReport]:
    """Writes the run's report on an adapter that answers so many items wrongly where the base errs in none."""
    recipe = recipes.load(Path("recipe.toml"))
    ref = base_model.load_ref(recipe.base.folder)
    path = base_model.artifact_path(recipe.base.folder, ref, "q8_0")

    def write(wrong: int = 0, *, task: int = 50, edited: dict[str, Any] | None = None, **settings: Any) -> Any:
        base_sha256 = sha256_file(path)
        with LlamaEngine(path, base_sha256=base_sha256, context_length=64, sequences=1, threads=1) as engine:
            base, adapted = answered(0, base_sha256), answered(wrong, base_sha256)
            measured = Measured([SUITE], [base], [adapted], [], done(0), done(task))
            identity = adapters.load_identity(recipe)
            report = make_report(
                engine, measured, adapter=recipe.name, adapter_sha256=identity.adapter_sha256, **settings
            )
        report = replace(report, **(edited or {}))
        records.save_json(report, recipe.run / REPORT_FILE)
        return report

    return write


@pytest.fixture
def write_parity(exported: Project) -> Callable[..., Parity]:
    """Writes the run's parity result."""
    recipe = recipes.load(Path("recipe.toml"))

    def write(**changes: Any) -> Parity:
        shipped, _ = load_exported(recipe)
        score = TaskScore(0.8, 0.9)
        parity = Parity(
            inputs="",
            adapter_sha256=shipped.adapter_sha256,
            artifact_sha256=shipped.artifact.sha256,
            base_sha256=shipped.base_sha256,
            scale=1.0,
            kl_nats_per_token=0.001,
            top1_agreement=0.99,
            tokens=100,
            rows=10,
            trained=score,
            shipped=score,
            base=TaskScore(0.0, 0.0),
            allowed_kl=0.01,
            causes=Causes(0.001, 0.0),
            cause="",
        )
        parity = replace(parity, **changes)
        records.save_json(parity, recipe.run / PARITY_FILE)
        return parity

    return write


@pytest.fixture
def proven(
    exported: Project, write_report: Callable[..., RetentionReport], write_parity: Callable[..., Parity]
) -> Project:
    """A run with everything a bundle needs."""
    assert write_report().verdict.outcome == "pass"
    write_parity()
    return exported


def manifest(folder: Path) -> Bundle:
    return records.load_json(Bundle, folder / "bundle.json")


def refused(path: Path = Path("recipe.toml")) -> str:
    """Pack, and return why it was refused; nothing may have been written."""
    with pytest.raises(Refused) as caught:
        pack(path)
    assert caught.value.exit_code == 1
    assert not Path("runs/lights/bundle").exists()
    return str(caught.value)


def test_a_proven_adapter_is_packed_with_its_proofs(proven: Project) -> None:
    folder = pack(proven.recipe(data={"system": "Answer with JSON."}, license="MIT", version="2.1"))
    bundle = check_bundle(manifest(folder))
    (artifact,) = bundle.artifacts
    assert {path.name for path in folder.iterdir()} == {"bundle.json", artifact.name}
    assert sha256_file(folder / artifact.name) == artifact.sha256
    assert (bundle.kind, bundle.name, bundle.version, bundle.license) == ("adapter", "lights", "2.1", "MIT")
    assert bundle.prompting.system == "Answer with JSON."
    assert bundle.base_sha256 == base_model.load_ref(Path("bases/tiny")).artifact("q8_0").sha256
    assert bundle.reports == {name: sha256_file(proven.run / name) for name in (REPORT_FILE, PARITY_FILE)}
    assert bundle.counter == 1


@pytest.mark.parametrize(
    ("missing", "command"),
    [(REPORT_FILE, "check"), (PARITY_FILE, "parity"), ("export", "export"), ("adapter", "train")],
)
def test_a_stage_that_did_not_run_is_named(proven: Project, missing: str, command: str) -> None:
    path = proven.run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match=f"pitstop {command} runs/lights"):
        pack(Path("recipe.toml"))


def test_an_adapter_that_forgets_is_refused(proven: Project, write_report: Callable[..., RetentionReport]) -> None:
    assert write_report(90).verdict.outcome == "fail"
    assert "fail, not pass" in refused()


def test_undecided_is_not_passed(proven: Project, write_report: Callable[..., RetentionReport]) -> None:
    assert write_report(8).verdict.outcome == "inconclusive"
    assert "inconclusive, not pass" in refused()


def test_a_report_edited_to_say_pass_is_refused(proven: Project, write_report: Callable[..., RetentionReport]) -> None:
    verdict = write_report().verdict
    assert write_report(90, edited={"verdict": verdict}).verdict.outcome == "pass"
    assert "fail, not pass" in refused()


def test_a_report_made_with_wider_margins_is_refused(
    proven: Project, write_report: Callable[..., RetentionReport]
) -> None:
    margins = replace(recipes.load(Path("recipe.toml")).check.margins, accuracy=0.5, suite_accuracy=0.6)
    assert write_report(90, margins=margins).verdict.outcome == "pass"
    assert "fail, not pass" in refused()


@pytest.mark.parametrize("change", [{"adapter_sha256": "0" * 64}, {"scale": 0.5}])
def test_a_report_about_another_adapter_is_refused(
    proven: Project, write_report: Callable[..., RetentionReport], change: dict[str, Any]
) -> None:
    write_report(edited=change)
    assert "about another adapter" in refused()


@pytest.mark.parametrize("change", [{"adapter_sha256": "0" * 64}, {"artifact_sha256": "0" * 64}, {"scale": 0.5}])
def test_parity_of_other_files_is_refused(
    proven: Project, write_parity: Callable[..., Parity], change: dict[str, Any]
) -> None:
    write_parity(**change)
    assert "about other files" in refused()


@pytest.mark.parametrize("change", [{"kl_nats_per_token": 0.02}, {"kl_nats_per_token": 0.02, "allowed_kl": 1.0}])
def test_an_export_that_differs_is_refused(
    proven: Project, write_parity: Callable[..., Parity], change: dict[str, Any]
) -> None:
    write_parity(**change)
    assert "0.0200 nats per token" in refused()


def test_another_scale_than_was_proven_is_refused(proven: Project) -> None:
    assert "about another adapter" in refused(proven.recipe(scale=0.5))


def test_an_adapter_trained_since_is_refused(proven: Project, write_report: Callable[..., RetentionReport]) -> None:
    train(proven.recipe(train={"steps": 2}))
    assert "about another adapter" in refused()
    write_report()
    assert "made from another adapter" in refused()


def test_the_same_content_is_packed_once_and_a_change_counts_up(proven: Project) -> None:
    folder = pack(Path("recipe.toml"))
    first = manifest(folder)
    begun = (folder / "bundle.json").stat().st_mtime_ns
    assert pack(proven.run) == folder
    assert (folder / "bundle.json").stat().st_mtime_ns == begun
    assert manifest(pack(proven.recipe(version="1.0.1"))).counter == first.counter + 1
    assert manifest(pack(proven.recipe(version="1.0.1"), counter=7)).counter == 7
    assert manifest(pack(proven.recipe(version="1.0.2"))).counter == 8


def test_a_damaged_bundle_is_packed_again_with_the_same_counter(proven: Project) -> None:
    folder = pack(Path("recipe.toml"))
    before = manifest(folder)
    path = folder / before.artifacts[0].name
    path.write_bytes(b"damaged")
    (folder / "left over").write_text("")
    assert manifest(pack(Path("recipe.toml"))) == before
    assert sha256_file(path) == before.artifacts[0].sha256
    assert {entry.name for entry in folder.iterdir()} == {"bundle.json", path.name}


def test_the_counter_survives_a_pack_that_was_stopped(proven: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(Path("recipe.toml"), counter=5)

    def full(*_: Any) -> None:
        raise StorageError("no space")

    changed = proven.recipe(version="1.0.1")
    with monkeypatch.context() as patched:
        patched.setattr(packing.records, "save_json", full)
        with pytest.raises(StorageError):
            pack(changed)
    assert manifest(pack(changed)).counter == 6


def test_a_base_is_packed_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    shutil.copytree(tiny_base, base)
    folder = pack(base)
    bundle = check_bundle(manifest(folder))
    ref = base_model.load_ref(base)
    assert (bundle.kind, bundle.name) == ("base", "tiny")
    artifact = ref.artifact("q8_0")
    assert bundle.artifacts == (replace(artifact, pieces=(artifact.sha256,)),)
    assert bundle.base_sha256 == sha256_file(folder / "q8_0.gguf") == ref.artifact("q8_0").sha256
    assert bundle.prompting == ref.prompting


def test_a_base_that_was_packed_otherwise_is_a_newer_version(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    shutil.copytree(tiny_base, base)
    folder = pack(base)
    first = manifest(folder)
    older = replace(first, artifacts=tuple(replace(artifact, pieces=()) for artifact in first.artifacts))
    records.save_json(older, folder / "bundle.json")
    again = manifest(pack(base))
    assert (first.version, again.version) == ("1.0.0", "1.0.1")
    assert (first.counter, again.counter) == (1, 2)
    assert manifest(pack(base)) == again


def test_a_merged_model_is_packed_if_it_was_judged_itself(
    proven: Project, write_report: Callable[..., RetentionReport], write_parity: Callable[..., Parity]
) -> None:
    recipe = proven.recipe(export={"delivery": "merged"})
    with pytest.raises(UsageError, match="pitstop merge runs/lights"):
        pack(recipe)
    shipped = merge(recipe).artifact.sha256
    write_parity(artifact_sha256=shipped)
    assert "about another file than ships" in refused(), (
        "a merged model is rounded anew: the adapter's verdict is not its"
    )
    write_report(artifact_sha256=shipped)
    folder = pack(recipe)
    bundle = check_bundle(manifest(folder))
    assert bundle.merged
    assert (bundle.artifact.sha256, bundle.scale) == (shipped, 1.0)
    assert bundle.base_sha256 == base_model.load_ref(Path("bases/tiny")).artifact("q8_0").sha256
    assert sha256_file(folder / bundle.artifact.name) == shipped


def test_a_model_merged_at_another_scale_does_not_ship(proven: Project) -> None:
    merge(proven.recipe(export={"delivery": "merged"}))
    with pytest.raises(UsageError, match=r"merged at scale 1.0, the recipe says 0.5"):
        pack(proven.recipe(export={"delivery": "merged"}, scale=0.5))


def test_a_report_about_an_older_export_is_refused(
    proven: Project, write_report: Callable[..., RetentionReport]
) -> None:
    write_report(artifact_sha256="0" * 64)
    assert "about another file than ships" in refused()


def test_a_manifest_ships_one_file_attached_or_merged(proven: Project) -> None:
    bundle = manifest(pack(Path("recipe.toml")))
    merged = replace(bundle.artifact, role="merged")
    for artifacts in ((bundle.artifact, merged), (merged, merged), ()):
        with pytest.raises(RecordError, match="not both and not none"):
            check_bundle(replace(bundle, artifacts=artifacts))
    with pytest.raises(RecordError, match=r"scale: 0.5 of a merged model must be 1"):
        check_bundle(replace(bundle, artifacts=(merged,), scale=0.5))


def test_a_suite_that_changed_since_the_report_is_refused(proven: Project) -> None:
    suites.save(SUITE, Path("suites", "facts"))
    pack(Path("recipe.toml"))
    items = SUITE.of(ChoiceItem)[1:]
    other = suites.make("facts", "choice", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(other, Path("suites", "facts"))
    with pytest.raises(Refused, match="changed since they were measured: facts"):
        pack(Path("recipe.toml"))
