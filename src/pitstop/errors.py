"""Everything pitstop raises on purpose.

    PitstopError                  exit code
    ├── Refused             1     a gate said no: the work is fine, the result is not
    ├── UsageError          2     asked for something that does not exist or cannot be done now
    │   ├── MissingExtra          an optional part of pitstop is not installed
    │   └── Busy                  another process holds the file, folder or port
    └── BrokenInput         3     a file, row or download is not what it must be
        ├── RecordError           a JSON or TOML record: every problem of it at once
        ├── FormatError           a GGUF, ONNX or safetensors file
        │   ├── NoEffect          an adapter that changes nothing
        │   └── NotFinite         an adapter, or a scale of one, under which the model computes no numbers
        ├── DatasetError          a row of a dataset or suite
        ├── BaseMismatch          an adapter and a base that do not belong together
        ├── Untrusted             metadata or bytes that fail verification
        │   └── WrongPiece        a piece of a file on its way in
        └── StorageError          the disk refused: full, read-only, unreadable

Foreign exceptions are translated where the foreign library is called, and nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class PitstopError(Exception):
    """What happened, where, and what to do next."""

    exit_code = 3

    def __init__(self, what: str, *, where: object = None, cure: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.cure = cure
        lines = [what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if cure:
            lines.append(f"  do:    {cure}")
        super().__init__("\n".join(lines))


class Refused(PitstopError):
    """A gate said no."""

    exit_code = 1


class UsageError(PitstopError):
    """The request names something that does not exist or cannot be done now."""

    exit_code = 2


class MissingExtra(UsageError):
    """A command needs an optional part of pitstop."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the '{extra}' part of pitstop", cure=f'pip install "pitstop[{extra}]"')


class Busy(UsageError):
    """Another process holds what this one needs."""


class BrokenInput(PitstopError):
    """A file, row or download is not what it must be."""


class RecordError(BrokenInput):
    """A JSON or TOML record with everything that is wrong in it."""

    def __init__(self, problems: Sequence[str], *, where: object = None, cure: str | None = None) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{count}:{listed}", where=where, cure=cure)


class FormatError(BrokenInput):
    """A model file whose header or tensors are not as the format demands."""


class NoEffect(FormatError):
    """An adapter with which the base computes what it computes without."""


class NotFinite(FormatError):
    """An adapter, or a scale of one, under which the model computes infinities or NaN."""


class DatasetError(BrokenInput):
    """A dataset or suite row that cannot be used."""


class BaseMismatch(BrokenInput):
    """An adapter and a base that do not belong together."""


class Untrusted(BrokenInput):
    """Metadata or bytes that fail verification."""


class WrongPiece(Untrusted):
    """A piece of a file that is not what was signed for: it is gone, what came before it stays."""


class StorageError(BrokenInput):
    """The disk refused: full, read-only or unreadable."""


@contextmanager
def together() -> Iterator[Callable[..., Any]]:
    """Do several things that may each find their input broken, and tell of all that is wrong at once.

    The given function calls another one with its arguments; what that raises is raised at the end of the block.

    Raises:
        PitstopError: the only one there was.
        BrokenInput: the text of all, if there were more.
    """
    found: list[PitstopError] = []

    def attempt(do: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return do(*arguments, **named)
        except PitstopError as error:
            found.append(error)
            return None

    yield attempt
    if len(found) == 1:
        raise found[0]
    if found:
        raise BrokenInput(f"{len(found)} problems:" + "".join(f"\n{error}" for error in found)) from found[0]
