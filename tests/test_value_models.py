"""Value models: alignment, members, scale, adapters on the policy's weights, target networks, and what is on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference_values as reference
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from posttrain import models
from posttrain.errors import RecipeError, UserError
from posttrain.models import Policy, active_adapter, build_policy, save_model, selected_adapter
from posttrain.options import Head as HeadOptions
from posttrain.options import Lora, Value
from posttrain.options import Policy as PolicyOptions
from posttrain.value_checkpoints import build_value, load_value, save_value
from posttrain.values import (
    Moments,
    ValueModel,
    ValueSpec,
    back_up,
    backed_up,
    polyak,
    reduce_members,
    target_copy,
)

TYPES = ("scalar", "categorical", "quantile", "bernoulli", "per_token")
SMALL = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES = {
    "Qwen2": SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3": SMALL | HEADS,
    "Llama": SMALL | HEADS,
    "Gemma2": SMALL | HEADS | {"query_pre_attn_scalar": 16},
    "GPT2": {"vocab_size": 261, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory, tiny_model_folder):
    """``family_folder("Llama")`` -> a saved tiny model of the family with the tokenizer of all tests."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            config = getattr(transformers, f"{family}Config")(**FAMILIES[family], bos_token_id=None, eos_token_id=1)
            name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
            model = getattr(transformers, name)(config)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def policy_options(tiny_model_folder) -> PolicyOptions:
    return PolicyOptions(model=str(tiny_model_folder))


