"""Every recipe of ``recipes/rl``, as it stands in the file, makes two real steps on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs import write_run
from safetensors.torch import load_file

from posttrain.loading import load_recipe
from posttrain.online import train
from posttrain.tracking import read_metrics

pytestmark = pytest.mark.engine
FOLDER = Path(__file__).parent.parent / "recipes" / "rl"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    """Other model, data, verifier and sizes, the recipe's own method. Loss terms are finite and the weights move."""
    write_run(tmp_path, tiny_model_folder)
    overrides = {
        "policy.model": tiny_model_folder,
        "policy.dtype": "float32",
        "policy.gradient_checkpointing": "false",
        "data.path": tmp_path / "data.jsonl",
        "data.name": "null",
        "data.columns": "{}",
        "verify.0.use": f"{tmp_path / 'verifier.py'}:share_of_digits",
        "engine.use": "transformers",
        "evaluate": "null",
        "sampling.max_tokens": 12,
        "prompts_per_step": 4,
        "completions": min(load_recipe(FOLDER / f"{name}.yaml").completions, 4),
        "optimizer.learning_rate": 0.001,
        "optimizer.warmup_steps": 0,
        "steps": 2,
        "run.folder": tmp_path / "run",
    }
    recipe = load_recipe(FOLDER / f"{name}.yaml", [f"--{key}={value}" for key, value in overrides.items()])
    train(recipe)
    metrics = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(metrics) == 2
    for row in metrics:
        values = [value for key, value in row.items() if key.startswith(("loss", "grad_norm"))]
        assert len(values) == 2 + len(recipe.loss) and all(map(math.isfinite, values))
        assert row["grad_norm"] > 0 and row["skipped"] == 0
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(after[key], before[key]) for key in before)
