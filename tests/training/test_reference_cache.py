"""The reference cache gives the numbers of a run without it, sees every change, and continues where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import UserError
from posttrain.micro_batches import micro_batches
from posttrain.models.joint import forward
from posttrain.parts.preference.scores import log_ratio
from posttrain.rollout.collect import draw_examples
from posttrain.system.processes import Processes
from posttrain.training import reference_cache
from posttrain.training.learner import score
from posttrain.training.recipe import load_recipe
from posttrain.training.reference_cache import ReferencedExamples, first_draws, schedule_of
from posttrain.training.required_passes import find_required_passes
from posttrain.training.setup import build_learner, load_material, with_cached_reference

PAIRS = 12


def rows(conversational: bool = False) -> list[dict[str, Any]]:
    """Pairs of very different lengths."""
    plain = [
        {"prompt": f"{a}+1=", "chosen": str(a + 1) * (1 + 5 * (a % 3)), "rejected": "no idea" * (1 + a % 2)}
        for a in range(PAIRS)
    ]
    if not conversational:
        return plain
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in plain]


def write(folder: Path, model: Path, data: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in data or rows())
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = {
        "policy": {"model": str(model)},
        "reference": {"cache": str(folder / "cache")},
        "data": {"path": "pairs.jsonl"},
        "examples": {"use": "pairs"},
        "loss": [{"use": "pairwise", "beta": 0.1}],
        "normaliser": {"use": "group_mean_of_token_sum"},
        "optimizer": {"learning_rate": 0.001},
        "steps": 3,
        "prompts_per_step": 4,
        "micro_batch_tokens": 64,
        "run": {"folder": str(folder / "run"), "trackers": [], "rollouts_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False), encoding="utf-8")
    return path


class Prepared:
    """A run that is set up but has taken no step."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self.recipe = load_recipe(path)
        needs, tokenizer = find_required_passes(self.recipe), AutoTokenizer.from_pretrained(self.recipe.policy.model)
        material = load_material(self.recipe, tokenizer, needs.columns)
        self.learner = build_learner(self.recipe, needs, processes)
        self.material = with_cached_reference(self.learner, material)

    def first_batch(self) -> Any:
        sampler = self.recipe.prompts.call(size=len(self.material), seed=self.recipe.seed)
        assert self.material.examples is not None
        drawn = draw_examples(self.recipe, self.learner.processes, self.material.examples, sampler, 0)
        return score(self.learner, drawn.batch)


@pytest.fixture(scope="module")
def prepare():
    """``prepare(path)`` sets up a run on one process, without taking a step."""
    with Processes() as processes:
        yield lambda path: Prepared(path, processes)


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("shard-*")}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_at_the_first_step_every_score_is_exactly_zero(
    prepare, tmp_path, tiny_model_folder, lora, conversational, cached
):
    """The policy is the reference, and the cache scores the batches of the run, so log-ratios are exactly 0."""
    policy = {"model": str(tiny_model_folder)} | ({"lora": {"rank": 4}} if lora else {})
    changes = {"policy": policy} | ({} if cached else {"reference": {"cache": False}})
    run = prepare(write(tmp_path, tiny_model_folder, rows(conversational), **changes))
    assert isinstance(run.material.examples, ReferencedExamples) == cached
    batch = run.first_batch()
    assert batch.logp_ref.abs().sum() > 0
    for part in micro_batches(batch, run.recipe.micro_batch_tokens, lambda n: n, whole_groups=True):
        (outputs,) = forward(run.learner.optimiser.model, part, temperature=1.0)
        assert outputs.logp.requires_grad
        assert log_ratio(outputs, part).eq(0).all()


def test_a_second_run_scores_nothing_and_other_weights_data_or_temperature_everything(
    prepare, tmp_path, tiny_model_folder, monkeypatch
):
    scored: list[int] = []
    original = reference_cache.reference_logp
    monkeypatch.setattr(reference_cache, "reference_logp", lambda *a: scored.append(len(a[1])) or original(*a))

    def scores(data=None, model=tiny_model_folder, **changes: Any) -> int:
        scored.clear()
        prepare(write(tmp_path, model, data, **changes))
        return sum(scored)

    assert scores() == 2 * PAIRS
    assert scores() == scores(loss=[{"use": "pairwise", "beta": 0.5}], seed=3) == 0
    assert scores(steps=30) == 0
    assert scores(sampling={"temperature": 0.7}) == 2 * PAIRS
    changed = rows()
    changed[5]["rejected"] += "!"
    assert scores(changed) == 2 * PAIRS
    assert scores() == 0
    other = tmp_path / "other"
    moved = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        moved.model.norm.weight[3] += 2**-20
    moved.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(other)
    assert scores(model=other) == 2 * PAIRS
    assert scores(reference={"model": str(other), "cache": str(tmp_path / "cache")}) == 0


def test_only_what_is_drawn_is_scored(prepare, tmp_path, tiny_model_folder):
    run = prepare(write(tmp_path, tiny_model_folder, steps=2))
    drawn = {i for index in schedule_of(run.recipe, PAIRS) for i in index}
    assert run.material.examples.logp.keys() == drawn and len(drawn) == 8


def test_an_interrupted_computation_goes_on_without_doing_its_shards_again(
    prepare, tmp_path, tiny_model_folder, monkeypatch
):
    monkeypatch.setattr(reference_cache, "SHARD_SECONDS", 0.0)
    path = write(tmp_path, tiny_model_folder)
    original, calls = reference_cache.reference_logp, []

    def interrupted(learner, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(learner, batch)

    monkeypatch.setattr(reference_cache, "reference_logp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(path)
    before = shards(tmp_path / "cache")
    assert len(before) == 2
    prepare(path)
    assert len(calls) == 4
    after = shards(tmp_path / "cache")
    assert len(after) == 3 and before.items() <= after.items()
    whole = write(tmp_path / "whole", tiny_model_folder)
    monkeypatch.setattr(reference_cache, "reference_logp", original)
    assert same(prepare(whole).material.examples.logp, prepare(path).material.examples.logp)


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all((a[i] == b[i]).all() for i in a)


def test_a_damaged_shard_is_named(prepare, tmp_path, tiny_model_folder):
    path = write(tmp_path, tiny_model_folder)
    prepare(path)
    (shard,) = (tmp_path / "cache").rglob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"shard-.*safetensors: a damaged shard.*remove it"):
        prepare(path)


def test_another_reference_is_let_go(prepare, tmp_path, tiny_model_folder):
    other = {"model": str(tiny_model_folder), "cache": str(tmp_path / "cache")}
    run = prepare(write(tmp_path, tiny_model_folder, reference=other))
    assert run.learner.reference is None and isinstance(run.material.examples, ReferencedExamples)


def test_a_reference_over_the_vocabulary_stays_in_memory(prepare, tmp_path, tiny_model_folder):
    margin = [{"use": "token_kl", "alpha": 1.0, "chosen_gradient": True}]
    run = prepare(write(tmp_path, tiny_model_folder, loss=[{"use": "pairwise", "margin": margin}]))
    assert run.learner.reference is not None and not isinstance(run.material.examples, ReferencedExamples)


def test_first_draws_skip_what_is_known():
    schedule = [[0, 1], [2, 3], [1, 4], [0, 2]]
    assert first_draws(schedule, set()) == [([0, 1], {0, 1}), ([2, 3], {2, 3}), ([1, 4], {4})]
    assert first_draws(schedule, {0, 1, 4}) == [([2, 3], {2, 3})]
    assert first_draws(schedule, {0, 1, 2, 3, 4}) == []
