"""What the measured zoo says of the gate, as tables: error rates, undecided ones, predictors, cost."""

import itertools
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from repair_report import repairs
from zoo import ZOOS

from pitstop.retention.gate import TASK, Verdict, gate, sees
from pitstop.retention.looks import LEAST, LEAST_TEXTS, seen
from pitstop.retention.margins import Margins
from pitstop.retention.paired import Drop, Paired
from pitstop.retention.sampling import order

MARGINS = Margins(resamples=1000)
LOOKS = len(MARGINS.looks)
DRAWS = 80  # gates of a specimen, each on items drawn anew from its sealed half
HARMLESS, HARMFUL = ("null", "benign"), ("forgetful", "boundary")


@dataclass(frozen=True)
class Outcome:
    """A specimen measured by one engine, beside the base."""

    name: str
    kind: str
    pairs: tuple[Paired, ...]
    kl: float  # to the base, nats per token, the larger of the probes; nan: not measured
    moved: float | None  # F_delta
    seconds: float  # of a core, to score what was scored
    sizes: tuple[int, ...]  # how many items the suites really have
    looked: int | None = None  # it was measured up to this look; None: all of it

    def sealed(self) -> tuple[Paired, ...]:
        """Return the half of the items that no choice about the gate was made with."""
        return tuple(
            _only(pair, [at for at, group in enumerate(pair.groups) if _is_sealed(group)]) for pair in self.pairs
        )

    def decided(self) -> tuple[Verdict, int]:
        """Return the verdict that `pitstop check` gives, and the look that gave it."""
        if self.looked:
            return gate(self.pairs, LEARNED, {}, MARGINS, look=self.looked), self.looked
        return decide(self.pairs)

    @property
    def drop(self) -> float:
        """Drop of the accuracy over all knowledge suites, by all items."""
        pooled = knowledge(self.pairs)
        return Drop(pooled, resamples=1, seed=0).value if pooled else 0.0


def outcomes(results: Mapping[str, Any], engine: str) -> list[Outcome]:
    """Return everything that one engine measured."""
    measured = results["measured"][engine]
    base = measured["base"]
    found = []
    for name, entry in measured.items():
        if name != "base":
            pairs = tuple(_pairs(results["suites"], base, entry))
            moved = results.get("displacement", {}).get(name)
            kl = max(entry.get("kl", {}).values(), default=float("nan"))
            sizes = tuple(results["suites"][pair.name]["whole"] for pair in pairs)
            found.append(Outcome(name, entry["kind"], pairs, kl, moved, entry["seconds"], sizes, entry.get("looks")))
    return found


