"""What both demo datasets share: the row, the three files, and the card written last that vouches for them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitstop.errors import PitstopError
from pitstop.files import sha256_file, write_bytes
from pitstop.records import load_json, save_json

SPLITS = ("train", "valid", "test")
CARD = "dataset.json"


@dataclass(frozen=True)
class Row:
    """One example; rows of one group never meet in two splits."""

    id: str
    prompt: str
    completion: str
    group: str


@dataclass(frozen=True)
class DatasetCard:
    """Where a dataset comes from, how it was split, and the digests of its files."""

    name: str
    description: str
    licence: str
    source: list[str]  # requirement, and the file of it that was read
    builder: str  # SHA-256 of the code that wrote the rows
    seed: int
    split_rule: str
    counts: dict[str, int]  # rows by split
    sha256: dict[str, str]  # by file name


def compact(record: Mapping[str, Any]) -> str:
    """Return the one JSON text of a record: no spaces, keys in the order given."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def write(folder: Path, splits: Mapping[str, Sequence[Row]], **about: Any) -> DatasetCard:
    """Write the rows of every split and, last, the card that names them.

    Raises:
        StorageError: the disk refused.
    """
    digests = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        write_bytes(path, "".join(compact(vars(row)) + "\n" for row in splits[split]).encode())
        digests[path.name] = sha256_file(path)
    counts = {split: len(splits[split]) for split in SPLITS}
    card = DatasetCard(counts=counts, sha256=digests, **about)
    save_json(card, folder / CARD)
    return card


def builder_digest(*modules: str) -> str:
    """Return one digest of the code that makes a dataset: the named files, and this one."""
    return hashlib.sha256("".join(sha256_file(Path(module)) for module in (*modules, __file__)).encode()).hexdigest()


def finished(folder: Path, builder: str, source: Sequence[str]) -> DatasetCard | None:
    """Return the card of a dataset that this very code already built here from this source, else None."""
    try:
        card = load_json(DatasetCard, folder / CARD)
        whole = all(sha256_file(folder / name) == digest for name, digest in card.sha256.items())
    except PitstopError:
        return None
    return card if whole and (card.builder, card.source) == (builder, list(source)) else None
