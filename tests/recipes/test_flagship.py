"""The flagship recipe as README.md launches it, in all four ways, on real vLLM."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from runs import command, launch
from transformers import AutoModelForCausalLM

from posttrain.output.tracking import read_metrics

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "grpo.yaml")
PROBLEMS = ROOT / "examples" / "data" / "word_problems.jsonl"  # GSM8K's columns
SMALL = ("--steps=1", "--prompts_per_step=4", "--completions=4", "--sampling.max_tokens=32")
WAYS = {
    "posttrain train": lambda *arguments: command(str(Path(sys.executable).parent / "posttrain"), "train", *arguments),
    "python -m posttrain": lambda *arguments: command("-m", "posttrain", *arguments),
    "accelerate launch": lambda *arguments: launch(*arguments),
    "accelerate launch -m posttrain": lambda *arguments: launch("-m", "posttrain", *arguments),
}


def arguments(model: Path, folder: Path) -> list[str]:
    return [RECIPE, f"--policy.model={model}", f"--data.path={PROBLEMS}", f"--run.folder={folder}"]


def test_the_literal_command(tiny_model_folder, tmp_path):
    done = launch(*arguments(tiny_model_folder, tmp_path / "run"), "--steps=2", timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"  engine vllm \d+\.\d+", done.stdout)
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["grad_norm"] is not None and line["skipped"] == 0 for line in metrics)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype.itemsize == 2  # bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_launch(way, tiny_model_folder, tmp_path):
    done = WAYS[way](*arguments(tiny_model_folder, tmp_path / "run"), *SMALL)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert len(read_metrics(tmp_path / "run")) == 1


def test_in_a_log_file_there_is_nothing_but_the_run(tiny_model_folder, tmp_path):
    """No progress bars and no notes of libraries to themselves, also not of TRL, which is imported for its rewards."""
    verify = "--verify=[{use: math}, {use: trl.rewards.think_format_reward}]"
    done = WAYS["posttrain train"](*arguments(tiny_model_folder, tmp_path / "run"), *SMALL, "--engine.use=vllm", verify)
    assert done.returncode == 0 and done.stderr == ""
    first = ("memory: ", "grpo: ", "  ", "  engine ", "step 0/1 ", "step 1/1 ", "warning")
    unexpected = [line for line in done.stdout.splitlines() if not line.startswith(first)]
    assert not unexpected
