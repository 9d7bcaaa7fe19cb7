"""Tests of what verifiers do to the machine: processes that they leave behind, floods of output, slow imports."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from posttrain.recipe.part import Part
from posttrain.recipe.resolve import resolve
from posttrain.verify import VerifierPool
from posttrain.verify import output as output_of_workers

VERIFIERS = """
import os, signal, subprocess, sys, time

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]

def note(pid):
    with open(__file__ + ".pids", "a") as file:
        file.write(f"{pid}\\n")

def daemon():
    if os.fork() == 0:          # the usual two forks, after which nobody is the parent
        os.setsid()
        if os.fork() == 0:
            note(os.getpid())
            time.sleep(300)
        os._exit(0)
    os.wait()

def leaves(completion):
    if completion in ("child", "killed", "stuck"):
        note(subprocess.Popen(SLEEP).pid)
    if completion in ("session", "killed", "stuck"):
        note(subprocess.Popen(SLEEP, start_new_session=True).pid)
    if completion == "daemon":
        daemon()
    if completion == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while completion == "stuck":
        pass
    return 1.0

def floods(completion):
    print("the first line")
    sys.stderr.write("x" * 3_000_000)      # without a line break
    subprocess.run(["head", "-c", "2000000", "/dev/zero"])
    return 1.0
"""


@pytest.fixture
def verifier(tmp_path: Path):
    """Makes a verifier of the file; its errors leave the completion unscored."""
    path = tmp_path / "own.py"
    path.write_text(VERIFIERS)

    def make(name: str, time_limit: float = 60.0) -> Part:
        spec = f"{path}:{name}"
        settings = {"name": name, "spec": spec, "time_limit": time_limit, "on_error": "skip"}
        return Part.of(resolve(spec), settings=settings)

    return make


def run(part: Part, texts: list[str]) -> None:
    with VerifierPool([part], workers=1) as pool:
        for text in texts:
            pool.submit(0, text, [], {})
            pool.collect()


@pytest.mark.engine
def test_processes_that_verifiers_leave_behind_end_with_the_pool(verifier, tmp_path: Path, capfd) -> None:
    run(verifier("leaves"), ["child", "session", "daemon", "killed"])
    pids = [int(line) for line in (tmp_path / "own.py.pids").read_text().split()]
    assert len(pids) == 5
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
    said = capfd.readouterr().err
    assert "verifiers left" in said and "behind (python" in said and "now ended" in said


@pytest.mark.engine
def test_a_worker_at_its_time_limit_takes_its_children_with_it(verifier, tmp_path: Path) -> None:
    with VerifierPool([verifier("leaves", time_limit=1.0)], workers=1) as pool:
        pool.submit(0, "stuck", [], {})
        pool.collect()
        pids = [int(line) for line in (tmp_path / "own.py.pids").read_text().split()]
        assert len(pids) == 2 and not any(map(running, pids)), "at once, and not only at the end of the run"


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.engine
def test_a_flood_of_output_is_cut_and_counted(verifier, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_of_workers, "MOST", 10_000)
    run(verifier("floods"), ["a", "b"])
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("the first line\nxxx") and len(said.err) < 10_500
    assert "... further output of verifiers is left out" in said.err
    assert "verifiers wrote 10.0 MB, of which 10.0 MB were left out" in said.err


def test_an_import_that_takes_long_is_said(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.system.long_work.QUIET", 0.05)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.4)\n\ndef check(completion):\n    return 1.0\n")
    resolve(f"{tmp_path / 'slow.py'}:check")
    assert "still importing slow.py, 0 s\n" in capsys.readouterr().err
    resolve(f"{tmp_path / 'slow.py'}:check")
    assert capsys.readouterr().err == "", "it is imported once"
