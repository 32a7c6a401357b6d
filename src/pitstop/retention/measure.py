"""An engine and suites to figures per item: without an adapter, with one, and how far apart the predictions are."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pitstop import __version__
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import PLAIN_BASE, Engine, Use
from pitstop.errors import PitstopError, UsageError
from pitstop.progress import progress
from pitstop.records import load_json, save_json, to_json
from pitstop.retention import answering, scoring
from pitstop.retention.paired import Paired
from pitstop.retention.scoring import ChoiceScore, Prepared, TextScore
from pitstop.retention.suite import Ability, ChoiceItem, ClozeItem, Kind, Suite, TextItem

SCORING = 4  # rises when the same items would score otherwise: cached figures of before are not used


@dataclass(frozen=True)
class SuiteResult:
    """A suite measured once, under one adapter or none."""

    suite: str
    kind: Kind
    digest: str  # of the suite
    engine: str
    base_sha256: str
    context_length: int  # tokens; longer items are excluded
    chance: float | None
    choices: tuple[ChoiceScore, ...]  # of every kind whose items are right or wrong
    texts: tuple[TextScore, ...]
    excluded: tuple[str, ...]  # ids of items that do not fit the context, or have nothing to score
    trained_on: tuple[str, ...] = ()  # ids of items that were set aside, for they stand in the training rows
    guards: Ability = "knowledge"  # which margin of the gate applies


@dataclass(frozen=True)
class _Work:
    """A suite as rows of tokens; one of the two lists is empty."""

    suite: Suite
    scored: tuple[Prepared, ...]  # choices, clozes and texts
    asked: tuple[answering.Asked, ...]  # answer items
    excluded: tuple[str, ...]
    neutral: tuple[Prepared, ...] = ()  # options after the suite's neutral prompt

    @property
    def tokens(self) -> int:
        """How many tokens have to be read or written."""
        read = sum(len(row.tokens) for item in (*self.scored, *self.neutral) for row in item.rows)
        return read + sum(one.tokens for one in self.asked)


def measure(
    engine: Engine,
    suites: Sequence[Suite],
    use: Use = PLAIN_BASE,
    *,
    cache: Path | None = None,
    invocation: Sequence[int] = (),
    prompting: Prompting | None = None,
) -> tuple[SuiteResult, ...]:
    """Score every retention suite (all but chats) under one adapter, or under none.

    Args:
        cache: folder for the plain base's figures, which stay the same for the same base file, engine and suite.
        invocation: tokens put before every item: without them an activated adapter would not act, and forget nothing.
        prompting: the base's own, by which answer suites are rendered.

    Raises:
        UsageError: no such adapter; an answer suite without prompting, or a template that refuses a prompt.
        BrokenInput: the model gives no finite number for some item.
        StorageError: the cache cannot be written.
    """
    wanted = [suite for suite in suites if suite.record.purpose == "retention"]
    places = {suite.name: _cache_path(engine, suite, cache, use, invocation, prompting) for suite in wanted}
    found = {suite.name: _cached(engine, suite, places[suite.name]) for suite in wanted}
    missing = [_prepare(engine, suite, invocation, prompting) for suite in wanted if found[suite.name] is None]
    if missing:
        total = sum(work.tokens for work in missing)
        with progress(f"retention, {use.adapter or 'base'}", total, "tokens") as advance:
            for work in missing:
                name = work.suite.name
                result = found[name] = _measured(engine, work, use, partial(advance, note=name))
                if (path := places[name]) is not None:
                    save_json(result, path)
    return tuple(result for result in found.values() if result is not None)


def join(results: Sequence[SuiteResult], more: Sequence[SuiteResult]) -> tuple[SuiteResult, ...]:
    """Return results with what a later look found of the same suites; suites may be in either or both."""
    found = {result.suite: result for result in results}
    for result in more:
        before = found.get(result.suite)
        found[result.suite] = result if before is None else _joined(before, result)
    return tuple(found.values())


def _joined(before: SuiteResult, more: SuiteResult) -> SuiteResult:
    return replace(
        before,
        choices=before.choices + more.choices,
        texts=before.texts + more.texts,
        excluded=before.excluded + more.excluded,
    )


def pair(base: SuiteResult, adapted: SuiteResult) -> Paired:
    """Put the two measurements of a suite side by side.

    Raises:
        UsageError: they are not of the same items on the same base and engine.
    """
    for field in ("suite", "digest", "engine", "base_sha256", "context_length"):
        if getattr(base, field) != getattr(adapted, field):
            raise UsageError(
                f"results of suite {base.suite} cannot be compared: {field} is {getattr(base, field)} without the "
                f"adapter and {getattr(adapted, field)} with it",
                cure="measure both with the same engine, base file and suite",
            )
    if base.kind != "text":
        figures = [
            (a.group, float(a.correct), float(b.correct), 1.0)
            for a, b in zip(base.choices, adapted.choices, strict=True)
        ]
    else:
        figures = [
            (a.group, a.nats / math.log(2), b.nats / math.log(2), float(a.bytes))
            for a, b in zip(base.texts, adapted.texts, strict=True)
        ]
    groups, baseline, changed, weights = zip(*figures, strict=True) if figures else ((), (), (), ())
    return Paired(
        base.suite,
        "text" if base.kind == "text" else "choice",
        groups,
        baseline,
        changed,
        weights,
        base.chance,
        base.guards,
    )


def pair_all(base: Sequence[SuiteResult], adapted: Sequence[SuiteResult]) -> tuple[Paired, ...]:
    """Pair the results suite by suite.

    Raises:
        UsageError: not the same suites, in the same order.
    """
    if [result.suite for result in base] != [result.suite for result in adapted]:
        raise UsageError("the base and the adapter were not measured on the same suites", cure="measure both again")
    return tuple(pair(one, other) for one, other in zip(base, adapted, strict=True))


def _prepare(engine: Engine, suite: Suite, invocation: Sequence[int], prompting: Prompting | None) -> _Work:
    if suite.record.kind == "answer":
        asked, excluded = answering.prepare(engine, suite, invocation, prompting)
        return _Work(suite, (), asked, excluded)
    scored, excluded = scoring.prepare(engine, suite, invocation)
    neutral = scoring.prepare_neutral(engine, suite, scored, invocation)
    if suite.record.scoring == "pmi":  # an option that cannot be scored apart cannot compete
        apart = {one.item.id for one in neutral}
        excluded += tuple(one.item.id for one in scored if not scoring.options_of(one) <= apart)
        scored = [one for one in scored if scoring.options_of(one) <= apart]
    return _Work(suite, tuple(scored), (), excluded, tuple(neutral))


def _measured(engine: Engine, work: _Work, use: Use, advance: Callable[[float], None]) -> SuiteResult:
    suite, choices, texts = work.suite, [], []
    choices += answering.answer(engine, work.asked, use, advance)
    neutral = scoring.score(engine, work.neutral, use, advance)
    apart = {one.item.id: found[0].logprob for one, found in zip(work.neutral, neutral, strict=True)}
    for one, found in zip(work.scored, scoring.score(engine, work.scored, use, advance), strict=True):
        match one.item:
            case ChoiceItem():
                choices.append(scoring.choice_score(one, one.item, found, suite.record.scoring, apart))
            case ClozeItem():
                choices.append(scoring.cloze_score(one, found[0]))
            case TextItem():
                texts.append(TextScore(one.item.id, one.item.group, -found[0].logprob, one.bytes[0]))
    return SuiteResult(
        suite=suite.name,
        kind=suite.record.kind,
        digest=suite.digest,
        engine=engine.name,
        base_sha256=engine.base_sha256,
        context_length=engine.context_length,
        chance=suite.record.chance,
        choices=tuple(choices),
        texts=tuple(texts),
        excluded=work.excluded,
        guards=suite.record.guards,
    )


def _cache_path(
    engine: Engine,
    suite: Suite,
    cache: Path | None,
    use: Use,
    invocation: Sequence[int],
    prompting: Prompting | None,
) -> Path | None:
    if cache is None or use.adapter is not None:
        return None
    rendered = to_json(prompting) if suite.record.kind == "answer" else b""
    items = (item.id for item in suite.items)  # a look may hold a part of the suite
    parts = (__version__, SCORING, engine.name, engine.base_sha256, engine.context_length, *invocation, *items)
    said = to_json(suite.record) + rendered + "\n".join(map(str, parts)).encode()
    return cache / f"{suite.name}-{hashlib.sha256(said).hexdigest()[:24]}.json"


def _cached(engine: Engine, suite: Suite, path: Path | None) -> SuiteResult | None:
    if path is None or not path.is_file():
        return None
    try:
        found = load_json(SuiteResult, path)
    except PitstopError:
        return None  # damaged, or written by another version: measured again, and replaced
    same = (found.digest, found.base_sha256, found.engine) == (suite.digest, engine.base_sha256, engine.name)
    return found if same else None
