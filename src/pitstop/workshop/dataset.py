"""Rows to tokenized examples whose loss falls on the answer only, split by group."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.invocation import NEVER, active_from, with_invocation
from pitstop.engines.template import render
from pitstop.errors import DatasetError, UsageError

MAX_PROBLEMS = 20  # listed one by one; more are counted

Parsed = TypeVar("Parsed")


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
    """A row as tokens; the loss counts tokens from ``answer_start`` on."""

    tokens: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True)
class Encoded:
    """Examples, and how many rows were left out for their length."""

    examples: tuple[Example, ...]
    too_long: int
    longest: int  # tokens of the longest row


def load_rows(path: Path) -> list[Row]:
    """Read JSONL rows of prompt and completion, or of chat messages.

    Raises:
        UsageError: no such file.
        DatasetError: every bad line at once, with its number.
    """
    rows = _read_lines(path, _row)
    if not rows:
        raise DatasetError("the dataset has no rows", where=path)
    return rows


def split(rows: Sequence[Row], test_share: float) -> tuple[list[Row], list[Row]]:
    """Split rows into train and test by a hash of their group: the same rows always fall on the same side."""
    train: list[Row] = []
    test: list[Row] = []
    for row in rows:
        bucket = int(hashlib.sha256(row.group.encode()).hexdigest()[:8], 16) % 10_000
        (test if bucket < test_share * 10_000 else train).append(row)
    return train, test


def load_split(train: Path, test: Path | None, test_share: float) -> tuple[list[Row], list[Row]]:
    """Load train and test rows, and refuse rows of one prompt on both sides.

    Raises:
        UsageError: a file is missing.
        DatasetError: bad rows, an empty side, or a prompt that leaks from train into test.
    """
    if test is None:
        training, held_out = split(load_rows(train), test_share)
    else:
        training, held_out = load_rows(train), load_rows(test)
    if not training or not held_out:
        raise DatasetError(
            f"the split leaves {len(training)} rows to train on and {len(held_out)} to test on",
            where=train,
            cure="give more rows, more groups, or a test file of your own ([data] test)",
        )
    seen = {_asked(row) for row in training}
    leaked = [row.id for row in held_out if _asked(row) in seen]
    if leaked:
        raise DatasetError(
            f"{len(leaked)} test prompts also stand in the training rows (first: {leaked[0]})",
            where=test or train,
            cure="remove them from one side, or give rows of one source the same group",
        )
    return training, held_out


def _asked(row: Row) -> tuple[tuple[str, str], ...]:
    # The whole conversation: "yes, please" asks for something else in another one. A system message is no question.
    return tuple((message["role"], message["content"]) for message in row.prompt if message["role"] != "system")


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


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, prompting: Prompting, max_tokens: int) -> Encoded:
    """Tokenize rows; rows over ``max_tokens`` are left out and counted, never cut.

    Raises:
        DatasetError: no row fits.
    """
    examples, too_long, longest = [], 0, 0
    for row in rows:
        example = _example(row, tokenizer, prompting)
        longest = max(longest, len(example.tokens))
        if len(example.tokens) > max_tokens:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise DatasetError(
            f"every row is longer than {max_tokens} tokens (longest: {longest})", cure="raise [data] max_tokens"
        )
    return Encoded(tuple(examples), too_long, longest)


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
            tokens = _example(_row(data, number), tokenizer, prompting).tokens
            same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, anybody, strict=False))
            opening = max(1, len(list(same)))
        invoked = with_invocation(tokens, invocation)
        opening += len(invoked) - len(tokens)
        return Example(invoked[: opening + max_tokens], opening)

    found = _read_lines(path, encoded)
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

    return _read_lines(path, text_of)


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, prompting: Prompting) -> Example:
    prompt = tokenizer(prompt_text(row, prompting), add_special_tokens=False)["input_ids"]
    answer = tokenizer(row.answer + prompting.eos_token, add_special_tokens=False)["input_ids"]
    return Example((*prompt, *answer), len(prompt))


def _read_lines(path: Path, read: Callable[[Any, int], Parsed]) -> list[Parsed]:
    """Read every line of a JSONL file that is not blank; problems are gathered and raised together."""
    try:
        # Of bytes, for texts have more ends of lines than JSONL has: U+2028 may stand in a string.
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the dataset: {error.strerror}", where=path) from error
    parsed, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                data = json.loads(line.decode())
                json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
                parsed.append(read(data, number))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
        raise DatasetError(
            f"{len(problems)} of {len(lines)} rows cannot be used:" + "".join(f"\n  - {line}" for line in shown),
            where=path,
            cure='a line is {"prompt": "…", "completion": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}',
        )
    return parsed


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
                raise ValueError(f"no {key}")
        messages = (
            {"role": "user", "content": data["prompt"]},
            {"role": "assistant", "content": data["completion"]},
        )
    if not messages[-1]["content"].strip():
        raise ValueError("the answer is empty")
    prompt = messages[-2]["content"]
    return Row(str(data.get("id", number)), messages, str(data.get("group", prompt)))
