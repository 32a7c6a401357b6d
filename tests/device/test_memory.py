"""What is freed goes back to the system."""

import platform
import subprocess
import sys

import pytest

BLOCK = 2 << 20
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
@pytest.mark.parametrize(("setting", "from_the_system"), [("with", "True"), ("without", "False")])
def test_a_large_block_comes_from_the_system_after_one_was_freed(setting: str, from_the_system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_AFTER_A_FREE, setting], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == from_the_system
