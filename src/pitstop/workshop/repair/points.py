"""One candidate measured exactly: what it costs the base and what is left of the task, item by item."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import PLAIN_BASE, Engine, Use
from pitstop.progress import quietly
from pitstop.retention.drift import Drift, drift
from pitstop.retention.gate import Verdict, gate
from pitstop.retention.margins import Margins
from pitstop.retention.measure import SuiteResult, measure, pair_all
from pitstop.retention.paired import Drop, Paired
from pitstop.retention.task import TaskResult, TaskRow, measure_task, pair_task
from pitstop.workshop.adapter import FOLDER, IDENTITY_FILE
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair.material import Part
from pitstop.workshop.repair.pairs import Pairs, write
from pitstop.workshop.task import sampling

CANDIDATE = "candidate"
CACHE = "measured"  # in the base's folder: what `check` and this keep of the plain base


@dataclass(frozen=True)
class Point:
    """Figures of one candidate, or of the plain base, on one part of the items."""

    results: tuple[SuiteResult, ...]
    drift: tuple[Drift, ...]
    task: TaskResult
    nats: Mapping[str, float]  # per token of a row's expected answer, by the row's id

    @property
    def answer_nats(self) -> float:
        """Nats per token of the expected answers, averaged over rows."""
        return float(np.mean(list(self.nats.values())))

    @property
    def kl(self) -> float | None:
        """KL to the base, nats per token, averaged over the probes' documents; None without any."""
        every = [document.kl for probe in self.drift for document in probe.documents]
        return float(np.mean(every)) if every else None


class Bench:
    """An engine with the base in it, on which candidates are tried one after another."""

    def __init__(self, engine: Engine, recipe: Recipe, ref: BaseRef, scratch: Path) -> None:
        """Take an engine without adapters.

        Args:
            scratch: folder for one candidate's files at a time.
        """
        self._engine, self._recipe, self._ref, self._scratch = engine, recipe, ref, scratch

    def base(self, part: Part, pairs: Pairs) -> Point:
        """Return the plain base's figures on a part; those of its suites are kept beside the base.

        Args:
            pairs: of the adapter, whose invocation the base is measured with.
        """
        with self._loaded(pairs) as invocation:
            cache, prompting = self._recipe.base.folder / CACHE, self._ref.prompting
            measured = measure(self._engine, part.suites, cache=cache, invocation=invocation, prompting=prompting)
            return Point(measured, (), self._task(part.rows, PLAIN_BASE), self._nats(part.rows, PLAIN_BASE))

    def point(self, pairs: Pairs, part: Part, *, shown: bool = False) -> Point:
        """Measure a candidate on a part.

        Args:
            shown: with a progress of its own.

        Raises:
            BrokenInput: the model gives no finite number under it.
        """
        use = Use(CANDIDATE, self._recipe.scale)
        with self._loaded(pairs) as invocation, nullcontext() if shown else quietly():
            return Point(
                measure(self._engine, part.suites, use, invocation=invocation, prompting=self._ref.prompting),
                drift(self._engine, part.suites, use, self._ref.prompting, invocation=invocation),
                self._task(part.rows, use),
                self._nats(part.rows, use),
            )

    def task(self, pairs: Pairs, rows: Sequence[TaskRow]) -> TaskResult:
        """Let a candidate answer rows of its task."""
        with self._loaded(pairs), quietly():
            return self._task(rows, Use(CANDIDATE, self._recipe.scale))

    @contextmanager
    def _loaded(self, pairs: Pairs) -> Iterator[tuple[int, ...]]:
        """Load a candidate as it would ship: out of a folder with these factors."""
        source = self._recipe.run / FOLDER
        write(pairs, source, self._scratch)
        shutil.copyfile(source / IDENTITY_FILE, self._scratch / IDENTITY_FILE)
        self._engine.load_adapter(CANDIDATE, self._scratch)
        try:
            yield self._engine.invocation(CANDIDATE)
        finally:
            self._engine.unload_adapter(CANDIDATE)

    def _task(self, rows: Sequence[TaskRow], use: Use) -> TaskResult:
        return measure_task(self._engine, rows, use, metric=self._recipe.check.metric, sampling=sampling(self._recipe))

    def _nats(self, rows: Sequence[TaskRow], use: Use) -> dict[str, float]:
        """Return nats per token of the expected answers; of those that fit the context."""
        found = {}
        for row in rows:
            prompt = self._engine.tokenize(row.prompt)
            answer = self._engine.tokenize(row.expected + self._ref.prompting.eos_token)
            if prompt and len(prompt) + len(answer) <= self._engine.context_length:
                found[row.id] = -float(np.mean(self._engine.score(prompt, answer, use)))
        return found


def only(results: Sequence[SuiteResult], part: Part) -> tuple[SuiteResult, ...]:
    """Return what was measured of a part's items."""
    ids = part.ids()
    return tuple(
        replace(
            result,
            choices=tuple(choice for choice in result.choices if choice.id in ids[result.suite]),
            texts=tuple(text for text in result.texts if text.id in ids[result.suite]),
        )
        for result in results
    )


def part_of(point: Point, part: Part) -> Point:
    """Return a point's figures on a part of what it was measured on."""
    ids, rows = part.ids(), {row.id for row in part.rows}
    probes = tuple(
        replace(probe, documents=tuple(one for one in probe.documents if one.id in ids[probe.suite]))
        for probe in point.drift
    )
    task = replace(point.task, answers=tuple(answer for answer in point.task.answers if answer.id in rows))
    nats = {row: value for row, value in point.nats.items() if row in rows}
    return Point(only(point.results, part), probes, task, nats)


def judge(base: Point, adapted: Point, margins: Margins) -> Verdict:
    """Return what the gate says of a candidate on the items both were measured on."""
    probes = {probe.suite: probe.mean for probe in adapted.drift}
    return gate(pair_all(base.results, adapted.results), pair_task(base.task, adapted.task), probes, margins)


def damage(reference: Point, candidate: Point, part: Part, margins: Margins) -> Drop:
    """Return how many more bits per byte a candidate needs than a reference for texts and for right answers.

    A right answer of a choice or a cloze is a text as well, and its likelihood moves long before an answer flips.
    Generated answers have none, and do not count here.
    """
    answers = part.answers()
    both = [pair for pair in zip(reference.results, candidate.results, strict=True) if _has_likelihoods(pair[0])]
    # Where stereotypes are measured there is no right answer: they count only if there is nothing else.
    counted = [pair for pair in both if pair[0].guards != "stereotype"] or both
    pairs = tuple(_bits(one, other, answers) for one, other in counted)
    return Drop(pairs, resamples=margins.resamples, seed=margins.seed)


def _has_likelihoods(result: SuiteResult) -> bool:
    return bool(result.texts) or any(choice.logprobs for choice in result.choices)


def _bits(one: SuiteResult, other: SuiteResult, answers: Mapping[tuple[str, str], int]) -> Paired:
    figures: list[tuple[str, float, float, float]] = []
    for before, after in zip(one.choices, other.choices, strict=True):
        right = answers.get((one.suite, before.id), 0)  # a cloze has one answer
        size = float(before.bytes[right])
        figures.append((before.group, -before.logprobs[right], -after.logprobs[right], size))
    for text, changed in zip(one.texts, other.texts, strict=True):
        figures.append((text.group, text.nats, changed.nats, float(text.bytes)))
    groups, baseline, adapted, weights = zip(*figures, strict=True)
    to_bits = 1.0 / math.log(2)
    return Paired(
        one.suite, "text", groups, tuple(b * to_bits for b in baseline), tuple(a * to_bits for a in adapted), weights
    )
