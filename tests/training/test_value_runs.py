"""Whole runs with a value model: recipes of recipes/value, resuming, warm starts, waiting policies, dataset rows."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import environment, write_run
from safetensors.torch import load_file

from posttrain import load_recipe, load_value, train
from posttrain.data.rollout_files import read_rollouts
from posttrain.output.tracking import read_metrics
from posttrain.training.setup import value_kind

pytestmark = pytest.mark.engine
FOLDER = Path(__file__).parents[2] / "recipes" / "value"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

PPO: dict[str, Any] = {
    "value": {"optimizer": {"learning_rate": 0.003}},
    "advantage": {"use": "gae", "lambda_": 0.95},
    "shape": [{"use": "whiten"}],
    "target": {"use": "lambda_return", "lambda_": 0.95},
    "value_loss": [{"use": "mse", "clip": 0.2}],
}
ONLY_VALUES: dict[str, Any] = {
    "value": {"optimizer": {"learning_rate": 0.003}},
    "target": {"use": "lambda_return"},
    "value_loss": [{"use": "mse"}],
    "loss": [],
}
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(8)]
STEPWISE = [{"prompt": f"{a}+1+1=", "completions": [f"{a + 1}", f"{a}"], "labels": [True, False]} for a in range(8)]


def start(folder: Path, model: Path, **changes: Any) -> list[dict]:
    """Runs a recipe in this process and returns its metrics without timing."""
    train(load_recipe(write_run(folder, model, **changes)))
    return read_metrics(folder / "run", timing=False)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The run folder of a finished PPO run."""
    folder = tmp_path_factory.mktemp("ppo")
    start(folder, tiny_model_folder, **PPO, steps=12)
    return folder / "run"


def test_policy_and_critic_learn(ppo: Path) -> None:
    metrics = read_metrics(ppo)
    assert sum(m["reward/mean"] for m in metrics[-4:]) / 4 > metrics[0]["reward/mean"] + 0.05
    assert metrics[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a head of zeros explains nothing
    assert metrics[-1]["value/rmse"] < metrics[0]["value/target"] + metrics[-1]["value/rmse"]
    assert all(m["value/grad_norm"] > 0 and math.isfinite(m["value_loss/mse"]) for m in metrics)


def test_a_saved_value_model_gives_the_same_values_in_a_fresh_process(ppo: Path) -> None:
    batch = read_rollouts(ppo / "rollouts" / "step-000012.parquet")
    here = load_value(ppo / "value")(batch.tokens, batch.states)[0]
    program = (
        "import sys, torch; from posttrain import load_value; from posttrain.data.rollout_files import read_rollouts;"
        "batch = read_rollouts(sys.argv[2]); value = load_value(sys.argv[1]);"
        "torch.save(value(batch.tokens, batch.states)[0].detach(), sys.argv[3])"
    )
    there = ppo / "values.pt"
    arguments = [str(ppo / "value"), str(ppo / "rollouts" / "step-000012.parquet"), str(there)]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment(), timeout=120)
    assert torch.equal(here, torch.load(there))
    assert here.abs().max() > 0


