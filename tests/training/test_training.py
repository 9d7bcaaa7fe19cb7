"""Whole runs on a tiny model learn, repeat bit for bit, survive kill -9, and stop on errors with a message."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
import transformers
from runs import VERIFIER, command, environment, write_run
from transformers import AutoModelForCausalLM

from posttrain.batch import Batch
from posttrain.commands.cli import main
from posttrain.data.rollout_files import read_rollouts
from posttrain.errors import UserError, VerifierError
from posttrain.micro_batches import blank_row
from posttrain.models.load import load_tokenizer
from posttrain.output.run_folder import step_name
from posttrain.output.tracking import read_metrics
from posttrain.system.processes import Processes
from posttrain.training.loop import train
from posttrain.training.metrics import rollout_metrics
from posttrain.training.recipe import load_recipe
from posttrain.training.setup import build_engine, load_material

pytestmark = pytest.mark.engine


def start(folder: Path, model: Path, **changes) -> list[dict]:
    """Runs a recipe in this process and returns its metrics without timing."""
    train(load_recipe(write_run(folder, model, **changes)))
    return read_metrics(folder / "run", timing=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    start(folder, tiny_model_folder, steps=14, evaluate={"data": {"path": "data.jsonl"}, "every": 10})
    return folder / "run"


def test_a_run_learns(finished):
    metrics = read_metrics(finished)
    first, last = metrics[1]["reward/mean"], sum(m["reward/mean"] for m in metrics[-5:]) / 5
    assert last > first + 0.1
    assert [m["step"] for m in metrics] == list(range(15))
    assert metrics[0].keys() >= {"eval/score", "eval/length"} and "eval/score" in metrics[14]


def test_a_run_leaves_what_it_says(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.config.model_type == "qwen2"
    assert (finished / "model" / "README.md").read_text(encoding="utf-8").startswith("---")
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-000012", "step-000014"]
    assert list((finished / "tensorboard").iterdir())
    rollouts = datasets.Dataset.from_parquet(str(finished / "rollouts" / "step-000003.parquet"))
    assert len(rollouts) == 16 and all(rollouts["completion"])
    batch = read_rollouts(finished / "rollouts" / "step-000003.parquet")
    assert len(batch) == 16 and batch.advantage.abs().sum() > 0


def test_stored_log_probs_are_those_of_the_policy(finished, tiny_model_folder):
    """The initial model sampled step 1, so a plain forward pass of it gives the same log-probs."""
    batch = read_rollouts(finished / "rollouts" / "step-000001.parquet")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    for row, length in enumerate(batch.length.tolist()[:4]):
        table = model(batch.tokens[row : row + 1, :length]).logits[0].log_softmax(-1)
        chosen = batch.mask[row, 1:length]
        logps = table[:-1].gather(-1, batch.tokens[row, 1:length, None])[:, 0][chosen]
        torch.testing.assert_close(logps, batch.logp_sampler[row, 1:length][chosen], atol=1e-4, rtol=0)


def test_a_run_repeats(finished, tmp_path, tiny_model_folder):
    again = start(tmp_path, tiny_model_folder, steps=14, evaluate={"data": {"path": "data.jsonl"}, "every": 10})
    assert again == read_metrics(finished, timing=False)
    ours, theirs = (path / "model" / "model.safetensors" for path in (finished, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_may_be_resumed_and_its_card_stays(finished):
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| eval/score \| 0\.\d+ \| [\d.]+ \|", card) and "time/" not in card
    assert f"- sampled with: transformers {transformers.__version__}\n" in card
    train(load_recipe(finished.parent / "recipe.yaml"), resume=True)
    again = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert again == card


def test_a_folder_in_use_is_refused(finished, tiny_model_folder):
    with pytest.raises(UserError, match="--resume"):
        start(finished.parent, tiny_model_folder)


RECIPES = {
    "kl in the reward, several updates": {
        "reward": [{"use": "kl_penalty", "weight": 0.01}],
        "epochs": 2,
        "minibatches": 2,
    },
    "kl and entropy in the loss": {
        "loss": [{"use": "clip"}, {"use": "kl", "coef": 0.1}, {"use": "entropy", "coef": 0.01}]
    },
    "adapters with a reference": {
        "policy": {"lora": {"rank": 4}},
        "loss": [{"use": "clip"}, {"use": "kl", "coef": 0.1}],
    },
    "refill": {
        "select": [{"use": "mixed_groups"}],
        "prompts": {"use": "by_failure"},
        "completions": 2,
        "prompts_per_step": 6,
    },
    "greedy baseline": {
        "rollout": {"use": "single_turn", "greedy": True},
        "advantage": {"use": "outcome", "center": "greedy", "scale": "none"},
    },
    "importance weights": {"loss": [{"use": "clip", "weights": [{"use": "truncated_importance"}]}]},
    "small micro-batches": {"micro_batch_tokens": 40, "policy": {"gradient_checkpointing": True}},
    "bfloat16": {"policy": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_variants_take_real_steps(name, tmp_path, tiny_model_folder):
    changes = dict(RECIPES[name])
    if "policy" in changes:
        changes["policy"] = {"model": str(tiny_model_folder), **changes["policy"]}
    metrics = start(tmp_path, tiny_model_folder, **changes)
    assert len(metrics) == 3
    for line in metrics:
        assert line["loss"] is not None and line["grad_norm"] > 0 and line["skipped"] == 0
        assert line["sampler/difference"] < (0.1 if name == "bfloat16" else 1e-4)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_micro_batches_do_not_change_a_run(tmp_path, tiny_model_folder):
    one = start(tmp_path / "one", tiny_model_folder)
    many = start(tmp_path / "many", tiny_model_folder, micro_batch_tokens=40)
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)


ONLY_VALUES = {
    "loss": [],
    "target": {"use": "lambda_return"},
    "value_loss": [{"use": "broken.py:broken_value"}],
}


@pytest.mark.parametrize(
    "changes", [{"loss": [{"use": "broken.py:broken"}]}, ONLY_VALUES], ids=["policy", "value model alone"]
)
def test_a_loss_that_is_not_finite_is_skipped_then_stops_the_run(tmp_path, tiny_model_folder, changes):
    """The message names the gradient norms that the recipe has; a recipe may train the value model alone."""
    recipe = write_run(
        tmp_path, tiny_model_folder, steps=9, run={"folder": str(tmp_path / "run"), "max_bad_steps": 2}, **changes
    )
    # finite on the probe's batch of 8, not on the run's of 16
    (tmp_path / "broken.py").write_text(
        "def broken(outputs, batch):\n    return outputs.logp * (float('nan') if len(batch) == 16 else 1.0)\n\n"
        "def broken_value(outputs, batch):\n    return outputs.value * (float('nan') if len(batch) == 16 else 1.0)\n",
        encoding="utf-8",
    )
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row \(loss nan, .*grad_norm"):
        train(load_recipe(recipe))
    assert [line["skipped"] for line in read_metrics(tmp_path / "run")] == [1, 1, 1]
    assert len(read_rollouts(tmp_path / "run" / "dump" / "step-000003-rank-0.parquet")) == 16


def test_a_verifier_that_fails_stops_the_run_after_a_checkpoint(tmp_path, tiny_model_folder):
    recipe = write_run(tmp_path, tiny_model_folder, steps=3, run={"folder": str(tmp_path / "run"), "save_every": 100})
    flag = tmp_path / "fail"
    failing = VERIFIER.replace(
        "    return",
        f"    if __import__('os').path.exists({str(flag)!r}) and answer == '7':\n"
        "        raise ValueError('seven!')\n"
        "    return",
    )
    (tmp_path / "verifier.py").write_text(failing, encoding="utf-8")
    flag.touch()
    with pytest.raises(VerifierError, match="seven!"):
        train(load_recipe(recipe))
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text(encoding="utf-8"))
    flag.unlink()
    train(load_recipe(recipe), resume=True)
    resumed = read_metrics(tmp_path / "run", timing=False)
    assert [line["step"] for line in resumed] == [1, 2, 3] and state["step"] < 3
    assert resumed == start(tmp_path / "whole", tiny_model_folder)


def test_where_nothing_is_selected_the_state_is_saved_and_resume_goes_on(tmp_path, tiny_model_folder, capsys):
    """All completions score 0 until the verifier is repaired, and then the run can be resumed."""
    changes = {"select": [{"use": "mixed_groups"}], "max_refills": 1, "steps": 2}
    recipe = write_run(tmp_path, tiny_model_folder, **changes)
    (tmp_path / "verifier.py").write_text(
        "def share_of_digits(completion, *, answer):\n    return 0.0\n", encoding="utf-8"
    )
    assert main([str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "not one of 8 prompts passed `select` (mixed_groups) in 2 rounds" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]
    (tmp_path / "verifier.py").write_text(VERIFIER, encoding="utf-8")
    assert main([str(recipe), "--resume"]) == 0
    assert read_metrics(tmp_path / "run", timing=False) == start(tmp_path / "whole", tiny_model_folder, **changes)


def wait_for_lines(process: subprocess.Popen, metrics: Path, lines: int) -> None:
    """Waits until a run has written a number of lines of metrics."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= lines:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_ctrl_c_says_where_resume_goes_on_and_leaves_no_process(engine, tmp_path, tiny_model_folder):
    recipe = write_run(tmp_path, tiny_model_folder, engine={"use": engine}, steps=10_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", str(recipe)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 5)
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the run
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    said = re.fullmatch(
        r"SIGINT: stopped at step (\d+) of 10000; --resume goes on from step (\d+)", errors.splitlines()[-1]
    )
    assert said and "Traceback" not in errors
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-1] == step_name(int(said[2])) and not any(name.startswith(".") for name in names)
    psutil.wait_procs(others, timeout=10)  # the last of them, Python's own, end just after the run
    assert others and all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in others)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_kill_and_resume_repeat_a_whole_run_bit_for_bit(engine, tmp_path, tiny_model_folder):
    changes = {"engine": {"use": engine}, "steps": 8, "evaluate": {"data": {"path": "data.jsonl"}, "every": 3}}
    whole = write_run(tmp_path / "whole", tiny_model_folder, **changes)
    done = command("-m", "posttrain", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    killed = write_run(tmp_path / "killed", tiny_model_folder, **changes)
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "posttrain", str(killed)], env=environment(), **quiet)
    wait_for_lines(process, metrics, 6)  # the 5th step is done
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = command("-m", "posttrain", str(killed), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_metrics(tmp_path / "killed" / "run", timing=False) == read_metrics(
        tmp_path / "whole" / "run", timing=False
    )
    models = [(tmp_path / name / "run" / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert models[0] == models[1]


def test_a_rank_without_completions_counts_as_none(random_batch):
    """The blank row of a rank without prompts takes part in the passes but in no statistic."""
    with Processes() as processes:
        batch = random_batch(0)
        alone = rollout_metrics(batch, processes)
        with_blank = rollout_metrics(Batch.concatenate([batch, blank_row(batch)]), processes)
    assert alone == with_blank


def test_failures_are_counted_by_the_step(tmp_path, tiny_model_folder):
    """The count is of one step, not of the run: a resumed run could not know earlier failures."""
    verify = [{"use": "fails.py:always", "on_error": "skip"}]
    (tmp_path / "fails.py").write_text("def always(completion):\n    raise ValueError\n", encoding="utf-8")
    metrics = start(tmp_path, tiny_model_folder, verify=verify, steps=2)
    assert [line["failures/fails.py:always"] for line in metrics] == [16, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"use": "transformers", "max_model_len": 17}}, "need 18 positions; engine.max_model_len has 17"),
        ({"engine": {"use": "transformers", "max_model_len": 4096}}, "4096 is more than the 2048 positions"),
        ({"evaluate": {"data": {"path": "data.jsonl"}, "sampling": {"max_tokens": 4000}}}, "(6 tokens) and evaluate."),
    ],
    ids=["prompts that do not fit", "more than the model has", "evaluation that does not fit"],
)
def test_what_does_not_fit_the_engine_is_refused_before_the_first_step(changes, message, tmp_path, tiny_model_folder):
    recipe = load_recipe(write_run(tmp_path, tiny_model_folder, **changes))
    material = load_material(recipe, load_tokenizer(recipe.policy))
    with pytest.raises(UserError, match=re.escape(message)):
        build_engine(recipe, material, load_tokenizer(recipe.policy))


