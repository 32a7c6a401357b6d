"""Answers that changed: an accuracy that stays may hide as many forgotten as gained.

As in "Mapping Post-Training Forgetting in Language Models at Scale" (arXiv:2510.17776): a model that guesses loses some
of its lucky answers whatever happens, so what chance alone would turn from right to wrong is taken off.
"""

from dataclasses import dataclass

from pitstop.retention.paired import Paired


@dataclass(frozen=True)
class Flips:
    """Shares of a choice suite's items; all are fractions."""

    forgotten: float  # right without the adapter, wrong with it (1 -> 0)
    gained: float  # wrong without, right with it (0 -> 1)
    by_chance: float  # of the forgotten: what guessing alone would turn
    ceiling: float  # the most that could be forgotten beyond guessing

    @property
    def truly_forgotten(self) -> float:
        """What was forgotten beyond chance; the drop of the accuracy is what was forgotten less what was gained."""
        return max(self.forgotten - self.by_chance, 0.0)

    @property
    def churn(self) -> float:
        """Items whose answer changed; it decides how many are needed for a verdict."""
        return self.forgotten + self.gained


def flips(pair: Paired) -> Flips:
    """Count the changed answers of a suite whose items are right or wrong."""
    items = len(pair.groups)
    changes = list(zip(pair.baseline, pair.adapted, strict=True))
    base, adapted = pair.score
    guessing = pair.chance or 0.0
    # With k options, 1 / k is the chance level: (1 - a) / (k - 1) is the share that is right by luck.
    lucky = (1 - base) * guessing / (1 - guessing)
    return Flips(
        forgotten=changes.count((1.0, 0.0)) / items,
        gained=changes.count((0.0, 1.0)) / items,
        by_chance=lucky * (1 - adapted),
        ceiling=max((base - guessing) / (1 - guessing), 0.0),
    )
