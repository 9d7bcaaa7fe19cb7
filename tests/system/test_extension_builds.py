"""Locks of PyTorch's extension builds: a dead one is taken away, a live one is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from posttrain.system import extension_builds
from posttrain.system.extension_builds import holder, is_dead, watched_builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the lock of an extension in a root of its own; locks are spoken of at once."""
    monkeypatch.setattr(extension_builds, "PATIENCE", 0.0)
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "cpu_adam" / "lock"


def test_a_lock_that_nobody_holds_is_taken_away(lock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    lock.touch()
    start = time.monotonic()
    with watched_builds(tmp_path):
        FileBaton(str(lock)).wait()  # PyTorch's own wait, without end while the lock is there
    assert time.monotonic() - start < 10 and not lock.exists()
    assert "was left by a build that was interrupted: it is removed" in capfd.readouterr().err


def test_the_lock_of_a_build_here_stays_and_is_named(lock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    with watched_builds(tmp_path):
        time.sleep(0.7)
        assert lock.exists() and holder(lock) == os.getpid() and not is_dead(lock)
    baton.release()
    said = capfd.readouterr().err
    assert said == f"cpu_adam is compiled in {lock.parent}: once on a machine, for about three minutes\n"


def test_the_lock_of_another_process_lives_as_long_as_the_process(lock: Path, tmp_path: Path, capfd):
    program = f"import time; held = open({str(lock)!r}, 'x'); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as build:
        assert build.stdout is not None and build.stdout.readline() == b"held\n"
        with watched_builds(tmp_path):
            time.sleep(0.7)
            assert lock.exists()
            build.kill()
            build.wait()
            FileBaton(str(lock)).wait()
    said = capfd.readouterr().err
    assert f"waiting for cpu_adam, which process {build.pid} compiles" in said and "it is removed" in said


def test_on_a_network_disk_a_young_lock_may_be_another_machines(lock: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extension_builds, "NETWORK", ("",))  # every file system counts as one
    lock.touch()
    assert not is_dead(lock)
    os.utime(lock, (0, time.time() - 601))
    assert is_dead(lock)
