"""What becomes of the memory that a wide pass has freed, by what the system says a process holds."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others do otherwise")

PASSES = """
import ctypes, psutil, sys
from workers import memory

libc, size = ctypes.CDLL(None), 8 * 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def a_pass():  # many activations of some MiB at a time, none of them kept
    rows = [libc.malloc(size) for _ in range(30)]
    for row in rows:
        ctypes.memset(row, 1, size)
    for row in rows:
        libc.free(row)

def held():
    return psutil.Process().memory_info().rss // 2**20

asked = memory.keep() if "keep" in sys.argv else None
before = held()
for _ in range(3):
    a_pass()
kept = held()
memory.give_back()
print(asked, kept - before, held() - before)
"""


def mib_held(*words: str) -> tuple[int, int]:
    """After passes, and after what is free was given back."""
    ran = subprocess.run([sys.executable, "-c", PASSES, *words], check=True, capture_output=True, text=True)
    asked, kept, left = ran.stdout.split()
    assert asked == str(True if words else None)
    return int(kept), int(left)


def test_a_pass_finds_the_memory_of_the_one_before_until_a_model_goes():
    kept, left = mib_held("keep")
    assert kept > 200  # of 240
    assert left < 40


def test_by_itself_the_library_gives_it_back_after_each():
    kept, _ = mib_held()
    assert kept < 40
