"""Where rows come from: JSONL, CSV, Parquet, or a data set of the Hugging Face hub; one mapping a row."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pitstop.errors import DatasetError, MissingExtra, UsageError

MAX_PROBLEMS = 20  # listed one by one; more are counted
HUB = re.compile(r"hub:(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")
FORM = 'a row is {"prompt": "…", "completion": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'

Parsed = TypeVar("Parsed")
Raw = tuple[str, Callable[[], Any]]  # "line 3", and what reads it; raises ValueError


def is_hub(source: Path) -> bool:
    """Whether a source names a data set of the hub: `hub:owner/name`, then `:config`, `@revision`, `#split`."""
    return str(source).startswith("hub:")


def read(
    source: Path, parse: Callable[[Any, int], Parsed], columns: Mapping[str, str] | None = None, *, form: str = FORM
) -> tuple[list[Parsed], int]:
    """Read every row of a source; return what ``parse`` made of them, and how many there are.

    Args:
        source: a file, read by its suffix (.csv, .parquet, else JSONL), or `hub:…`.
        parse: makes something of a row and its number; raises ValueError with what is wrong.
        columns: our name of a column -> the source's.
        form: what a row is to look like, for the message.

    Raises:
        UsageError: no such file or data set.
        MissingExtra: what reads it is not installed.
        DatasetError: every bad row at once, with its number.
    """
    parsed, problems, count = [], [], 0
    for count, (place, load) in enumerate(_raw(source), 1):
        try:
            parsed.append(parse(_renamed(load(), columns or {}), count))
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
        raise DatasetError(
            f"{len(problems)} of {count} rows cannot be used:" + "".join(f"\n  - {line}" for line in shown),
            where=source,
            cure=f"{form}; columns of other names are given in [data] columns",
        )
    return parsed, count


def _raw(source: Path) -> Iterator[Raw]:
    if is_hub(source):
        return _hub(str(source))
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        return _parquet(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the dataset: {error.strerror}", where=source) from error
    return _csv(content, source) if suffix == ".csv" else _jsonl(content)


def _jsonl(content: bytes) -> Iterator[Raw]:
    # Of bytes, for texts have more ends of lines than JSONL has: U+2028 may stand in a string.
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield f"line {number}", partial(_line, line)


def _line(line: bytes) -> Any:
    return _json(line.decode())


def _json(text: str) -> Any:
    data = json.loads(text)
    json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    return data


def _csv(content: bytes, source: Path) -> Iterator[Raw]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for row in reader:
            yield f"line {reader.line_num}", partial(_cells, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"not CSV in UTF-8: {error}", where=source, cure="save it as CSV, UTF-8") from error


def _cells(row: dict[str | None, Any]) -> dict[str, Any]:
    if None in row:
        raise ValueError("more cells than the header has columns")
    cells = {str(key): value for key, value in row.items() if value is not None}
    if "messages" in cells:
        cells["messages"] = _json(cells["messages"])
    return cells


def _parquet(source: Path) -> Iterator[Raw]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtra("reading Parquet", "data") from error
    try:
        table = parquet.read_table(source)
    except FileNotFoundError as error:
        raise UsageError("cannot read the dataset: no such file", where=source) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise DatasetError(f"not Parquet: {error}", where=source, cure="write it as Parquet again") from error
    return _of_table(table)


def _hub(source: str) -> Iterator[Raw]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("a data set of the hub", "data") from error
    named = HUB.fullmatch(source)
    if named is None:
        raise UsageError(f"{source!r} names no data set", cure="write hub:owner/name, then :config, @revision, #split")
    try:
        found = datasets.load_dataset(
            named["name"], named["config"], split=named["split"] or "train", revision=named["revision"]
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot load the data set: {said}",
            where=source,
            cure="check the name, the split and the connection; or download it and name a Parquet or JSONL file",
        ) from error
    return _of_table(found.with_format("arrow")[:])


def _of_table(table: Any) -> Iterator[Raw]:
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", partial(dict, row)


def _renamed(data: Any, columns: Mapping[str, str]) -> Any:
    if not columns or not isinstance(data, dict):
        return data
    if missing := [theirs for theirs in columns.values() if theirs not in data]:
        raise ValueError(f"no column {missing[0]!r}; there are: {', '.join(map(str, data))}")
    return data | {ours: data[theirs] for ours, theirs in columns.items()}
