"""Memory of processes, as the system says it."""

from __future__ import annotations

import os
import subprocess
import sys

from posttrain.system.memory import peak_bytes, resident_bytes


def test_the_peak_is_the_process_s_own_and_not_of_the_one_that_started_it():
    held = b"1" * 200_000_000
    assert peak_bytes() >= resident_bytes() > len(held)
    code = "from posttrain.system.memory import peak_bytes; print(peak_bytes())"
    own = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1_000_000 < own < 150_000_000


def test_a_process_that_is_not_there_has_no_peak():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert peak_bytes(child.pid) == 0
    assert peak_bytes(os.getpid()) == peak_bytes()
