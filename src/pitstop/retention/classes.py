"""Answers that are one of a few: which is the likeliest, and how likely.

Nothing is generated: every class is an answer the model might give, and its probability is compared with the others'.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pitstop.engines.base import Engine, Use
from pitstop.errors import DatasetError
from pitstop.retention.scoring import Prepared, competing, score
from pitstop.retention.suite import ChoiceItem

MOST = 50  # classes
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class Pick:
    """The likeliest class of a row."""

    word: str
    probability: float  # among the classes


def classes_of(answers: Iterable[str]) -> tuple[str, ...]:
    """Return the classes that training answers have, in a fixed order.

    Raises:
        DatasetError: there are none to choose between, or too many, or two that cannot be told apart word by word.
    """
    found = tuple(sorted({answer.strip() for answer in answers}))
    if not 2 <= len(found) <= MOST:
        raise DatasetError(
            f"the training rows have {len(found)} different answers, and classes are 2 to {MOST}",
            cure='score what is written freely by the metric "text", and numbers by "number"',
        )
    for one in found:
        if longer := [other for other in found if other != one and other.startswith(one)]:
            raise DatasetError(
                f"class {one!r} is how class {longer[0]!r} begins, so it always looks likelier",
                cure="give them words of their own ([data.table] words)",
            )
    return found


def likeliest(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    classes: Sequence[Sequence[str]],
    use: Use,
) -> list[Pick]:
    """Return the likeliest class after each prompt.

    Args:
        prompts: tokens, ready to be continued.
        classes: those of each prompt.

    Raises:
        BrokenInput: the model gives no finite number for some row.
    """
    items = [
        _prepared(engine, prompt, words, at) for at, (prompt, words) in enumerate(zip(prompts, classes, strict=True))
    ]
    picks = []
    for words, found in zip(classes, score(engine, items, use, lambda done: None), strict=True):
        logprobs = [likelihood.logprob for likelihood in found]
        highest = max(logprobs)
        total = math.fsum(math.exp(logprob - highest) for logprob in logprobs)
        picks.append(Pick(words[logprobs.index(highest)], 1 / total))
    return picks


def _prepared(engine: Engine, prompt: Sequence[int], words: Sequence[str], number: int) -> Prepared:
    wholes = [(*prompt, *engine.tokenize(word)) for word in words]
    item = ChoiceItem(str(number), str(number), "", tuple(words), 0)
    return competing(item, wholes, shared=len(prompt))


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Return how far probabilities are from the share of right answers (Guo et al., ICML 2017, equation 3).

    The mean over bins of equal width of |share right - mean probability|, weighted by their rows.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, is_right in zip(probabilities, right, strict=True):
        bins.setdefault(min(int(probability * BINS), BINS - 1), []).append((probability, is_right))
    gaps = (abs(sum(p for p, _ in members) - sum(ok for _, ok in members)) for members in bins.values())
    return math.fsum(gaps) / len(right)