def damaged(model: Path, folder: Path, how: str) -> Path:
    """Copies a model and damages the copy."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    match how:
        case "no weights":
            weights.unlink()
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "unknown kind":
            config["model_type"] = "unheard-of"
        case "other shapes":
            config["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("how", ["no weights", "cut short", "unknown kind", "other shapes"])
def test_a_model_that_does_not_load_is_told_with_the_place_of_its_key(how, tmp_path, tiny_model_folder, capsys):
    model = damaged(tiny_model_folder, tmp_path / "model", how)
    recipe = write_run(tmp_path, model)
    assert main([str(recipe)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    problem = f"'{model}': " if how == "other shapes" else f"cannot load '{model}': "
    assert message.startswith(f"{recipe}:2:3: policy.model: {problem}")


def test_mistakes_that_show_when_a_run_starts_have_their_place(tmp_path, tiny_model_folder, capsys):
    recipe = write_run(tmp_path, tiny_model_folder)
    assert main([str(recipe), "--policy.model=./nowhere"]) == 2
    said = capsys.readouterr().err
    assert said == "command line: --policy.model=./nowhere: there is no folder './nowhere'\n"


def test_the_largest_seed_shuffles_and_drops_out(tmp_path, tiny_model_folder):
    lora = {"rank": 2, "dropout": 0.1}
    policy = {"model": str(tiny_model_folder), "lora": lora}
    metrics = start(tmp_path, tiny_model_folder, seed=2**32 - 1, steps=1, minibatches=2, policy=policy)
    assert metrics[0]["grad_norm"] > 0


def test_in_bfloat16_the_policy_starts_at_its_reference(tmp_path, tiny_model_folder):
    policy = {"model": str(tiny_model_folder), "dtype": "bfloat16"}
    metrics = start(tmp_path, tiny_model_folder, policy=policy, loss=[{"use": "clip"}, {"use": "kl"}], steps=2)
    assert metrics[0]["policy/kl_ref"] == 0 < metrics[1]["policy/kl_ref"]
