"""Runs on several processes, launched as users launch them, give the losses, gradients and rollouts of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import command, launch, write_run
from transformers import AutoModelForCausalLM

from posttrain.data.rollout_files import read_rollouts
from posttrain.output.run_folder import RunFolder
from posttrain.output.tracking import read_metrics

pytestmark = pytest.mark.engine

RECIPE = {
    # micro-batches of unequal number, a KL term, batch statistics: all that is summed over ranks
    "advantage": {"use": "outcome", "center": "group", "scale": "batch"},
    "loss": [{"use": "clip"}, {"use": "kl", "coef": 0.05}],
    "normaliser": {"use": "token_mean"},
    "micro_batch_tokens": 60,
    "prompts_per_step": 6,
    "steps": 3,
    "evaluate": {"data": {"path": "data.jsonl"}, "every": 3},
}
PPO = {
    # a critic, statistics of advantages over all ranks, steps on parts of the batch; no clipping of gradients, because
    # DeepSpeed clips both models' together
    "value": {"optimizer": {"learning_rate": 0.003, "max_grad_norm": 1e3}},
    "optimizer": {"learning_rate": 0.003, "max_grad_norm": 1e3},
    "reward": [{"use": "kl_penalty", "weight": 0.05}],
    "advantage": {"use": "gae", "lambda_": 0.95},
    "shape": [{"use": "whiten"}],
    "target": {"use": "lambda_return", "lambda_": 0.95},
    "value_loss": [{"use": "mse", "clip": 0.2}],
    "micro_batch_tokens": 60,
    "prompts_per_step": 6,
    "epochs": 2,
    "minibatches": 2,
    "steps": 3,
}
NASH_MD = {
    # each completion is compared with those of the prompt's that a mixture of policy and reference draws
    "opponent": {"share": 0.125},
    "rollout": {"use": "against", "role": "baseline"},
    "compare": {"use": "win_rate", "against": "baselines"},
    "reward": [{"use": "kl_penalty", "level": "token", "weight": 0.008}],
    "advantage": {"use": "returns"},
    "loss": [{"use": "reinforce"}],
    "normaliser": {"use": "seq_mean_of_token_sum"},
    "completions": 2,
    "prompts_per_step": 6,
    "steps": 2,
}
MULTI = ("--multi_gpu", "--num_processes", "2")
ZERO = ("--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "--gradient_accumulation_steps", "1")


def check_equal(one: list[dict], two: list[dict], *names: str) -> None:
    """The values of some metrics in two runs, at every step."""
    for ours, theirs in zip(one, two, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["step"], name)


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("single")
    done = command("-m", "posttrain", str(write_run(folder, tiny_model_folder, **RECIPE)))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.parametrize("flags", [MULTI, ZERO], ids=["data parallel", "ZeRO-2"])
def test_two_processes_equal_one(flags, single, tmp_path, tiny_model_folder):
    recipe = write_run(tmp_path, tiny_model_folder, **RECIPE)
    done = launch(*flags, str(recipe), ACCELERATE_USE_CPU="true" if flags is MULTI else "false")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "2 processes" in done.stdout
    one, two = read_metrics(single, timing=False), read_metrics(tmp_path / "run", timing=False)
    assert [line["step"] for line in two] == [0, 1, 2, 3]
    check_equal(one[1:], two[1:], "loss", "loss/clip", "loss/kl", "grad_norm", "reward/mean", "policy/entropy")
    assert one[3]["eval/score"] == pytest.approx(two[3]["eval/score"], abs=1e-6)
    weights = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (single, tmp_path / "run")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)
    # the ranks' rollouts together are those of one process
    files = [RunFolder(tmp_path / "run").rollouts(1, rank) for rank in (0, 1)]
    texts = [text for file in files for text in read_rollouts(file).texts]
    assert texts == list(read_rollouts(RunFolder(single).rollouts(1)).texts)


@pytest.fixture(scope="module")
def single_ppo(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("single-ppo")
    done = command("-m", "posttrain", str(write_run(folder, tiny_model_folder, **PPO)))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.parametrize("flags", [MULTI, ZERO], ids=["data parallel", "ZeRO-2"])
def test_two_processes_with_a_critic_equal_one(flags, single_ppo, tmp_path, tiny_model_folder):
    recipe = write_run(tmp_path, tiny_model_folder, **PPO)
    done = launch(*flags, str(recipe), ACCELERATE_USE_CPU="true" if flags is MULTI else "false")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    one, two = read_metrics(single_ppo, timing=False), read_metrics(tmp_path / "run", timing=False)
    names = ["loss", "loss/clip", "value_loss/mse", "value/explained_variance", "value/rmse", "reward/mean"]
    names += ["grad_norm", "value/grad_norm"] if flags is MULTI else []  # DeepSpeed has one norm of both models
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    check_equal(one, two, *names)


def test_two_processes_with_an_opponent_equal_one(tmp_path, tiny_model_folder):
    done = command("-m", "posttrain", str(write_run(tmp_path / "one", tiny_model_folder, **NASH_MD)))
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = write_run(tmp_path / "two", tiny_model_folder, **NASH_MD)
    done = launch(*MULTI, str(recipe), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    one, two = (read_metrics(tmp_path / name / "run", timing=False) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    check_equal(one, two, "loss", "loss/reinforce", "grad_norm", "reward/mean")


def test_two_processes_with_vllm_resume_under_zero(tmp_path, tiny_model_folder):
    run = {"folder": str(tmp_path / "run"), "save_every": 1, "keep_finished": 1}
    changes = RECIPE | {"engine": {"use": "vllm"}, "run": run}
    recipe = str(write_run(tmp_path, tiny_model_folder, **changes))
    done = launch(*ZERO, recipe, "--steps=2")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    done = launch(*ZERO, recipe, "--resume")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert all(line["sampler/difference"] < 1e-4 for line in metrics[1:])
    done = command("-m", "posttrain", recipe, "--resume", "--steps=4")
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cpu", "--num_processes", "2"), "started only this one"),
        ((*MULTI, "--num_machines", "1"), "cannot be shared equally by 2 processes; --prompts_per_step=4"),
    ],
    ids=["hidden single process", "uneven prompts"],
)
def test_launches_that_cannot_be_right_are_refused(flags, message, tmp_path, tiny_model_folder):
    recipe = str(write_run(tmp_path, tiny_model_folder))
    overrides = [] if "--cpu" in flags else ["--prompts_per_step=3"]
    variables = {} if "--cpu" in flags else {"ACCELERATE_USE_CPU": "true"}
    done = launch(*flags, recipe, *overrides, **variables)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


BROKEN = """
import os

