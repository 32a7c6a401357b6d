"""Looking more than once: how sure each look must be, so that all of them together are wrong as rarely as promised.

Whoever looks at a quarter of the items, then at half, then at all, and stops at the first clear answer, has three
chances to be wrong. The looks are fixed beforehand, and each may spend a share of the error (alpha spending: Lan and
DeMets, Biometrika 70, 1983, 659-663), here as much as there are new items (Kim and DeMets, Biometrika 74, 1987,
149-154, with rho = 1). The statistic's values at the looks are sums of independent parts; the chance to cross first at
a look follows by integrating over where it stood at the look before (Armitage, McPherson and Rowe, Journal of the
Royal Statistical Society A 132, 1969, 235-244).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pitstop.retention.sampling import order
from pitstop.retention.suite import Suite

GRID = 601  # points that the statistic's density is followed at
FAR = 6.0  # standard deviations below which it is not followed
BISECTIONS = 30
LEAST = 100  # things that every look sees, if there are so many: fewer answers, right or wrong, could not be judged
LEAST_TEXTS = 40  # a text says more than an answer: its bits per byte move by less than a margin

Thing = TypeVar("Thing")
_above = np.vectorize(lambda x: 0.5 * math.erfc(x / math.sqrt(2)))


def confidences(looks: Sequence[float], confidence: float) -> tuple[float, ...]:
    """Return how sure each look must be for the first clear answer to be right with this confidence.

    Args:
        looks: share of all items that each look sees, rising, the last 1.
        confidence: of one-sided bounds, of all looks together.
    """
    return _confidences(tuple(looks), confidence)


@lru_cache(maxsize=32)
def _confidences(looks: tuple[float, ...], confidence: float) -> tuple[float, ...]:
    if len(looks) == 1:
        return (confidence,)
    error = 1.0 - confidence
    found: list[float] = []
    standing: NDArray[np.float64] = np.array([0.0])  # sums of the statistic that have not crossed yet
    density: NDArray[np.float64] = np.array([1.0])  # their probabilities
    for before, now in itertools.pairwise((0.0, *looks)):
        step = math.sqrt(now - before)
        bound = _bound(standing, density, step, math.sqrt(now), error * (now - before))
        found.append(NormalDist().cdf(bound))
        grid = np.linspace(-FAR * math.sqrt(now), bound * math.sqrt(now), GRID)
        kernel = np.exp(-(((grid[:, None] - standing) / step) ** 2) / 2) / (step * math.sqrt(2 * math.pi))
        weights = np.full(GRID, grid[1] - grid[0])
        weights[[0, -1]] /= 2  # trapezoids
        standing, density = grid, (kernel @ density) * weights
    return tuple(found)


def _bound(
    standing: NDArray[np.float64], density: NDArray[np.float64], step: float, deviation: float, error: float
) -> float:
    """Return the standardized bound that is crossed now, and not before, with this probability."""
    low, high = 0.0, FAR
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        crossing = float((_above((middle * deviation - standing) / step) * density).sum())
        low, high = (middle, high) if crossing > error else (low, middle)
    return (low + high) / 2


def part(
    things: Sequence[Thing],
    looks: Sequence[float],
    look: int,
    *,
    group: Callable[[Thing], str],
    least: int = LEAST,
) -> list[Thing]:
    """Return what a look (the first is 1) sees for the first time: a random part, groups kept together where it can be.

    A look sees at least so many things: a quarter of a small suite could never be judged. Looks that have more in
    common than their shares say are less often wrong together, not more (Slepian's inequality).
    """
    shuffled = sorted(things, key=lambda thing: order(group(thing)))
    ends = (0, *seen(len(things), looks, least))
    return shuffled[ends[look - 1] : ends[look]]


def seen(count: int, looks: Sequence[float], least: int) -> tuple[int, ...]:
    """Return how many of so many things have been seen after each look."""
    return tuple(max(round(share * count), min(count, least)) for share in looks)


def look_at(suite: Suite, looks: Sequence[float], look: int) -> Suite:
    """Return the items of a suite that a look sees for the first time."""
    least = LEAST_TEXTS if suite.record.kind == "text" else LEAST
    return replace(suite, items=tuple(part(suite.items, looks, look, group=lambda item: item.group, least=least)))
