"""The run folder: one process at a time, and what is complete for the same inputs is not done again."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pitstop import records
from pitstop.errors import Busy, RecordError, UsageError
from pitstop.files import sha256_file, storage_error

Result = TypeVar("Result")


@contextmanager
def exclusive(run: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the run folder; a second process is told (or waits) instead of mixing its files in.

    Raises:
        Busy: another process works on this run.
        StorageError: the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise storage_error(error, run) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy("another pitstop works on this run", where=run, cure="wait for it, or stop it") from error
        yield


def inputs_digest(*parts: Any) -> str:
    """Return a digest of records, texts and the content of files: whatever decides a stage's result."""
    digest = hashlib.sha256()
    for part in parts:
        plain = sha256_file(part) if isinstance(part, Path) else records.to_json(part).decode()
        digest.update(plain.encode() + b"\0")
        if not isinstance(part, (Path, str)):
            for value in vars(part).values():
                if isinstance(value, Path) and value.is_file():
                    digest.update(sha256_file(value).encode() + b"\0")
    return digest.hexdigest()


def finished(path: Path, kind: type[Result], inputs: str) -> Result | None:
    """Return a stage's result if it is complete and was made from the same inputs (its field ``inputs``)."""
    if not path.is_file():
        return None
    try:
        result = records.load_json(kind, path)
    except RecordError:
        return None  # of another pitstop version: made again
    return result if getattr(result, "inputs", None) == inputs else None


def require(path: Path, what: str, command: str) -> Path:
    """Return the path of an earlier stage's result.

    Raises:
        UsageError: it is not there, with the command that makes it.
    """
    if not path.exists():
        raise UsageError(f"no {what} yet", where=path, cure=f"run first: {command}")
    return path
