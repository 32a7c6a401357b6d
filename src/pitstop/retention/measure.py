"""An engine and suites to figures per item: without an adapter, with one, and how far apart the predictions are."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pitstop import __version__
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Use, divergence
from pitstop.engines.invocation import with_invocation
from pitstop.engines.template import render
from pitstop.errors import BrokenInput, PitstopError, UsageError
from pitstop.progress import progress
from pitstop.records import load_json, save_json
from pitstop.retention.paired import Paired
from pitstop.retention.suite import Ability, ChatItem, ChoiceItem, Kind, Scoring, Suite, TextItem

LOGITS_BYTES = 128 << 20  # of one batch; the vocabulary is what makes them large
BATCH_ROWS = 32
SCORING = 1  # rises when the same items would score otherwise: cached figures of before are not used


@dataclass(frozen=True)
class ChoiceScore:
    """One choice item. An option's score is its log-probability, per byte where the suite's scoring says so."""

    id: str
    group: str
    correct: bool
    picked: int  # index of the best option
    margin: float  # score of the right option less that of the best wrong one, nats or nats per byte
    logprobs: tuple[float, ...]  # ln p of each option, nats
    bytes: tuple[int, ...]  # of each option, UTF-8


@dataclass(frozen=True)
class TextScore:
    """One text item, without its first token, which nothing predicts."""

    id: str
    group: str
    nats: float  # -ln p
    bytes: int  # UTF-8


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
    choices: tuple[ChoiceScore, ...]
    texts: tuple[TextScore, ...]
    excluded: tuple[str, ...]  # ids of items that do not fit the context, or have nothing to score
    trained_on: tuple[str, ...] = ()  # ids of items that were set aside, for they stand in the training rows
    guards: Ability = "knowledge"  # which margin of the gate applies


@dataclass(frozen=True)
class DocumentDrift:
    """How far the adapted model's predictions are from the base's on one document."""

    id: str
    group: str
    kl: float  # KL(base || adapted), mean over the scored positions, nats per token
    tokens: int  # scored positions


@dataclass(frozen=True)
class Drift:
    """KL to the base on one probe."""

    suite: str
    digest: str  # of the probe
    documents: tuple[DocumentDrift, ...]
    excluded: tuple[str, ...]

    @property
    def mean(self) -> float:
        """KL per token, averaged over documents; nan without any."""
        return float(np.mean([document.kl for document in self.documents])) if self.documents else math.nan


@dataclass(frozen=True)
class _Row:
    """One sequence to evaluate: logits from position ``first`` on are wanted."""

    tokens: tuple[int, ...]
    first: int

    def invoked(self, invocation: Sequence[int]) -> "_Row":
        """Return the row with an adapter's invocation in it."""
        tokens = with_invocation(self.tokens, invocation)
        return _Row(tokens, self.first + len(tokens) - len(self.tokens))


@dataclass(frozen=True)
class _Option:
    """Where an option's tokens are predicted: in which row of its item, and which tokens they are."""

    row: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Prepared:
    """An item as rows; a text has one option, itself."""

    item: ChoiceItem | TextItem
    rows: tuple[_Row, ...]
    options: tuple[_Option, ...]
    first_bytes: int = 0  # of a text's first token


def measure(
    engine: Engine,
    suites: Sequence[Suite],
    use: Use = PLAIN_BASE,
    *,
    cache: Path | None = None,
    invocation: Sequence[int] = (),
) -> tuple[SuiteResult, ...]:
    """Score every retention suite (choice and text) under one adapter, or under none.

    Args:
        invocation: tokens put before every item: without them an activated adapter would not act, and forget nothing.
        cache: folder for the plain base's figures, which stay the same for the same base file, engine and suite.

    Raises:
        UsageError: no such adapter.
        BrokenInput: the model gives no finite number for some item.
        StorageError: the cache cannot be written.
    """
    wanted = [suite for suite in suites if suite.record.purpose == "retention"]
    places = {suite.name: _cache_path(engine, suite, cache, use, invocation) for suite in wanted}
    found = {suite.name: _cached(engine, suite, places[suite.name]) for suite in wanted}
    missing = [(suite, *_prepare(engine, suite, invocation)) for suite in wanted if found[suite.name] is None]
    if missing:
        total = sum(len(row.tokens) for _, items, _ in missing for item in items for row in item.rows)
        with progress(f"retention, {use.adapter or 'base'}", total, "tokens") as advance:
            for suite, items, excluded in missing:
                scores = _score(engine, items, use, partial(advance, note=suite.name))
                result = found[suite.name] = _result(engine, suite, items, scores, excluded)
                if (path := places[suite.name]) is not None:
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
    if base.kind == "choice":
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
        "choice" if base.kind == "choice" else "text",
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


