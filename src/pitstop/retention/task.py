"""The score on the adapter's own task: answers generated for held-out rows, compared with what was expected.

`json`: the answer is one JSON value equal to the expected one (numbers by value, so 90 is 90.0), and besides precision,
recall and F1 over all (key, value) pairs of all rows. `text`: the same text, but for space at its ends. `number`: a
number no further off than the tolerance, and besides how far off answers are. `class`: of a few answers the expected
one is the likeliest, and besides how well the probabilities are calibrated; nothing is generated for it.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Use
from pitstop.errors import DatasetError, UsageError
from pitstop.progress import progress
from pitstop.retention.classes import calibration_error, likeliest
from pitstop.retention.paired import Paired

Metric = Literal["json", "text", "class", "number"]
Advance = Callable[[float], None]
BATCH_ROWS = 32
MOST = Decimal(10) ** 100  # what is larger was not meant as a number
OPENING = 8  # tokens that show whether an answer may become JSON
# How a JSON value may begin: a number must be nothing but one, for an address begins with one too.
JSON_OPENING = re.compile(r"""\s*([{\["tfn].*|-?\d*\.?\d*([eE][+-]?\d*)?\s*)""", re.DOTALL)


@dataclass(frozen=True)
class TaskRow:
    """A held-out row: the rendered prompt, and the answer the adapter should give."""

    id: str
    group: str  # rows of one group are resampled together: a template, an author
    prompt: str  # rendered with the chat template, ready to be continued
    expected: str
    classes: tuple[str, ...] = ()  # what the answer is one of; only where the metric is `class`
    tolerance: float = 0.0  # how far a right answer may be off; only where the metric is `number`


@dataclass(frozen=True)
class TaskAnswer:
    """One row's answer and how it compares."""

    id: str
    group: str
    answer: str
    exact: bool
    parsed: bool  # whether it is JSON at all, or a number; the others always parse
    found: int  # (key, value) pairs in the answer
    expected: int  # pairs in the expected answer
    matched: int  # pairs in both
    off: float | None = None  # of a number: how far from the expected one
    probability: float | None = None  # of a class: among all classes


@dataclass(frozen=True)
class TaskResult:
    """All rows under one adapter, or under none."""

    metric: Metric
    answers: tuple[TaskAnswer, ...]
    excluded: tuple[str, ...]  # ids of rows whose prompt leaves no room for an answer

    @property
    def exact(self) -> float:
        """Share of exact answers."""
        return sum(answer.exact for answer in self.answers) / len(self.answers)

    @property
    def parse_rate(self) -> float:
        """Share of answers that are JSON."""
        return sum(answer.parsed for answer in self.answers) / len(self.answers)

    @property
    def precision(self) -> float:
        """Share of the answers' pairs that are right; 0 without any."""
        return _ratio(sum(answer.matched for answer in self.answers), sum(answer.found for answer in self.answers))

    @property
    def recall(self) -> float:
        """Share of the expected pairs that were found."""
        return _ratio(sum(answer.matched for answer in self.answers), sum(answer.expected for answer in self.answers))

    @property
    def f1(self) -> float:
        """Micro F1 over pairs."""
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def off(self) -> float | None:
        """Median of how far the numbers are off; None without any."""
        found = [answer.off for answer in self.answers if answer.off is not None]
        return statistics.median(found) if found else None

    @property
    def calibration_error(self) -> float | None:
        """How far the probabilities of the classes are from the share of right answers; None without any."""
        sure = [(one.probability, one.exact) for one in self.answers if one.probability is not None]
        return calibration_error(*zip(*sure, strict=True)) if sure else None


@dataclass(frozen=True)
class _Json:
    """A JSON value in a form that compares by meaning."""

    canonical: str
    pairs: Counter[tuple[str, str]]  # (key, canonical value) of every leaf


_NOTHING = _Json("", Counter())


def measure_task(
    engine: Engine,
    rows: Sequence[TaskRow],
    use: Use = PLAIN_BASE,
    *,
    metric: Metric,
    sampling: Sampling | None = None,
) -> TaskResult:
    """Let the engine answer every row, greedily unless told otherwise, and compare.

    Raises:
        DatasetError: no rows, or an expected answer that is not JSON where the metric is `json`.
        UsageError: no such adapter.
    """
    check_rows(rows, metric)
    prompts = {row.id: engine.tokenize(row.prompt) for row in rows}
    after = {words: _least_after(engine, words) for words in {row.classes for row in rows}}
    fitting = [row for row in rows if 0 < len(prompts[row.id]) <= engine.context_length - after[row.classes]]
    if not fitting:
        raise UsageError(f"no row's prompt fits the context of {engine.context_length} tokens")
    with progress(f"task, {use.adapter or 'base'}", len(fitting), "rows") as advance:
        if metric == "class":
            found = _classified(engine, fitting, prompts, use, advance)
        else:
            found = _generated(engine, fitting, prompts, use, sampling or Sampling(), metric, advance)
    answers = tuple(found[row.id] for row in rows if row.id in found)
    return TaskResult(metric, answers, tuple(row.id for row in rows if row.id not in found))


def _least_after(engine: Engine, classes: Sequence[str]) -> int:
    """Return how many tokens need room after a prompt: of the longest class all but the last, which is predicted."""
    return max((len(engine.tokenize(word)) - 1 for word in classes), default=1)


def _classified(
    engine: Engine, rows: Sequence[TaskRow], prompts: Mapping[str, Sequence[int]], use: Use, advance: Advance
) -> dict[str, TaskAnswer]:
    found = {}
    for begin in range(0, len(rows), BATCH_ROWS):
        batch = rows[begin : begin + BATCH_ROWS]
        picks = likeliest(engine, [prompts[row.id] for row in batch], [row.classes for row in batch], use)
        for row, pick in zip(batch, picks, strict=True):
            found[row.id] = replace(compare(row, pick.word, "class"), probability=round(pick.probability, 6))
        advance(len(batch))
    return found


def _generated(
    engine: Engine,
    rows: Sequence[TaskRow],
    prompts: Mapping[str, Sequence[int]],
    use: Use,
    sampling: Sampling,
    metric: Metric,
    advance: Advance,
) -> dict[str, TaskAnswer]:
    found: dict[str, TaskAnswer] = {}
    # Prompts of like length go together.
    ordered = sorted(rows, key=lambda row: -len(prompts[row.id]))
    for begin in range(0, len(ordered), BATCH_ROWS):
        batch = ordered[begin : begin + BATCH_ROWS]
        texts = _answers(engine, [prompts[row.id] for row in batch], use, sampling, metric)
        found |= {row.id: compare(row, text, metric) for row, text in zip(batch, texts, strict=True)}
        advance(len(batch))
    return found


def _answers(
    engine: Engine, prompts: Sequence[Sequence[int]], use: Use, sampling: Sampling, metric: Metric
) -> list[str]:
    """Let the engine answer. A plain base that begins with anything but JSON is not heard out: no ending mends that."""
    if metric != "json" or use.adapter is not None:
        return engine.generate_batch(prompts, use, sampling)
    opening = replace(sampling, max_tokens=min(OPENING, sampling.max_tokens))
    texts = engine.generate_batch(prompts, use, opening)
    hopeful = [at for at, text in enumerate(texts) if JSON_OPENING.fullmatch(text)]
    if hopeful:
        whole = engine.generate_batch([prompts[at] for at in hopeful], use, sampling)
        for at, text in zip(hopeful, whole, strict=True):
            texts[at] = text
    return texts


def check_rows(rows: Sequence[TaskRow], metric: Metric) -> None:
    """Refuse rows that no answer could be right for.

    Raises:
        DatasetError: everything wrong with them, at once.
    """
    problems = [f"id {name!r} is used {n} times" for name, n in Counter(row.id for row in rows).items() if n > 1]
    problems += [] if rows else ["there are no rows"]
    if metric == "json":
        problems += [f"{row.id}: the expected answer is not JSON" for row in rows if _read(row.expected) is None]
    if metric == "number":
        problems += [f"{row.id}: the expected answer is no number" for row in rows if _number_in(row.expected) is None]
    if metric == "class":
        problems += [
            f"{row.id}: {row.expected!r} is no answer of the training rows"
            for row in rows
            if row.expected.strip() not in row.classes
        ]
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:20])
        raise DatasetError(
            f"the held-out rows cannot be scored, {len(problems)} problems:{shown}",
            cure="correct these rows, or choose another metric ([check] metric)",
        )


def compare(row: TaskRow, answer: str, metric: Metric) -> TaskAnswer:
    """Compare one answer with the expected one."""
    if metric in ("text", "class"):
        exact = answer.strip() == row.expected.strip()
        return TaskAnswer(row.id, row.group, answer, exact, True, 1, 1, int(exact))
    if metric == "number":
        value, expected = _number_in(answer), _number_in(row.expected) or Decimal(0)
        off = None if value is None else abs(value - expected)
        exact = off is not None and off <= Decimal(str(row.tolerance))
        said_off = None if off is None else float(off)
        return TaskAnswer(row.id, row.group, answer, exact, value is not None, 1, 1, int(exact), off=said_off)
    said, wanted = _read(answer), _read(row.expected) or _NOTHING
    found = said or _NOTHING
    return TaskAnswer(
        row.id,
        row.group,
        answer,
        exact=said is not None and said.canonical == wanted.canonical,
        parsed=said is not None,
        found=found.pairs.total(),
        expected=wanted.pairs.total(),
        matched=(found.pairs & wanted.pairs).total(),
    )


def pair_task(base: TaskResult, adapted: TaskResult) -> Paired:
    """Put exact answers without and with the adapter side by side.

    Raises:
        UsageError: they are not of the same rows and metric.
    """
    same = [answer.id for answer in base.answers] == [answer.id for answer in adapted.answers]
    if not same or base.metric != adapted.metric:
        raise UsageError("the base and the adapter did not answer the same rows", cure="measure both again")
    return Paired(
        name="task",
        kind="task",
        groups=tuple(answer.group for answer in base.answers),
        baseline=tuple(float(answer.exact) for answer in base.answers),
        adapted=tuple(float(answer.exact) for answer in adapted.answers),
        weights=(1.0,) * len(base.answers),
    )


def _read(text: str) -> _Json | None:
    """Return a text's JSON value, None if it is none. A model may write anything, so anything may be in it."""
    try:
        value = json.loads(
            text.strip(),
            parse_int=_number,
            parse_float=_number,
            parse_constant=_refuse,
            object_pairs_hook=tuple,  # pairs as they stand: a key given twice is two fields, and never exact
        )
        return _Json(_canonical(value), Counter(_pairs(value)))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _number_in(text: str) -> Decimal | None:
    """Return the number a text is, leading zeros or not; None if it is none."""
    try:
        value = Decimal(text.strip())
    except ArithmeticError:
        return None
    return value if value.is_finite() and abs(value) < MOST else None


def _number(text: str) -> Decimal:
    value = Decimal(text)
    if not value.is_finite():
        raise ValueError(f"{text} is no number")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _canonical(value: Any) -> str:
    """Return a text that is the same for equal values: numbers by value, keys in order, true never 1."""
    if isinstance(value, Decimal):
        sign, digits, exponent = value.as_tuple()
        plain = "".join(map(str, digits)).rstrip("0")
        return f"{'-' * sign}{plain}e{int(exponent) + len(digits) - len(plain)}" if plain else "0"
    if isinstance(value, tuple):
        inner = ",".join(sorted(f"{json.dumps(key)}:{_canonical(inner)}" for key, inner in value))
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    return json.dumps(value)


def _pairs(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, canonical value) of every leaf; keys of inner objects are joined with dots."""
    if isinstance(value, tuple):
        for key, inner in value:
            yield from _pairs(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, f"{at}[]")
    else:
        yield at, _canonical(value)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
