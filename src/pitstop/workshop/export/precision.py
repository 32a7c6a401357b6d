"""How finely an adapter file is written, where the recipe leaves it open: the smallest whose rounding costs nothing.

What a precision costs is KL(the file in 32-bit floats || the file in it) over right answers of the task, both on the
device's engine and the same base, so that nothing else is in it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import Use
from pitstop.files import sha256_file
from pitstop.progress import say
from pitstop.workshop.comparison import KL_ROWS, compare_answers
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.task import open_exported, task_rows

EXACT = "f32"
SMALLER = {"gguf": ("q8_0", "f16"), "onnx": ("f16",)}  # the smallest first
SHARE = 0.1  # of what the whole export may differ by ([export] parity_kl)
ROUNDED = "rounded"  # name of the file that is tried

Write = Callable[[Path, str], Path]  # into a folder, in a precision


def smallest(recipe: Recipe, ref: BaseRef, artifact: str, write: Write) -> str:
    """Return the coarsest precision that changes what the adapter answers by less than its share of the KL budget.

    Args:
        artifact: precision of the base artifact it is written for.
        write: writes the adapter.

    Raises:
        DatasetError: the task's rows cannot be used.
    """
    rows = task_rows(recipe, ref)[:KL_ROWS]
    allowed = SHARE * recipe.export.parity_kl
    with tempfile.TemporaryDirectory() as scratch:
        exact = write(Path(scratch), EXACT)
        with open_exported(recipe, ref, artifact, exact, sha256_file(exact)) as engine:
            for precision in SMALLER[ref.artifact(artifact).format]:
                tried = write(Path(scratch), precision)
                engine.load_adapter(ROUNDED, tried)
                uses = Use(recipe.name, recipe.scale), Use(ROUNDED, recipe.scale)
                kl, _, _ = compare_answers(engine, engine, uses, rows, ref.prompting.eos_token)
                engine.unload_adapter(ROUNDED)
                if kl <= allowed:
                    say(f"adapter for {artifact}: {precision}, {kl:.1e} of {allowed:g} nats per token from {EXACT}")
                    return precision
    say(f"adapter for {artifact}: {EXACT}; anything less costs more than {allowed:g} nats per token")
    return EXACT
