"""Value models: alignment, members, scale, adapters on the policy's weights, and target networks."""

from __future__ import annotations

import pytest
import reference_value_models as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_values import FAMILIES, shared_pair, stirred
from transformers import AutoModelForCausalLM

from posttrain.models import policy as models
from posttrain.models.adapters import active_adapter, selected_adapter
from posttrain.models.policy import Policy, build_policy, save_model
from posttrain.models.value import Moments, ValueSpec, backed_up, polyak, target_copy
from posttrain.models.value_files import build_value
from posttrain.parts.targets import backup, reduce_members
from posttrain.recipe.sections import HeadSection as HeadOptions
from posttrain.recipe.sections import LoraSection, ValueSection
from posttrain.recipe.sections import PolicySection as PolicyOptions


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["scalar", "per_token"])
def test_a_value_belongs_to_the_prefix_that_ends_with_its_column(family_folder, random_batch, family, kind):
    options = PolicyOptions(model=str(family_folder(family)))
    value = stirred(build_value(ValueSection(head=HeadOptions(type=kind)), options)).eval()
    batch = random_batch(0, groups=1)
    values, logits = value(batch.tokens, batch.states)
    assert logits is None and values.dtype == torch.float32 and (values[~batch.states] == 0).all()
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).base_model.eval()
    weight, bias = value.head.linear.weight, value.head.linear.bias
    for row, column in batch.states.nonzero().tolist():
        seen = column + 1 if kind == "scalar" else column
        hidden = plain(input_ids=batch.tokens[row : row + 1, :seen]).last_hidden_state[0, -1]
        expected = weight[0] @ hidden + bias[0] if kind == "scalar" else weight[batch.tokens[row, column]] @ hidden
        torch.testing.assert_close(values[row, column], expected, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing(policy_options, random_batch):
    value, batch = stirred(build_value(ValueSection(), policy_options)), random_batch(1)
    wide = torch.nn.functional.pad(batch.tokens, (0, 5), value=9), torch.nn.functional.pad(batch.states, (0, 5))
    torch.testing.assert_close(value(*wide)[0][:, :12], value(batch.tokens, batch.states)[0], atol=1e-5, rtol=0)


def test_a_row_without_states_has_no_gradient(policy_options, random_batch):
    value, batch = stirred(build_value(ValueSection(), policy_options)), random_batch(2)
    value(batch.tokens, torch.zeros_like(batch.mask))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in value.head.parameters())


def test_the_first_column_has_no_state_before_it(policy_options, random_batch):
    value = stirred(build_value(ValueSection(head=HeadOptions(type="per_token")), policy_options))
    batch = random_batch(3)
    values, _ = value(batch.tokens, torch.ones_like(batch.mask))
    assert (values[:, 0] == 0).all() and (values[:, 1:] != 0).all()


# --------------------------------------------------------------------------------------------------- members and scale


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.sampled_from(["mean", "min", "max", "mean_minus_std"]))
@settings(max_examples=40, deadline=None)
def test_members_are_reduced_as_the_scalar_formula_says(values, how):
    reduced = reduce_members(torch.tensor(values)[:, None], how=how, deviations=0.7)
    assert reduced.item() == pytest.approx(reference.reduce(values, how, 0.7), abs=1e-5)


@pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
def test_each_member_is_reachable_and_trains_alone(policy_options, random_batch, kind):
    section = ValueSection(head=HeadOptions(type=kind, bins=5), members=3, reduce="min")
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


def test_running_moments_are_the_weighted_moments():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4 + i, generator=generator) * 2 + i).tolist() for i in range(4)]
    moments = Moments(decay=0.9)
    for batch in batches:
        running = moments.update(sum(batch) / len(batch), sum(v * v for v in batch) / len(batch))
    assert running == pytest.approx(reference.running_moments(batches, 0.9), rel=1e-9)
    assert Moments().update(0.5, 0.25) == pytest.approx((0.5, 0.1))  # the smallest deviation


@pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
def test_statistics_move_the_values_and_the_support_alike(policy_options, random_batch, kind):
    section = ValueSection(head=HeadOptions(type=kind, bins=5, low=-2, high=2), normalise=True)
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
    value, alone = (build_value(ValueSection(normalise=True), policy_options) for _ in range(2))
    sums = torch.tensor([9.0, 81.0, 1.0], dtype=torch.float64)
    value.update_statistics(here, lambda own_sums: own_sums + sums)
    alone.update_statistics(torch.cat([here, there]))
    assert value.state == pytest.approx(alone.state)
    alone.update_statistics(torch.tensor([float("nan")]))
    assert value.state == pytest.approx(alone.state)
    restored = build_value(ValueSection(normalise=True), policy_options)
    restored.state = value.state
    assert restored.spec == value.spec and restored.moments == value.moments


