"""Every recipe of ``recipes/preference``, as it stands in the file, makes two real steps on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import VERIFIER
from safetensors.torch import load_file
from transformers import AutoTokenizer

from posttrain.batch import seq_mean
from posttrain.data.examples import pairs
from posttrain.models.policy import build_policy
from posttrain.output.tracking import read_metrics
from posttrain.recipe.sections import DataSection, PolicySection
from posttrain.training.loop import train
from posttrain.training.recipe import Recipe, load_recipe

pytestmark = pytest.mark.engine
RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ["dpo", *sorted(f"preference/{path.stem}" for path in (RECIPES / "preference").glob("*.yaml"))]
SMALL = {
    "policy.dtype": "float32",
    "policy.gradient_checkpointing": "false",
    "data.name": "null",
    "data.columns": "{}",
    "evaluate": "null",
    "optimizer.learning_rate": 0.001,
    "optimizer.warmup_steps": 0,
    "steps": 2,
    "prompts_per_step": 4,
    "run.trackers": "[]",
    "run.rollouts_every": 0,
}


def rows(part: str) -> list[dict[str, Any]]:
    """Data for a part of the slot `examples`, or prompts for a recipe that samples."""
    asked = [{"prompt": f"{a}+1="} for a in range(8)]
    answers = [str(a + 1) * (1 + a % 3) for a in range(8)]
    no = "no idea"
    scores = [{"score_chosen": 3.0 + a, "score_rejected": 1.5} for a in range(8)]
    return {
        "pairs": [q | {"chosen": a, "rejected": no} | s for q, a, s in zip(asked, answers, scores, strict=True)],
        "rated": [
            q | {"completion": c, "label": c != no} for q, a in zip(asked, answers, strict=True) for c in (a, no)
        ],
        "demonstrations": [q | {"completion": a} for q, a in zip(asked, answers, strict=True)],
        "prompts": [q | {"answer": "1"} for q in asked],
    }[part]


def small(name: str, folder: Path, model: Path, **changes: Any) -> Recipe:
    """The recipe on the tiny model and data that fit it."""
    path = RECIPES / f"{name}.yaml"
    plain = load_recipe(path)
    examples = plain.examples
    data = folder / "data.jsonl"
    written = rows("prompts" if examples is None else examples.name)
    data.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    chosen = SMALL | {"policy.model": model, "data.path": data, "run.folder": folder / "run"}
    if examples is None:
        (folder / "verifier.py").write_text(VERIFIER, encoding="utf-8")
        chosen |= {"verify": f"[{{use: '{folder / 'verifier.py'}:share_of_digits'}}]"}
        chosen |= {"engine.use": "transformers", "sampling.max_tokens": 8, "minibatches": min(2, plain.minibatches)}
    return load_recipe(path, [f"--{key}={value}" for key, value in (chosen | changes).items()])


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    """Other model, data, verifier and sizes, the recipe's own method. Loss terms are finite and the weights move."""
    recipe = small(name, tmp_path, tiny_model_folder)
    train(recipe)
    metrics = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(metrics) == 2
    for row in metrics:
        values = [float(row[key] or 0) for key in row if key.startswith(("loss", "grad_norm"))]
        assert len(values) == 2 + len(recipe.loss) and all(map(math.isfinite, values))
        assert float(row["grad_norm"] or 0) > 0 and row["skipped"] == 0
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_a_resumed_run_remembers_the_running_baseline(tmp_path: Path, tiny_model_folder: Path) -> None:
    """BCO in four steps, and in two and two: the same weights, and the mean over all four batches."""
    states = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            changes = {"steps": stop, "optimizer.schedule": "constant", "run.keep_finished": 1}
            train(small("preference/bco", folder, tiny_model_folder, **changes), resume=stop != stops[0])
        state = json.loads((folder / "run" / "checkpoints" / "step-000004" / "state.json").read_text())
        states.append((state["parts"], load_file(folder / "run" / "model" / "model.safetensors")))
    (memory, weights), (resumed, its_weights) = states
    assert memory == resumed and memory["baseline"]["count"] == 4 * 4 * 2 and memory["baseline"]["sum"] != 0
    assert all(torch.equal(weights[key], its_weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["dpo", "preference/kto", "preference/ipo", "preference/simpo"])
def test_preferences_of_other_prompts_are_learned(name: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    """'No idea' is at first about as likely as a digit; the prompts of the test are not in the training data."""
    train(small(name, tmp_path, tiny_model_folder, **{"steps": 10, "optimizer.learning_rate": 0.003}))
    held_out = [{"prompt": f"{a}+2=", "chosen": str(a + 2), "rejected": "no idea"} for a in (3, 5, 6)]
    data = tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    batch = pairs(DataSection(path=str(data)), tokenizer, None).batch(range(3))
    gap = []
    for folder in (tiny_model_folder, tmp_path / "run" / "model"):
        with torch.no_grad():
            logp = build_policy(PolicySection(model=str(folder)))(batch.tokens, batch.mask)[0]
        chosen, rejected = seq_mean(logp, batch.mask).view(-1, 2).unbind(1)
        gap.append(chosen - rejected)
    assert (gap[1] > gap[0] + 0.3).all()
