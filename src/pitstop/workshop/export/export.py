"""The trained adapter as the artifact a device loads. Leaves `runs/<name>/export/`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pitstop import records
from pitstop.bundle.binding import check_adapter
from pitstop.bundle.formats import read_gguf, read_onnx_adapter, read_onnx_graph
from pitstop.bundle.manifest import Artifact, BaseRef
from pitstop.bundle.onnx import check_onnx_adapter
from pitstop.errors import BrokenInput
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.export.onnx import export_onnx
from pitstop.workshop.export.precision import smallest
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest, require

FOLDER = "export"
RESULT_FILE = "export.json"


@dataclass(frozen=True)
class Further:
    """One adapter file for a base artifact that it was not trained for."""

    base: str  # precision of the base artifact
    base_sha256: str
    artifact: Artifact


@dataclass(frozen=True)
class Exported:
    """`export/export.json`: what was made of which adapter."""

    inputs: str
    adapter_sha256: str  # of the trained weights
    base_sha256: str  # the base artifact it runs on
    artifact: Artifact
    also: tuple[Further, ...] = ()  # the same adapter for other artifacts of the base


def export(path: Path, *, force: bool = False) -> Exported:
    """Write the adapter of a run for each base artifact the recipe names, checked as a device will check it.

    Raises:
        UsageError: nothing is trained yet.
        RecordError: the adapter has what an adapter file cannot express, or the base has no such artifact.
        BrokenInput: the converter refuses, or its result does not fit the base.
        DatasetError: the recipe leaves the precision open, and there are no rows to choose it by.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        ref = base_model.load_ref(recipe.base.folder)
        others = [ref.artifact(precision).sha256 for precision in recipe.export.also]
        inputs = inputs_digest(identity, recipe.export, *others)
        done = recipe.run / FOLDER / RESULT_FILE
        if not force and (known := finished(done, Exported, inputs)) and _whole(recipe, known):
            return known
        done.unlink(missing_ok=True)
        artifact = _make(recipe, ref, recipe.base.artifact, identity.base_sha256, "adapter")
        also = tuple(
            Further(one, digest, _make(recipe, ref, one, digest, f"adapter-for-{one}"))
            for one, digest in zip(recipe.export.also, others, strict=True)
        )
        exported = Exported(inputs, identity.adapter_sha256, identity.base_sha256, artifact, also)
        records.save_json(exported, done)
        return exported


def _make(recipe: Recipe, ref: BaseRef, precision: str, base_sha256: str, stem: str) -> Artifact:
    """Write the adapter for one base artifact, which has this digest, and check that it fits."""
    base = base_model.artifact_path(recipe.base.folder, ref, precision)
    running = ref.artifact(precision)
    write = partial(write_adapter, recipe, running.format, base, base_sha256)
    kind: str = recipe.export.precision
    if kind == "auto":
        kind = smallest(recipe, ref, precision, write)
    elif running.format == "onnx" and kind != "f32":
        kind = "f16"  # of the two that ONNX Runtime knows
    target = write(recipe.run / FOLDER, kind, stem)
    if running.format == "onnx":
        check_onnx_adapter(read_onnx_adapter(target), read_onnx_graph(base), running.sha256)
    else:
        check_adapter(read_gguf(target), read_gguf(base), running.sha256)
    return Artifact("adapter", running.format, kind, target.name, sha256_file(target), target.stat().st_size)


def write_adapter(
    recipe: Recipe, format: str, base: Path, base_sha256: str, folder: Path, precision: str, stem: str = "adapter"
) -> Path:
    """Write the trained adapter as a file for one base artifact, in one precision, and return its path.

    Raises:
        RecordError: the adapter has what such a file cannot express.
        BrokenInput: the converter refuses.
        StorageError: the disk refuses.
    """
    adapter, hf = recipe.run / adapters.FOLDER, recipe.base.folder / "hf"
    if format == "onnx":
        target = folder / f"{stem}-{precision}.onnx_adapter"
        export_onnx(adapter, hf, base, base_sha256, target, precision=precision)
    else:
        target = folder / f"{stem}-{precision}.gguf"
        export_gguf(adapter, hf, base_sha256, target, precision=precision)
    return target


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
    artifacts = (exported.artifact, *(further.artifact for further in exported.also))
    paths = ((recipe.run / FOLDER / artifact.name, artifact.sha256) for artifact in artifacts)
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths)
