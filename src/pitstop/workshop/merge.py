"""Base and adapter to one model: for a board with memory to spare, and for what an adapter file cannot carry.

Leaves `runs/<name>/merged/`: `hf/` in float32, `<precision>.gguf` or `model.onnx` with its files, as the base is
shipped, and `merged.json`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, PreTrainedModel

from pitstop import records
from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.manifest import Artifact
from pitstop.bundle.onnx import check_files
from pitstop.engines.llama import quantize
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.progress import progress
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.export import llamacpp
from pitstop.workshop.export.onnx import PRECISIONS, build_base
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest, require

FOLDER = "merged"
RESULT_FILE = "merged.json"
WEIGHTS_FILE = Path("hf", "model.safetensors")


@dataclass(frozen=True)
class Merged:
    """`merged/merged.json`: what was merged, and what came out."""

    inputs: str
    adapter_sha256: str  # of the trained weights
    base_sha256: str  # the base artifact it runs beside, and takes the place of
    base_weights_sha256: str  # of the base's hf/ weights, which the adapter was added to
    scale: float  # multiplier of the adapter's effect
    weights_sha256: str  # of hf/model.safetensors
    artifact: Artifact  # the GGUF, or the ONNX graph, which names its other files


def merge(path: Path, *, force: bool = False) -> Merged:
    """Add a run's adapter, times the recipe's scale, to its base and write the sum as one model.

    The sum is rounded again when it is quantized: attached to the base it was trained on, an adapter loses nothing.

    Raises:
        UsageError: nothing is trained yet, it is an activated LoRA, or another process works on this run.
        BrokenInput: weights that are not the ones that were trained, or a sum with values that are not finite.
        StorageError: the disk refuses.
    """
    recipe = recipes.load(path)
    with exclusive(recipe.run):
        identity = adapters.load_identity(recipe)
        if recipe.train.invocation:
            raise UsageError(
                f"{recipe.name} is an activated LoRA: merged, it would act before its invocation too",
                cure="ship it attached: pitstop export, or train it without [train] invocation",
            )
        ref = base_model.load_ref(recipe.base.folder)
        source = sha256_file(recipe.base.folder / WEIGHTS_FILE)
        inputs = inputs_digest(identity, source, ref.tokenizer_sha256, recipe.base.artifact, str(recipe.scale))
        done = recipe.run / FOLDER / RESULT_FILE
        if not force and (known := finished(done, Merged, inputs)) and _whole(recipe, known):
            return known
        done.unlink(missing_ok=True)
        artifact = _make(recipe, identity.base_sha256)
        weights = sha256_file(done.parent / WEIGHTS_FILE)
        merged = Merged(inputs, identity.adapter_sha256, identity.base_sha256, source, recipe.scale, weights, artifact)
        records.save_json(merged, done)  # written last: without it the merge is not finished
        return merged


def load_merged(recipe: Recipe) -> tuple[Merged, Path]:
    """Return what was merged, and the path of the checked GGUF.

    Raises:
        UsageError: nothing is merged yet.
        BrokenInput: the file is not the one that was made.
    """
    done = require(recipe.run / FOLDER / RESULT_FILE, "merged model", f"pitstop merge {recipe.run}")
    merged = records.load_json(Merged, done)
    path = recipe.run / FOLDER / merged.artifact.name
    if not path.is_file() or sha256_file(path) != merged.artifact.sha256:
        raise BrokenInput(
            f"{path.name} is not the file that was merged",
            where=path,
            cure=f"merge it again: pitstop merge {recipe.run} --force",
        )
    return merged, path


def _make(recipe: Recipe, base_sha256: str) -> Artifact:
    folder = recipe.run / FOLDER
    folder.mkdir(exist_ok=True)
    precision = recipe.base.artifact
    kind = "onnx" if precision in PRECISIONS else "gguf"
    target = folder / f"{precision}.gguf"
    with progress(f"merge {recipe.name}", 3, "steps") as advance, tempfile.TemporaryDirectory(dir=folder) as scratch:
        base_model.save_hugging_face(_add(recipe), base_model.load_tokenizer(recipe.base.folder), folder)
        advance(note="added")
        if kind == "onnx":
            target = build_base(folder / "hf", folder, precision, merged_from=base_sha256)
            advance(2, note="built")
            return Artifact("merged", kind, precision, target.name, sha256_file(target), target.stat().st_size)
        full = Path(scratch) / "full.gguf"
        llamacpp.convert_model(folder / "hf", full, "f32" if precision == "f32" else "f16")
        advance(note="converted")
        quantize(full, target, precision, keys={BASE_KEY: base_sha256})
        advance(note="quantized")
    return Artifact("merged", kind, precision, target.name, sha256_file(target), target.stat().st_size)


def _add(recipe: Recipe) -> PreTrainedModel:
    """Return the base in float32 with the adapter added as PEFT computes it, every scaling rule included."""
    model = AutoModelForCausalLM.from_pretrained(recipe.base.folder / "hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(recipe.run / adapters.FOLDER))
    try:
        with rescale_adapter_scale(adapted, recipe.scale):
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise BrokenInput(f"the adapter cannot be merged: {error}", where=recipe.run / adapters.FOLDER) from error
    return merged


def _whole(recipe: Recipe, merged: Merged) -> bool:
    folder = recipe.run / FOLDER
    expected = {WEIGHTS_FILE: merged.weights_sha256, Path(merged.artifact.name): merged.artifact.sha256}
    if not all((folder / name).is_file() and sha256_file(folder / name) == sha for name, sha in expected.items()):
        return False
    return merged.artifact.format != "onnx" or _whole_onnx(folder / merged.artifact.name)


def _whole_onnx(graph: Path) -> bool:
    try:
        check_files(read_onnx_graph(graph))
    except BrokenInput:
        return False
    return True
