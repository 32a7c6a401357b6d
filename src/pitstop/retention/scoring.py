"""Items to rows of tokens, and a model's logits on them to figures per item: choices, clozes and texts.

Nothing is generated here. An option, a cloze's answer and a text are all the same to a model: tokens that stand in a
row, after others; what is scored is how likely they were.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pitstop.engines.base import Engine, Logits, Use
from pitstop.engines.invocation import with_invocation
from pitstop.errors import BrokenInput, UsageError
from pitstop.retention.suite import AnswerItem, ChatItem, ChoiceItem, ClozeItem, Item, Scoring, Suite, TextItem

LOGITS_BYTES = 128 << 20  # of one batch; the vocabulary is what makes them large
BATCH_ROWS = 32

Scored = ChoiceItem | ClozeItem | TextItem


@dataclass(frozen=True)
class ChoiceScore:
    """One item that is right or wrong: of a choice, a cloze or an answer suite."""

    id: str
    group: str
    correct: bool
    picked: int  # index of the best option; of a cloze or an answer 0 if it is right, else -1
    margin: float  # score of the right option less that of the best wrong one; of a cloze of the least sure token; nats
    logprobs: tuple[float, ...]  # ln p of each option, or of the cloze's answer, nats
    bytes: tuple[int, ...]  # of each of these, UTF-8
    said: str = ""  # what was generated; answer suites only


@dataclass(frozen=True)
class TextScore:
    """One text item, without its first token, which nothing predicts."""

    id: str
    group: str
    nats: float  # -ln p
    bytes: int  # UTF-8


@dataclass(frozen=True)
class Row:
    """One sequence to evaluate: logits from position ``first`` on are wanted."""

    tokens: tuple[int, ...]
    first: int

    def invoked(self, invocation: Sequence[int]) -> "Row":
        """Return the row with an adapter's invocation in it."""
        tokens = with_invocation(self.tokens, invocation)
        return Row(tokens, self.first + len(tokens) - len(self.tokens))


@dataclass(frozen=True)
class Span:
    """Where tokens are predicted: in which row of their item, from its first logits on, and which tokens they are."""

    row: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How likely a span was."""

    logprob: float  # ln p of all its tokens, nats
    lead: float  # of the token that leads the least over every other one, nats; below 0 if another is likelier


@dataclass(frozen=True)
class Prepared:
    """An item as rows; a text and a cloze have one span."""

    item: Scored
    rows: tuple[Row, ...]
    spans: tuple[Span, ...]
    bytes: tuple[int, ...]  # of each span


def prepare(engine: Engine, suite: Suite, invocation: Sequence[int]) -> tuple[list[Prepared], tuple[str, ...]]:
    """Tokenize a suite; items that do not fit the context or hold nothing to score are excluded by id.

    Raises:
        UsageError: a suite of another kind.
    """
    prepared, excluded = [], []
    for item in suite.items:
        found = _fitting(engine, item, suite.name, invocation)
        if found is None:
            excluded.append(item.id)
        else:
            prepared.append(found)
    return prepared, tuple(excluded)


def prepare_neutral(
    engine: Engine, suite: Suite, items: Sequence[Prepared], invocation: Sequence[int]
) -> list[Prepared]:
    """Return every option that fits after the suite's neutral prompt, by its text as id: equal options share a row."""
    neutral = suite.record.neutral
    if neutral is None:
        return []
    options = sorted({option for one in items for option in options_of(one)})
    found = (_fitting(engine, ClozeItem(option, option, neutral, option), suite.name, invocation) for option in options)
    return [one for one in found if one is not None]


def _fitting(engine: Engine, item: Item, name: str, invocation: Sequence[int]) -> Prepared | None:
    """Return an item as rows with the invocation in them; None if it does not fit, or holds nothing to score."""
    found = _rows_of(engine, item, name)
    if found is None:
        return None
    found = replace(found, rows=tuple(row.invoked(invocation) for row in found.rows))
    return found if all(len(row.tokens) <= engine.context_length for row in found.rows) else None


def _rows_of(engine: Engine, item: Item, name: str) -> Prepared | None:
    match item:
        case ChoiceItem():
            return _choice(engine, item)
        case ClozeItem():
            return _continuation(engine, item)
        case TextItem():
            return _text(engine, item)
        case ChatItem() | AnswerItem():
            raise UsageError(f"suite {name} holds items whose likelihood is not scored", where=name)


def _text(engine: Engine, item: TextItem) -> Prepared | None:
    if item.given:
        given, whole = tuple(engine.tokenize(item.given)), tuple(engine.tokenize(item.given + item.text))
        return _after(item, whole, shared=_common([given, whole]), size=len(item.text.encode()))
    tokens = tuple(engine.tokenize(item.text))
    skipped = len(engine.detokenize(tokens[:1]).encode())
    return _after(item, tokens, shared=min(1, len(tokens)), size=max(len(item.text.encode()) - skipped, 1))


def _continuation(engine: Engine, item: ClozeItem) -> Prepared | None:
    prompt, whole = tuple(engine.tokenize(item.prompt)), tuple(engine.tokenize(f"{item.prompt} {item.answer}"))
    return _after(item, whole, shared=_common([prompt, whole]), size=len(item.answer.encode()))


def _after(item: Scored, whole: tuple[int, ...], *, shared: int, size: int) -> Prepared | None:
    """Score what stands after the shared tokens; None if that is nothing, or nothing is before it."""
    if not 0 < shared < len(whole):
        return None
    return Prepared(item, (Row(whole[:-1], shared - 1),), (Span(0, whole[shared:]),), (size,))


