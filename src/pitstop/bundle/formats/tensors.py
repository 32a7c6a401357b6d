"""What every reader of a model file's header gives and goes by."""

import stat
from dataclasses import dataclass
from pathlib import Path

from pitstop.errors import FormatError

MAX_ENTRIES = 65_536  # metadata keys, and tensors
MAX_ELEMENTS = 1 << 63
CURE = "fetch or export the file again; do not load it"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, by its header."""

    name: str
    shape: tuple[int, ...]  # as the format orders it: GGUF fastest first, others slowest first
    type: str  # "F32", "Q4_1" …
    offset: int  # bytes from the start of the tensor data
    size: int  # bytes


def regular_size(path: Path) -> int:
    """Return the bytes of a file.

    Raises:
        FormatError: it is no regular file: a FIFO would block, a device never end.
        OSError: it cannot be asked.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path.name} is no regular file", where=path)
    return status.st_size
