"""Tests of processes: a launch that would silently be one process is refused, and errors reach other processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from posttrain.errors import UserError, VerifierError
from posttrain.system.processes import _portable, refuse_hidden_single_process, refuse_lost_processes, refuse_plugins


def test_a_launch_that_would_hide_processes_is_refused():
    """The environments are those of ``accelerate launch --cpu --num_processes 2`` and of torchrun."""
    with pytest.raises(UserError, match="--multi_gpu --num_processes"):
        refuse_hidden_single_process({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"})
    refuse_hidden_single_process({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "RANK": "0"})
    refuse_hidden_single_process({"ACCELERATE_USE_CPU": "True"})


def test_ranks_that_would_train_alone_are_refused():
    with pytest.raises(UserError, match="WORLD_SIZE=2"):
        refuse_lost_processes({"WORLD_SIZE": "2"}, 1)
    refuse_lost_processes({"WORLD_SIZE": "2"}, 2)
    refuse_lost_processes({}, 1)


def test_errors_reach_other_processes_whole():
    """An error that cannot be rebuilt in another process arrives with its type and message."""
    error = VerifierError("math", "raised ValueError: no", "data.jsonl:3", {"answer": 1}, "text", "trace")
    copied = pickle.loads(pickle.dumps(_portable(error)))
    assert type(copied) is VerifierError and str(copied) == str(error) and copied.place == "data.jsonl:3"

    class Local(Exception):
        pass

    assert str(_portable(Local("said"))) == "Local: said"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context or sequence parallelism"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "`policy.dtype` in the recipe"),
        ({"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"}, "does not go with `--use_deepspeed`"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(variables: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        refuse_plugins(variables)
    refuse_plugins(
        {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}
    )


LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[3]]).wait()
"""
LAUNCHED = """
import sys, time
from pathlib import Path
from posttrain.errors import Stopped
from posttrain.system.interrupts import end_by_signals
from posttrain.system.launcher import end_with_launcher
note = Path(sys.argv[1])
try:
    with end_by_signals():
        end_with_launcher()
        note.write_text("running")
        time.sleep(60)
except Stopped as stopped:
    note.write_text(str(stopped.code))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
@pytest.mark.parametrize(("name", "code"), [("accelerate", "143"), ("mine", "running")])
def test_a_run_ends_with_its_launcher(tmp_path: Path, name: str, code: str):
    (tmp_path / name).write_text(LAUNCHER, encoding="utf-8")
    note = tmp_path / "note"
    launcher = subprocess.Popen([sys.executable, tmp_path / name, "launch", LAUNCHED, note])
    (run,) = wait_for(lambda: note.is_file() and psutil.Process(launcher.pid).children())
    launcher.kill()  # it gets no chance to pass anything on
    launcher.wait()
    if code == "running":  # such as a run under a shell that is closed
        time.sleep(0.5)
        run.kill()
    psutil.wait_procs([run], timeout=20)
    assert note.read_text(encoding="utf-8") == code


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result
