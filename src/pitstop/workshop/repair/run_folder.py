"""The repaired adapter as a run folder: it appears when it is whole."""

import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from pitstop import records
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file, write_bytes
from pitstop.workshop import adapter as adapters
from pitstop.workshop import recipe as recipes
from pitstop.workshop.recipe import RECIPE_FILE, Recipe
from pitstop.workshop.repair.page import page
from pitstop.workshop.repair.pairs import write
from pitstop.workshop.repair.result import Repair
from pitstop.workshop.repair.search import changes
from pitstop.workshop.repair.shapes import Shape
from pitstop.workshop.runs import exclusive

RESULT_FILE = "repair.json"
PAGE_FILE = "repair.html"


def whole(target: Path, known: Repair) -> bool:
    """Tell whether a repaired run still holds the adapter its result speaks of, and its recipe."""
    weights = target / adapters.FOLDER / adapters.WEIGHTS_FILE
    kept = (target / RECIPE_FILE).is_file() and weights.is_file()
    return kept and sha256_file(weights) == known.adapter_sha256


def refuse_another(target: Path, source: Path) -> None:
    """Refuse to write over a run that is no repair of this one.

    Raises:
        UsageError: it holds something else.
    """
    if not (target / RECIPE_FILE).is_file():
        return
    if _source_of(target / RESULT_FILE) != str(source):
        raise UsageError(f"{target} holds a run that is no repair of {source}", cure="name another folder: --to NAME")


def _source_of(done: Path) -> str | None:
    """Return which run a result says it repaired, also if it is of another version; None if it says nothing."""
    try:
        found = json.loads(done.read_bytes())
    except (OSError, ValueError):
        return None
    return str(found.get("source")) if isinstance(found, dict) else None


def save(result: Repair, recipe: str, identity: adapters.Identity, shape: Shape, scale: float) -> Repair:
    """Write the repaired run and return the result with the digest of its weights.

    The recipe comes last: without it no stage takes the folder for a run.

    Raises:
        Busy: another process works on that run.
        StorageError: the disk refuses.
    """
    assert result.run is not None
    source, target = Path(result.source), Path(result.run)
    with exclusive(target), tempfile.TemporaryDirectory(dir=target, prefix=".repair-") as scratch:
        fresh = Path(scratch, adapters.FOLDER)
        write(shape.scaled(scale), source / adapters.FOLDER, fresh)
        digest = sha256_file(fresh / adapters.WEIGHTS_FILE)
        history = (*identity.history, *changes(shape, scale, identity.adapter_sha256))
        identity = replace(identity, adapter_sha256=digest, history=history)
        records.save_json(identity, fresh / adapters.IDENTITY_FILE)
        result = replace(result, adapter_sha256=digest)
        shown = page(result).encode()
        before = target / adapters.FOLDER
        if before.exists():
            shutil.move(before, Path(scratch, "before"))
        fresh.rename(before)
        write_bytes(target / PAGE_FILE, shown)
        records.save_json(result, target / RESULT_FILE)
        write_bytes(target / RECIPE_FILE, recipe.encode())
    return result


def recipe_text(recipe: Recipe, path: Path, target: Path) -> str:
    """Return the text of a recipe's file with the folder of the repaired run in it, and nothing else changed.

    Raises:
        BrokenInput: the recipe is written in a way that does not allow it.
    """
    head, bracket, tables = path.read_text(encoding="utf-8").partition("\n[")
    head = re.sub(r"(?m)^folder\s*=.*\n?", "", head)
    said = f"folder = {json.dumps(target.as_posix())} # made by: pitstop repair {recipe.run.as_posix()}\n"
    text = said + head + bracket + tables
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, RECIPE_FILE)
        copy.write_text(text, encoding="utf-8")
        if recipes.load(copy) != replace(recipe, folder=target):
            raise BrokenInput(
                "the repaired run's folder cannot be written into this recipe",
                where=path,
                cure="write its keys as `pitstop init` does: name and version first, tables after them",
            )
    return text