@pytest.fixture
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def stirred(value: ValueModel, seed: int = 0, std: float = 0.3) -> ValueModel:
    """With weights in its head (and adapter) as training leaves them, not at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in value.own_parameters().items():
            if name.startswith("head.") or "lora_B" in name:
                parameter.normal_(std=std, generator=generator)
    return value


def shared_pair(folder, *, checkpointing: bool = False, seed: int = 0) -> tuple[Policy, ValueModel]:
    """A policy and a value model on the same weights, both with adapters that do something."""
    torch.manual_seed(seed)
    own = PolicyOptions(model=str(folder), lora=Lora(rank=4), gradient_checkpointing=checkpointing)
    policy = build_policy(own)
    value = build_value(Value(share=True), own, policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy, stirred(value, std=0.1)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["scalar", "per_token"])
def test_a_value_is_of_the_prefix_that_ends_with_its_column(family_folder, random_batch, family, kind):
    own = PolicyOptions(model=str(family_folder(family)))
    value, batch = stirred(build_value(Value(head=HeadOptions(type=kind)), own)).eval(), random_batch(0, groups=1)
    values, logits = value(batch.tokens, batch.states)
    assert logits is None and values.dtype == torch.float32 and (values[~batch.states] == 0).all()
    plain = AutoModelForCausalLM.from_pretrained(own.model, dtype=torch.float32).base_model.eval()
    weight, bias = value.head.linear.weight, value.head.linear.bias
    for row, column in batch.states.nonzero().tolist():
        seen = column + 1 if kind == "scalar" else column
        hidden = plain(input_ids=batch.tokens[row : row + 1, :seen]).last_hidden_state[0, -1]
        expected = weight[0] @ hidden + bias[0] if kind == "scalar" else weight[batch.tokens[row, column]] @ hidden
        torch.testing.assert_close(values[row, column], expected, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing(policy_options, random_batch):
    value, batch = stirred(build_value(Value(), policy_options)), random_batch(1)
    wide = torch.nn.functional.pad(batch.tokens, (0, 5), value=9), torch.nn.functional.pad(batch.states, (0, 5))
    torch.testing.assert_close(value(*wide)[0][:, :12], value(batch.tokens, batch.states)[0], atol=1e-5, rtol=0)


def test_a_row_without_states_has_no_gradient(policy_options, random_batch):
    value, batch = stirred(build_value(Value(), policy_options)), random_batch(2)
    value(batch.tokens, torch.zeros_like(batch.mask))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in value.head.parameters())


def test_the_first_column_has_no_state_before_it(policy_options, random_batch):
    value, batch = stirred(build_value(Value(head=HeadOptions(type="per_token")), policy_options)), random_batch(3)
    values, _ = value(batch.tokens, torch.ones_like(batch.mask))
    assert (values[:, 0] == 0).all() and (values[:, 1:] != 0).all()


# --------------------------------------------------------------------------------------------------- members and scale


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.sampled_from(["mean", "min", "max", "mean_minus_std"]))
@settings(max_examples=40, deadline=None)
def test_members_are_reduced_as_the_scalar_formula_says(values, how):
    reduced = reduce_members(torch.tensor(values)[:, None], how, 0.7)
    assert reduced.item() == pytest.approx(reference.reduce(values, how, 0.7), abs=1e-5)


@pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
def test_each_member_is_reachable_and_trains_alone(policy_options, random_batch, kind):
    section = Value(head=HeadOptions(type=kind, bins=5), members=3, reduce="min")
    value, batch = build_value(section, policy_options), random_batch(4)
    values, logits = value(batch.tokens, batch.states, members=True)
    reduced, none = value(batch.tokens, batch.states)
    assert values.shape == (3, *batch.mask.shape) and none is None
    assert torch.equal(values.amin(0), reduced) and not torch.allclose(values[0], values[1], atol=1e-3)
    if logits is not None:
        assert logits.shape == (*values.shape, 5)
        torch.testing.assert_close(value.head.decode(logits).where(batch.states, 0.0), values, atol=1e-6, rtol=0)
    values[1].sum().backward()
    touched = value.head.linear.weight.grad.unflatten(0, (3, -1)).abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, False]


def test_running_moments_are_the_weighted_ones():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4 + i, generator=generator) * 2 + i).tolist() for i in range(4)]
    moments = Moments(decay=0.9)
    for batch in batches:
        found = moments.update(sum(batch) / len(batch), sum(v * v for v in batch) / len(batch))
    assert found == pytest.approx(reference.running_moments(batches, 0.9), rel=1e-9)
    assert Moments().update(0.5, 0.25) == pytest.approx((0.5, 0.1))  # the floor of the deviation


@pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
def test_statistics_move_the_values_and_the_support_alike(policy_options, random_batch, kind):
    section = Value(head=HeadOptions(type=kind, bins=5, low=-2, high=2), normalise=True)
    value, batch = stirred(build_value(section, policy_options)), random_batch(5)
    before, logits = value(batch.tokens, batch.states)
    value.update_statistics(torch.tensor([3.0, 7.0, float("nan"), 5.0]))
    after, moved = value(batch.tokens, batch.states)
    scale = (8 / 3) ** 0.5
    assert value.spec.shift == pytest.approx(5.0) and value.spec.scale == pytest.approx(scale)
    torch.testing.assert_close(after, (5 + scale * before).where(batch.states, 0.0), atol=1e-5, rtol=1e-5)
    if kind == "categorical":
        torch.testing.assert_close((moved.softmax(-1) * value.support).sum(-1).where(batch.states, 0.0), after)
        assert value.support[0].item() == pytest.approx(5 - 2 * scale)
    if kind == "quantile":
        torch.testing.assert_close(moved.mean(-1), after)
        assert not torch.equal(moved, logits)


def test_statistics_are_those_of_all_ranks(policy_options):
    here, there = torch.tensor([1.0, 2.0]), torch.tensor([9.0])
    value, alone = (build_value(Value(normalise=True), policy_options) for _ in range(2))
    sums = torch.tensor([9.0, 81.0, 1.0], dtype=torch.float64)
    value.update_statistics(here, lambda mine: mine + sums)
    alone.update_statistics(torch.cat([here, there]))
    assert value.state == pytest.approx(alone.state)
    alone.update_statistics(torch.tensor([float("nan")]))
    assert value.state == pytest.approx(alone.state)
    again = build_value(Value(normalise=True), policy_options)
    again.state = value.state
    assert again.spec == value.spec and again.moments == value.moments


# ----------------------------------------------------------------------------------------------------------- backing up


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["mean", "soft", "max", "greedy"]), beta=st.floats(0.1, 3))
def test_backing_up_is_the_scalar_formula(seed, kind, beta):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(3, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    expected = [reference.back_up(p, q, kind, beta) for p, q in zip(logp.exp().tolist(), values.tolist(), strict=True)]
    torch.testing.assert_close(back_up(logp, values, kind, beta), torch.tensor(expected, dtype=torch.float64))


def test_a_soft_value_lies_between_the_mean_and_the_maximum():
    logp, values = torch.randn(4, 6).double().log_softmax(-1), torch.randn(4, 6).double()
    mean, largest = back_up(logp, values, "mean"), back_up(logp, values, "max")
    torch.testing.assert_close(back_up(logp, values, "soft", 1e5), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(back_up(logp, values, "soft", 1e-4), largest, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="positive beta"):
        back_up(logp, values, "soft", None)


@pytest.mark.parametrize("kind", ["mean", "soft", "max", "greedy"])
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_values_are_backed_up_over_every_next_token(tiny_model_folder, random_batch, monkeypatch, kind, chunk):
    monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", chunk)
    batch = random_batch(6)
    policy, _ = shared_pair(tiny_model_folder)
    own = PolicyOptions(model=str(tiny_model_folder))
    value = stirred(build_value(Value(head=HeadOptions(type="per_token")), own), std=0.05)
    value.spec = ValueSpec(head=value.spec.head, shift=0.5, scale=2.0)
    found = backed_up(value, policy, batch.tokens, batch.states, kind, 0.5, temperature=0.8)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)  # adapters off
    logp = (plain(batch.tokens).logits / 0.8).log_softmax(-1)
    values = 0.5 + 2.0 * plain.model(batch.tokens).last_hidden_state @ value.head.linear.weight.T
    for row, column in batch.states.nonzero()[:20].tolist():
        expected = reference.back_up(logp[row, column].exp().tolist(), values[row, column].tolist(), kind, 0.5)
        assert found[row, column].item() == pytest.approx(expected, abs=1e-4)
    assert (found[~batch.states] == 0).all() and not found.requires_grad


# ------------------------------------------------------------------------------------------ on the policy's own weights


def test_one_copy_of_the_weights_three_models(tiny_model_folder, random_batch):
    policy, value = shared_pair(tiny_model_folder)
    batch = random_batch(7)
    alone = build_policy(PolicyOptions(model=str(tiny_model_folder)))
    ours = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in value.backbone.parameters()} == ours
    reference_logp, _ = policy(batch.tokens, batch.mask, reference=True)
    assert torch.equal(reference_logp, alone(batch.tokens, batch.mask)[0])
    logp, _ = policy(batch.tokens, batch.mask)
    assert not torch.allclose(logp, reference_logp, atol=1e-3)
    assert not torch.allclose(value.hidden_states(batch.tokens), policy.hidden_states(batch.tokens), atol=1e-3)
    assert selected_adapter(policy.model) == "default"
    with active_adapter(policy.model, None):
        assert selected_adapter(policy.model) is None
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert any(".default." in name for name in trained) and any(".value." in name for name in trained)
    assert all("lora_" in name for name in trained)


def joint_and_separate(policy, value, batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of one backward pass through both models' losses, and of one pass for each."""
    found = []
    for together in (True, False):
        policy.train(), value.train()
        policy.zero_grad(), value.zero_grad()
        losses = []
        for module, inputs in ((policy, batch.mask), (value, batch.states)):
            loss = (module(batch.tokens, inputs)[0] * batch.advantage).sum()
            losses.append(loss)
            if not together:
                loss.backward()
        if together:
            torch.stack(losses).sum().backward()
        found.append(gradients(value) | gradients(policy))
    return found[0], found[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_joint_backward_pass_gives_the_gradients_of_separate_ones(tiny_model_folder, random_batch, checkpointing):
    policy, value = shared_pair(tiny_model_folder, checkpointing=checkpointing)
    batch = random_batch(8)
    joint, separate = joint_and_separate(policy, value, batch)
    assert joint.keys() == separate.keys() and any(".value." in name for name in joint)
    for name in joint:
        assert separate[name].abs().sum() > 0, name
        torch.testing.assert_close(joint[name], separate[name], atol=0, rtol=1e-6)
    plain_policy, plain_value = shared_pair(tiny_model_folder)
    expected, _ = joint_and_separate(plain_policy, plain_value, batch)
    for name in joint:  # checkpointed or not
        torch.testing.assert_close(joint[name], expected[name], atol=1e-5, rtol=1e-4)


def test_the_checkpointing_trap_is_there_without_the_cure(tiny_model_folder, random_batch):
    policy, value = shared_pair(tiny_model_folder, checkpointing=True)
    policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trapped, _ = joint_and_separate(policy, value, random_batch(8))
    right, _ = joint_and_separate(*shared_pair(tiny_model_folder), random_batch(8))
    wrong = {name for name in right if not torch.allclose(trapped[name], right[name], atol=1e-3, rtol=1e-2)}
    assert wrong == {name for name in right if ".value." in name}  # recomputed with the policy's adapter


def test_training_leaves_the_reference_and_the_other_adapter_alone(tiny_model_folder, random_batch):
    policy, value = shared_pair(tiny_model_folder, checkpointing=True)
    batch = random_batch(9)
    before, _ = policy(batch.tokens, batch.mask, reference=True)
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    values_before, _ = value(batch.tokens, batch.states)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(3):  # the policy alone: what the value model is made of has no gradient then
        policy.train()
        policy(batch.tokens, batch.mask)[0].mul(batch.advantage).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, own[name])}
    assert changed == {name for name in own if ".default." in name}
    after, _ = policy(batch.tokens, batch.mask, reference=True)
    assert torch.equal(before, after)
    assert torch.equal(value(batch.tokens, batch.states)[0], values_before)
    optimizer = torch.optim.AdamW(value.own_parameters().values(), lr=0.01)
    logp, _ = policy(batch.tokens, batch.mask)
    for _ in range(3):
        value(batch.tokens, batch.states)[0].sub(1.0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(value(batch.tokens, batch.states)[0], values_before, atol=1e-2)
    assert torch.equal(policy(batch.tokens, batch.mask)[0], logp)
    assert torch.equal(policy(batch.tokens, batch.mask, reference=True)[0], before)


def test_the_engine_gets_the_policy_alone(tiny_model_folder, tokenizer, tmp_path, random_batch):
    policy, value = shared_pair(tiny_model_folder)
    batch = random_batch(10)
    sent = dict(policy.weights())
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_model_folder).named_parameters())
    assert sent.keys() == plain.keys() and all(sent[name].shape == plain[name].shape for name in plain)
    stirred(value, seed=5)
    assert all(torch.equal(sent[name], tensor) for name, tensor in policy.weights())
    save_model(policy, tokenizer, tmp_path, torch.float32)
    loaded = Policy(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    expected, _ = policy.eval()(batch.tokens, batch.mask)
    torch.testing.assert_close(loaded(batch.tokens, batch.mask)[0], expected, atol=1e-5, rtol=0)
    assert [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()] == []


# ------------------------------------------------------------------------------------------------------- target network


@pytest.mark.parametrize("how", ["full", "lora", "share"])
def test_a_target_network_follows_slowly(tiny_model_folder, random_batch, how):
    own = PolicyOptions(model=str(tiny_model_folder))
    if how == "share":
        _, value = shared_pair(tiny_model_folder)
    else:
        value = stirred(build_value(Value(lora=Lora(rank=2) if how == "lora" else None), own))
    batch = random_batch(11)
    flags = {name: p.requires_grad for name, p in value.named_parameters()}
    target = target_copy(value)
    assert all(value.get_parameter(name).requires_grad == flag for name, flag in flags.items())
    assert torch.equal(target(batch.tokens, batch.states)[0], value(batch.tokens, batch.states)[0])
    assert not any(p.requires_grad for p in target.own_parameters().values())
    if how != "full":
        assert target.backbone is value.backbone
    before = {name: p.clone() for name, p in target.own_parameters().items()}
    stirred(value, seed=1)
    value.update_statistics(torch.tensor([1.0, 5.0]))
    polyak(target, value, 0.25)
    for name, parameter in value.own_parameters().items():
        expected = before[name] + 0.25 * (parameter - before[name])
        torch.testing.assert_close(target.own_parameters()[name], expected, atol=1e-6, rtol=0)
    assert target.spec.shift == value.spec.shift == 3.0
    if how == "full":
        assert target.own_parameters().keys() == dict(value.named_parameters()).keys()


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_equal_to_the_bit_after_loading(policy_options, tokenizer, tmp_path, random_batch, kind):
    section = Value(head=HeadOptions(type=kind, bins=5, low=-1, high=1), members=1 if kind == "per_token" else 2)
    value, batch = stirred(build_value(section, policy_options, kind="soft", beta=0.3)), random_batch(12)
    if kind != "bernoulli":
        value.update_statistics(torch.tensor([1.0, 2.0]))
    save_value(value, tokenizer, tmp_path, step=7)
    loaded = load_value(tmp_path)
    for mine, its in zip(value(batch.tokens, batch.states), loaded(batch.tokens, batch.states), strict=True):
        assert its is None if mine is None else torch.equal(mine, its)
    spec = loaded.spec
    assert (spec.head, spec.kind, spec.beta, spec.step, spec.members) == (section.head, "soft", 0.3, 7, section.members)
    assert (spec.shift, spec.scale) == (value.spec.shift, value.spec.scale) and spec.base == policy_options.model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_is_saved(family_folder, tokenizer, tmp_path, random_batch, family):
    own, batch = PolicyOptions(model=str(family_folder(family))), random_batch(13)
    for kind, auto in (("scalar", AutoModelForTokenClassification), ("per_token", AutoModelForCausalLM)):
        value = stirred(build_value(Value(head=HeadOptions(type=kind)), own)).eval()
        save_value(value, tokenizer, tmp_path / kind)
        plain = auto.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
        outputs = plain(input_ids=batch.tokens).logits.detach()
        if kind == "per_token":
            outputs = outputs[:, :-1].gather(-1, batch.tokens[:, 1:, None])
            outputs = torch.nn.functional.pad(outputs, (0, 0, 1, 0))
        values, _ = value(batch.tokens, batch.states)
        torch.testing.assert_close(values, outputs[..., 0].where(batch.states, 0.0), atol=1e-5, rtol=1e-5)
        assert torch.equal(load_value(tmp_path / kind)(batch.tokens, batch.states)[0], values)


PROGRAM = """
import sys, torch
from posttrain.value_checkpoints import load_value
batch = torch.load(sys.argv[2])
torch.save(load_value(sys.argv[1])(batch["tokens"], batch["states"])[0], sys.argv[3])
"""


@pytest.mark.engine
def test_a_fresh_process_needs_the_path_alone(policy_options, tokenizer, tmp_path, random_batch):
    value, batch = stirred(build_value(Value(), policy_options)), random_batch(14)
    save_value(value, tokenizer, tmp_path / "value")
    torch.save({"tokens": batch.tokens, "states": batch.states}, tmp_path / "batch.pt")
    command = [sys.executable, "-c", PROGRAM, *(str(tmp_path / name) for name in ("value", "batch.pt", "values.pt"))]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "values.pt"), value(batch.tokens, batch.states)[0])