def _pairs(suites: Mapping[str, Any], base: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[Paired]:
    """Yield the suites; of an entry that stopped at an early look, the items that were looked at."""
    for name, suite in suites.items():
        groups = [f"{name} {number}" for number in suite["groups"] or range(suite["items"])]
        if name in base["right"]:
            before, after = _bits(base["right"][name]), _bits(entry["right"][name])
            weights: tuple[float, ...] = (1.0,) * len(before)
            pair = Paired(name, "choice", tuple(groups), before, before, weights, suite["chance"], suite["guards"])
        elif name in base["texts"]:
            before = tuple(nats / np.log(2) for nats, _ in base["texts"][name])
            after = tuple(nats / np.log(2) for nats, _ in entry["texts"][name])
            weights = tuple(float(n) for _, n in base["texts"][name])
            pair = Paired(name, "text", tuple(groups), before, before, weights)
        else:
            continue
        yield replace(_look(pair, entry.get("looks", LOOKS)), adapted=after)


def _bits(packed: str) -> tuple[float, ...]:
    return tuple(float(bit) for bit in f"{int(packed, 16):b}"[1:])


def _is_sealed(group: str) -> bool:
    return int(order(f"sealed {group}")[:8], 16) % 2 == 1


def _only(pair: Paired, picked: Sequence[int], groups: Sequence[str] | None = None) -> Paired:
    def take(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[at] for at in picked)

    return replace(
        pair,
        groups=tuple(groups) if groups is not None else take(pair.groups),
        baseline=take(pair.baseline),
        adapted=take(pair.adapted),
        weights=take(pair.weights),
    )


def knowledge(pairs: Sequence[Paired]) -> tuple[Paired, ...]:
    """Return the suites that are pooled: those that are not blind for this base."""
    return tuple(pair for pair in pairs if pair.kind == "choice" and pair.guards == "knowledge" and sees(pair))


def drawn(pair: Paired, size: int, chance: random.Random) -> Paired:
    """Return so many items drawn from a suite with replacement, group by group."""
    by_group: dict[str, list[int]] = {}
    for at, group in enumerate(pair.groups):
        by_group.setdefault(group, []).append(at)
    names, picked, groups = list(by_group), [], []
    while len(picked) < size:
        members = by_group[chance.choice(names)]
        groups += [f"{len(groups)} drawn"] * len(members)
        picked += members
    return _only(pair, picked[:size], groups[:size])


def decide(pairs: Sequence[Paired]) -> tuple[Verdict, int]:
    """Look as `pitstop check` does, at retention only; return the verdict and the look that gave it."""
    for look in range(1, LOOKS + 1):
        verdict = gate([_look(pair, look) for pair in pairs], LEARNED, {}, MARGINS, look=look)
        if verdict.outcome != "inconclusive":
            break
    return verdict, look


def _look(pair: Paired, look: int) -> Paired:
    """Return what has been seen of a suite after a look: its items are stored in the order that looks take them."""
    least = LEAST_TEXTS if pair.kind == "text" else LEAST
    return _only(pair, range(seen(len(pair.groups), MARGINS.looks, least)[look - 1]))


def judged(suites: Mapping[str, Any], base: Mapping[str, Any], entry: Mapping[str, Any], look: int) -> Verdict:
    """Judge a specimen by what was measured of it up to a look."""
    return gate(list(_pairs(suites, base, entry)), LEARNED, {}, MARGINS, look=look)


# A task that is learned beyond doubt: what is calibrated is the judgement of what was forgotten.
LEARNED = Paired("task", "task", tuple(map(str, range(200))), (0.0,) * 200, (1.0,) * 200, (1.0,) * 200)


def at_margin(pairs: Sequence[Paired], drop: float, target: float, chance: random.Random) -> list[Paired]:
    """Undo a part of the damage of knowledge, item by item, so that the pooled drop is the target, and all the rest."""
    share, damaged = target / drop, {pair.name for pair in knowledge(pairs)}
    found = []
    for pair in pairs:
        kept = [pair.name in damaged and chance.random() < share for _ in pair.groups]
        adapted = [new if keep else old for old, new, keep in zip(pair.baseline, pair.adapted, kept, strict=True)]
        found.append(replace(pair, adapted=tuple(adapted)))
    return found


def rates(found: Sequence[Outcome], target: float | None) -> Counter[str]:
    """Count verdicts on items drawn anew; with a target, of specimens whose damage is undone to that drop."""
    counts: Counter[str] = Counter()
    for outcome in found:
        chance = random.Random(outcome.name)
        # Suites that the base guesses at would see in some draws, and thin out what is pooled.
        seeing = [(pair, size) for pair, size in zip(outcome.sealed(), outcome.sizes, strict=True) if sees(pair)]
        sealed = [pair for pair, _ in seeing]
        drop = expected_drop(sealed, [size for _, size in seeing])
        if target is not None and drop < target:
            continue
        for _ in range(DRAWS):
            sample = [drawn(pair, size, chance) for pair, size in seeing]
            if target is not None:
                sample = at_margin(sample, drop, target, chance)
            counts[decide(sample)[0].outcome] += 1
    return counts


def expected_drop(pairs: Sequence[Paired], sizes: Sequence[int]) -> float:
    """Return the pooled drop of knowledge in draws of so many items of each suite."""
    pooled = {pair.name for pair in knowledge(pairs)}
    drops = [
        (Drop((pair,), resamples=1, seed=0).value, n)
        for pair, n in zip(pairs, sizes, strict=True)
        if pair.name in pooled
    ]
    return sum(drop * n for drop, n in drops) / max(sum(n for _, n in drops), 1)


def auc(scores: Sequence[float], harmful: Sequence[bool]) -> float:
    """Return how often a harmful one scores above a harmless one."""
    bad = [score for score, is_bad in zip(scores, harmful, strict=True) if is_bad]
    good = [score for score, is_bad in zip(scores, harmful, strict=True) if not is_bad]
    wins = [float(one > other) + 0.5 * float(one == other) for one in bad for other in good]
    return statistics.fmean(wins) if wins else float("nan")


def beyond(pairs: Sequence[Paired]) -> list[str]:
    """Return of which criteria more than the margin is lost, without regard to chance."""
    found = gate(pairs, LEARNED, {}, MARGINS).criteria
    return [one.name for one in found if one.drop > one.margin and one.name != TASK and one.outcome != "blind"]


def report(files: Sequence[Path]) -> str:
    """Return the whole page."""
    sections = [HEADER]
    for file in files:
        results = json.loads(file.read_text())
        engines = list(results["measured"])
        main = outcomes(results, engines[0])
        sections += [
            f"## {file.stem}\n",
            _what(results, engines[0], main),
            _errors(main),
            _hiding(main),
            _zoo(main),
            _predictors(main),
            _engines(results, engines),
            repairs(results.get("repairs", {})),
        ]
    return "\n".join(sections)


HEADER = "\n\n".join(
    (
        "# How often the gate is wrong",
        "Made by `tools/calibrate_gate.py report` out of the outcomes of every item, which `tools/calibrate_gate.py "
        "measure` wrote; the adapters are recipes and seeds in `tools/zoo.py`, and the base `tiny-gemma3` is what "
        "`tools/pretrain_tiny.py` makes in half an hour (the one measured drew by chance the lines its words are "
        "made of: made again, it is not the same to the bit). What is judged is retention: the task counts as learned.",
        "Half of the items of every suite is sealed: no choice about the gate was made with it. Error rates are of "
        "gates on items drawn anew, with replacement, from the measured items of the sealed half, as many as the "
        "suites have; what is lost on those items is the truth there. "
        f"{DRAWS} gates a specimen, looks included; in brackets the 95 % interval, of the draws and not of the choice "
        'of adapters. "At the margin" undoes a part of the damage of forgetful specimens, item by item, until exactly '
        f"the margin of {MARGINS.accuracy * 100:g} points is lost over all knowledge suites together; their texts, "
        "form and safety count as undamaged, so that nothing else fails them.\n",
    )
)


def _what(results: Mapping[str, Any], engine: str, found: Sequence[Outcome]) -> str:
    kinds = Counter(outcome.kind for outcome in found)
    suites = ", ".join(f"{name} {suite['items']:,}" for name, suite in results["suites"].items())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    blind = ", ".join(pair.name for pair in found[0].pairs if not sees(pair))
    return (
        f"{len(found)} of the zoo's {len(ZOOS[results['zoo']]())} adapters ({counts}), measured on `{engine}`. "
        f"Items: {suites}.{f' Blind for this base: {blind}.' if blind else ''}\n"
    )


def _errors(found: Sequence[Outcome]) -> str:
    harmless = [one for one in found if one.kind in HARMLESS and not beyond(one.sealed())]
    harmful = [one for one in found if one.kind in HARMFUL]
    asked: list[tuple[str, Counter[str], str, str]] = [
        ("false fail: null and benign", rates(harmless, None), "fail", "≤ 5 %"),
        ("false pass: at the margin", rates(harmful, MARGINS.accuracy), "pass", "≤ 5 %"),
        ("false pass: at twice the margin", rates(harmful, 2 * MARGINS.accuracy), "pass", "≤ 1 %"),
    ]
    rows = [
        f"| {name} | {_share(counts[wrong], counts)} | {goal} | {_share(counts['inconclusive'], counts)} | "
        f"{sum(counts.values()):,} |"
        for name, counts, wrong, goal in asked
    ]
    head = "| | wrong | goal | undecided after the last look | gates |\n|---|---|---|---|---|"
    return f"### Error rates\n\n{head}\n" + "\n".join(rows) + "\n"


def _share(count: int, counts: Counter[str]) -> str:
    total = sum(counts.values())
    if not total:
        return "-"
    z = 1.96
    center = (count + z * z / 2) / (total + z * z)  # Wilson's interval
    half = z * (count * (total - count) / total + z * z / 4) ** 0.5 / (total + z * z)
    low, high = max(center - half, 0.0), center + half
    return f"{count / total:.1%} ({low:.1%} to {high:.1%})"


def _hiding(found: Sequence[Outcome]) -> str:
    rows = []
    for outcome in found:
        if outcome.kind == "adversarial":
            counts, lost = rates([outcome], None), ", ".join(beyond(outcome.sealed())) or "nothing"
            verdicts = " | ".join(str(counts[verdict]) for verdict in ("pass", "inconclusive", "fail"))
            rows.append(f"| {outcome.name} | {outcome.kl:.3f} | {lost} | {verdicts} |")
    if not rows:
        return ""
    said = f"{DRAWS} gates of each, as above. A real check sets items aside that were trained on; here they count."
    head = "| adapter | KL | loses more than the margin of | pass | undecided | fail |\n|---|---|---|---|---|---|"
    return f"### Damage that hides\n\n{said}\n\n{head}\n" + "\n".join(rows) + "\n"


def _zoo(found: Sequence[Outcome]) -> str:
    rows, undecided = [], 0
    for outcome in found:
        verdict, look = outcome.decided()
        undecided += verdict.outcome == "inconclusive"
        moved = "" if outcome.moved is None else f"{outcome.moved:.3f}"
        failed = ", ".join(one.name for one in verdict.criteria if one.outcome == "fail")
        rows.append(
            f"| {outcome.name} | {outcome.kind} | {outcome.drop * 100:+.1f} | {outcome.kl:.3f} | {moved} | "
            f"{verdict.outcome} | {look} | {failed} |"
        )
    head = "| adapter | kind | drop, points | KL | F_Δ | verdict | look | fails |\n|---|---|---|---|---|---|---|---|"
    share = (
        f"{undecided} of {len(found)} undecided after the last look: on the items that were measured, which are fewer "
        "than the suites have"
    )
    return f"### Every adapter once, on all items\n\n{share}.\n\n{head}\n" + "\n".join(rows) + "\n"


def _predictors(found: Sequence[Outcome]) -> str:
    bad = [bool(beyond(outcome.pairs)) for outcome in found]
    lines = [f"- KL to the base: {auc([one.kl for one in found], bad):.3f}"]
    if all(one.moved is not None for one in found):
        lines.append(f"- F_Δ: {auc([one.moved or 0.0 for one in found], bad):.3f}")
    knee = _knee([one.kl for one in found], bad)
    said = (
        f'Area under the ROC curve for "more than a margin is lost" ({sum(bad)} of {len(bad)} adapters, by all items):'
    )
    best = f"KL that best tells them apart: {knee:.3f} nats per token."
    return "\n\n".join(("### KL and F_Δ as predictors", said, "\n".join(lines), best)) + "\n"


def _knee(scores: Sequence[float], bad: Sequence[bool]) -> float:
    """Return the threshold with the largest sum of sensitivity and specificity (Youden's)."""

    def youden(threshold: float) -> float:
        hits = sum(score > threshold for score, is_bad in zip(scores, bad, strict=True) if is_bad)
        alarms = sum(score > threshold for score, is_bad in zip(scores, bad, strict=True) if not is_bad)
        return hits / max(sum(bad), 1) - alarms / max(len(bad) - sum(bad), 1)

    ordered = sorted(scores)
    between = [(one + other) / 2 for one, other in itertools.pairwise(ordered)]
    return max(between, key=youden, default=float("nan"))


def _engines(results: Mapping[str, Any], engines: Sequence[str]) -> str:
    verdicts = {engine: {one.name: one.decided()[0].outcome for one in outcomes(results, engine)} for engine in engines}
    first, rows, differing = verdicts[engines[0]], [], []
    for engine, found in verdicts.items():
        seconds = statistics.median(one.seconds for one in outcomes(results, engine))
        both = [name for name in found if name in first]
        other = [name for name in both if found[name] != first[name]]
        agreed = "-" if engine == engines[0] else f"{len(both) - len(other)} of {len(both)}"
        rows.append(f"| {engine} | {len(found)} | {agreed} | {seconds:.0f} |")
        differing += [f"{name} ({first[name]}; {found[name]} on {engine})" for name in other]
    head = f"| engine | adapters | verdict as on {engines[0]} | seconds of a core for one adapter |\n|---|---|---|---|"
    said = f"\nOther verdicts: {', '.join(differing)}.\n" if differing else ""
    return f"### Engines\n\n{head}\n" + "\n".join(rows) + f"\n{said}"
