"""What is freed goes back to the system."""

import gc
import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pitstop.device.memory import held

BLOCK = 2 << 20
MIB = 1 << 20
BLOCKS_AFTER_A_FREE = f"""
import ctypes, sys
from pitstop.device import memory
if sys.argv[1] == "with":
    memory.give_back_freed_memory()

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes, libc.mallinfo2.restype = (ctypes.c_size_t,), (ctypes.c_void_p,), Info
libc.free(libc.malloc({BLOCK}))
before = libc.mallinfo2().hblkhd
block = libc.malloc({BLOCK})
print(libc.mallinfo2().hblkhd - before >= {BLOCK})
"""
HEAP_WITH_HOLES = """
import ctypes
from pitstop.device import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
SIZE = 100_000

def blocks():
    found = [libc.malloc(SIZE) for _ in range(300)]
    for block in found:
        ctypes.memset(block, 1, SIZE)
    return found

free = blocks()
last = libc.malloc(SIZE)
for block in free:
    libc.free(block)
before = memory.held()
blocks()
print(memory.held().since(before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
@pytest.mark.parametrize(("setting", "from_the_system"), [("with", "True"), ("without", "False")])
def test_a_large_block_comes_from_the_system_after_one_was_freed(setting: str, from_the_system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_AFTER_A_FREE, setting], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == from_the_system


def test_garbage_that_goes_later_does_not_count_against_what_comes() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself = self
            self.block = bytearray(b"x") * (30 * MIB)

    gc.disable()
    try:
        Loop()
        before = held()
    finally:
        gc.enable()
    gc.collect()
    block = bytearray(b"x") * (10 * MIB)
    assert held().since(before) >= 9 * MIB
    assert len(block) == 10 * MIB


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell mappings apart")
def test_what_came_is_counted_and_what_the_system_takes_back_is_not(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in one, two:
        with path.open("wb") as file:
            file.truncate(8 * MIB)
    with one.open("rb") as first, two.open("rb") as second:
        known = mmap.mmap(first.fileno(), 0, access=mmap.ACCESS_READ)
        touch(known, 8 * MIB)
        before = held()
        known.madvise(mmap.MADV_DONTNEED)
        new = mmap.mmap(second.fileno(), 0, access=mmap.ACCESS_READ)
        touch(new, 6 * MIB)
        block = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, 4 * MIB, mmap.PAGESIZE):
            block[at] = 1
        assert 9 * MIB <= held().since(before) < 14 * MIB


def touch(mapped: mmap.mmap, size: int) -> None:
    """Read something of every page, and copy none."""
    assert not any(mapped[at] for at in range(0, size, mmap.PAGESIZE))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its heap in another way")
def test_what_comes_into_free_places_of_the_heap_is_counted() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP_WITH_HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 25e6, "of 30 MB"
