"""How this process gets memory from the system, and gives it back."""

import ctypes
import gc
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGE = 1 << 20  # bytes; what is this large comes from the system and goes back to it

_M_MMAP_THRESHOLD = -3  # of malloc.h


def give_back_freed_memory() -> None:
    """Keep large blocks that were freed from staying in this process; call it once, when a program begins.

    glibc raises the size from which it asks the system itself to that of the largest block freed so far. Buffers of
    adapters and of compute graphs, which grow with every adapter, then lie in its heap and leave holes: a further
    adapter of 9.8 MB took 16 MB of resident memory, and takes 11 MB with this. Other C libraries are left alone.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def resident_bytes() -> int:
    """Return what this process has in memory, mapped files included; where that is not told, the most it ever had."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


@dataclass(frozen=True)
class Held:
    """What this process has in memory, by where it comes from."""

    anonymous: int  # bytes that no file holds
    files: Mapping[str, int]  # bytes of mapped files, by name: the system takes such pages back as it likes

    def since(self, before: "Held") -> int:
        """Return the bytes that came since then: of no file, or of files that were not mapped before."""
        mapped = sum(size for name, size in self.files.items() if name not in before.files)
        return self.anonymous - before.anonymous + mapped


def held() -> Held:
    """Return what this process has in memory; where its parts are not told apart, all of it is of no file.

    Garbage, and what lies free in glibc's heap, is given back first: nobody holds it. What is loaded into its place
    would come for nothing, and what goes later would count against what comes.
    """
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return Held(resident_bytes(), {})
    files: Counter[str] = Counter()
    anonymous, name = 0, ""
    for line in lines:
        key, _, value = line.partition(":")
        if key in ("Rss", "Anonymous"):
            size = int(value.split()[0]) * 1024
            if name:
                files[name] += size if key == "Rss" else -size  # a page that was written to is of no file any more
            anonymous += size * (key == "Anonymous")
        elif "-" in key.partition(" ")[0]:  # a mapping begins: addresses, rights, offset, device, inode, file
            name = next(iter(line.split(maxsplit=5)[5:]), "")
    return Held(anonymous, files)


def peak_bytes() -> int:
    """Return the most this process ever had in memory, mapped files included."""
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
