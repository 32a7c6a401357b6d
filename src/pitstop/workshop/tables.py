"""Rows of a table as language, and what stands in one column as the answer.

    "Petal length is 1.4 cm, petal width is 0.2 cm. What is the species?"  →  "setosa"

After LIFT (Dinh et al., NeurIPS 2022, arXiv 2206.06565): names and units say what a number means, which a model has
read about. A class is answered by a word, a number by digits of one width, so that each digit has its place.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pitstop.workshop import sources

MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "?"})  # cells that say nothing, in any case
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # 007 and E5 are names
LARGEST = 1e15  # number that is told digit by digit; a larger one as it is written
NAMED_UNIT = re.compile(r"(?P<name>.+?)\s*\((?P<unit>[^()]+)\)")


@dataclass(frozen=True)
class Table:
    """The `[data.table]` table of a recipe."""

    label: str  # column that is asked for
    units: dict[str, str] = field(default_factory=dict)  # column -> unit; "petal length (cm)" has one already
    words: dict[str, str] = field(default_factory=dict)  # value of the label -> the word that names it
    range: tuple[float, float] | None = None  # the label is a number from the first to the second, in its own unit
    decimals: int = 0  # of such a label
    digits: int = 4  # significant ones of the numbers that are told
    leave_out: tuple[str, ...] = ()  # columns that are not told

    @property
    def question(self) -> str:
        """What is asked at the end of a row."""
        return f"What is the {_words(_name(self.label))}?"


def problems(table: Table) -> list[str]:
    """Return what cannot be meant."""
    found = []
    if table.label in table.leave_out:
        found.append(f"leave_out: {table.label!r} is the label, which is never told")
    if not 1 <= table.digits <= 9:
        found.append(f"digits: {table.digits} must be from 1 to 9")
    if not 0 <= table.decimals <= 6:
        found.append(f"decimals: {table.decimals} must be from 0 to 6")
    if table.range is not None and not -1e12 < table.range[0] < table.range[1] < 1e12:
        found.append(f"range: {list(table.range)} must be the least and the greatest value")
    if table.range is not None and table.words:
        found.append("words: a label with a range is a number, which no word names")
    if table.range is None and table.decimals:
        found.append("decimals: only a number has them; give its range")
    clashes = sorted(word for word, count in Counter(table.words.values()).items() if count > 1)
    found += [f"words: {word!r} names two values" for word in clashes]
    return found


def told(table: Table, cells: Any, apart: Collection[str] = ()) -> dict[str, Any]:
    """Return a row as prompt and completion; its id and group are kept.

    Args:
        cells: a mapping of columns to values.
        apart: columns that are none of the table's own: id and group, under any name.

    Raises:
        ValueError: it is no row of this table, with the reason.
    """
    prompt = asked(table, cells, apart)
    if table.label not in cells:
        raise ValueError(_absent(table.label, cells))
    kept = {key: cells[key] for key in ("id", "group") if key in cells and key in apart}
    return {"prompt": prompt, "completion": _answer(table, cells[table.label]), **kept}


def asked(table: Table, cells: Any, apart: Collection[str] = ()) -> str:
    """Return a row as the prompt alone, whether it has the label or not; arguments and errors as for `told`."""
    if not isinstance(cells, Mapping):
        raise ValueError("not a row with columns")
    if absent := [column for column in (*table.units, *table.leave_out) if column not in cells]:
        raise ValueError(_absent(absent[0], cells))
    silent = {table.label, *table.leave_out, *apart}
    parts = [_told(table, column, value) for column, value in cells.items() if column not in silent]
    sentence = ", ".join(part for part in parts if part)
    if not sentence:
        raise ValueError("every cell is empty")
    return f"{sentence[0].upper()}{sentence[1:]}. {table.question}"


def ask_rows(source: Path, table: Table, columns: Mapping[str, str], trained: Path) -> list[str]:
    """Return what to ask about further rows of a table, with the label or without.

    Args:
        columns: as for training: our name of an id or a group -> the table's.
        trained: the table of the training rows, whose columns a further row must have: what it says beside them, or
            leaves out, the adapter has never read.

    Raises:
        UsageError: no such file.
        DatasetError: every bad line at once, with its number.
    """
    apart = {*columns, *columns.values()}
    known, _ = sources.read(trained, lambda cells, _: frozenset(cells if isinstance(cells, Mapping) else ()))
    told = frozenset[str]().union(*known) - {table.label, *table.leave_out, *apart}
    always = told.intersection(*known)

    def ask(cells: Any, _: int) -> str:
        prompt = asked(table, cells, apart)
        if absent := sorted(always - set(cells)):
            raise ValueError(_absent(absent[0], cells))
        if unknown := [column for column in cells if column not in {*told, table.label, *table.leave_out, *apart}]:
            raise ValueError(f"column {unknown[0]!r} is none of the training table's: {', '.join(sorted(told))}")
        return prompt

    form = f"a row has the cells of {trained.name}, and needs none under {table.label!r}"
    prompts, _ = sources.read(source, ask, form=form)
    return prompts


def _absent(column: str, cells: Mapping[Any, Any]) -> str:
    return f"no column {column!r}; there are: {', '.join(map(str, cells))}"


def _told(table: Table, column: str, value: Any) -> str:
    """Return what one cell says; nothing if it is empty."""
    text = _cell(value, table.digits)
    if text is None:
        return ""
    named = NAMED_UNIT.fullmatch(column)
    unit = table.units.get(column) or (named["unit"] if named else "")
    return " ".join(part for part in (_words(_name(column)), "is", text, unit) if part)


def _answer(table: Table, value: Any) -> str:
    text = _cell(value, 15)
    if text is None:
        raise ValueError(f"nothing stands under {table.label!r}, which is asked for")
    if table.range is None:
        return table.words.get(text, table.words.get(str(value), _words(text)))
    low, high = table.range
    number = _number(text)
    if number is None or not low <= number <= high:
        raise ValueError(f"{table.label!r} is {text}, which is no number from {low:g} to {high:g}")
    width = max(len(f"{bound:.{table.decimals}f}") for bound in (low, high))
    return f"{number:0{width}.{table.decimals}f}"


def _cell(value: Any, digits: int) -> str | None:
    """Return a value as text, numbers with so many significant digits; None if it says nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (Mapping, list, tuple)):
        raise ValueError("a cell holds a text or a number, not several")
    text = " ".join(str(value).split())
    if text.casefold() in MISSING:
        return None
    number = _number(text)
    if number is None or abs(number) >= LARGEST:
        return text
    rounded = float(f"{number:.{digits - 1}e}")
    if rounded == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    plain = f"{rounded:.{places}f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _number(text: str) -> float | None:
    if not NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _name(column: str) -> str:
    named = NAMED_UNIT.fullmatch(column)
    return named["name"] if named else column


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
