"""The repaired adapter as a run folder: it appears when it is whole."""

import tempfile
from dataclasses import replace
from pathlib import Path

from pitstop import records
from pitstop.files import sha256_file, write_bytes
from pitstop.workshop import adapter as adapters
from pitstop.workshop.recipe import RECIPE_FILE
from pitstop.workshop.repair.page import page
from pitstop.workshop.repair.pairs import write
from pitstop.workshop.repair.result import Repair
from pitstop.workshop.repair.search import changes
from pitstop.workshop.repair.shapes import Shape
from pitstop.workshop.runs import exclusive
from pitstop.workshop.successor import put

RESULT_FILE = "repair.json"
PAGE_FILE = "repair.html"


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
        put(fresh, target)
        write_bytes(target / PAGE_FILE, shown)
        records.save_json(result, target / RESULT_FILE)
        write_bytes(target / RECIPE_FILE, recipe.encode())
    return result
