"""The run folder: checkpoints that are whole or absent, and an exact rewind."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from kills import kill_at_change

from posttrain.batch import Batch
from posttrain.data.rollout_files import write_rollouts
from posttrain.errors import UserError
from posttrain.output.run_folder import (
    MARKER,
    RunFolder,
    changed_settings,
    open_run,
    prune_checkpoints,
    step_of,
    write_checkpoint,
)
from posttrain.output.tracking import Trackers, read_metrics

RESOLVED = {"policy": {"model": "tiny"}, "loss": [{"use": "clip", "low": 0.2}], "steps": 6, "optimizer": {"eps": 1e-8}}


def save(folder: RunFolder, step: int) -> None:
    with write_checkpoint(folder, step) as directory:
        (directory / "state").write_text(str(step))


def test_a_used_folder_is_refused_and_the_message_names_both_ways_out(tmp_path: Path):
    open_run(tmp_path / "run", RESOLVED)
    with pytest.raises(UserError, match=r"already holds a run: `--resume` .* `--run.folder=\.\.\.`"):
        open_run(tmp_path / "run", RESOLVED)


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty: `--run.folder"):
        open_run(tmp_path, RESOLVED)
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "thesis.tex", RESOLVED)


def test_an_empty_folder_is_taken(tmp_path: Path):
    folder, checkpoint = open_run(tmp_path, RESOLVED)
    assert checkpoint is None and folder.recipe.exists()


def test_nothing_to_resume_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to resume"):
        open_run(tmp_path / "rnu", RESOLVED, resume=True)


def test_resume_goes_on_from_the_newest_complete_checkpoint(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    for step in (2, 10, 4):
        save(folder, step)
    (folder.checkpoints / "step-000099").mkdir()  # copied in by hand, or half downloaded: no marker
    _, checkpoint = open_run(tmp_path, RESOLVED, resume=True)
    assert checkpoint is not None and step_of(checkpoint) == 10 and (checkpoint / "state").read_text() == "10"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_checkpoint_that_failed_midway_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    folder, _ = open_run(tmp_path, RESOLVED)
    save(folder, 1)
    with pytest.raises(error, match="midway"), write_checkpoint(folder, 2) as directory:
        (directory / "state").write_text("half")
        raise error("midway")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]


def test_writing_a_step_again_replaces_it(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    save(folder, 1)
    with write_checkpoint(folder, 1) as directory:
        (directory / "other").write_text("new")
    assert sorted(path.name for path in (folder.checkpoints / "step-000001").iterdir()) == [MARKER, "other"]


def test_prune_keeps_the_newest(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    for step in (5, 100, 20, 15):
        save(folder, step)
    prune_checkpoints(folder, keep=2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000020", "step-000100"]


def test_ranks_write_into_one_checkpoint_and_none_leaves_before_it_is_whole(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    barrier = threading.Barrier(3)
    seen = []

    def rank(number: int) -> None:
        with write_checkpoint(folder, 7, main=number == 0, barrier=barrier.wait) as directory:
            time.sleep(0.05 * number)
            (directory / f"rank-{number}").write_text("x")
        latest = folder.latest_checkpoint()
        seen.append(sorted(path.name for path in latest.iterdir()) if latest else None)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert seen == [[MARKER, "rank-0", "rank-1", "rank-2"]] * 3


def test_a_kill_at_any_write_of_a_checkpoint_leaves_a_whole_one(tmp_path: Path):
    steps = []
    for moment in range(1, 100):
        path = tmp_path / str(moment)
        folder, _ = open_run(path, RESOLVED)
        save(folder, 1)
        if not kill_at_change(moment, path, lambda folder=folder: (save(folder, 2), prune_checkpoints(folder, 1))):
            break
        _, checkpoint = open_run(path, RESOLVED, resume=True)
        assert checkpoint is not None and not list(folder.checkpoints.glob(".*"))
        steps.append(step_of(checkpoint))
        assert json.loads((checkpoint / MARKER).read_text()) == {"step": steps[-1]}
    assert steps.count(1) > 3 and steps.count(2) > 1


def train(folder: RunFolder, steps: range) -> None:
    """Writes the files of some steps: numbers that depend only on the step, and seconds that do not."""
    with Trackers([], folder.path) as trackers:
        for step in steps:
            trackers.log(step, {"loss": 1 / (step + 3), "grad_norm": float("nan"), "time/step": time.perf_counter()})
            batch = dataclasses.replace(EMPTY, step=step)
            write_rollouts(folder.rollouts(step), batch, [])
            if step % 2 == 0:
                save(folder, step)


def empty_batch() -> Batch:
    zeros = {"tokens": torch.long, "step_id": torch.long, "mask": torch.bool}
    grids = {name: torch.zeros(0, 0, dtype=dtype) for name, dtype in zeros.items()}
    numbers = {name: torch.zeros(0, dtype=torch.long) for name in ("length", "group", "finish", "version")}
    return Batch(
        **grids,
        **numbers,
        logp_sampler=torch.zeros(0, 0),
        step_reward=torch.zeros(0, 0),
        baseline_only=torch.zeros(0, dtype=torch.bool),
        score=torch.zeros(0),
        reward=torch.zeros(0),
        rows=(),
        texts=(),
    )


EMPTY = empty_batch()


def test_a_resumed_run_has_the_metrics_of_one_never_stopped(tmp_path: Path):
    whole, _ = open_run(tmp_path / "whole", RESOLVED)
    train(whole, range(1, 7))
    stopped, _ = open_run(tmp_path / "stopped", RESOLVED)
    train(stopped, range(1, 6))
    with stopped.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # a line that a kill cut short
    (stopped.rollouts(6).parent / ".step-000006.parquet.writing").write_bytes(b"PAR1")
    stopped, checkpoint = open_run(tmp_path / "stopped", RESOLVED, resume=True)
    assert checkpoint is not None and step_of(checkpoint) == 4
    assert [path.name for path in sorted(stopped.rollouts(1).parent.iterdir())][-1] == "step-000004.parquet"
    train(stopped, range(5, 7))
    assert read_metrics(whole.path, timing=False) == read_metrics(stopped.path, timing=False)
    assert read_metrics(whole.path) != read_metrics(stopped.path)
    assert [entry["step"] for entry in read_metrics(stopped.path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    train(folder, range(1, 2))
    folder, checkpoint = open_run(tmp_path, RESOLVED, resume=True)
    assert checkpoint is None and not folder.metrics.exists() and not list(folder.rollouts(1).parent.iterdir())
    assert [line["step"] for line in read_metrics(tmp_path / "stopped-1")] == [1]
    assert [path.name for path in (tmp_path / "stopped-1" / "rollouts").iterdir()] == ["step-000001.parquet"]


def test_changed_settings_are_named(tmp_path: Path):
    folder, _ = open_run(tmp_path, RESOLVED)
    assert changed_settings(folder.recipe, RESOLVED) == []
    other = RESOLVED | {"loss": [{"use": "clip", "low": 0.1}], "seed": 3}
    assert changed_settings(folder.recipe, other) == ["loss.0.low: 0.2 -> 0.1", "seed: (absent) -> 3"]
