"""Dropout of configurations: off in training by default, kept on request, and kept in what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import save_tiny

from posttrain.models.load import load_tokenizer
from posttrain.models.policy import build_policy, save_model
from posttrain.models.value_files import build_value, save_value
from posttrain.recipe.sections import PolicySection, ValueSection

DROPPING = {
    "gpt2": {},
    "opt": {"layerdrop": 0.5},
    "falcon": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "gptj": {"attn_pdrop": 0.2, "resid_pdrop": 0.1},
    "mixtral": {"router_jitter_noise": 0.5},
}


@pytest.mark.parametrize("family", DROPPING)
def test_training_and_evaluation_passes_are_equal_unless_the_recipe_keeps_dropout(family, tmp_path):
    folder = str(save_tiny(family, tmp_path / family, **DROPPING[family]))
    tokens = torch.randint(5, 261, (2, 14))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for dropout in (False, True):
        policy = build_policy(PolicySection(model=folder, dropout=dropout))
        with torch.no_grad():
            trained, evaluated = policy.train()(tokens, mask)[0], policy.eval()(tokens, mask)[0]
        assert torch.equal(trained, evaluated) != dropout


def test_saved_models_have_the_dropout_of_their_checkpoint(tmp_path):
    folder = save_tiny("falcon", tmp_path / "falcon", **DROPPING["falcon"])
    options = PolicySection(model=str(folder))
    tokenizer = load_tokenizer(options)
    save_model(build_policy(options), tokenizer, tmp_path / "model", torch.float32)
    save_value(build_value(ValueSection(), options), tokenizer, tmp_path / "value")
    for saved in ("model", "value"):
        config = json.loads((tmp_path / saved / "config.json").read_text(encoding="utf-8"))
        assert config["hidden_dropout"] == config["attention_dropout"] == 0.2
        assert not any("posttrain" in name or name == "dropout_of_config" for name in config if name != "posttrain")
