"""What the gate can decide with these suites at all, said before anything is measured."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pitstop.retention.gate import ALL_CHOICES, POWER
from pitstop.retention.looks import confidences
from pitstop.retention.margins import Margins
from pitstop.retention.paired import LEAST_GROUPS
from pitstop.retention.suite import Suite

CHURN = 0.05  # share of items whose answer changes though nothing is lost; an adapter that keeps well has about that


@dataclass(frozen=True)
class Shortage:
    """A criterion with too few items for its margin."""

    name: str
    items: int
    needed: int
    margin: float
    hopeless: bool  # not even an adapter that changes no answer could pass

    @property
    def words(self) -> str:
        """What is too little, and how much would do."""
        if self.hopeless:
            what = "cannot pass, whatever the adapter does"
        else:
            what = f"will often stay undecided, even if nothing is lost and {CHURN:.0%} of the answers change"
        return (
            f"{self.name}: {self.items:,} items are too few for a margin of {self.margin:g}: it {what}; "
            f"{self.needed:,} are needed"
        )


def shortages(suites: Sequence[Suite], margins: Margins) -> list[Shortage]:
    """Return the criteria that these suites are too small for, by the bounds of the last look.

    Of a text suite only the number of groups can be told before its figures are known.
    """
    kept = [suite for suite in suites if suite.record.purpose == "retention"]
    binary = [suite for suite in kept if suite.record.kind != "text"]
    knowledge = [suite for suite in binary if suite.record.guards == "knowledge"]
    sure = confidences(margins.looks, margins.confidence)[-1]
    asked = [(ALL_CHOICES, knowledge, margins.accuracy)] if knowledge else []
    asked += [(suite.name, [suite], margins.of(suite.record.kind, suite.record.guards)) for suite in binary]
    found = [_binary(name, group, margin, sure) for name, group, margin in asked]
    found += [_text(suite, margins.bits_per_byte) for suite in kept if suite.record.kind == "text"]
    return [shortage for shortage in found if shortage is not None]


def _binary(name: str, suites: Sequence[Suite], margin: float, sure: float) -> Shortage | None:
    items = sum(len(suite.items) for suite in suites)
    sizes = [size for suite in suites for size in Counter(item.group for item in suite.items).values()]
    clustering = sum(size**2 for size in sizes) / items  # the worst design effect there may be
    z = NormalDist().inv_cdf(sure)
    # Tango's bound without a flip: n m / (1 - m) = z^2.
    least = max(math.ceil(clustering * z**2 * (1 - margin) / margin), LEAST_GROUPS)
    if items < least or len(sizes) < LEAST_GROUPS:
        return Shortage(name, items, least, margin, hopeless=True)
    likely = math.ceil(CHURN * ((z + NormalDist().inv_cdf(POWER)) / margin) ** 2)
    return Shortage(name, items, likely, margin, hopeless=False) if items < likely else None


def _text(suite: Suite, margin: float) -> Shortage | None:
    groups = len({item.group for item in suite.items})
    return Shortage(suite.name, groups, LEAST_GROUPS, margin, hopeless=True) if groups < LEAST_GROUPS else None
