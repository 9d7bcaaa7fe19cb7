"""Every recipe of ``recipes/rl``, as it stands in the file, makes two real steps on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_run
from safetensors.torch import load_file

from posttrain.data.rollout_files import read_rollouts
from posttrain.output.tracking import read_metrics
from posttrain.training.loop import train
from posttrain.training.recipe import Recipe, load_recipe

pytestmark = pytest.mark.engine
RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in (RECIPES / "rl").glob("*.yaml"))
STEPWISE = [{"prompt": f"{a}+1+1=", "completions": [f"{a + 1}", f"{a}"], "labels": [True, False]} for a in range(8)]
PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(8)]
GIVEN = {
    "runs/prm/value": ("prm", STEPWISE),
    "runs/prm_mse/value": ("prm_mse", STEPWISE),
    "runs/dvpo_value/value": ("dvpo_value", PAIRS),
}
"""The value models that recipes name, with the recipe of ``recipes/value`` that trains each and data for it."""


def tiny(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Overrides with a tiny model and small sizes."""
    return {
        "policy.model": model,
        "policy.dtype": "float32",
        "policy.gradient_checkpointing": "false",
        "data.name": "null",
        "data.columns": "{}",
        "engine.use": "transformers",
        "evaluate": "null",
        "sampling.max_tokens": 12,
        "prompts_per_step": 4,
        "run.folder": folder,
    } | more


def flags(overrides: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in overrides.items()]


@pytest.fixture(scope="session")
def value_models(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    """Value models after one step, under the names that recipes have for them."""
    made = {}
    for name, (recipe, rows) in GIVEN.items():
        folder = tmp_path_factory.mktemp(recipe)
        data = folder / "given.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = {"data.path": data, "steps": 1, "value.optimizer.learning_rate": 0.001}
        path = RECIPES / "value" / f"{recipe}.yaml"
        made[name] = train(load_recipe(path, flags(tiny(tiny_model_folder, folder / "run", **own))))
    return made


@pytest.fixture(scope="session")
def earlier_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The rollouts of a run of two steps."""
    folder = tmp_path_factory.mktemp("earlier")
    train(load_recipe(write_run(folder, tiny_model_folder, steps=2)))
    return folder / "run" / "rollouts"


def named_models(recipe: Recipe) -> dict[str, str]:
    """Saved value models that the recipe names, by their place in it."""
    found = {} if recipe.value is None or recipe.value.model is None else {"value.model": recipe.value.model}
    given = {f"reward.{i}.model": part.options.get("model") for i, part in enumerate(recipe.reward)}
    return found | {place: str(model) for place, model in given.items() if model is not None}


def smaller(name: str, folder: Path, model: Path, request: pytest.FixtureRequest) -> Recipe:
    """The recipe's own method with another model, data, verifier and sizes; no policy waits for its critic."""
    path = RECIPES / "rl" / f"{name}.yaml"
    recipe = load_recipe(path)
    write_run(folder, model)
    own: dict[str, Any] = {
        "completions": min(recipe.completions, 4),
        "minibatches": min(recipe.minibatches, 2),
        "optimizer.learning_rate": 0.001,
        "optimizer.warmup_steps": 0,
        "steps": 2,
        "data.path": folder / "data.jsonl" if recipe.examples is None else request.getfixturevalue("earlier_run"),
    }
    for place, part in (("rollout", recipe.rollout), ("examples", recipe.examples)):
        if part is not None and "separator" in part.options:
            own[f"{place}.separator"] = "k"  # a tiny model writes no lines
    if recipe.verify:
        own["verify.0.use"] = f"{folder / 'verifier.py'}:share_of_digits"
    if recipe.value_loss:
        own |= {"value.optimizer.learning_rate": 0.001, "value.optimizer.warmup_steps": 0}
    if recipe.value is not None and recipe.value.ready_at is not None:
        own["value.ready_at"] = -100
    if recipe.value is not None and recipe.value.branches is not None:
        own["value.branches.completions"] = 2
    for place, saved in named_models(recipe).items():
        own[place] = request.getfixturevalue("value_models")[saved]
    return load_recipe(path, flags(tiny(model, folder / "run", **own)))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, tmp_path: Path, tiny_model_folder: Path, request: pytest.FixtureRequest) -> None:
    """Loss terms are finite; the policy moves, and its critic if it has one."""
    recipe = smaller(name, tmp_path, tiny_model_folder, request)
    train(recipe)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    metrics = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    assert len(metrics) == 2
    for row in metrics:
        kinds = ("loss", "grad_norm", "value_loss/", "value/grad_norm")
        values = [value for key, value in row.items() if key.startswith(kinds)]
        assert len(values) == 2 + len(recipe.loss) + len(recipe.value_loss) + bool(recipe.value_loss)
        assert all(map(math.isfinite, values))
        assert row["grad_norm"] > 0 and row["skipped"] == 0 and row.get("policy/waits", 0) == 0
        assert row.get("value/grad_norm", 1) > 0
    if "separator" in recipe.rollout.options or (recipe.examples and "separator" in recipe.examples.options):
        stored = [read_rollouts(file) for file in (tmp_path / "run" / "rollouts").glob("*.parquet")]
        assert max(int(batch.step_id.max()) for batch in stored) > 0  # the parts that read steps have some
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert (tmp_path / "run" / "value").exists() == bool(recipe.value_loss)