def broken(outputs, batch):
    return outputs.logp * (float("nan") if batch.step == 1 and os.environ.get("RANK") == "1" else 0.0)
"""


@pytest.mark.parametrize("flags", [MULTI, ZERO], ids=["data parallel", "ZeRO-2"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(flags, tmp_path, tiny_model_folder):
    recipe = write_run(tmp_path, tiny_model_folder, loss=[{"use": "clip"}, {"use": "broken.py:broken"}])
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    variables = {"ACCELERATE_USE_CPU": "true"} if flags is MULTI else {}
    done = launch(*flags, str(recipe), **variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    metrics = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in metrics] == [0, 1, 0]
    assert metrics[2]["loss"] is not None and metrics[2]["grad_norm"] > 0


FAILS = """
import os
from pathlib import Path

def on_one_rank(advantage, batch):
    if os.environ.get("RANK") == "1":
        raise ValueError("a part that fails here only")
    return advantage

def on_one_row(completion, *, answer):
    stepped = (Path(__file__).parent / "run" / "rollouts" / "step-000001.parquet").exists()
    if answer == "held out" and stepped:
        raise ValueError("a verifier that fails here only")
    return 1.0
"""


def launch_failing(folder: Path, model: Path, **changes):
    recipe = write_run(folder, model, prompts_per_step=2, **changes)
    (folder / "fails.py").write_text(FAILS, encoding="utf-8")
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": "3+4", "answer": "held out"}]  # one for each rank
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return launch(*MULTI, str(recipe), ACCELERATE_USE_CPU="true", timeout=120)


def test_an_error_on_one_rank_ends_all(tmp_path, tiny_model_folder):
    """The other ranks wait for the failing rank in a collective operation, so it must not wait for them."""
    done = launch_failing(tmp_path, tiny_model_folder, shape=[{"use": "fails.py:on_one_rank"}])
    assert done.returncode != 0 and "a part that fails here only" in done.stderr


def test_a_verifier_that_fails_in_an_evaluation_on_one_rank_stops_all_after_a_checkpoint(tmp_path, tiny_model_folder):
    changes = {"verify": [{"use": "fails.py:on_one_row"}], "evaluate": {"data": {"path": "held_out.jsonl"}, "every": 1}}
    done = launch_failing(tmp_path, tiny_model_folder, **changes)
    assert done.returncode != 0 and "VerifierError: verifier 'fails.py:on_one_row' raised ValueError" in done.stderr
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None and checkpoint.name == "step-000001"
    # the metrics of step 1 are in the checkpoint: a resumed run begins with its evaluation
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0]
