"""Does a new adapter do anything, and anything sane? Other runtimes load any, and answer as the base for ever."""

from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Use
from pitstop.errors import NoEffect, NotFinite

PROBE = "The capital of France is Paris, and 2 + 2 = 4."  # evaluated with and without the adapter
CLEAR = 0.5  # of a logit: an adapter that moves none by as much is compared with what the base computes now
_plain: WeakKeyDictionary[Engine, tuple[list[int], Logits]] = WeakKeyDictionary()  # what the base said last


def probe(engine: Engine, name: str, path: Path) -> None:
    """Refuse a loaded adapter without effect, or with one that is no number.

    What the base computes is kept, and computed again only where the adapter's effect is small.

    Raises:
        NoEffect: with it the base computes what it computes without.
        NotFinite: with it the model computes infinities or NaN.
    """
    tokens = [*engine.invocation(name), *engine.tokenize(PROBE)][: engine.context_length] or [0]
    adapted = engine.logits(tokens, Use(name), first=len(tokens) - 1)
    if not np.isfinite(adapted).all():
        raise NotFinite(f"{path.name} makes the model compute values that are not finite", where=path)
    asked, plain = _plain.get(engine, ([], adapted))
    if asked == tokens and np.abs(adapted - plain).max() > CLEAR:
        return
    plain = engine.logits(tokens, PLAIN_BASE, first=len(tokens) - 1)
    _plain[engine] = tokens, plain
    if np.array_equal(plain, adapted):
        raise NoEffect(
            f"{path.name} changes nothing: with it the base computes exactly what it computes without",
            where=path,
            cure="check that the training changed the adapter and that the export kept its tensors",
        )
