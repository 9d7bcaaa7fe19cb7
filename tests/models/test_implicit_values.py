"""Implicit values: the log-ratio of a language model to its frozen base, and PRIME with it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from posttrain import load_recipe, load_value, train
from posttrain.batch import Batch, Outputs
from posttrain.data.rollout_files import read_rollouts
from posttrain.decoding.candidate_cache import value_score
from posttrain.errors import RecipeError, UserError
from posttrain.models import policy as models
from posttrain.models.implicit_value import ImplicitValue
from posttrain.models.policy import build_policy, save_model
from posttrain.models.value import ValueModel, polyak, target_copy
from posttrain.models.value_files import build_value, save_value
from posttrain.output.tracking import read_metrics
from posttrain.parts.credit import last_chosen
from posttrain.parts.rewards import value_gain
from posttrain.parts.targets import outcome_label
from posttrain.parts.value_losses import bce
from posttrain.recipe.sections import HeadSection, LoraSection, ValueSection
from posttrain.recipe.sections import PolicySection as PolicyOptions
from posttrain.system.processes import Processes
from posttrain.training.required_passes import find_required_passes
from posttrain.training.setup import build_learner

BETA = 0.3
HEAD = HeadSection(type="implicit", beta=BETA)


@pytest.fixture
def batch_of(random_batch):
    """A function from a seed to a random batch whose tool output is at least two tokens long."""

    def make(seed: int) -> Batch:
        batch = random_batch(seed)
        column = torch.arange(batch.mask.shape[1])
        tool_output = ~batch.mask & (column >= 3) & (column < batch.length[:, None])
        return batch.set(mask=batch.mask & ~F.pad(tool_output[:, :-1], (1, 0)))

    return make


def moved(value: ValueModel, std: float = 0.05, seed: int = 0) -> ImplicitValue:
    """The value model after random changes to the weights of its language model."""
    assert isinstance(value, ImplicitValue)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in value.own_parameters().values():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return value.eval()


def by_hand(model: torch.nn.Module, base: torch.nn.Module, batch: Batch) -> list[list[float]]:
    """The values V_t = β Σ log π_φ / π_base, computed one completion and one token at a time."""
    values = [[0.0] * batch.mask.shape[1] for _ in range(len(batch))]
    for i, row in enumerate(batch.tokens.tolist()):
        logp, logp_base = (lm(torch.tensor([row])).logits[0].double().log_softmax(-1) for lm in (model, base))
        total = 0.0
        for t in range(1, len(row)):
            if batch.mask[i, t]:
                total += BETA * (logp[t - 1, row[t]] - logp_base[t - 1, row[t]]).item()
            if batch.states[i, t]:
                values[i][t] = total
    return values


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_the_value_is_the_sum_of_log_ratios(policy_options, batch_of, monkeypatch, chunk: int) -> None:
    monkeypatch.setitem(models.CHUNK_ELEMENTS, "cpu", chunk)
    value, batch = moved(build_value(ValueSection(head=HEAD), policy_options)), batch_of(20)
    base = AutoModelForCausalLM.from_pretrained(policy_options.model, dtype=torch.float32).eval()
    values, logits = value(batch.tokens, batch.states)
    expected = torch.tensor(by_hand(value.backbone, base, batch)).double()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits[..., 0], values) and values.dtype == torch.float32
    member_values, member_logits = value(batch.tokens, batch.states, members=True)
    assert torch.equal(member_values, values[None]) and torch.equal(member_logits, logits[None])
    last_of_prompt = batch.prompt_length - 1  # no token has been chosen there
    assert (values[torch.arange(len(batch)), last_of_prompt] == 0).all() and values.abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("section", [{}, {"lora": LoraSection(rank=2)}], ids=["all weights", "adapters"])
def test_an_implicit_value_starts_at_exactly_zero(policy_options, batch_of, section) -> None:
    value, batch = build_value(ValueSection(head=HEAD, **section), policy_options), batch_of(21)
    assert (value.eval()(batch.tokens, batch.states)[0] == 0).all()
    assert isinstance(value, ImplicitValue) and (value.base is None) == bool(section)


@torch.no_grad()
def test_rewards_telescope(policy_options, batch_of) -> None:
    """A token's reward is β times its log-ratio; their sum is the value of the whole completion."""
    value, batch = moved(build_value(ValueSection(head=HEAD), policy_options)), batch_of(22)
    batch = batch.set(value=value(batch.tokens, batch.states)[0])
    gains = value_gain(batch)
    torch.testing.assert_close(gains, BETA * value.log_ratios(batch.tokens, batch.mask), atol=1e-6, rtol=1e-4)
    ends = batch.value.where(last_chosen(batch.mask), 0.0).sum(-1)
    torch.testing.assert_close(gains.sum(-1), ends, atol=1e-6, rtol=1e-5)
    assert (gains[~batch.mask] == 0).all()


