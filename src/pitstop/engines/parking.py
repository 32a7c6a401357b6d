"""Conversations that left the engine's memory: their state, kept within a budget, so that they come back unread.

The engine has few sequences; a conversation that has to make room is parked in RAM, and beyond that on disk. Whoever
continues it gets its state back, which costs a copy instead of an evaluation of all its tokens. Pure bookkeeping of
bytes: what they mean only the engine knows.
"""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pitstop.engines.sessions import Tag, common_prefix

State = NDArray[np.uint8]

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Parked:
    """A conversation outside of the engine."""

    tag: Tag
    tokens: list[int]
    size: int  # bytes
    state: State | None  # None: it lies on disk
    file: BinaryIO | None = None  # without a name: it is gone with the process, however that ends
    digest: bytes = b""  # of what lies on disk: only that is given to the engine again


class Parking:
    """Parked conversations, least recently used first."""

    def __init__(self, memory: int = 0, disk: int = 0, folder: Path | None = None) -> None:
        """Begin with none.

        Args:
            memory: bytes of state in RAM.
            disk: bytes of state in ``folder``, for what has no room in RAM.
        """
        self._budget = {"memory": memory, "disk": disk if folder is not None else 0}
        self._folder = folder
        self._parked: list[Parked] = []

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def bytes_in_memory(self) -> int:
        """State in RAM now."""
        return sum(parked.size for parked in self._parked if parked.state is not None)

    @property
    def bytes_on_disk(self) -> int:
        """State on disk now."""
        return sum(parked.size for parked in self._parked if parked.state is None)

    def has_room(self, size: int) -> bool:
        """Tell whether a state of so many bytes could be parked at all."""
        return 0 < size <= max(self._budget.values())

    def put(self, tag: Tag, tokens: Sequence[int], state: State) -> None:
        """Park a conversation; the least recently used ones leave for it."""
        if not self.has_room(len(state)):
            return
        self._parked.append(Parked(tag, list(tokens), len(state), state))
        self._settle()

    def _settle(self) -> None:
        while self.bytes_in_memory > self._budget["memory"]:
            self._to_disk(next(parked for parked in self._parked if parked.state is not None))
        while self.bytes_on_disk > self._budget["disk"]:
            self._forget(next(parked for parked in self._parked if parked.state is None))

    def _to_disk(self, parked: Parked) -> None:
        """Write one to disk; without room or luck there it is forgotten, which costs its conversation time only."""
        assert parked.state is not None
        if self._folder is None or parked.size > self._budget["disk"]:
            self._forget(parked)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as it is parked
            file.write(parked.state.data)
            file.flush()
        except OSError as error:
            _log.warning("a conversation could not be parked in %s: %s", self._folder, error)
            self._forget(parked)
            return
        parked.file, parked.digest, parked.state = file, _digest(parked.state), None

    def longest(self, tag: Tag, tokens: Sequence[int]) -> tuple[int, Parked | None]:
        """Return the parked conversation of this tag that shares most tokens with a prompt, and how many."""
        best: tuple[int, Parked | None] = (0, None)
        for parked in self._parked:
            common = common_prefix(parked, tag, tokens)
            if common > best[0]:
                best = common, parked
        return best

    def take(self, parked: Parked) -> State | None:
        """Return the state of one that comes back, which is parked no longer; None if the disk damaged it."""
        state = parked.state
        if parked.file is not None:
            parked.file.seek(0)
            state = np.frombuffer(parked.file.read(), np.uint8)
            if _digest(state) != parked.digest:
                _log.warning("a parked conversation is damaged on disk, and read anew")
                state = None
        self._forget(parked)
        return state

    def drop(self, adapter: str) -> None:
        """Forget whatever was computed under an adapter of this name."""
        for parked in [parked for parked in self._parked if adapter in parked.tag.names]:
            self._forget(parked)

    def clear(self) -> None:
        """Forget all, files included."""
        for parked in list(self._parked):
            self._forget(parked)

    def _forget(self, parked: Parked) -> None:
        self._parked.remove(parked)
        if parked.file is not None:
            parked.file.close()


def _digest(state: State) -> bytes:
    return hashlib.blake2b(state.data, digest_size=16).digest()