def _choice(engine: Engine, item: ChoiceItem) -> Prepared | None:
    """Score options from where their tokens part."""
    wholes = [tuple(engine.tokenize(f"{item.prompt} {option}")) for option in item.options]
    # A tokenizer may join the prompt's end with the option's beginning: what all share is the prompt.
    shared = _common([tuple(engine.tokenize(item.prompt)), *wholes])
    if shared == 0 or any(len(whole) <= shared for whole in wholes):
        return None
    return competing(item, wholes, shared)


def competing(item: ChoiceItem, wholes: Sequence[tuple[int, ...]], shared: int) -> Prepared:
    """Return options as rows; one whose row begins another's needs no row of its own.

    Args:
        wholes: tokens of each option, after those of the prompt.
        shared: how many all of them share.
    """
    rows: list[tuple[int, ...]] = []
    spans: dict[int, Span] = {}
    for at in sorted(range(len(wholes)), key=lambda at: -len(wholes[at])):
        needed = wholes[at][:-1]
        holder = next((number for number, row in enumerate(rows) if row[: len(needed)] == needed), len(rows))
        if holder == len(rows):
            rows.append(needed)
        spans[at] = Span(holder, wholes[at][shared:])
    sizes = tuple(len(option.encode()) for option in item.options)
    ordered = tuple(spans[at] for at in range(len(wholes)))
    return Prepared(item, tuple(Row(row, shared - 1) for row in rows), ordered, sizes)


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def score(
    engine: Engine, items: Sequence[Prepared], use: Use, advance: Callable[[float], None]
) -> list[tuple[Likelihood, ...]]:
    """Return how likely every span of every item is.

    Raises:
        BrokenInput: the model gives no finite number for some item.
    """
    # Like lengths together, for an engine that pads; rows of an item together, for one that reads what they share once.
    order = sorted(range(len(items)), key=lambda at: -max(len(row.tokens) for row in items[at].rows))
    flat = [(at, number) for at in order for number in range(len(items[at].rows))]
    rows = [items[at].rows[number] for at, number in flat]
    found: list[dict[int, Likelihood]] = [{} for _ in items]
    for (at, number), row, logits in zip(flat, rows, logits_of(engine, rows, use), strict=True):
        for place, span in enumerate(items[at].spans):
            if span.row == number:
                found[at][place] = _likelihood(logits, span.tokens, items[at].item.id)
        advance(len(row.tokens))
    return [tuple(spans[place] for place in range(len(spans))) for spans in found]


def _likelihood(logits: Logits, tokens: Sequence[int], name: str) -> Likelihood:
    """Return ln p of tokens, predicted by the first rows of the logits, and how sure the least sure of them was."""
    rows = logits[: len(tokens)]
    places = np.arange(len(tokens)), list(tokens)
    highest = rows.max(axis=-1, keepdims=True)
    # float32 exponentials, summed in float64: off by 1e-7 a token, at a fifth of the cost.
    sums = np.exp(rows - highest).sum(axis=-1, dtype=np.float64)
    picked: NDArray[np.float64] = rows[places].astype(np.float64) - highest[:, 0]
    value = float((picked - np.log(sums)).sum())
    if not math.isfinite(value):
        raise not_finite(name)
    lead = float(picked.min())
    if lead == 0.0:  # all are the likeliest ones: by how much
        lead = float((highest[:, 0] - np.partition(rows, -2, axis=-1)[:, -2]).min())
    return Likelihood(value, lead)


def options_of(one: Prepared) -> frozenset[str]:
    """Return the options of a choice; other items have none."""
    return frozenset(one.item.options) if isinstance(one.item, ChoiceItem) else frozenset()


def choice_score(
    one: Prepared, item: ChoiceItem, found: Sequence[Likelihood], scoring: Scoring, apart: Mapping[str, float]
) -> ChoiceScore:
    """Let a choice's options compete.

    Args:
        apart: ln p of options after the neutral prompt, where the scoring is "pmi".
    """
    logprobs = tuple(likelihood.logprob for likelihood in found)
    match scoring:
        case "per byte":
            scores = [logprob / size for logprob, size in zip(logprobs, one.bytes, strict=True)]
        case "whole":
            scores = list(logprobs)
        case "pmi":
            scores = [logprob - apart[option] for logprob, option in zip(logprobs, item.options, strict=True)]
    picked = max(range(len(scores)), key=lambda at: scores[at])
    wrong = max(value for at, value in enumerate(scores) if at != item.answer)
    margin = scores[item.answer] - wrong
    return ChoiceScore(item.id, item.group, picked == item.answer, picked, margin, logprobs, one.bytes)


def cloze_score(one: Prepared, found: Likelihood) -> ChoiceScore:
    """Tell whether greedy decoding would have given a cloze's answer."""
    right = found.lead > 0
    return ChoiceScore(one.item.id, one.item.group, right, 0 if right else -1, found.lead, (found.logprob,), one.bytes)


def batches(engine: Engine, rows: Sequence[Row]) -> Iterator[list[int]]:
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


def logits_of(engine: Engine, rows: Sequence[Row], use: Use) -> Iterator[Logits]:
    """Yield each row's logits from where they are wanted."""
    return engine.logits_batch([row.tokens for row in rows], use, firsts=[row.first for row in rows])


def not_finite(name: str) -> BrokenInput:
    """Return the error of a model that computes no probability for an item."""
    return BrokenInput(
        f"the model gives no finite probability for item {name}",
        cure="the adapter or the base is damaged: train it again at a lower rate, or check the file's digest",
    )
