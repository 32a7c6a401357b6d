"""Does a new adapter do anything, and anything sane? Other runtimes load any, and answer as the base for ever."""

from pathlib import Path

import numpy as np

from pitstop.engines.base import PLAIN_BASE, Engine, Use
from pitstop.errors import NoEffect, NotFinite

PROBE = "The capital of France is Paris, and 2 + 2 = 4."  # evaluated with and without the adapter


def probe(engine: Engine, name: str, path: Path) -> None:
    """Refuse a loaded adapter without effect, or with one that is no number.

    Raises:
        NoEffect: with it the base computes what it computes without.
        NotFinite: with it the model computes infinities or NaN.
    """
    tokens = [*engine.invocation(name), *engine.tokenize(PROBE)][: engine.context_length] or [0]
    plain = engine.logits(tokens, PLAIN_BASE, first=len(tokens) - 1)
    adapted = engine.logits(tokens, Use(name), first=len(tokens) - 1)
    if not np.isfinite(adapted).all():
        raise NotFinite(f"{path.name} makes the model compute values that are not finite", where=path)
    if np.array_equal(plain, adapted):
        raise NoEffect(
            f"{path.name} changes nothing: with it the base computes exactly what it computes without",
            where=path,
            cure="check that the training changed the adapter and that the export kept its tensors",
        )
