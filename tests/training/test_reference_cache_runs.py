"""Whole runs with the reference cache: killed and resumed, on two ranks, and with held-out pairs."""

from __future__ import annotations

import json

import pytest
from runs import launch
from safetensors.numpy import load_file
from test_reference_cache import PAIRS, rows, write

from posttrain.output.tracking import read_metrics
from posttrain.training.loop import train
from posttrain.training.recipe import load_recipe
from posttrain.training.reference_cache import read_shards

pytestmark = pytest.mark.engine


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
