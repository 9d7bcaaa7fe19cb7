"""Adapters on every layer: what is trained is what is sampled and saved, and the reference is without all of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posttrain.errors import RecipeError
from posttrain.models.adapters import adapter_parameters
from posttrain.models.load import load_model
from posttrain.models.policy import Policy, build_policy, save_model
from posttrain.recipe.sections import LoraSection, PolicySection
from posttrain.training.other_policies import adapted_copy

LAYERS = (("lm_head",), ("lm_head", "q_proj"), ("embed_tokens",), ".*(lm_head|embed_tokens|v_proj)", "all-linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder):
    """Function ``folder(tied=...)`` that gives a saved tiny Llama, with tied or untied embeddings."""

    def save(*, tied: bool):
        path = tmp_path_factory.mktemp("tied" if tied else "untied")
        torch.manual_seed(0)
        sizes = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 1}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).save_pretrained(path)
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(path)
        return path

    return {tied: save(tied=tied) for tied in (False, True)}


def stirred_policy(path, targets) -> tuple[Policy, PolicySection]:
    """A policy with random adapters that are not zero, and its section."""
    torch.manual_seed(0)
    section = PolicySection(model=str(path), lora=LoraSection(rank=4, targets=targets))
    policy = build_policy(section).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return policy, section


@pytest.mark.parametrize("targets", LAYERS, ids=str)
def test_the_reference_has_no_adapter_in_any_layer(folder, random_batch, targets):
    policy, section = stirred_policy(folder[False], targets)
    beside = Policy(load_model(dataclasses.replace(section, lora=None), dtype=torch.float32))
    batch = random_batch(0)
    expected = beside.statistics(batch.tokens, batch.mask, entropy=True, collision=True)
    off = policy.statistics(batch.tokens, batch.mask, entropy=True, collision=True, without_adapters=True)
    for ours, theirs in zip(off, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    to_itself = policy.statistics(batch.tokens, batch.mask, kl_from=policy).kl_ref
    to_other = policy.statistics(batch.tokens, batch.mask, kl_from=beside).kl_ref
    torch.testing.assert_close(to_itself, to_other, atol=1e-5, rtol=0)
    assert to_itself is not None and to_itself.max() > 1e-3


@pytest.mark.parametrize("targets", LAYERS, ids=str)
def test_the_trained_the_sent_and_the_saved_policy_are_one(folder, random_batch, tmp_path, targets):
    policy, section = stirred_policy(folder[False], targets)
    batch = random_batch(1)
    trained = policy(batch.tokens, batch.mask)[0]
    save_model(policy, AutoTokenizer.from_pretrained(section.model), tmp_path, torch.float32)
    saved = Policy(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(saved(batch.tokens, batch.mask)[0], trained, atol=1e-4, rtol=0)
    sent = AutoModelForCausalLM.from_pretrained(section.model)
    sent.load_state_dict(dict(policy.weights()))
    torch.testing.assert_close(Policy(sent)(batch.tokens, batch.mask)[0], trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "q_proj"), ".*embed_tokens"], ids=str)
def test_adapters_on_tied_layers_are_refused(folder, targets):
    section = PolicySection(model=str(folder[True]), lora=LoraSection(targets=targets))
    with pytest.raises(RecipeError, match=r"embed_tokens and lm_head are tied"):
        build_policy(section)


def test_adapters_on_other_layers_of_a_tied_model_are_not(folder):
    build_policy(PolicySection(model=str(folder[True]), lora=LoraSection()))


@pytest.mark.parametrize("targets", [("no_such_layer",), ("norm",)], ids=str)
def test_targets_that_cannot_have_an_adapter_are_refused(folder, targets):
    with pytest.raises(RecipeError, match=r"lora.targets: "):
        build_policy(PolicySection(model=str(folder[False]), lora=LoraSection(targets=targets)))


def test_a_snapshot_copies_the_adapter_of_every_layer(folder, random_batch):
    policy, _ = stirred_policy(folder[False], ("embed_tokens", "lm_head", "q_proj"))
    assert len(adapter_parameters(policy.model, policy.adapter)) == 2 + 2 + 2 * 2
    batch = random_batch(2)
    before = policy(batch.tokens, batch.mask)[0]
    snapshot = adapted_copy(policy)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model, policy.adapter).values():
            parameter.mul_(3)
    torch.testing.assert_close(snapshot(batch.tokens, batch.mask, reference=True)[0], before, atol=1e-6, rtol=0)
    kl = policy.statistics(batch.tokens, batch.mask, kl_from=snapshot).kl_ref
    assert kl is not None and kl.max() > 1e-3
