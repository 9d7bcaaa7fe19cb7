"""Runs whose engine and trainer differ stop before the first step; equal policies are equal to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_run
from tiny_families import save_tiny

from posttrain.engines import transformers as engines
from posttrain.errors import RecipeError
from posttrain.models.policy import Policy
from posttrain.output.tracking import read_metrics
from posttrain.training import loop, self_check
from posttrain.training.loop import train
from posttrain.training.recipe import load_recipe

pytestmark = pytest.mark.engine


def start(folder: Path, model: Path, **changes) -> list[dict]:
    train(load_recipe(write_run(folder, model, steps=1, **changes)))
    return read_metrics(folder / "run", timing=False)


def test_an_engine_without_a_feature_of_the_model_stops_the_run(tmp_path, monkeypatch):
    model = save_tiny("gemma2", tmp_path / "gemma2", of_queries_and_keys=1.0)
    monkeypatch.setattr(engines, "kernel_for", lambda config, asked: asked)
    with pytest.raises(RecipeError, match=r"engine: Gemma2ForCausalLM: .* nats .*; at most 0.01 .*max_difference"):
        start(tmp_path / "refused", model)
    assert not (tmp_path / "refused" / "run" / "metrics.jsonl").exists()
    accepted = {"use": "transformers", "max_difference": 100.0}
    assert start(tmp_path / "accepted", model, engine=accepted)[0]["sampler/difference"] > 0.01


def test_an_adapter_that_does_not_reach_the_engine_stops_the_run(tmp_path, tiny_model_folder, monkeypatch):
    """A new adapter changes nothing: the check gives it weights. The planted fault sends weights without adapters."""
    policy = {"model": str(tiny_model_folder), "lora": {"rank": 4}}
    start(tmp_path / "right", tiny_model_folder, policy=policy)

    def without_adapters(self):
        parameters = self.base.named_parameters()
        return ((name.replace(".base_layer", ""), p.detach()) for name, p in parameters if ".lora_" not in name)

    monkeypatch.setattr(Policy, "weights", without_adapters)
    with pytest.raises(RecipeError, match=r"before the first step .*policy.lora.targets"):
        start(tmp_path / "planted", tiny_model_folder, policy=policy)


def test_the_completions_of_the_first_step_are_compared_too(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(loop, "check_engine", lambda run, load: load())
    monkeypatch.setattr(self_check, "EXACT", 1e-12)
    with pytest.raises(RecipeError, match="on the completions of the first step"):
        start(tmp_path, tiny_model_folder)


def test_equal_policies_are_equal_where_the_configuration_has_dropout(tmp_path):
    model = save_tiny("gpt2", tmp_path / "gpt2")
    slow = {"learning_rate": 1e-12}
    grpo = start(tmp_path / "grpo", model, epochs=2, minibatches=1, optimizer=slow)[0]
    assert grpo["policy/ratio"] == pytest.approx(1, abs=1e-6) and grpo["policy/kl_old"] < 1e-9
    given = {"examples": {"use": "pairs"}, "data": {"path": "pairs.jsonl"}, "loss": [{"use": "pairwise", "beta": 0.1}]}
    absent = dict.fromkeys(("verify", "advantage", "sampling", "engine", "completions"))
    (tmp_path / "dpo").mkdir()
    rows = [
        f'{{"prompt": "{a}+{b}=", "chosen": "{a + b}", "rejected": "{a * b + 1}"}}\n' for a in (2, 3) for b in (5, 6)
    ]
    (tmp_path / "dpo" / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    dpo = start(tmp_path / "dpo", model, optimizer=slow, **given, **absent)[0]
    assert (dpo["preference/margin"], dpo["preference/accuracy"], dpo["policy/kl_ref"]) == (0, 0.5, 0)
