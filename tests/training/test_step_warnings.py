"""Warnings about steps that teach nothing: what they are true of, once each, with counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_run

from posttrain import load_recipe
from posttrain.output.tracking import read_metrics
from posttrain.training.loop import train
from posttrain.training.recipe import Recipe
from posttrain.training.step_warnings import StepWarnings, problems

FINE = {
    "score/mean": 0.5,
    "score/std": 0.5,
    "groups/equal": 0.25,
    "advantage/zero": 0.25,
    "truncated": 0.1,
    "unscored": 0.0,
    "grad_norm": 1.0,
    "learning_rate": 1e-6,
    "skipped": 0.0,
    "prompts/missing": 0.0,
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(Path(__file__).parents[2] / "recipes" / "rl" / "grpo.yaml")


@pytest.mark.parametrize(
    ("changes", "kinds", "message"),
    [
        ({}, [], ""),
        (
            {"score/mean": 0.0, "score/std": 0.0, "groups/equal": 1.0, "advantage/zero": 1.0, "grad_norm": 0.0},
            ["all completions of each prompt had the same score"],
            "got the same score (mean 0.000), so every advantage is 0",
        ),
        ({"advantage/zero": 1.0, "grad_norm": 0.0}, ["every advantage was 0"], "Look at the rewards"),
        ({"score/std": 0.0}, ["every completion had the same score"], "got the score 0.500"),
        ({"unscored": 1.0}, ["no completion had a score"], "no verifier applies"),
        (
            {"truncated": 0.88},
            ["most completions were cut off"],
            "88% of the completions were cut off at `sam",
        ),
        ({"eval/truncated": 0.6}, ["most completions of the evaluation were cut off"], "`evaluate.sampling.max_tokens"),
        ({"grad_norm": 0.0}, ["the gradient of the policy was 0"], "exactly 0"),
        ({"grad_norm": 0.0, "policy/waits": 1.0}, [], ""),
        ({"learning_rate": 0.0}, ["the learning rate of the policy was 0"], "`optimizer.learning_rate`"),
        ({"value/grad_norm": 0.0, "value/learning_rate": 1.0}, ["the gradient of the value model was 0"], ""),
        (
            {"skipped": 2.0, "grad_norm": float("nan")},
            ["the loss or a gradient was not finite"],
            "in 2 optimiser",
        ),
        (
            {"prompts/missing": 5.0, "prompts/drawn": 44.0, "prompts/rounds": 4.0},
            ["too few prompts passed `select`"],
            "only 27 of 32 prompts are learned from: no more passed `select` of 44 drawn in 4 rounds",
        ),
    ],
)
def test_each_kind(recipe: Recipe, changes: dict, kinds: list, message: str) -> None:
    found = dict(problems(recipe, FINE | changes))
    assert list(found) == kinds
    assert all(message in text and "\n" not in text for text in found.values())


def test_each_warning_is_given_once_once_more_if_it_lasts_and_counted(recipe: Recipe) -> None:
    said: list[str] = []
    warnings = StepWarnings(recipe, said.append)
    for step in range(1, 13):
        warnings.look(step, FINE | {"truncated": 0.9 if step == 2 or step > 5 else 0.0})
    assert [line[: line.index(":")] for line in said] == ["warning, step 2", "warning, steps 6 to 10, 5 in a row"]
    warnings.summarise()
    assert said[2:] == ["warning: most completions were cut off in 8 of 12 steps"]


@pytest.mark.engine
def test_a_run_without_a_gradient_says_so(tmp_path, tiny_model_folder, capsys) -> None:
    path = write_run(tmp_path, tiny_model_folder, verify=[{"use": "nothing.py:nothing"}], sampling={"max_tokens": 2})
    (tmp_path / "nothing.py").write_text("def nothing(completion):\n    return 0.0\n", encoding="utf-8")
    train(load_recipe(path))
    said = capsys.readouterr().out
    assert said.count("all completions of each prompt got the same score (mean 0.000)") == 1
    assert "warning: all completions of each prompt had the same score in 3 of 3 steps" in said
    assert "warning, step 1: " in said and "were cut off at `sampling.max_tokens: 2`" in said
    rows = read_metrics(tmp_path / "run")
    assert all(row["groups/equal"] == row["advantage/zero"] == 1 and row["grad_norm"] == 0 for row in rows)
