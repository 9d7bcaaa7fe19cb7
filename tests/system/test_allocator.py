"""Large blocks of memory are given back when they are freed, not kept in the heap between others."""

from __future__ import annotations

import subprocess
import sys

import pytest
from runs import environment

PROGRAM = """
import sys
from posttrain.system.allocator import give_back_large_blocks
if sys.argv[1] == "changed":
    assert give_back_large_blocks()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
largest = b"x" * (30 << 20)
del largest  # glibc now takes smaller blocks from its heap
blocks = [b"x" * (2 << 20) for _ in range(60)]
full = resident()
del blocks[::2]
print(full - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_blocks_between_others_are_given_back():
    freed = {}
    for kind in ("usual", "changed"):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True, env=environment()
        )
        freed[kind] = float(run.stdout)
    assert freed["changed"] > 50  # of 60 MiB
    assert freed["usual"] < 20
