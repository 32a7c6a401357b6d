"""Artifacts and their proofs to a bundle; refuses whatever was not proven about these very bytes.

Leaves `runs/<name>/bundle/` for an adapter, `bases/<name>/bundle/` for a base: `bundle.json` and the files it names.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pitstop import records
from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.manifest import PIECE, Artifact, Bundle, check_bundle
from pitstop.bundle.onnx import parts
from pitstop.errors import Refused, Untrusted, UsageError
from pitstop.files import replacing, sha256_file, sha256_pieces
from pitstop.retention.report import RetentionReport, regate
from pitstop.retention.suite import load_all
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import REPORT_FILE
from pitstop.workshop.parity import PARITY_FILE, Parity, too_far
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, require
from pitstop.workshop.shipped import Shipped, load_shipped, result_file

FOLDER = "bundle"
MANIFEST_FILE = "bundle.json"
DEVICE_CONTEXT = 2048  # tokens a conversation may have on a device, where the base allows more


def pack(path: Path, *, artifact: str | None = None, counter: int | None = None) -> Path:
    """Pack a run's adapter, or a base folder, and return the bundle folder; the same content is packed once.

    Args:
        artifact: precision of the base artifact that is packed, or beside which the adapter runs; None: the first one,
            and the one the recipe trains on.

    Raises:
        UsageError: a stage before this one has not run.
        Refused: no passing verdict, or no parity, about these very files.
    """
    if (path / base_model.BASE_FILE).is_file():
        return _pack_base(path, artifact, counter)
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        return _pack_adapter(recipe, artifact, counter)


def _pack_base(folder: Path, precision: str | None, counter: int | None) -> Path:
    ref = base_model.load_ref(folder)
    if not ref.artifacts:
        raise UsageError(f"{folder} has no artifact to ship", cure="make one: pitstop base SOURCE --precision q8_0")
    artifact = ref.artifact(precision) if precision else ref.artifacts[0]
    files = {artifact: base_model.artifact_path(folder, ref, artifact.precision)}
    if artifact.format == "onnx":
        files |= parts(read_onnx_graph(files[artifact]))
    bundle = Bundle(
        kind="base",
        name=ref.name,
        version="1.0.0",
        counter=1,
        license=ref.license,
        base_name=ref.name,
        base_sha256=artifact.sha256,
        prompting=ref.prompting,
        context_length=min(ref.context_length, DEVICE_CONTEXT),
        artifacts=tuple(files),
    )
    name = FOLDER if artifact == ref.artifacts[0] else f"{FOLDER}-{artifact.precision}"
    return _write(bundle, files, folder / name, counter)


def _pack_adapter(recipe: Recipe, base: str | None, counter: int | None) -> Path:
    identity = adapters.load_identity(recipe)
    ships = load_shipped(recipe, base)
    own = "" if ships.base == recipe.base.artifact else f" --artifact {ships.base}"
    checked, compared = (result_file(name, recipe, ships.base) for name in (REPORT_FILE, PARITY_FILE))
    if not checked.is_file() and recipe.export.delivery == "attached":
        checked = recipe.run / REPORT_FILE  # as it was trained, which parity says is the same
    report = records.load_json(
        RetentionReport, require(checked, "retention report", f"pitstop check {recipe.run}{own}")
    )
    parity = records.load_json(Parity, require(compared, "parity result", f"pitstop parity {recipe.run}{own}"))
    _refuse_unproven(recipe, identity, ships, report, parity)
    ref = base_model.load_ref(recipe.base.folder)
    files = {ships.artifact: ships.path}
    if (ships.artifact.format, ships.artifact.role) == ("onnx", "merged"):
        files |= parts(read_onnx_graph(ships.path))
    bundle = Bundle(
        kind="adapter",
        name=recipe.name,
        version=recipe.version,
        counter=1,
        license=recipe.license,
        base_name=ref.name,
        base_sha256=ships.base_sha256,
        prompting=replace(ref.prompting, system=recipe.data.system),
        context_length=min(ref.context_length, DEVICE_CONTEXT),
        artifacts=tuple(files),
        scale=ships.scale,
        measured={
            "parity_kl_nats_per_token": parity.kl_nats_per_token,
            "shipped_exact_share": parity.shipped.exact,
            "shipped_field_f1": parity.shipped.field_f1,
        },
        reports={path.name: sha256_file(path) for path in (checked, compared)},
    )
    folder = recipe.run / (FOLDER if not own else f"{FOLDER}-{ships.base}")
    return _write(bundle, files, folder, counter)


def _refuse_unproven(
    recipe: Recipe, identity: adapters.Identity, ships: Shipped, report: RetentionReport, parity: Parity
) -> None:
    """Refuse unless verdict and parity are about this adapter, this artifact and this scale.

    The verdict is computed again from the stored items and the recipe's limits: a report edited to say "pass", or
    made with wider margins, does not.
    """
    merged = recipe.export.delivery == "merged"
    run, make = recipe.run, "merge" if merged else "export"
    again = f"run again: pitstop {make} {run} && pitstop check {run} && pitstop parity {run}"
    verdict = regate(replace(report, margins=recipe.check.margins))
    if verdict.outcome != "pass":
        raise Refused(
            f"the verdict on {recipe.name} is {verdict.outcome}, not pass",
            where=recipe.run / REPORT_FILE,
            cure="read retention.html in the run folder; mend the recipe and train again",
        )
    if (report.adapter_sha256, report.scale) != (identity.adapter_sha256, recipe.scale):
        raise Refused("the retention report is about another adapter", where=recipe.run / REPORT_FILE, cure=again)
    if changed := _changed_suites(recipe, report):
        raise Refused(
            f"suites changed since they were measured: {', '.join(changed)}", where=recipe.check.suites, cure=again
        )
    # An attached adapter is proven as it was trained, and parity says that what ships is the same. A merged model is
    # other weights, rounded anew: what they forgot must have been measured on them.
    if report.artifact_sha256 not in ({ships.artifact.sha256} if merged else {ships.artifact.sha256, None}):
        raise Refused("the retention report is about another file than ships", where=run / REPORT_FILE, cure=again)
    if ships.adapter_sha256 != identity.adapter_sha256:
        raise Refused(f"the {make} was made from another adapter", where=ships.path, cure=again)
    if (parity.adapter_sha256, parity.artifact_sha256, parity.scale) != (
        identity.adapter_sha256,
        ships.artifact.sha256,
        recipe.scale,
    ):
        raise Refused("the parity result is about other files", where=recipe.run / PARITY_FILE, cure=again)
    if not parity.kl_nats_per_token <= recipe.export.parity_kl:
        raise Refused(
            f"what ships differs by {parity.kl_nats_per_token:.4f} nats per token from the trained adapter, "
            f"more than the {recipe.export.parity_kl} allowed",
            where=recipe.run / PARITY_FILE,
            cure=too_far(recipe),
        )


def _changed_suites(recipe: Recipe, report: RetentionReport) -> list[str]:
    """Return the suites that are other ones now than in the report; those that are not here any more cannot tell."""
    if not recipe.check.suites.is_dir():
        return []
    digests = {suite.name: suite.digest for suite in load_all(recipe.check.suites)}
    return [suite.name for suite in report.suites if digests.get(suite.name, suite.digest) != suite.digest]


def _write(bundle: Bundle, files: Mapping[Artifact, Path], folder: Path, counter: int | None) -> Path:
    """Write the bundle folder, the manifest last; a changed bundle gets a higher counter than the one before."""
    files = {_with_pieces(artifact, path): path for artifact, path in files.items()}
    bundle = replace(bundle, artifacts=tuple(files))
    before = _before(folder)
    if counter is None:
        changed = before is not None and _numbered(bundle, before.counter) != before
        counter = before.counter + changed if before is not None else 1
    bundle = check_bundle(_numbered(bundle, counter))
    targets = {artifact: folder / artifact.name for artifact in files}
    if bundle == before and all(_is(target, artifact) for artifact, target in targets.items()):
        return folder
    # The old manifest stays until the new one replaces it: without it the counter would begin again.
    for artifact, target in targets.items():
        with files[artifact].open("rb") as source, replacing(target) as file:
            shutil.copyfileobj(source, file, 1 << 20)
    for other in folder.iterdir():
        if other not in (*targets.values(), folder / MANIFEST_FILE):
            other.unlink()
    records.save_json(bundle, folder / MANIFEST_FILE)
    return folder


def _numbered(bundle: Bundle, counter: int) -> Bundle:
    """Return the bundle with a counter; a base, whose version nobody writes down, has one that rises with it."""
    return replace(bundle, counter=counter, version=f"1.0.{counter - 1}" if bundle.kind == "base" else bundle.version)


def _with_pieces(artifact: Artifact, path: Path) -> Artifact:
    found, pieces = sha256_pieces(path, PIECE)
    if found != artifact.sha256:
        raise Untrusted(f"{path.name} changed while it was packed", where=path, cure="pack it again")
    return replace(artifact, pieces=pieces)


def _is(path: Path, artifact: Artifact) -> bool:
    return path.is_file() and sha256_file(path) == artifact.sha256


def _before(folder: Path) -> Bundle | None:
    manifest = folder / MANIFEST_FILE
    return records.load_json(Bundle, manifest) if manifest.is_file() else None
