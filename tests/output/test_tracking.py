"""Metrics, trackers, the display and the model card."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.errors import RecipeError, UserError
from posttrain.output.progress import Column, Progress, duration
from posttrain.output.tracking import Trackers, check_trackers, read_metrics, truncate_metrics
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.training.citations import papers
from posttrain.training.model_card import write_model_card
from posttrain.training.recipe import Recipe

# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    trackers = Trackers([], tmp_path)
    trackers.log(1, {"loss": torch.tensor(0.5), "count": np.int64(3), "done": True, "time/step": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.5,
        "count": 3,
        "done": 1,
        "time/step": 1.5,
    }
    trackers.close()
    trackers.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    with Trackers([], tmp_path) as trackers:
        trackers.log(1, {"a": float("nan"), "b": torch.tensor(float("inf")), "c": None, "d": -0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": -0.1}\n'


def test_floats_come_back_bit_for_bit(tmp_path: Path):
    numbers = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    with Trackers([], tmp_path) as trackers:
        trackers.log(1, {str(i): number for i, number in enumerate(numbers)})
    assert list(read_metrics(tmp_path)[0].values())[1:] == numbers


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path):
    with Trackers([], tmp_path) as trackers, pytest.raises(TypeError, match="a metric must be a number, not 'high'"):
        trackers.log(1, {"reward": "high"})


def test_only_the_main_process_writes(tmp_path: Path):
    with Trackers(["tensorboard"], tmp_path, active=False) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_damaged_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of JSON"):
        read_metrics(path)


def test_truncation_keeps_the_step_and_those_before(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Trackers([], tmp_path) as trackers:
        for step in (0, 1, 2, 2, 3, 4):
            trackers.log(step, {"x": step / 7})
    truncate_metrics(path, 2)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2, 2]


# --------------------------------------------------------------------------------------------------------- trackers


def test_unknown_and_missing_trackers_are_refused_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as error:
        check_trackers(["tensorbord", "wandb", "trackio", "tensorboard"])
    assert "there is no tracker 'tensorbord'" in error.value.problems[0]
    hints = ["`pip install 'posttrain[wandb]'`", "`pip install 'posttrain[trackio]'`", "`pip install tensorboard`"]
    assert all(hint in problem for hint, problem in zip(hints, error.value.problems[1:], strict=True))


def test_the_extras_that_hints_name_exist():
    extras = importlib.metadata.metadata("posttrain").get_all("Provides-Extra") or []
    assert {"wandb", "trackio"} <= set(extras)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path):
    with Trackers(["tensorboard"], tmp_path, config={"steps": 6}) as trackers:
        for step in (1, 2, 3):
            trackers.log(step, {"loss": step * 1.0, "reward": float("nan")})
    with Trackers(["tensorboard"], tmp_path, config={"steps": 6}, start=2) as trackers:
        for step in (3, 4):
            trackers.log(step, {"loss": step * 1.0, "reward": 0.5})
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert curve(tmp_path, "reward") == [(3, 0.5), (4, 0.5)]


LOG_TWICE = """
import sys
from posttrain.output.tracking import Trackers
for start, steps in ((0, (1, 2)), (2, (3, 4))):
    with Trackers([sys.argv[1]], sys.argv[2], "project", {"loss": [{"use": "clip"}]}, start=start) as trackers:
        for step in steps:
            trackers.log(step, {"reward": step / 4, "nan": float("nan")})
