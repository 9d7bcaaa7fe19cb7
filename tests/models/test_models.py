"""Log-probs and weights of a policy against a plain forward pass of the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import RecipeError
from posttrain.models import policy as models
from posttrain.models.load import load_tokenizer
from posttrain.models.policy import Policy, build_policy, save_model
from posttrain.recipe.sections import LoraSection
from posttrain.recipe.sections import PolicySection as PolicyOptions


@pytest.fixture
def options(tiny_model_folder) -> PolicyOptions:
    return PolicyOptions(model=str(tiny_model_folder))


def plain_logps(model, batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the chosen tokens, computed one row at a time without padding."""
    logps, entropies = torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)
    for row, length in enumerate(batch.length.tolist()):
        logits = model(batch.tokens[row : row + 1, :length]).logits[0].float() / temperature
        table = logits.log_softmax(-1)
        for t in range(1, length):
            if batch.mask[row, t]:
                logps[row, t] = table[t - 1, batch.tokens[row, t]]
                entropies[row, t] = -(table[t - 1].exp() * table[t - 1]).sum()
    return logps, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7 * 261, 10**9])
def test_logps_are_in_the_columns_of_their_tokens(options, random_batch, monkeypatch, temperature, chunk):
    monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", chunk)
    policy, batch = build_policy(options), random_batch(0)
    logp, entropy = policy(batch.tokens, batch.mask, temperature=temperature, entropy=True)
    expected, expected_entropy = plain_logps(policy.model, batch, temperature)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    assert logp.dtype == torch.float32 and (logp[~batch.mask] == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_do_not_change_the_gradient(tiny_model_folder, random_batch, monkeypatch, checkpointing):
    batch = random_batch(1)
    gradients = []
    for chunk in (3 * 261, 10**9):
        monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", chunk)
        policy = build_policy(PolicyOptions(model=str(tiny_model_folder), gradient_checkpointing=checkpointing))
        policy.train()
        logp, _ = policy(batch.tokens, batch.mask)
        (logp * batch.advantage).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().sum() > 0


def test_padding_changes_nothing(options, random_batch):
    policy, batch = build_policy(options), random_batch(2)
    wide = torch.nn.functional.pad(batch.tokens, (0, 9), value=17)
    logp, _ = policy(batch.tokens, batch.mask)
    padded, _ = policy(wide, torch.nn.functional.pad(batch.mask, (0, 9)))
    torch.testing.assert_close(padded[:, : logp.shape[1]], logp, atol=1e-6, rtol=0)


def test_a_row_without_chosen_tokens_has_no_gradient(options, random_batch):
    policy, batch = build_policy(options), random_batch(3)
    logp, _ = policy(batch.tokens, torch.zeros_like(batch.mask))
    logp.sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in policy.parameters())


@pytest.fixture
def adapted(tiny_model_folder) -> Policy:
    policy = build_policy(PolicyOptions(model=str(tiny_model_folder), lora=LoraSection(rank=4)))
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def test_weights_for_an_engine_are_those_of_the_saved_model(options):
    sent = dict(build_policy(options).weights())
    expected = dict(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in sent)


def test_adapters_are_merged_for_the_engine(adapted, options, random_batch):
    merged = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    merged.load_state_dict(dict(adapted.weights()), strict=False)
    batch = random_batch(4)
    logp, _ = adapted.eval()(batch.tokens, batch.mask)
    expected, _ = Policy(merged)(batch.tokens, batch.mask)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())


def test_the_reference_is_the_policy_without_its_adapters(adapted, options, random_batch):
    batch = random_batch(5)
    reference, _ = adapted.eval()(batch.tokens, batch.mask, reference=True)
    expected, _ = build_policy(options)(batch.tokens, batch.mask)
    assert torch.equal(reference, expected)
    logp, _ = adapted(batch.tokens, batch.mask)
    assert not torch.allclose(logp, expected, atol=1e-3)


def test_only_adapters_are_trained(adapted):
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_saved_model_loads_and_generates(adapted, options, tmp_path, random_batch):
    tokenizer = load_tokenizer(options)
    save_model(adapted, tokenizer, tmp_path / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = random_batch(6)
    expected, _ = adapted.eval()(batch.tokens, batch.mask)
    torch.testing.assert_close(Policy(model)(batch.tokens, batch.mask)[0], expected, atol=1e-5, rtol=0)
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = saved_tokenizer.apply_chat_template([{"role": "user", "content": "2+2"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False).shape[1] == len(ids) + 3
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()


def test_the_message_names_a_missing_model(tmp_path):
    with pytest.raises(RecipeError, match="no folder"):
        load_tokenizer(PolicyOptions(model=str(tmp_path / "absent")))
