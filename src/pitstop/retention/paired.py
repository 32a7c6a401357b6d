"""One criterion's paired figures: the drop, its confidence bounds, and how surprising a margin would be.

Every item was measured twice, without and with the adapter; what counts is the difference within the item. Items of one
group (questions on one passage, rows of one template) are not independent, so groups are what is resampled.

Two ways to a bound, chosen by what was measured:

accuracy   Each item is 0 or 1. Tango's score interval for a paired difference of proportions (Statistics in Medicine
           17, 1998, 891-908), on counts divided by the design effect of the groups (Rao and Scott, Biometrics 48,
           1992), and the percentile bootstrap over groups; the wider of the two holds. The score interval keeps a
           width when not one item flipped, where a bootstrap has none: 0 flips in n items bound the drop at about
           2.7 / n, not at 0.
other      The studentized bootstrap over groups (Efron and Tibshirani 1993, ch. 12.5), which corrects for few and
           skewed documents; strong skew (log-normal) at 60 documents still costs it a few points of coverage.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pitstop.errors import BrokenInput
from pitstop.retention.suite import Ability

Floats = NDArray[np.float64]

LEAST_GROUPS = 10  # fewer say too little about the spread for any bound
CHUNK = 1 << 20  # resampled groups held at once
DOUBT = 4.0  # flipped items that weigh as much as the worst design effect possible


@dataclass(frozen=True)
class Paired:
    """One suite measured twice, item by item; all sequences have one entry per item."""

    name: str
    kind: Literal["choice", "text", "task"]
    groups: tuple[str, ...]
    baseline: tuple[float, ...]  # choice and task: 1 right, 0 wrong; text: bits
    adapted: tuple[float, ...]
    weights: tuple[float, ...]  # choice and task: 1; text: bytes
    chance: float | None = None  # accuracy of guessing; choice only
    guards: Ability = "knowledge"  # which margin applies

    @property
    def score(self) -> tuple[float, float]:
        """Baseline and adapted: accuracy (a fraction) or bits per byte."""
        total = math.fsum(self.weights) or math.nan
        return math.fsum(self.baseline) / total, math.fsum(self.adapted) / total

    @property
    def differences(self) -> list[float]:
        """Per item: positive is worse with the adapter, for accuracies and for bits."""
        sign = -1.0 if self.kind == "text" else 1.0
        return [sign * (base - adapted) for base, adapted in zip(self.baseline, self.adapted, strict=True)]


def check_paired(pair: Paired) -> Paired:
    """Return the pair if its figures can be judged at all.

    Raises:
        BrokenInput: no items, lists of different lengths, or a figure that is not finite.
    """
    lengths = {len(pair.groups), len(pair.baseline), len(pair.adapted), len(pair.weights)}
    if len(lengths) > 1 or 0 in lengths:
        raise BrokenInput(f"{pair.name}: no items, or lists of different lengths", cure="measure this suite again")
    figures = np.array([pair.baseline, pair.adapted, pair.weights], dtype=np.float64)
    if not np.isfinite(figures).all() or (figures[2] <= 0).any():
        raise BrokenInput(f"{pair.name}: a score is not a finite number", cure="measure this suite again")
    if pair.kind != "text" and not np.isin(figures[:2], (0.0, 1.0)).all():
        raise BrokenInput(f"{pair.name}: items must be right (1) or wrong (0)", cure="measure this suite again")
    return pair


class Drop:
    """The drop of one or several suites taken together, with bounds at any level."""

    def __init__(self, pairs: tuple[Paired, ...], *, resamples: int, seed: int) -> None:
        self.binary = all(pair.kind != "text" for pair in pairs)
        self.items = sum(len(pair.groups) for pair in pairs)
        self._resamples, self._seed = resamples, seed
        # Sorted, so that not even rounding depends on the order of the items.
        self._differences = np.sort(np.concatenate([np.array(pair.differences) for pair in pairs]))
        self._strata = [_by_group(pair) for pair in pairs]
        self._total = sum(float(weights.sum()) for _, weights in self._strata)
        self.groups = sum(len(sums) for sums, _ in self._strata)
        self.value = sum(float(sums.sum()) for sums, _ in self._strata) / self._total

    @property
    def enough(self) -> bool:
        """Whether there are groups enough to speak of bounds."""
        return self.groups >= LEAST_GROUPS

    def lower(self, level: float) -> float | None:
        """Return the one-sided lower confidence bound, None where there is none to be had (too few groups)."""
        return self._bound(level, below=True)

    def upper(self, level: float) -> float | None:
        """Return the one-sided upper confidence bound, None where there is none to be had."""
        return self._bound(level, below=False)

    def p_above(self, margin: float) -> float:
        """Return the p-value of "the drop is at most the margin": small means it is surely more."""
        if not self.enough:
            return 1.0
        if self.binary:
            score = 1.0 - NormalDist().cdf(self._tango(margin))
            return max(score, _share(self._means <= margin))
        if self._error == 0.0:
            return 0.0 if self.value > margin else 1.0
        return _share(self._studentized >= (self.value - margin) / self._error)

    def p_below(self, margin: float) -> float:
        """Return the p-value of "the drop is at least the margin": small means it is surely less."""
        if not self.enough:
            return 1.0
        if self.binary:
            return max(NormalDist().cdf(self._tango(margin)), _share(self._means >= margin))
        if self._error == 0.0:
            return 0.0 if self.value < margin else 1.0
        return _share(self._studentized <= (self.value - margin) / self._error)

    def _bound(self, level: float, *, below: bool) -> float | None:
        if not self.enough:
            return None
        tail = 1.0 - level if below else level
        if self.binary:
            z = NormalDist().inv_cdf(level)
            score = _root(lambda margin: self._tango(margin) - (z if below else -z))
            resampled = float(np.quantile(self._means, tail, method="inverted_cdf"))
            return min(score, resampled) if below else max(score, resampled)
        bound = self.value - float(np.quantile(self._studentized, 1.0 - tail, method="inverted_cdf")) * self._error
        return bound if math.isfinite(bound) else None

    @cached_property
    def _error(self) -> float:
        """Standard error of the drop over groups (linearized ratio, stratified by suite)."""
        return float(_errors([(sums, weights, self.value) for sums, weights in self._strata], self._total))

    @cached_property
    def _design_effect(self) -> float:
        """How many items of a group are worth one independent item: 1 if none depends on another.

        A few flips cannot show whether groups flip together: the worst case (as one) fades with the number of flips.
        """
        worst = sum(float((sizes**2).sum()) for _, sizes in self._strata) / self.items
        flips = float((self._differences != 0).sum())
        plain = float(self._differences.std()) / math.sqrt(self.items)
        seen = (self._error / plain) ** 2 if plain > 0 else worst
        return (flips * min(max(seen, 1.0), worst) + DOUBT * worst) / (flips + DOUBT)

    @cached_property
    def _counts(self) -> tuple[float, float, float]:
        """Return how many items there are, were lost and were gained, as independent ones."""
        counted = (self.items, (self._differences > 0).sum(), (self._differences < 0).sum())
        n, lost, gained = (float(count) / self._design_effect for count in counted)
        return n, lost, gained

    def _tango(self, margin: float) -> float:
        """Return Tango's score statistic of a drop against the margin: far above zero, the drop is more."""
        n, lost, gained = self._counts
        linear = (2 * n - lost + gained) * margin - lost - gained
        constant = -gained * margin * (1 - margin)
        nuisance = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * nuisance + margin * (1 - margin))
        distance = lost - gained - n * margin
        if variance <= 0:  # not one flip, and a margin of 0: exactly as expected
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    @cached_property
    def _resampled(self) -> tuple[Floats, Floats]:
        """Drops and their standard errors in resamples of the groups, each suite resampled by itself."""
        random = np.random.default_rng(self._seed)
        if self.binary:
            return _resampled_counts(random, self._strata, self._resamples), np.zeros(self._resamples)
        chunk = max(1, CHUNK // self.groups)
        means, errors = [], []
        for begin in range(0, self._resamples, chunk):
            rows = min(chunk, self._resamples - begin)
            drawn = []
            for sums, weights in self._strata:
                index = random.integers(len(sums), size=(rows, len(sums)), dtype=np.int32)
                drawn.append((sums[index], weights[index]))
            total: Floats = np.sum([weights.sum(axis=1) for _, weights in drawn], axis=0)
            mean: Floats = np.sum([sums.sum(axis=1) for sums, _ in drawn], axis=0) / total
            means.append(mean)
            spread = [(sums, weights, mean[:, None]) for sums, weights in drawn]
            errors.append(_errors(spread, total))
        return np.concatenate(means), np.concatenate(errors)

    @property
    def _means(self) -> Floats:
        return self._resampled[0]

    @cached_property
    def _studentized(self) -> Floats:
        means, errors = self._resampled
        away = means - self.value
        # A resample without spread says nothing of scale: infinitely far away, which only widens the bounds.
        far = np.where(away == 0.0, 0.0, np.copysign(np.inf, away))
        return np.divide(away, errors, out=far, where=errors > 0)


def _by_group(pair: Paired) -> tuple[Floats, Floats]:
    """Return per group the sum of differences and of weights, in an order that does not depend on the items' order."""
    rows = sorted(zip(pair.groups, pair.differences, pair.weights, strict=True))
    names = np.array([name for name, _, _ in rows])
    begins = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    sums = np.add.reduceat(np.array([row[1] for row in rows]), begins)
    weights = np.add.reduceat(np.array([row[2] for row in rows]), begins)
    by_figures = np.lexsort((weights, sums))
    return sums[by_figures], weights[by_figures]


def _resampled_counts(random: np.random.Generator, strata: Sequence[tuple[Floats, Floats]], resamples: int) -> Floats:
    """Return the drop in resamples, by how often each kind of group is drawn: of items there are three."""
    total, lost = np.zeros(resamples), np.zeros(resamples)
    for sums, weights in strata:
        kinds, sizes = np.unique(np.stack((sums, weights)), axis=1, return_counts=True)
        counts = random.multinomial(len(sums), sizes / len(sums), size=resamples)
        lost += counts @ kinds[0]
        total += counts @ kinds[1]
    found: Floats = lost / total
    return found


def _errors(strata: Sequence[tuple[Floats, Floats, Floats | float]], total: Floats | float) -> Floats:
    """Return the standard error of the ratio sum / weight, from the spread of the groups' residuals."""
    variance: Floats = np.zeros(())
    for sums, weights, mean in strata:
        count = sums.shape[-1]
        residuals = sums - mean * weights
        residuals -= residuals.mean(axis=-1, keepdims=True)
        variance = variance + (residuals**2).sum(axis=-1) * (count / max(count - 1, 1))
    return np.asarray(np.sqrt(variance) / total, dtype=np.float64)


def _share(hits: NDArray[np.bool_]) -> float:
    return (1.0 + float(hits.sum())) / (1.0 + len(hits))


def _root(decreasing: Callable[[float], float]) -> float:
    """Return where a decreasing function of a drop in (-1, 1) crosses zero."""
    low, high = -1.0 + 1e-12, 1.0 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2