@pytest.mark.parametrize("how", ["all weights", "adapters", "shared"])
def test_gradients_are_those_of_the_cross_entropy_and_in_phi_alone(tiny_model_folder, batch_of, how) -> None:
    torch.manual_seed(0)
    options = PolicyOptions(model=str(tiny_model_folder), lora=LoraSection(rank=2) if how == "shared" else None)
    policy = build_policy(options)
    section = ValueSection(head=HEAD, share=how == "shared", lora=LoraSection(rank=2) if how == "adapters" else None)
    value, batch = moved(build_value(section, options, policy)), batch_of(23)
    target = outcome_label(batch.set(reward=(batch.reward > 0).float()), at="end")
    batch = batch.set(target=target)
    values, logits = value(batch.tokens, batch.states)
    bce(Outputs(logp=torch.zeros_like(values), value=values, value_logits=logits), batch).sum().backward()
    own_ids = {id(parameter) for parameter in value.own_parameters().values()}
    everything = [*value.parameters(), *policy.parameters()]
    assert all(p.grad is None for p in everything if id(p) not in own_ids)
    gradients = {name: p.grad.clone() for name, p in value.own_parameters().items() if p.grad is not None}
    assert gradients.keys() == value.own_parameters().keys()
    value.zero_grad()
    ends = last_chosen(batch.mask)
    assert (ends.sum(-1) == 1).all()
    log_odds = BETA * value.log_ratios(batch.tokens, batch.mask).sum(-1)
    label = target.where(ends, 0.0).sum(-1)
    F.binary_cross_entropy_with_logits(log_odds, label, reduction="sum").backward()
    for name, parameter in value.own_parameters().items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_three_models_on_one_copy_of_the_weights(tiny_model_folder, batch_of) -> None:
    """With ``share`` the base is the reference policy, so training the policy does not change the value."""
    options, batch = PolicyOptions(model=str(tiny_model_folder), lora=LoraSection(rank=2)), batch_of(24)
    policy = build_policy(options)
    value = moved(build_value(ValueSection(head=HEAD, share=True), options, policy))
    before = value(batch.tokens, batch.states)[0]
    for name, parameter in policy.named_parameters():
        if f".lora_B.{policy.adapter}." in name:
            parameter.add_(0.1)
    assert torch.equal(value(batch.tokens, batch.states)[0], before) and before.abs().max() > 0
    assert not torch.equal(*(policy(batch.tokens, batch.mask, reference=off)[0] for off in (False, True)))


@torch.no_grad()
@pytest.mark.parametrize("section", [{}, {"lora": LoraSection(rank=2)}], ids=["all weights", "adapters"])
def test_a_target_network_follows(policy_options, batch_of, section) -> None:
    value, batch = moved(build_value(ValueSection(head=HEAD, **section), policy_options)), batch_of(25)
    slow = target_copy(value)
    before = value(batch.tokens, batch.states)[0]
    assert torch.equal(slow(batch.tokens, batch.states)[0], before)
    moved(value, seed=1)
    now = value(batch.tokens, batch.states)[0]
    assert torch.equal(slow(batch.tokens, batch.states)[0], before) and not torch.equal(now, before)
    polyak(slow, value, rate=1.0)
    assert torch.equal(slow(batch.tokens, batch.states)[0], now)
    assert not any(parameter.requires_grad for parameter in slow.own_parameters().values())


# -------------------------------------------------------------------------------------------------------------- on disk