"""


def log_twice(tracker: str, folder: Path) -> str:
    """Logs a run and its resumption in a process of its own, without the user's credentials."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    environment |= {"HOME": str(folder), "NETRC": str(folder / "no-netrc")}
    done = subprocess.run(
        [sys.executable, "-c", LOG_TWICE, tracker, str(folder / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.engine
def test_trackio_keeps_its_database_in_the_run_folder(tmp_path: Path):
    pytest.importorskip("trackio")
    log_twice("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "run" / "trackio" / "project.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["reward"]) for step, metrics in rows] == [(i, i / 4) for i in (1, 2, 3, 4)]


@pytest.mark.engine
def test_wandb_without_a_key_is_kept_offline(tmp_path: Path):
    pytest.importorskip("wandb")
    log_twice("wandb", tmp_path)
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identifier = (tmp_path / "run" / "tracker_id").read_text()
    assert runs and all(f"-{identifier}" in path.name for path in runs)  # two in one second end in -1, -2


# ---------------------------------------------------------------------------------------------------------- display


def run_progress(stream: io.TextIOBase, **arguments) -> None:
    with Progress(4, stream=stream, **arguments) as progress:  # type: ignore[arg-type]
        for step in range(1, 5):
            progress.update(step, {"reward/mean": step / 4, "time/tokens_per_second": 1234.5, "unknown": 1.0})
        progress.note("[saved] checkpoints/step-000004")
        progress.note("model: runs/é/model")


def test_in_a_log_file_there_is_one_plain_line_a_step():
    stream = io.StringIO()
    run_progress(stream, every=0.0)
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 1/4  reward 0\.250  tokens/s 1,23[45]  ETA \d+s", lines[0])
    assert [line.split()[1] for line in lines[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert "[saved] checkpoints/step-000004" in lines
    assert "\x1b" not in stream.getvalue()


def test_fast_steps_do_not_flood_a_log_file():
    stream = io.StringIO()
    run_progress(stream, every=60.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("step")] == ["1/4", "4/4"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_can_be_written(encoding: str):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    run_progress(stream)
    stream.flush()
    assert b"model: runs/" in raw.getvalue()
    assert raw.getvalue().decode(encoding).isascii() or encoding != "ascii"


def test_other_processes_show_nothing():
    stream = io.StringIO()
    run_progress(stream, active=False)
    assert stream.getvalue() == ""


ON_TERMINAL = """
import logging, sys, warnings
logging.basicConfig(stream=sys.stderr, level="INFO", format="%(message)s")
from posttrain.output.progress import Progress
with Progress(3) as progress:
    for step in range(1, 4):
        progress.update(step, {"reward/mean": step / 4})
        logging.getLogger("engine").info(f"logged at step {step}")
        warnings.warn(f"warned at step {step}")
        print(f"printed at step {step}")
logging.getLogger("engine").info("logged after")
"""


def screen(output: str) -> list[str]:
    """The final screen of a terminal, with carriage returns, cursor-up and erase-line carried out."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token.endswith("K"):
                lines[row] = ""
        elif token != "\r":
            lines[row] += token
    return lines


def test_on_a_terminal_messages_appear_above_the_table():
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL], stdout=follower, stderr=follower, env=environment, close_fds=True
    )
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end was closed: the process has ended
            break
        if not piece:
            break
        output += piece
    os.close(leader)
    assert process.wait() == 0
    lines = [line.strip() for line in screen(output.decode())]
    for kind in ("logged", "printed"):
        assert [line for line in lines if line.startswith(kind)][:3] == [f"{kind} at step {i}" for i in (1, 2, 3)]
    assert sum("warned at step" in line and "Warning" in line for line in lines) == 3
    table = next(i for i, line in enumerate(lines) if "3/3" in line)
    assert max(i for i, line in enumerate(lines) if "at step" in line) < table < lines.index("logged after")
    assert lines[table + 1].split() == ["step", "reward"] and lines[table + 4].split() == ["3", "0.750"]


def test_columns_can_be_chosen():
    stream = io.StringIO()
    with Progress(1, stream=stream, columns=[Column("value/loss", "critic", "{:.1f}")]) as progress:
        progress.update(1, {"value/loss": float("nan")})
    assert stream.getvalue().startswith("step 1/1  critic nan  ETA 0s")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (float("nan"), "?")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------------------- model card


def group_mean(batch, *, scale: str = "std"):
    """Returns the reward minus the group's mean.

    Shao et al. 2024, section 4.1.1, arXiv:2402.03300.
    """


def make_recipe(path: Path | None) -> Recipe:
    part = Part(call=functools.partial(group_mean, scale="none"), name="outcome")
    return Recipe(
        policy=sections.PolicySection(model="Qwen/Qwen2.5-1.5B-Instruct"),
        data=sections.DataSection(path="openai/gsm8k", name="main"),
        verify=(Part(call=len, name="math"),),
        loss=(Part(call=len, name="clip", coef=0.5, weights=(part,)),),
        advantage=part,
        normaliser=part,
        rollout=part,
        prompts=part,
        name="grpo",
        path=path,
    )


def test_the_hub_can_read_the_model_card(tmp_path: Path):
    from huggingface_hub import ModelCard

    recipe_file = tmp_path / "grpo.yaml"
    recipe_file.write_text("# DAPO, Yu et al. 2025, arXiv:2503.14476\npolicy:\n")
    recipe = make_recipe(recipe_file)
    assert papers(recipe) == [
        "DAPO, Yu et al. 2025, arXiv:2503.14476",
        "Shao et al. 2024, section 4.1.1, arXiv:2402.03300.",
    ]
    path = write_model_card(tmp_path / "model", recipe, before={"eval/score": 0.43}, after={"eval/score": 0.9375})
    card = ModelCard.load(path)
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B-Instruct" and card.data.datasets == ["openai/gsm8k"]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"posttrain", "arxiv:2503.14476", "arxiv:2402.03300"} <= set(card.data.tags)
    assert "| eval/score | 0.43 | 0.9375 |" in card.text
    assert "steps: 100" in card.text and "0.5 x `clip`" in card.text and "torch 2." in card.text


def test_local_paths_do_not_pose_as_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    recipe = make_recipe(None)
    policy, data = sections.PolicySection(model="runs/tiny"), sections.DataSection(path="data/train.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    card = ModelCard.load(write_model_card("model", Recipe(**{**vars(recipe), "policy": policy, "data": data})))
    assert card.data.base_model is None and card.data.datasets is None
    assert "`runs/tiny`, trained with posttrain" in card.text