def drift(
    engine: Engine, suites: Sequence[Suite], use: Use, prompting: Prompting, *, invocation: Sequence[int] = ()
) -> tuple[Drift, ...]:
    """Measure KL(base || adapted) over the whole vocabulary on every drift probe.

    Chat probes are rendered with the base's own template, and only the reply's positions count.

    Raises:
        UsageError: no such adapter, or the template refuses a chat.
        BrokenInput: the model gives no finite number for some document.
    """
    probes = [suite for suite in suites if suite.record.purpose == "drift"]
    rows = {probe.name: _probe_rows(engine, probe, prompting, invocation) for probe in probes}
    total = sum(len(row.tokens) for found, _ in rows.values() for row in found.values())
    found = []
    with progress(f"KL to the base, {use.adapter or 'base'}", total, "tokens") as advance:
        for probe in probes:
            fitting, excluded = rows[probe.name]
            divergences = {}
            names = list(fitting)
            for batch in _batches(engine, [fitting[name] for name in names]):
                picked = [fitting[names[at]] for at in batch]
                base = list(_logits(engine, picked, PLAIN_BASE))
                for at, before, after in zip(batch, base, _logits(engine, picked, use), strict=True):
                    divergences[names[at]] = _kl(before, after, names[at])
                    advance(len(fitting[names[at]].tokens), probe.name)
            documents = tuple(
                DocumentDrift(item.id, item.group, *divergences[item.id])
                for item in probe.items
                if item.id in divergences
            )
            found.append(Drift(probe.name, probe.digest, documents, excluded))
    return tuple(found)


def _kl(base: Logits, adapted: Logits, name: str) -> tuple[float, int]:
    per_token = divergence(base, adapted)
    value = float(per_token.mean())
    if not math.isfinite(value):
        raise _not_finite(name)
    return value, len(per_token)


def _probe_rows(
    engine: Engine, probe: Suite, prompting: Prompting, invocation: Sequence[int]
) -> tuple[dict[str, _Row], tuple[str, ...]]:
    fitting, excluded = {}, []
    for item in probe.items:
        if isinstance(item, ChatItem):
            prompt = engine.tokenize(render(prompting, [{"role": "user", "content": item.prompt}]))
            row = _Row((*prompt, *engine.tokenize(item.reply))[:-1], len(prompt) - 1)
        else:
            row = _Row(tuple(engine.tokenize(item.text if isinstance(item, TextItem) else item.prompt)), 0)
        row = row.invoked(invocation)
        if row.first < len(row.tokens) <= engine.context_length:
            fitting[item.id] = row
        else:
            excluded.append(item.id)
    return fitting, tuple(excluded)


def _prepare(engine: Engine, suite: Suite, invocation: Sequence[int]) -> tuple[list[_Prepared], tuple[str, ...]]:
    """Tokenize a suite; items that do not fit the context or hold nothing to score are excluded by id."""
    prepared, excluded = [], []
    for item in suite.items:
        if isinstance(item, ChatItem):
            raise UsageError(f"suite {suite.name} is a chat suite: it measures drift", where=suite.name)
        found = _choice_rows(engine, item) if isinstance(item, ChoiceItem) else _text_rows(engine, item)
        if found is not None:
            found = replace(found, rows=tuple(row.invoked(invocation) for row in found.rows))
        if found is not None and all(len(row.tokens) <= engine.context_length for row in found.rows):
            prepared.append(found)
        else:
            excluded.append(item.id)
    return prepared, tuple(excluded)


def _text_rows(engine: Engine, item: TextItem) -> _Prepared | None:
    tokens = tuple(engine.tokenize(item.text))
    if len(tokens) < 2:
        return None
    skipped = len(engine.detokenize(tokens[:1]).encode())
    return _Prepared(item, (_Row(tokens[:-1], 0),), (_Option(0, tokens[1:]),), skipped)


