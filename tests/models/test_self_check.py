"""The self-check finds faults that are planted in models, and leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_families import save_tiny, tiny_language_model

from posttrain.errors import RecipeError
from posttrain.models import load
from posttrain.models import policy as policies
from posttrain.models.logit_map import LogitMap
from posttrain.models.policy import Policy, build_policy
from posttrain.models.self_check import BUDGET, Comparison, Rows, check_policy, check_value
from posttrain.models.value_files import build_value
from posttrain.recipe.sections import HeadSection, LoraSection, PolicySection, ValueSection


def options(family: str, folder, std: float = 0.1, **changes) -> PolicySection:
    return PolicySection(model=str(save_tiny(family, folder / family, std=std)), **changes)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_scale_or_cap_that_is_left_out(family, tmp_path, monkeypatch):
    policy = build_policy(options(family, tmp_path, std=0.5))
    check_policy(policy, trained=True)
    monkeypatch.setattr(policies, "logit_map", lambda model: LogitMap())
    with pytest.raises(RecipeError, match=r"policy.model: G\w+ForCausalLM: log-probs .* by up to .* nats"):
        check_policy(policy, trained=True)


def test_a_feature_that_the_attention_kernel_drops(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "kernel_for", lambda config, asked: asked)
    section = options("gemma2", tmp_path, std=0.6)
    with pytest.raises(RecipeError, match="Gemma2ForCausalLM: .*attention: sdpa.*set policy.attention: eager"):
        check_policy(build_policy(section), trained=False)
    with pytest.raises(RecipeError, match=r"value.model: Gemma2Model: .*set policy.attention: eager"):
        check_value(build_value(ValueSection(), section), trained=False)


@pytest.mark.parametrize("affordable", [True, False])
def test_a_kernel_that_drops_a_window_longer_than_the_batch(affordable, tmp_path, monkeypatch, capsys):
    policy = build_policy(options("mistral", tmp_path))
    policy.base.config.sliding_window = 40
    rows, compare = Rows(policy.base.config, torch.device("cpu")), Comparison(policy.base, "policy.model")
    compare.layers(rows, policy.hidden_states)

    def without_window(tokens):
        states = policy.hidden_states(tokens)
        return states * 2 if tokens.shape[1] > 40 and policy.base.config._attn_implementation == "sdpa" else states

    monkeypatch.setitem(BUDGET, "cpu", BUDGET["cpu"] if affordable else 1.0)
    if affordable:
        with pytest.raises(RecipeError, match="beyond the attention window of 40 tokens .*policy.attention: eager"):
            compare.layers(rows, without_window)
    else:
        compare.layers(rows, without_window)
        assert "window of 40 tokens are not tried" in capsys.readouterr().err


def test_dropout_that_is_not_asked_for(tmp_path):
    section = options("gpt2", tmp_path, dropout=True)
    policy = build_policy(section)
    check_policy(policy, trained=True, random_modes=True)
    check_policy(policy, trained=False)
    with pytest.raises(RecipeError, match="GPT2LMHeadModel: .*training mode.*policy.dropout: true"):
        check_policy(policy, trained=True)
    with pytest.raises(RecipeError, match="GPT2Model: .*training mode.*policy.dropout: true"):
        check_value(build_value(ValueSection(), section), trained=True)


class HeadKeepsItsAdapter(Policy):
    """A policy whose reference has the adapters that it should not have."""

    def forward(self, tokens, mask, *, reference=False, **asked):
        return super().forward(tokens, mask, **asked)


def test_an_adapter_that_stays_on_in_the_reference(tmp_path):
    policy = build_policy(options("llama", tmp_path, lora=LoraSection(rank=2)))
    check_policy(policy, trained=True)
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM: log-probs without adapters .*policy.lora.targets"):
        check_policy(HeadKeepsItsAdapter(policy.model), trained=False)


def test_a_model_that_sees_later_tokens():
    with pytest.raises(RecipeError, match="BertGenerationDecoder: .*no causal language model"):
        check_policy(Policy(tiny_language_model("bert-generation")), trained=False)


def test_layers_that_depend_on_the_width_of_the_batch():
    model = tiny_language_model("llama")
    model.get_decoder().embed_tokens.register_forward_hook(lambda module, inputs, output: output + output.shape[1] / 10)
    with pytest.raises(RecipeError, match="padding on the right"):
        check_policy(Policy(model), trained=False)


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)])
def test_the_check_changes_nothing(lora, tmp_path):
    policy = build_policy(options("qwen3", tmp_path, lora=lora)).train()
    before = {name: (p.clone(), p.requires_grad) for name, p in policy.named_parameters()}
    state = torch.get_rng_state()
    check_policy(policy, trained=True)
    assert all(module.training for module in policy.modules())
    assert policy.base.config._attn_implementation == "sdpa"
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


@pytest.mark.parametrize("head", [HeadSection(), HeadSection(type="implicit")])
def test_value_models_pass(head, tmp_path):
    check_value(build_value(ValueSection(head=head), options("qwen3", tmp_path)), trained=True)


def test_single_numbers_that_are_large_are_no_measure():
    """Rounding of numbers fifty times as large as the others, as trained models have, is no fault. Others are."""
    model = tiny_language_model("llama")
    compare = Comparison(model, "policy.model")
    own = torch.ones(2, 4, 64)
    own[:, :, 3] = 50.0
    rounded = own.clone()
    rounded[:, :, 3] *= 1 + 3e-5
    compare.relative(rounded, own, "hidden states", "a remedy")
    different = own.clone()
    different[1, 2, :32] += 0.02
    with pytest.raises(RecipeError, match="hidden states differ from the model's own by up to 0.0022 of their length"):
        compare.relative(different, own, "hidden states", "a remedy")