def test_a_saved_critic_warm_starts_another_run(ppo: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    """The values of the first step equal those of the saved model, bit for bit."""
    changes = PPO | {"value": {"model": str(ppo / "value"), "optimizer": {"learning_rate": 0.003}}}
    start(tmp_path, tiny_model_folder, **changes, steps=1)
    batch = read_rollouts(tmp_path / "run" / "rollouts" / "step-000001.parquet")
    model = load_value(ppo / "value").eval()
    with torch.no_grad():
        for row in range(len(batch)):  # one by one: another batch than the run's, so not the same to the bit
            one = batch[[row]].trim()
            torch.testing.assert_close(model(one.tokens, one.states)[0], one.value, atol=1e-5, rtol=1e-4)
    assert batch.value is not None and batch.value.abs().max() > 0


@pytest.mark.parametrize(
    "changes",
    [
        PPO,
        PPO | {"value": {"members": 2, "reduce": "min", "normalise": True, "target_rate": 0.5}, "minibatches": 2},
        PPO | {"value": {"share": True}, "gradient": True},
        PPO | {"value": {"ready_at": 0.05, "optimizer": {"learning_rate": 0.003}}},
        ONLY_VALUES,
    ],
    ids=["PPO", "members, statistics, slow copy", "shared", "waiting", "values alone"],
)
def test_a_resumed_run_repeats_one_that_was_never_stopped(changes, tmp_path: Path, tiny_model_folder: Path) -> None:
    changes = dict(changes)
    if changes.pop("gradient", False):
        lora = {"rank": 4}
        changes["policy"] = {"model": str(tiny_model_folder), "lora": lora, "gradient_checkpointing": True}
    whole = start(tmp_path / "whole", tiny_model_folder, **changes, steps=5)
    start(tmp_path / "two", tiny_model_folder, **changes, steps=5)
    run = tmp_path / "two" / "run"
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000005")  # as if it had been killed in its fifth step
    train(load_recipe(tmp_path / "two" / "recipe.yaml"), resume=True)
    assert read_metrics(run, timing=False) == whole
    for name in ("model", "value"):
        if (run / name).exists():
            ours, theirs = (load_file(r / name / "model.safetensors") for r in (run, tmp_path / "whole" / "run"))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_policy_waits_for_its_critic(tmp_path: Path, tiny_model_folder: Path) -> None:
    changes = PPO | {"value": {"ready_at": 0.9, "optimizer": {"learning_rate": 0.003}}}
    metrics = start(tmp_path, tiny_model_folder, **changes, steps=3)
    assert all(m["policy/waits"] == 1 and m["grad_norm"] == 0 and m["value/grad_norm"] > 0 for m in metrics)
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_values_from_branches(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The value of the prompt is the mean score of the branches from it, the same for its whole group."""
    changes = {"value": {"branches": {"completions": 3, "separator": "0"}}, "steps": 2}
    changes["advantage"] = {"use": "value_change", "level": "step", "last": "reward"}
    metrics = start(tmp_path, tiny_model_folder, **changes)
    assert all(m["grad_norm"] > 0 for m in metrics)
    batch = read_rollouts(tmp_path / "run" / "rollouts" / "step-000001.parquet")
    assert batch.value is not None and batch.advantage is not None
    first = batch.mask.int().argmax(-1)
    of_prompt = batch.value[torch.arange(len(batch)), first - 1]
    assert all(len(of_prompt[batch.group == group].unique()) == 1 for group in batch.group.unique())
    # the changes of the steps of a completion add up to its reward minus the value of the prompt
    last_of_step = batch.mask & (torch.nn.functional.pad(batch.step_id[:, 1:], (0, 1), value=-1) != batch.step_id)
    total = (batch.advantage * last_of_step).sum(-1)
    torch.testing.assert_close(total, batch.reward - of_prompt, atol=1e-5, rtol=0)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    """Runs each recipe's method with a tiny model, data and verifier: the value model changes and can be loaded."""
    write_run(tmp_path, tiny_model_folder)
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    data = tmp_path / "data.jsonl"
    if recipe.examples is not None:
        data = write_rows(tmp_path / "given.jsonl", PAIRS if recipe.examples.name == "pairs" else STEPWISE)
    overrides: dict[str, Any] = {
        "policy.model": tiny_model_folder,
        "policy.dtype": "float32",
        "policy.gradient_checkpointing": "false",
        "data.path": data,
        "data.name": "null",
        "data.columns": "{}",
        "engine.use": "transformers",
        "sampling.max_tokens": 12,
        "prompts_per_step": 4,
        "completions": min(recipe.completions, 4),
        "value.optimizer.learning_rate": 0.001,
        "steps": 2,
        "run.folder": tmp_path / "run",
    }
    if recipe.reference.model is not None:
        overrides["reference.model"] = tiny_model_folder
    if recipe.target is not None and recipe.target.name == "lambda_return":
        overrides["target.truncated"] = "end"  # so short, every completion is cut off
    if recipe.verify:
        overrides["verify.0.use"] = f"{tmp_path / 'verifier.py'}:share_of_digits"
    folder = train(load_recipe(FOLDER / f"{name}.yaml", [f"--{key}={value}" for key, value in overrides.items()]))
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 2 and folder == tmp_path / "run" / "value"
    for row in metrics:
        assert row["value/grad_norm"] > 0 and row["skipped"] == 0 and math.isfinite(row["loss"])
    model = load_value(folder)
    assert (model.spec.kind, model.spec.beta) == value_kind(recipe)
    before, after = load_file(tiny_model_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    stayed = all(torch.equal(after[key], before[key]) for key in before if key in after)
    assert stayed == (recipe.value is not None and recipe.value.head_only)
    assert not (tmp_path / "run" / "model").exists()


def test_values_of_stored_rollouts(ppo: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    changes = ONLY_VALUES | {"data": {"path": str(ppo)}, "examples": {"use": "rollouts"}, "verify": [], "steps": 3}
    metrics = start(tmp_path, tiny_model_folder, **changes)
    assert metrics[-1]["value/rmse"] < metrics[0]["value/rmse"]
