"""How this process gets memory from the system, and gives it back."""

import ctypes
import resource
import sys
from contextlib import suppress
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


def peak_bytes() -> int:
    """Return the most this process ever had in memory, mapped files included."""
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
