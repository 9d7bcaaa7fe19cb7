"""Whole runs with the reference cache: killed and resumed, on two ranks, and with held-out pairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from runs import environment, launch
from safetensors.numpy import load_file
from test_reference_cache import PAIRS, rows, shards, write

from posttrain.output.tracking import read_metrics
from posttrain.training.loop import train
from posttrain.training.recipe import load_recipe
from posttrain.training.reference_cache import read_shards

pytestmark = pytest.mark.engine

KILLED = """
import sys, time
from posttrain.training import reference_cache
from posttrain.training.recipe import load_recipe
from posttrain.training.loop import train
reference_cache.SHARD_SECONDS = 0.0
original = reference_cache.reference_logp
def slowly(*arguments):
    print("scored", flush=True)
    time.sleep(float(sys.argv[2]))
    return original(*arguments)
reference_cache.reference_logp = slowly
train(load_recipe(sys.argv[1]))
"""


def test_a_run_with_the_cache_is_the_run_without_it(tmp_path, tiny_model_folder):
    """The first pass over the data has the same batches and so the same bits. Later passes agree to 1e-5."""
    found = {}
    for name, changes in (("with", {}), ("without", {"reference": {"cache": False}})):
        folder = tmp_path / name
        train(load_recipe(write(folder, tiny_model_folder, steps=6, **changes)))
        found[name] = [row["loss"] for row in read_metrics(folder / "run")]
    assert found["with"][:3] == found["without"][:3]
    assert found["with"] == pytest.approx(found["without"], abs=1e-5)
    assert found["with"][2] < found["with"][0]


def test_evaluation_on_held_out_pairs(tmp_path, tiny_model_folder):
    """Before training the policy is the reference, so accuracy is ½ and margin 0; both grow with training."""
    changes = {"evaluate": {"examples": {"path": "pairs.jsonl"}, "every": 2}, "steps": 4}
    train(load_recipe(write(tmp_path, tiny_model_folder, **changes)))
    metrics = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    assert metrics[0]["eval/preference/accuracy"] == 0.5 and metrics[0]["eval/preference/margin"] == 0.0
    assert metrics[4]["eval/preference/accuracy"] > 0.8 and metrics[4]["eval/preference/margin"] > 0
    assert "eval/preference/accuracy" not in metrics[3]
    last = metrics[4]
    assert last["preference/margin"] == pytest.approx(
        last["preference/chosen_reward"] - last["preference/rejected_reward"], abs=1e-6
    )
    assert last["preference/chosen_logp"] < 0 and last["preference/accuracy"] > 0.5


def test_killed_computation_goes_on(tmp_path, tiny_model_folder):
    path = write(tmp_path, tiny_model_folder)
    started = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), "5"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert started.stdout is not None
    lines = (line for line in started.stdout if line == "scored\n")
    next(lines), next(lines)  # the first batch is on disk when the second one begins
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    before = shards(tmp_path / "cache")
    assert len(before) == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED.replace("train(load_recipe(sys.argv[1]))", "train(load_recipe(sys.argv[1]), resume=True)"),
            str(path),
            "0",
        ],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("scored") == 2
    assert before.items() <= shards(tmp_path / "cache").items()
    assert len(read_metrics(tmp_path / "run")) == 3


def test_two_ranks_share_the_work_and_agree_with_one(tmp_path, tiny_model_folder):
    path = write(tmp_path, tiny_model_folder)
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = launch(
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "posttrain",
        str(path),
        **variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "cache").iterdir()
    each = [set(load_file(shard)["group"].tolist()) for shard in folder.glob("shard-*")]
    assert len(each) == 2 and len(each[0]) == len(each[1]) == PAIRS // 2 and not each[0] & each[1]
    alone = write(tmp_path / "alone", tiny_model_folder)
    train(load_recipe(alone))
    (its,) = (tmp_path / "alone" / "cache").iterdir()
    assert its.name == folder.name
    mine, theirs = read_shards(its), read_shards(folder)
    assert mine.keys() == theirs.keys()
    for i in mine:
        assert abs(mine[i] - theirs[i]).max() < 1e-5
    losses = [[row["loss"] for row in read_metrics(f / "run")] for f in (tmp_path, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_is_left_out_is_printed_and_stored(tmp_path, tiny_model_folder, capsys):
    data = [*rows(), {"prompt": "q", "chosen": "same", "rejected": "same"}]
    train(load_recipe(write(tmp_path, tiny_model_folder, data, steps=1)))
    place = f"{tmp_path / 'pairs.jsonl'}:{PAIRS + 1}"
    assert f"1 row left out: the completions are all the same ({place})" in capsys.readouterr().out.replace("\n", "")
    stored = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert stored == {
        "data": [{"what": "left out", "reason": "the completions are all the same", "count": 1, "first": [place]}]
    }