@pytest.mark.parametrize("how", ["lora", "share"])
def test_adapters_are_merged_into_what_is_saved(tiny_model_folder, tokenizer, tmp_path, random_batch, how):
    if how == "share":
        _, value = shared_pair(tiny_model_folder)
    else:
        value = stirred(build_value(Value(lora=Lora(rank=2)), PolicyOptions(model=str(tiny_model_folder))), std=0.1)
    batch = random_batch(15)
    save_value(value, tokenizer, tmp_path)
    loaded = load_value(tmp_path)
    assert loaded.adapter is None
    expected = value(batch.tokens, batch.states)[0]
    torch.testing.assert_close(loaded(batch.tokens, batch.states)[0], expected, atol=1e-5, rtol=1e-4)
    target_copy(value)
    stirred(value, seed=4)  # what is merged is the model's own adapter, not that of its target
    save_value(value, tokenizer, tmp_path)
    expected = value(batch.tokens, batch.states)[0]
    torch.testing.assert_close(load_value(tmp_path)(batch.tokens, batch.states)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_saved_critic_starts_another(policy_options, tokenizer, tmp_path, random_batch):
    section = Value(head=HeadOptions(type="categorical", bins=5), members=2, reduce="min")
    value, batch = stirred(build_value(section, policy_options, kind="soft", beta=0.5)), random_batch(16)
    save_value(value, tokenizer, tmp_path)
    expected, _ = value(batch.tokens, batch.states)
    warm = build_value(Value(model=str(tmp_path)), policy_options)
    assert torch.equal(warm(batch.tokens, batch.states)[0], expected)
    assert (warm.spec.kind, warm.spec.beta, warm.spec.reduce, warm.spec.members) == ("soft", 0.5, "min", 2)
    assert all(p.requires_grad for p in warm.parameters())
    frozen = build_value(Value(model=str(tmp_path), frozen=True), policy_options, kind="mean")
    assert frozen.spec.kind == "soft" and not any(p.requires_grad for p in frozen.parameters())
    other = build_value(Value(model=str(tmp_path), reduce="max"), policy_options, kind="mean")
    assert other.spec.kind == "mean" and (other(batch.tokens, batch.states)[0] >= expected).all()
    adapted = build_value(Value(model=str(tmp_path), lora=Lora(rank=2)), policy_options)
    assert torch.equal(adapted(batch.tokens, batch.states)[0], expected)  # adapters start at nothing
    assert {n.split(".")[0] for n, p in adapted.named_parameters() if p.requires_grad} == {"backbone", "head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_is_a_value_model(family_folder, tokenizer, tmp_path, random_batch, family):
    folder, batch = family_folder(family), random_batch(17)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    value = load_value(tmp_path)
    assert value.spec == ValueSpec()
    values, _ = value(batch.tokens, batch.states)
    for row, length in enumerate(batch.length.tolist()):
        if batch.states[row, length - 1]:
            expected = model(batch.tokens[row : row + 1, :length]).logits[0, 0]
            torch.testing.assert_close(values[row, length - 1], expected, atol=1e-5, rtol=1e-5)
    critic = build_value(Value(model=str(tmp_path)), PolicyOptions(model=str(folder))).eval()
    assert torch.equal(critic(batch.tokens, batch.states)[0], values)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_process_model_is_a_value_model(tiny_model_folder, tokenizer, tmp_path, random_batch, labels):
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=labels, dtype=torch.float32)
    torch.nn.init.normal_(model.score.bias)
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = random_batch(18)
    logits = model(batch.tokens).logits
    right = logits[..., 0] if labels == 1 else logits.softmax(-1)[..., 1]
    value = load_value(tmp_path)
    assert value.spec.head.type == ("scalar" if labels == 1 else "bernoulli")
    values, _ = value(batch.tokens, batch.states)
    torch.testing.assert_close(values, right.where(batch.states, 0.0), atol=1e-5, rtol=1e-5)


def test_one_label_may_be_read_as_a_probability(tiny_model_folder, tokenizer, tmp_path, random_batch):
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    section = Value(model=str(tmp_path), head=HeadOptions(type="bernoulli"))
    value, batch = build_value(section, PolicyOptions(model=str(tiny_model_folder))), random_batch(19)
    assert torch.equal(
        value(batch.tokens, batch.states)[0],
        value(batch.tokens, batch.states)[1][..., 0].sigmoid().where(batch.states, 0.0),
    )


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_is_no_value_model_is_named(tiny_model_folder, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_value(tmp_path / "absent")
    with pytest.raises(UserError, match="without a value head"):
        load_value(tiny_model_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_value(tmp_path / "empty")
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_folder, num_labels=5)
    model.save_pretrained(tmp_path / "tagger")
    with pytest.raises(UserError, match="puts out 5"):
        load_value(tmp_path / "tagger")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="classifies into 3"):
        load_value(tmp_path / "classifier")


def test_a_broken_entry_is_named(policy_options, tokenizer, tmp_path):
    save_value(build_value(Value(), policy_options), tokenizer, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"posttrain": config["posttrain"] | {"kind": "median"}}))
    with pytest.raises(UserError, match="kind"):
        load_value(tmp_path)
    wider = config["posttrain"] | {"members": 2}
    path.write_text(json.dumps(config | {"posttrain": wider}))
    with pytest.raises(UserError, match="1 outputs.*speaks of 2"):
        load_value(tmp_path)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"head": HeadOptions(type="bernoulli")}, "value.head: .*does not fit"),
        ({"members": 3}, "value.members: 3"),
    ],
)
def test_a_recipe_that_does_not_fit_the_saved_model(policy_options, tokenizer, tmp_path, section, complaint):
    save_value(build_value(Value(members=2), policy_options), tokenizer, tmp_path)
    with pytest.raises(RecipeError, match=complaint):
        build_value(Value(model=str(tmp_path), **section), policy_options)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"share": True}, "policy.lora"),
        ({"frozen": True}, "without a value head"),
        ({"frozen": True, "lora": Lora()}, "leave out `value.lora`"),
        ({"normalise": True, "head": HeadOptions(type="bernoulli")}, "probability"),
        ({"members": 2, "head": HeadOptions(type="per_token")}, "one member"),
        ({"head": HeadOptions(type="categorical", low=1.0, high=0.0)}, "must be below"),
    ],
)
def test_contradictions_are_refused(policy_options, section, complaint):
    with pytest.raises(RecipeError, match=complaint):
        build_value(Value(**section), policy_options)


def test_a_soft_value_needs_its_temperature(policy_options):
    with pytest.raises(RecipeError, match="target.beta"):
        build_value(Value(), policy_options, kind="soft")


def test_a_value_model_of_another_tokenizer_is_refused(policy_options, tmp_path):
    from conftest import make_tokenizer

    save_value(build_value(Value(), policy_options), make_tokenizer(tmp_path / "tokenizer"), tmp_path / "value")
    build_value(Value(model=str(tmp_path / "value")), policy_options)
    swapped = (tmp_path / "value" / "tokenizer.json").read_text().replace('"a":', '"swap":').replace('"b":', '"a":')
    (tmp_path / "value" / "tokenizer.json").write_text(swapped.replace('"swap":', '"b":'))
    with pytest.raises(RecipeError, match="reads other tokens"):
        build_value(Value(model=str(tmp_path / "value")), policy_options)
