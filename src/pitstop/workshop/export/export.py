"""The trained adapter as the artifact a device loads. Leaves `runs/<name>/export/`."""

from dataclasses import dataclass
from pathlib import Path

from pitstop import records
from pitstop.bundle.binding import check_adapter
from pitstop.bundle.formats import read_gguf
from pitstop.bundle.manifest import Artifact
from pitstop.errors import BrokenInput
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest, require

FOLDER = "export"
RESULT_FILE = "export.json"


@dataclass(frozen=True)
class Exported:
    """`export/export.json`: what was made of which adapter."""

    inputs: str
    adapter_sha256: str  # of the trained weights
    base_sha256: str  # the base artifact it runs on
    artifact: Artifact


def export(path: Path, *, force: bool = False) -> Exported:
    """Write the GGUF adapter of a run, checked against its base as a device will check it.

    Raises:
        UsageError: nothing is trained yet.
        RecordError: the adapter has what GGUF cannot express.
        BrokenInput: the converter refuses, or its result does not fit the base.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        inputs = inputs_digest(identity, recipe.export)
        done = recipe.run / FOLDER / RESULT_FILE
        if not force and (known := finished(done, Exported, inputs)) and _whole(recipe, known):
            return known
        done.unlink(missing_ok=True)
        ref = base_model.load_ref(recipe.base.folder)
        target = recipe.run / FOLDER / f"adapter-{recipe.export.precision}.gguf"
        base = base_model.artifact_path(recipe.base.folder, ref, recipe.base.artifact)
        export_gguf(
            recipe.run / adapters.FOLDER,
            recipe.base.folder / "hf",
            identity.base_sha256,
            target,
            precision=recipe.export.precision,
        )
        check_adapter(read_gguf(target), read_gguf(base), ref.artifact(recipe.base.artifact).sha256)
        artifact = Artifact(
            "adapter", "gguf", recipe.export.precision, target.name, sha256_file(target), target.stat().st_size
        )
        exported = Exported(inputs, identity.adapter_sha256, identity.base_sha256, artifact)
        records.save_json(exported, done)
        return exported


def load_exported(recipe: Recipe) -> tuple[Exported, Path]:
    """Return what was exported, and the path of the checked artifact.

    Raises:
        UsageError: nothing is exported yet.
        BrokenInput: the file is not the one that was exported.
    """
    done = require(recipe.run / FOLDER / RESULT_FILE, "exported adapter", f"pitstop export {recipe.run}")
    exported = records.load_json(Exported, done)
    path = recipe.run / FOLDER / exported.artifact.name
    if not _whole(recipe, exported):
        raise BrokenInput(
            f"{path.name} is not the file that was exported",
            where=path,
            cure=f"export it again: pitstop export {recipe.run} --force",
        )
    return exported, path


def _whole(recipe: Recipe, exported: Exported) -> bool:
    path = recipe.run / FOLDER / exported.artifact.name
    return path.is_file() and sha256_file(path) == exported.artifact.sha256
