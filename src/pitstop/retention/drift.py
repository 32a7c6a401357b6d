"""How far an adapter moves the base's predictions: KL over the whole vocabulary, at its scale and on the way to it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Use, divergence
from pitstop.engines.template import render
from pitstop.progress import progress
from pitstop.retention import scoring
from pitstop.retention.scoring import Row
from pitstop.retention.suite import AnswerItem, ChatItem, ChoiceItem, ClozeItem, Item, Suite, TextItem, make
from pitstop.retention.task import TaskRow

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the adapter; at 0 it must be the base, exactly
CURVE_DOCUMENTS = 8  # of each probe
CURVE_ROWS = 24  # of the task


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
class ScalePoint:
    """What the adapter would do at a part of its scale."""

    scale: float
    kl: float  # KL(base || adapted) on the probes, nats per token
    task: float | None  # -ln p of the task's answers, nats per token; None without rows


def drift(
    engine: Engine, suites: Sequence[Suite], use: Use, prompting: Prompting, *, invocation: Sequence[int] = ()
) -> tuple[Drift, ...]:
    """Measure KL(base || adapted) on every drift probe.

    Chat probes are rendered with the base's own template, and only the reply's positions count.

    Raises:
        UsageError: no such adapter, or the template refuses a chat.
        BrokenInput: the model gives no finite number for some document.
    """
    probes = _probes(suites)
    rows = {probe.name: _probe_rows(engine, probe, prompting, invocation) for probe in probes}
    total = sum(len(row.tokens) for found, _ in rows.values() for row in found.values())
    found = []
    with progress(f"KL to the base, {use.adapter or 'base'}", total, "tokens") as advance:
        for probe in probes:
            fitting, excluded = rows[probe.name]
            divergences = {}
            for name, (kl,), tokens in _divergences(engine, fitting, [use]):
                divergences[name] = kl, tokens
                advance(len(fitting[name].tokens), probe.name)
            documents = tuple(
                DocumentDrift(item.id, item.group, *divergences[item.id])
                for item in probe.items
                if item.id in divergences
            )
            found.append(Drift(probe.name, probe.digest, documents, excluded))
    return tuple(found)


def scale_curve(
    engine: Engine,
    suites: Sequence[Suite],
    use: Use,
    prompting: Prompting,
    rows: Sequence[TaskRow] = (),
    *,
    invocation: Sequence[int] = (),
) -> tuple[ScalePoint, ...]:
    """Measure on a part of probes and task what a smaller scale would forget, and what it would unlearn.

    Raises:
        UsageError: no such adapter, or one without scales.
        BrokenInput: the model gives no finite number.
    """
    uses = [replace(use, scale=use.scale * scale) for scale in SCALES]
    probes = [replace(probe, items=probe.items[:CURVE_DOCUMENTS]) for probe in _probes(suites)]
    documents = [_probe_rows(engine, probe, prompting, invocation)[0] for probe in probes]
    answers = _answers(engine, rows[:CURVE_ROWS])
    total = sum(len(row.tokens) for found in documents for row in found.values()) + len(answers)
    with progress(f"scales of {use.adapter}", total, "tokens") as advance:
        measured = []
        for fitting in documents:
            for name, divergences, _ in _divergences(engine, fitting, uses):
                measured.append(divergences)
                advance(len(fitting[name].tokens))
        losses = [_loss(engine, answers, at) for at in uses] if answers else [None] * len(uses)
        advance(len(answers))
    means = np.mean(measured, axis=0) if measured else np.full(len(uses), np.nan)
    return tuple(map(ScalePoint, SCALES, map(float, means), losses))


def _probes(suites: Sequence[Suite]) -> list[Suite]:
    return [suite for suite in suites if suite.record.purpose == "drift"]


def _divergences(
    engine: Engine, fitting: dict[str, Row], uses: Sequence[Use]
) -> Iterator[tuple[str, list[float], int]]:
    """Yield each document's id, its mean KL to the base under each use, and over how many tokens."""
    names = list(fitting)
    for batch in scoring.batches(engine, [fitting[name] for name in names]):
        picked = [fitting[names[at]] for at in batch]
        base = list(scoring.logits_of(engine, picked, PLAIN_BASE))
        under = [
            [_kl(before, after, names[at]) for at, before, after in zip(batch, base, logits, strict=True)]
            for logits in (scoring.logits_of(engine, picked, use) for use in uses)
        ]
        for place, at in enumerate(batch):
            yield names[at], [values[place] for values in under], len(base[place])


def _kl(base: Logits, adapted: Logits, name: str) -> float:
    value = float(divergence(base, adapted).mean())
    if not math.isfinite(value):
        raise scoring.not_finite(name)
    return value


def _answers(engine: Engine, rows: Sequence[TaskRow]) -> Sequence[scoring.Prepared]:
    """Return the expected answers of a task, each after its prompt."""
    if not rows:
        return []
    items = [TextItem(row.id, row.group, row.expected, given=row.prompt) for row in rows]
    return scoring.prepare(engine, make("task", "text", items, license="", source="", description=""), ())[0]


def _loss(engine: Engine, answers: Sequence[scoring.Prepared], use: Use) -> float:
    """Return the loss on answers: nats per token, the mean over rows."""
    found = scoring.score(engine, answers, use, lambda _: None)
    per_token = [-span.logprob / len(one.spans[0].tokens) for one, (span,) in zip(answers, found, strict=True)]
    return float(np.mean(per_token))


def _probe_rows(
    engine: Engine, probe: Suite, prompting: Prompting, invocation: Sequence[int]
) -> tuple[dict[str, Row], tuple[str, ...]]:
    fitting, excluded = {}, []
    for item in probe.items:
        row = _probe_row(engine, item, prompting)
        row = row.invoked(invocation)
        if row.first < len(row.tokens) <= engine.context_length:
            fitting[item.id] = row
        else:
            excluded.append(item.id)
    return fitting, tuple(excluded)


def _probe_row(engine: Engine, item: Item, prompting: Prompting) -> Row:
    match item:
        case ChatItem():
            prompt = engine.tokenize(render(prompting, [{"role": "user", "content": item.prompt}]))
            return Row((*prompt, *engine.tokenize(item.reply))[:-1], len(prompt) - 1)
        case TextItem():
            given = engine.tokenize(item.given)
            return Row((*given, *engine.tokenize(item.text)), len(given))
        case ChoiceItem() | ClozeItem() | AnswerItem():
            return Row(tuple(engine.tokenize(item.prompt)), 0)