@torch.no_grad()
def test_values_are_equal_to_the_bit_after_loading(policy_options, tokenizer, tmp_path, batch_of) -> None:
    value, batch = moved(build_value(ValueSection(head=HEAD), policy_options)), batch_of(26)
    save_value(value, tokenizer, tmp_path, step=7)
    loaded = load_value(tmp_path)
    expected = value(batch.tokens, batch.states)[0]
    assert torch.equal(loaded(batch.tokens, batch.states)[0], expected)
    assert (loaded.spec.head, loaded.spec.base, loaded.spec.step) == (HEAD, policy_options.model, 7)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    saved = dict(plain.named_parameters())
    assert all(torch.equal(saved[name], parameter) for name, parameter in value.backbone.named_parameters())
    warm = build_value(ValueSection(model=str(tmp_path)), policy_options).eval()
    assert torch.equal(warm(batch.tokens, batch.states)[0], expected) and warm.spec.base == policy_options.model
    frozen = build_value(ValueSection(model=str(tmp_path), frozen=True), policy_options)
    assert torch.equal(frozen(batch.tokens, batch.states)[0], expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@torch.no_grad()
def test_adapters_are_merged_into_the_saved_model(policy_options, tokenizer, tmp_path, batch_of) -> None:
    value = moved(build_value(ValueSection(head=HEAD, lora=LoraSection(rank=2)), policy_options))
    batch = batch_of(27)
    save_value(value, tokenizer, tmp_path)
    expected = value(batch.tokens, batch.states)[0]
    torch.testing.assert_close(load_value(tmp_path)(batch.tokens, batch.states)[0], expected, atol=1e-5, rtol=1e-3)


def test_errors_say_what_is_missing(policy_options, tokenizer, tmp_path, batch_of) -> None:
    base = tmp_path / "base"
    save_model(build_policy(policy_options), tokenizer, base, torch.float32)
    value = build_value(ValueSection(head=HEAD, model=str(base)), policy_options)
    save_value(value, tokenizer, tmp_path / "value")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"^value model: the base of the implicit value .*: there is no folder"):
        load_value(tmp_path / "value")
    for section in (ValueSection(head=HEAD, members=2), ValueSection(head=HEAD, normalise=True)):
        with pytest.raises(RecipeError, match=r"value\.(members|normalise)"):
            build_value(section, policy_options)
    last = torch.zeros_like(batch_of(28).mask)
    last[:, -1] = True
    with pytest.raises(ValueError, match="must mark all"):
        value(batch_of(28).tokens, last)


# -------------------------------------------------------------------------------------------------------------- in runs

PRIME: dict[str, Any] = {
    "value": {"head": {"type": "implicit"}, "optimizer": {"learning_rate": 0.003}},
    "reward": [{"use": "value_gain"}],
    "advantage": {"use": "returns", "center": "leave_one_out", "step_center": "leave_one_out"},
    "target": {"use": "outcome_label", "at": "end"},
    "value_loss": [{"use": "bce"}],
}


@pytest.mark.parametrize(
    ("changes", "place"), [({"members": 2}, "value.members"), ({"normalise": True}, "value.normal")]
)
def test_recipes_that_contradict_themselves_are_refused(tmp_path, tiny_model_folder, changes, place) -> None:
    path = write_run(tmp_path, tiny_model_folder, **PRIME | {"value": PRIME["value"] | changes})
    with pytest.raises(RecipeError, match=place):
        load_recipe(path)


def test_a_policy_without_a_loss_requires_no_gradient(tmp_path, tiny_model_folder) -> None:
    changes = PRIME | {"loss": [], "advantage": None, "reward": [], "value": PRIME["value"] | {"share": True}}
    changes["policy"] = {"model": str(tiny_model_folder), "lora": {"rank": 2}}
    changes = {name: setting for name, setting in changes.items() if setting is not None}
    path = write_run(tmp_path, tiny_model_folder, **changes)
    recipe = load_recipe(path)
    with Processes() as processes:
        learner = build_learner(recipe, find_required_passes(recipe), processes)
        assert learner.value is not None
        own_ids = {id(parameter) for parameter in learner.value.own_parameters().values()}
        assert own_ids == {id(parameter) for parameter in learner.policy.parameters() if parameter.requires_grad}


@pytest.mark.engine
def test_prime_learns(tmp_path: Path, tiny_model_folder: Path) -> None:
    """In the first step the model equals its base and rewards are 0; later they are the gains of its values."""
    train(load_recipe(write_run(tmp_path, tiny_model_folder, **PRIME, steps=24)))
    metrics = read_metrics(tmp_path / "run")
    losses = [row["value_loss/bce"] or math.nan for row in metrics]
    assert losses[0] == pytest.approx(math.log(2)) and sum(losses[-8:]) / 8 < losses[0] - 0.01
    assert all(row[name] for row in metrics for name in ("value/grad_norm", "grad_norm"))
    first, second = (read_rollouts(tmp_path / "run" / "rollouts" / f"step-00000{step}.parquet") for step in (1, 2))
    assert first.value is not None and not first.value.any()
    assert second.value is not None and second.value.any()
    torch.testing.assert_close(second.step_reward, value_gain(second))
    assert load_value(tmp_path / "run" / "value").spec.base == str(tiny_model_folder)


def test_an_implicit_value_as_a_guide_is_refused_with_a_hint(policy_options) -> None:
    with pytest.raises(ValueError, match="LogRatio"):
        value_score(build_value(ValueSection(head=HEAD), policy_options))
