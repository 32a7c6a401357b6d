"""How far two engines, or two adapters on one, are apart in what they expect of right answers."""

from collections.abc import Sequence

import numpy as np

from pitstop.engines.base import Engine, Use, divergence
from pitstop.progress import progress
from pitstop.retention.task import TaskRow

KL_ROWS = 40  # held-out rows whose expected answers are compared token by token


def compare_answers(
    trained: Engine, shipped: Engine, uses: tuple[Use, Use], rows: Sequence[TaskRow], eos: str
) -> tuple[float, float, int]:
    """Return mean KL(trained || shipped), top-1 agreement and the number of answer tokens compared."""
    kl: list[np.ndarray] = []
    same: list[np.ndarray] = []
    with progress(f"parity {uses[0].adapter or 'of the bases'}", len(rows), "rows") as advance:
        for row in rows:
            prompt = trained.tokenize(row.prompt)
            tokens = [*prompt, *trained.tokenize(row.expected + eos)][:-1]
            first = len(prompt) - 1
            one = trained.logits(tokens, uses[0], first=first)
            other = shipped.logits(tokens, uses[1], first=first)
            kl.append(divergence(one, other))
            same.append(one.argmax(-1) == other.argmax(-1))
            advance()
    every = np.concatenate(kl)
    return float(every.mean()), float(np.concatenate(same).mean()), len(every)
