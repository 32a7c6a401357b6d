"""Rows to tokenized examples whose loss falls on the answers only, split by group."""

import hashlib
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.invocation import NEVER, active_from, with_invocation
from pitstop.engines.template import render
from pitstop.errors import DatasetError, UsageError, together
from pitstop.workshop import masks, sources, tables
from pitstop.workshop.recipe import Data
from pitstop.workshop.tables import Table


@dataclass(frozen=True)
class Row:
    """One line of a dataset: a conversation that ends with the answer to learn."""

    id: str
    messages: tuple[dict[str, str], ...]  # up to and including the answer
    group: str  # rows of one group never stand on both sides of a split

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """All that is said in it."""
        return " ".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Example:
    """A row as tokens, up to the last one that counts; the loss counts those of the answers."""

    tokens: tuple[int, ...]
    answer_start: int  # of the last answer, which ends with the tokens
    earlier: tuple[tuple[int, int], ...] = ()  # answers before it: from, until

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """All answers as token ranges (from, until)."""
        return (*self.earlier, (self.answer_start, len(self.tokens)))


@dataclass(frozen=True)
class Lengths:
    """How long rows are, in tokens."""

    rows: int
    median: int
    p95: int
    longest: int
    answers: float  # share of the tokens that the loss counts


@dataclass(frozen=True)
class Encoded:
    """Examples, and how many rows were left out for their length."""

    examples: tuple[Example, ...]
    too_long: int
    lengths: Lengths  # of all rows, those left out included


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out; no row stands in it twice, and no prompt on both sides."""

    train: list[Row]
    test: list[Row]
    duplicates: int  # rows that stood there before, word for word: left out
    conflicting: int  # prompts with more than one answer among the training rows: kept

    def __iter__(self) -> Iterator[list[Row]]:
        return iter((self.train, self.test))


def load_rows(source: Path, columns: Mapping[str, str] | None = None, table: Table | None = None) -> list[Row]:
    """Read rows of prompt and completion, or of chat messages, from JSONL, CSV, Parquet or the hub (`sources`).

    Args:
        table: the rows are those of a table, and become sentences (`tables`).

    Raises:
        UsageError: no such file.
        DatasetError: every bad line at once, with its number.
    """
    if table is None:
        rows, _ = sources.read(source, _row, columns)
    else:
        rows = _told_rows(source, columns or {}, table)
    if not rows:
        raise DatasetError("the dataset has no rows", where=source)
    return rows


def _told_rows(source: Path, columns: Mapping[str, str], table: Table) -> list[Row]:
    apart = {*columns, *columns.values()}

    def told(cells: Any, number: int) -> Row:
        return _row(tables.told(table, cells, apart), number)

    rows, _ = sources.read(source, told, columns, form=f"a row has a cell under {table.label!r} and under others")
    return rows


def split(rows: Sequence[Row], test_share: float) -> tuple[list[Row], list[Row]]:
    """Split rows into train and test by a hash of their group: the same rows always fall on the same side."""
    train: list[Row] = []
    test: list[Row] = []
    for row in rows:
        bucket = int(hashlib.sha256(row.group.encode()).hexdigest()[:8], 16) % 10_000
        (test if bucket < test_share * 10_000 else train).append(row)
    return train, test


def load_split(data: Data) -> Split:
    """Load train and test rows, each once, and refuse rows of one prompt on both sides.

    Raises:
        UsageError: a file is missing.
        DatasetError: bad rows of every file at once, an empty side, or a prompt that leaks from train into test.
    """
    with together() as load:
        rows = load(load_rows, data.train, data.columns, data.table)
        others = load(load_rows, data.test, data.columns, data.table) if data.test else []
    training, held_out = (rows, others) if data.test else split(rows, data.test_share)
    if not training or not held_out:
        raise DatasetError(
            f"the split leaves {len(training)} rows to train on and {len(held_out)} to test on",
            where=data.train,
            cure="give more rows, more groups, or a test file of your own ([data] test)",
        )
    seen = {_asked(row) for row in training}
    leaked = [row.id for row in held_out if _asked(row) in seen]
    if leaked:
        raise DatasetError(
            f"{len(leaked)} test prompts also stand in the training rows (first: {leaked[0]})",
            where=data.test or data.train,
            cure="remove them from one side, or give rows of one source the same group",
        )
    once, test_once = _distinct(training), _distinct(held_out)
    duplicates = len(training) - len(once) + len(held_out) - len(test_once)
    asked = Counter(_asked(row) for row in once)
    return Split(once, test_once, duplicates, sum(count > 1 for count in asked.values()))


def _distinct(rows: Sequence[Row]) -> list[Row]:
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(tuple((message["role"], message["content"]) for message in row.messages), row)
    return list(first.values())


def _asked(row: Row) -> tuple[tuple[str, str], ...]:
    # The whole conversation: "yes, please" asks for something else in another one. A system message is no question,
    # and other capitals or spaces make no other question.
    said = (message for message in row.prompt if message["role"] != "system")
    return tuple((message["role"], " ".join(message["content"].casefold().split())) for message in said)


def spread(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """Choose rows evenly over the groups: one of each group in turn, in a fixed order."""
    order = random.Random(seed)
    groups: dict[str, list[Row]] = {}
    for row in order.sample(list(rows), len(rows)):
        groups.setdefault(row.group, []).append(row)
    chosen: list[Row] = []
    while len(chosen) < min(count, len(rows)):
        for members in groups.values():
            if members and len(chosen) < count:
                chosen.append(members.pop())
    return chosen


def prompt_text(row: Row, prompting: Prompting) -> str:
    """Return the rendered prompt of a row, up to where the answer begins."""
    return render(prompting, row.prompt)


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompting: Prompting,
    max_tokens: int,
    *,
    one_answer: bool = False,
) -> Encoded:
    """Tokenize rows; what is over ``max_tokens`` is left out and counted, never cut.

    A row gives one example with all its answers, or one for each where its turns need it (`masks.conversations`).

    Raises:
        DatasetError: no row fits, or every row the chat template refuses.
    """
    found: list[Example] = []
    refused = []
    for row in rows:
        try:
            found += _examples(row, tokenizer, prompting, one_answer)
        except UsageError as error:
            refused.append(f"\n  - row {row.id}: {error.what}")
    if refused:
        raise DatasetError(
            f"{len(refused)} rows cannot be rendered:" + "".join(refused[: sources.MAX_PROBLEMS]),
            cure="write their messages in the order of roles that the base's chat template knows",
        )
    examples = tuple(example for example in found if len(example.tokens) <= max_tokens)
    lengths = _lengths(found)
    if not examples:
        raise DatasetError(
            f"every row is longer than {max_tokens} tokens (longest: {lengths.longest})",
            cure="raise [data] max_tokens",
        )
    return Encoded(examples, len(found) - len(examples), lengths)


def _lengths(examples: Sequence[Example]) -> Lengths:
    tokens = sorted(len(example.tokens) for example in examples)
    counted = sum(until - begin for example in examples for begin, until in example.answers)
    return Lengths(
        rows=len(tokens),
        median=int(statistics.median_low(tokens)),
        p95=tokens[(len(tokens) - 1) * 95 // 100],
        longest=tokens[-1],
        answers=round(counted / sum(tokens), 4),
    )


def check_invocation(examples: Sequence[Example], invocation: Sequence[int], text: str) -> None:
    """Refuse rows in which an activated adapter would not act when the answer begins.

    Raises:
        DatasetError: how many lack its invocation.
    """
    lacking = sum(active_from(row.tokens[: row.answer_start], invocation) == NEVER for row in examples)
    if lacking:
        raise DatasetError(
            f"{lacking} of {len(examples)} rows do not have the invocation {text!r} before their answer",
            cure="take what the chat template puts before every answer, its special tokens included",
        )


def encode_general(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompting: Prompting,
    max_tokens: int,
    invocation: Sequence[int] = (),
) -> list[Example]:
    """Tokenize general rows (text, or prompt and completion), cut to ``max_tokens`` words of their own.

    Rows without the invocation of an activated adapter get it put before them: it is to change nothing there.

    What the chat template opens every conversation with is neither counted nor scored: it is the same in all of them,
    and long enough to leave short rows nothing else. From there on every token counts, a prompt's too: what the base
    would say next is known everywhere.

    Raises:
        UsageError: no such file.
        DatasetError: every line that is neither, or none that holds anything to score.
    """

    anybody = tokenizer(render(prompting, [{"role": "user", "content": "?"}]), add_special_tokens=False)["input_ids"]

    def encoded(data: Any, number: int) -> Example:
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            tokens, opening = tuple(tokenizer(data["text"], add_special_tokens=False)["input_ids"]), 1
        else:
            tokens = list(_examples(_row(data, number), tokenizer, prompting, one_answer=False))[-1].tokens
            same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, anybody, strict=False))
            opening = max(1, len(list(same)))
        invoked = with_invocation(tokens, invocation)
        opening += len(invoked) - len(tokens)
        return Example(invoked[: opening + max_tokens], opening)

    found, _ = sources.read(path, encoded)
    examples = [example for example in found if example.answer_start < len(example.tokens)]
    if not examples:
        raise DatasetError("no general row has anything to score", where=path)
    return examples


def general_texts(path: Path) -> list[str]:
    """Return what general rows say.

    Raises:
        UsageError: no such file.
        DatasetError: every line that is no general row.
    """

    def text_of(data: Any, number: int) -> str:
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            return str(data["text"])
        return _row(data, number).text

    texts, _ = sources.read(path, text_of)
    return texts


def _examples(
    row: Row, tokenizer: PreTrainedTokenizerBase, prompting: Prompting, one_answer: bool
) -> Iterator[Example]:
    for pieces in masks.conversations(prompting, row.messages, one_answer=one_answer):
        tokens: list[int] = []
        answers = []
        for piece in pieces:
            begin = len(tokens)
            tokens += tokenizer(piece.text, add_special_tokens=False)["input_ids"]
            if piece.answer and len(tokens) > begin > 0:
                answers.append((begin, len(tokens)))
        if answers:  # a row without has nothing to learn from
            yield Example(tuple(tokens), answers[-1][0], tuple(answers[:-1]))


def _row(data: Any, number: int) -> Row:
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    if "messages" in data:
        if not isinstance(data["messages"], list):
            raise ValueError("messages must be a list")
        messages = tuple(data["messages"])
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError("every message needs a role and a content, both text")
        if not messages or messages[-1]["role"] != "assistant" or all(m["role"] != "user" for m in messages):
            raise ValueError("messages must end with the assistant's answer to something")
    else:
        for key in ("prompt", "completion"):
            if not isinstance(data.get(key), str):
                raise ValueError(f"no {key} among {', '.join(map(str, data)) or 'nothing'}")
        messages = (
            {"role": "user", "content": data["prompt"]},
            {"role": "assistant", "content": data["completion"]},
        )
    if not messages[-1]["content"].strip():
        raise ValueError("the answer is empty")
    prompt = messages[-2]["content"]
    return Row(str(data.get("id", number)), messages, str(data.get("group", prompt)))