def _choice_rows(engine: Engine, item: ChoiceItem) -> _Prepared | None:
    """Score options from where their tokens part; an option whose row begins another's needs no row of its own."""
    wholes = [tuple(engine.tokenize(f"{item.prompt} {option}")) for option in item.options]
    # A tokenizer may join the prompt's end with the option's beginning: what all share is the prompt.
    shared = _common([tuple(engine.tokenize(item.prompt)), *wholes])
    if shared == 0 or any(len(whole) <= shared for whole in wholes):
        return None
    rows: list[tuple[int, ...]] = []
    options: dict[int, _Option] = {}
    for at in sorted(range(len(wholes)), key=lambda at: -len(wholes[at])):
        needed = wholes[at][:-1]
        holder = next((number for number, row in enumerate(rows) if row[: len(needed)] == needed), len(rows))
        if holder == len(rows):
            rows.append(needed)
        options[at] = _Option(holder, wholes[at][shared:])
    ordered = tuple(options[at] for at in range(len(wholes)))
    return _Prepared(item, tuple(_Row(row, shared - 1) for row in rows), ordered)


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def _score(
    engine: Engine, items: Sequence[_Prepared], use: Use, advance: Callable[[float], None]
) -> list[tuple[float, ...]]:
    """Return ln p of every option of every item."""
    flat = [(at, number) for at, item in enumerate(items) for number in range(len(item.rows))]
    rows = [items[at].rows[number] for at, number in flat]
    scores = [[0.0] * len(item.options) for item in items]
    for batch in _batches(engine, rows):
        for index, logits in zip(batch, _logits(engine, [rows[index] for index in batch], use), strict=True):
            at, number = flat[index]
            for place, option in enumerate(items[at].options):
                if option.row == number:
                    scores[at][place] = _logprob(logits, option.tokens, items[at].item.id)
            advance(len(rows[index].tokens))
    return [tuple(score) for score in scores]


def _logprob(logits: Logits, tokens: Sequence[int], name: str) -> float:
    """Return ln p of tokens, predicted by the first rows of the logits."""
    rows = logits[: len(tokens)]
    highest = rows.max(axis=-1, keepdims=True)
    # float32 exponentials, summed in float64: off by 1e-7 a token, at a fifth of the cost.
    sums = np.exp(rows - highest).sum(axis=-1, dtype=np.float64)
    picked: NDArray[np.float64] = rows[np.arange(len(tokens)), list(tokens)].astype(np.float64) - highest[:, 0]
    value = float((picked - np.log(sums)).sum())
    if not math.isfinite(value):
        raise _not_finite(name)
    return value


def _batches(engine: Engine, rows: Sequence[_Row]) -> Iterator[list[int]]:
    """Yield indices of rows of like length, few enough that their logits fit in memory."""
    positions = LOGITS_BYTES // (4 * engine.vocabulary_size)
    batch: list[int] = []
    for at in sorted(range(len(rows)), key=lambda at: -len(rows[at].tokens)):
        longest = len(rows[batch[0]].tokens) if batch else 0
        if batch and (len(batch) == BATCH_ROWS or longest * (len(batch) + 1) > positions):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _logits(engine: Engine, rows: Sequence[_Row], use: Use) -> Iterator[Logits]:
    return engine.logits_batch([row.tokens for row in rows], use, firsts=[row.first for row in rows])


def _result(
    engine: Engine,
    suite: Suite,
    items: Sequence[_Prepared],
    scores: Sequence[tuple[float, ...]],
    excluded: tuple[str, ...],
) -> SuiteResult:
    choices, texts = [], []
    for prepared, score in zip(items, scores, strict=True):
        item = prepared.item
        if isinstance(item, ChoiceItem):
            choices.append(_choice_score(item, score, suite.record.scoring))
        else:
            size = max(len(item.text.encode()) - prepared.first_bytes, 1)
            texts.append(TextScore(item.id, item.group, -score[0], size))
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
        excluded=excluded,
        guards=suite.record.guards,
    )


def _choice_score(item: ChoiceItem, logprobs: tuple[float, ...], scoring: Scoring) -> ChoiceScore:
    sizes = tuple(len(option.encode()) for option in item.options)
    lengths = sizes if scoring == "per byte" else (1,) * len(sizes)
    scores = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    picked = max(range(len(scores)), key=lambda at: scores[at])
    wrong = max(score for at, score in enumerate(scores) if at != item.answer)
    margin = scores[item.answer] - wrong
    return ChoiceScore(item.id, item.group, picked == item.answer, picked, margin, logprobs, sizes)


def _cache_path(engine: Engine, suite: Suite, cache: Path | None, use: Use, invocation: Sequence[int]) -> Path | None:
    if cache is None or use.adapter is not None:
        return None
    record = suite.record
    what = (__version__, SCORING, record.kind, record.scoring, record.guards, suite.digest)
    items = (item.id for item in suite.items)  # a look may hold a part of the suite
    parts = (*what, engine.name, engine.base_sha256, engine.context_length, *invocation, *items)
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return cache / f"{suite.name}-{key[:24]}.json"


def _cached(engine: Engine, suite: Suite, path: Path | None) -> SuiteResult | None:
    if path is None or not path.is_file():
        return None
    try:
        found = load_json(SuiteResult, path)
    except PitstopError:
        return None  # damaged, or written by another version: measured again, and replaced
    same = (found.digest, found.base_sha256, found.engine) == (suite.digest, engine.base_sha256, engine.name)
    return found if same else None


def _not_finite(name: str) -> BrokenInput:
    return BrokenInput(
        f"the model gives no finite probability for item {name}",
        cure="the adapter or the base is damaged: train it again at a lower rate, or check the file's digest",
    )
