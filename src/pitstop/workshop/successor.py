"""A run made of another one without training it anew: its folder, its recipe, and its adapter put into place."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.workshop import adapter as adapters
from pitstop.workshop import recipe as recipes
from pitstop.workshop.recipe import RECIPE_FILE, Recipe


def run_of(recipe: Recipe, to: str | None, ending: str) -> Path:
    """Return the folder of a run that is made of a recipe's: runs/<to>, or the old one's name with an ending.

    Raises:
        UsageError: a name that cannot be a folder's, or the run itself.
    """
    name = to or f"{recipe.run.name}-{ending}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,80}", name):
        raise UsageError(f"{name!r} cannot be a run folder", cure="use a-z, 0-9, '.', '_' and '-': --to my-run")
    target = recipes.RUNS / name
    if target.resolve() == recipe.run.resolve():
        raise UsageError(f"{target} is the run it is made of", cure="name another folder with --to")
    return target


def refuse_another(target: Path, result_file: str, source: Path) -> None:
    """Refuse to write over a run that was not made of this one.

    Args:
        result_file: of the stage, which names the run it was made of.

    Raises:
        UsageError: it holds something else.
    """
    if not (target / RECIPE_FILE).is_file():
        return
    if _source_of(target / result_file) != str(source):
        raise UsageError(f"{target} holds a run that was not made of {source}", cure="name another folder: --to NAME")


def _source_of(done: Path) -> str | None:
    """Return which run a result says it was made of, also if it is of another version; None if it says nothing."""
    try:
        found = json.loads(done.read_bytes())
    except (OSError, ValueError):
        return None
    return str(found.get("source")) if isinstance(found, dict) else None


def whole(target: Path, adapter_sha256: str) -> bool:
    """Tell whether a run still holds its adapter, and its recipe."""
    weights = target / adapters.FOLDER / adapters.WEIGHTS_FILE
    kept = (target / RECIPE_FILE).is_file() and weights.is_file()
    return kept and sha256_file(weights) == adapter_sha256


def put(fresh: Path, target: Path) -> None:
    """Put a whole adapter folder into a run, in the place of the one before."""
    before = target / adapters.FOLDER
    if before.exists():
        shutil.move(before, fresh.with_name("before"))
    fresh.rename(before)


def recipe_text(recipe: Recipe, path: Path, target: Path, command: str, base: Mapping[str, str] | None = None) -> str:
    """Return the text of a recipe's file with another run folder in it, and nothing else changed.

    Args:
        path: of the file.
        command: that makes the run.
        base: keys of [base] that change as well.

    Raises:
        BrokenInput: the recipe is written in a way that does not allow it.
    """
    changed: dict[str, Any] = dict(base or {})
    head, bracket, tables = path.read_text(encoding="utf-8").partition("\n[")
    head = re.sub(r"(?m)^folder\s*=.*\n?", "", head)
    said = f"folder = {json.dumps(target.as_posix())} # made by: {command} {recipe.run.as_posix()}\n"
    text = said + head + _with_keys(bracket + tables, "base", changed)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, RECIPE_FILE)
        copy.write_text(text, encoding="utf-8")
        if recipes.load(copy) != replace(recipe, folder=target, base=replace(recipe.base, **changed)):
            raise BrokenInput(
                "the new run's folder cannot be written into this recipe",
                where=path,
                cure="write its keys as `pitstop init` does: name and version first, tables after them",
            )
    return text


def _with_keys(text: str, table: str, keys: Mapping[str, str]) -> str:
    """Return TOML with keys of one table set anew."""
    if not keys:
        return text
    head, title, rest = text.partition(f"\n[{table}]\n")
    own, bracket, others = rest.partition("\n[")
    for key, value in keys.items():
        line = f"{key} = {json.dumps(value)}\n"
        own, count = re.subn(rf"(?m)^{key}\s*=.*\n?", line, own)
        own = own if count else line + own
    return head + title + own + bracket + others
