"""Runs that are ended: by signals, by ``run.stop_after``, and by kills. Each goes on, with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from runs import environment, write_run
from test_training import wait_for_lines

from posttrain.commands.cli import main
from posttrain.output.run_folder import RunFolder, finished_steps
from posttrain.output.tracking import read_metrics


@pytest.mark.engine
def test_sigterm_saves_the_last_step_and_a_resumed_run_repeats_a_whole_one(tmp_path, tiny_model_folder):
    changes = {"steps": 30, "evaluate": {"data": {"path": "data.jsonl"}, "every": 4}}
    recipe = write_run(tmp_path / "ended", tiny_model_folder, **changes)
    arguments = [str(recipe), "--run.save_every=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = RunFolder(tmp_path / "ended" / "run")
    wait_for_lines(process, folder.metrics, 4)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)  # to the run alone, as Kubernetes does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143, errors
    saved = folder.latest_checkpoint()
    assert saved is not None and errors.strip() == (
        f"SIGTERM: stopped at step {int(saved.name[5:])} of 30; --resume goes on from step {int(saved.name[5:])}"
    )
    psutil.wait_procs(workers, timeout=10)
    assert workers and all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in workers)
    assert main([*arguments, "--resume"]) == 0
    whole = write_run(tmp_path / "whole", tiny_model_folder, **changes)
    assert main([str(whole)]) == 0
    assert read_metrics(folder.path, timing=False) == read_metrics(tmp_path / "whole" / "run", timing=False)
    weights = [(tmp_path / name / "run" / "model" / "model.safetensors").read_bytes() for name in ("ended", "whole")]
    assert weights[0] == weights[1]


def test_stop_after_ends_at_the_first_step_and_resume_goes_on(tmp_path, tiny_model_folder, capsys):
    recipe = write_run(tmp_path, tiny_model_folder, steps=2)
    assert main([str(recipe), "--run.stop_after=1s"]) == 75  # this process runs for longer already
    assert "run.stop_after: stopped at step 1 of 2; --resume goes on from step 1" in capsys.readouterr().err
    assert main([str(recipe), "--resume"]) == 0
    assert f"resuming at step 1 of 2 from {tmp_path}" in capsys.readouterr().out.replace("\n", " ")
    assert main([str(recipe), "--run.stop_after=soon"]) == 2
    assert "run.stop_after" in capsys.readouterr().err


@pytest.mark.engine
def test_a_resumed_run_says_that_the_rows_are_others(tmp_path, tiny_model_folder, capsys):
    recipe = write_run(tmp_path, tiny_model_folder, steps=2)
    rows = (tmp_path / "data.jsonl").read_text()
    said = []
    for text in (rows, rows.replace('"answer": "', '"answer": "1')):
        assert main([str(recipe), "--run.stop_after=1s", f"--run.folder={tmp_path / str(len(said))}"]) == 75
        (tmp_path / "data.jsonl").write_text(text)
        assert main([str(recipe), "--resume", f"--run.folder={tmp_path / str(len(said))}"]) == 0
        said.append("resuming with other rows in the data than before" in capsys.readouterr().out)
    assert said == [False, True]


def test_a_finished_run_says_so_and_loses_nothing(tmp_path, tiny_model_folder, capsys):
    recipe = write_run(tmp_path, tiny_model_folder, steps=1)
    assert main([str(recipe), "--run.keep_finished=0"]) == 0
    folder = RunFolder(tmp_path / "run")
    assert finished_steps(folder) == 1 and not list(folder.checkpoints.iterdir())
    files = sorted(folder.path.rglob("*"))
    capsys.readouterr()
    assert main([str(recipe), "--resume"]) == 0
    assert "is finished: all 1 steps are done" in capsys.readouterr().out
    assert main([str(recipe), "--resume", "--steps=2"]) == 2
    assert "no checkpoint to add steps from (`run.keep_finished: 1` keeps one)" in capsys.readouterr().err
    assert sorted(folder.path.rglob("*")) == files


KILLED = """
import os, sys
from pathlib import Path
moment = int(sys.argv[1])
seen = 0
def hook(event, arguments):
    global seen
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        if str(Path(sys.argv[2])) in str(arguments[0]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), 9)
sys.addaudithook(hook)
from posttrain.output.run_folder import open_run
open_run(sys.argv[2], {"steps": 3}, resume=len(sys.argv) > 3)
"""


def test_a_kill_at_any_write_of_the_set_up_leaves_a_folder_that_starts_or_resumes(tmp_path):
    from posttrain.output.run_folder import open_run

    code = KILLED.replace("from posttrain.output.run_folder import open_run", "")
    outcomes = []
    for moment in range(1, 30):
        folder = tmp_path / str(moment)
        child = os.fork()  # the modules are loaded already, which makes a kill cost milliseconds
        if child == 0:
            sys.argv = ["x", str(moment), str(folder)]
            exec(code, {"open_run": open_run})
            os._exit(0)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        resume = (folder / "recipe.yaml").exists()
        opened, checkpoint = open_run(folder, {"steps": 3}, resume=resume)
        assert checkpoint is None and opened.recipe.is_file() and not list(folder.glob(".*"))
        if not killed:
            break
        outcomes.append(resume)
    assert outcomes.count(True) > 2 and outcomes.count(False) > 1
