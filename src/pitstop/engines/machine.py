"""What the machine has for an engine: cores and memory."""

import os
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Return how many cores this process may use."""
    with suppress(AttributeError):  # macOS has no affinity
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes() -> int | None:
    """Return how much memory programs can have without making the machine swap; None: not known here."""
    with suppress(OSError, ValueError, StopIteration), Path("/proc/meminfo").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return None