# ----------------------------------------------------------------------------------------------------------- backing up


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["mean", "soft", "max", "greedy"]), beta=st.floats(0.1, 3))
def test_backed_up_values_are_the_scalar_formula(seed, kind, beta):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(3, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    expected = [reference.back_up(p, q, kind, beta) for p, q in zip(logp.exp().tolist(), values.tolist(), strict=True)]
    torch.testing.assert_close(backup(values, logp, kind=kind, beta=beta), torch.tensor(expected, dtype=torch.float64))


def test_a_soft_value_tends_to_the_mean_and_to_the_maximum():
    logp, values = torch.randn(4, 6).double().log_softmax(-1), torch.randn(4, 6).double()
    mean, largest = backup(values, logp, kind="mean"), backup(values, logp, kind="max")
    torch.testing.assert_close(backup(values, logp, kind="soft", beta=1e5), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(backup(values, logp, kind="soft", beta=1e-4), largest, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["mean", "soft", "max", "greedy"])
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_values_are_backed_up_over_every_next_token(tiny_model_folder, random_batch, monkeypatch, kind, chunk):
    monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", chunk)
    batch = random_batch(6)
    policy, _ = shared_pair(tiny_model_folder)
    options = PolicyOptions(model=str(tiny_model_folder))
    value = stirred(build_value(ValueSection(head=HeadOptions(type="per_token")), options), std=0.05)
    value.spec = ValueSpec(head=value.spec.head, shift=0.5, scale=2.0)
    result = backed_up(value, policy, batch.tokens, batch.states, kind, 0.5, temperature=0.8)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)  # adapters off
    logp = (plain(batch.tokens).logits / 0.8).log_softmax(-1)
    values = 0.5 + 2.0 * plain.model(batch.tokens).last_hidden_state @ value.head.linear.weight.T
    for row, column in batch.states.nonzero()[:20].tolist():
        expected = reference.back_up(logp[row, column].exp().tolist(), values[row, column].tolist(), kind, 0.5)
        assert result[row, column].item() == pytest.approx(expected, abs=1e-4)
    assert (result[~batch.states] == 0).all() and not result.requires_grad
    with pytest.raises(ValueError, match="positive beta"):
        backed_up(value, policy, batch.tokens, batch.states, "soft")


# ------------------------------------------------------------------------------------------ on the policy's own weights


def test_one_copy_of_the_weights_three_models(tiny_model_folder, random_batch):
    policy, value = shared_pair(tiny_model_folder)
    batch = random_batch(7)
    alone = build_policy(PolicyOptions(model=str(tiny_model_folder)))
    addresses = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in value.backbone.parameters()} == addresses
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


def test_adapters_and_head_are_float32_on_bfloat16_weights(tiny_model_folder, random_batch):
    options = PolicyOptions(
        model=str(tiny_model_folder), lora=LoraSection(rank=4), dtype="bfloat16", gradient_checkpointing=True
    )
    policy, batch = build_policy(options), random_batch(7)
    value = stirred(build_value(ValueSection(share=True, lora=LoraSection(rank=2)), options, policy), std=0.1)
    assert {p.dtype for p in value.own_parameters().values()} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = value.train()(batch.tokens, batch.states)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in value.own_parameters().values())


def joint_and_separate(policy, value, batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of one backward pass through both models' losses, and of a separate pass for each."""
    results = []
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
        results.append(gradients(value) | gradients(policy))
    return results[0], results[1]


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
    for name in joint:  # the same with and without checkpointing
        torch.testing.assert_close(joint[name], expected[name], atol=1e-5, rtol=1e-4)


def test_plain_checkpointing_gives_wrong_gradients_with_two_adapters(tiny_model_folder, random_batch):
    """``enable_checkpointing`` is needed: Transformers' own call recomputes activations with the wrong adapter."""
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
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    values_before, _ = value(batch.tokens, batch.states)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(3):  # the policy alone, so that the value model's weights have no gradient
        policy.train()
        policy(batch.tokens, batch.mask)[0].mul(batch.advantage).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if ".default." in name}
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


def test_the_engine_gets_only_the_policy(tiny_model_folder, tokenizer, tmp_path, random_batch):
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
    options = PolicyOptions(model=str(tiny_model_folder))
    if how == "share":
        _, value = shared_pair(tiny_model_folder)
    else:
        value = stirred(build_value(ValueSection(lora=LoraSection(rank=2) if how == "lora" else None), options))
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
