"""Numbers of papers that shipped recipes once missed: each is computed with the recipe's own parts, and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from random_batch import make_random_batch
from reference_values import q_ranking
from test_rl_recipes import with_judge
from torch import Tensor

from posttrain.batch import Batch, Finish, Outputs
from posttrain.training.apply_parts import add_rewards, advantages_of, total_loss, total_value_loss, value_target
from posttrain.training.learner import with_shares
from posttrain.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
ALL = {path.stem: path for folder in ("rl", "value") for path in (ROOT / "recipes" / folder).glob("*.yaml")}


def shipped(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def completions(*lengths: int, reward: list[float] | None = None, finish: Finish = Finish.STOPPED) -> Batch:
    """Completions of these lengths behind a prompt of one token, in one group, each token a step; log-probs are -1."""
    count, columns = len(lengths), 1 + max(lengths)
    place = torch.arange(columns)
    mask = (place >= 1) & (place <= torch.tensor(lengths)[:, None])
    blank, rewards = (
        make_random_batch(0, groups=1, size=count, columns=columns, prompt=1),
        torch.tensor(reward or [0.0]),
    )
    return blank.set(
        mask=mask,
        length=torch.tensor(lengths) + 1,
        finish=torch.full((count,), int(finish)),
        step_id=torch.where(mask, place, -1),
        reward=rewards.expand(count).clone(),
        score=rewards.expand(count).clone(),
        step_reward=torch.zeros(mask.shape),
        value=torch.zeros(mask.shape),
        value_next=None,
        **{name: torch.where(mask, -1.0, 0.0) for name in ("logp_old", "logp_ref", "logp_sampler")},
    )


def judged(batch: Batch) -> Tensor:
    """Reward in place of a process model's: nothing."""
    return torch.zeros(batch.mask.shape)


def slope(recipe: Recipe, term: int, batch: Batch) -> Tensor:
    """Gradient of one loss term of a recipe, its coefficient and normaliser included."""
    logp = torch.where(batch.mask, -1.0, 0.0).requires_grad_()
    batch = with_shares(recipe, batch)
    loss, _ = total_loss(recipe.loss, Outputs(logp=logp), batch)
    others = [part for i, part in enumerate(recipe.loss) if i != term and part.normaliser is None]
    if others:
        loss = loss - total_loss(others, Outputs(logp=logp), batch.set(term_share=None))[0]
    return torch.autograd.grad(loss, logp)[0]


# ---- truncation -----------------------------------------------------------------------------------------------------


def names(slot: str, part: str) -> list[str]:
    loaded = {name: getattr(load_recipe(path), slot) for name, path in ALL.items()}
    return sorted(name for name, chosen in loaded.items() if chosen is not None and chosen.name == part)


@pytest.mark.parametrize("name", [name for name in names("advantage", "gae") if name != "dvpo"])
def test_a_cut_is_an_ending_for_advantages(name: str) -> None:
    """V = 0.6 at every state, score 0, cut off: the last token's advantage is -0.6, not 0."""
    batch = completions(4, finish=Finish.LENGTH)
    batch = batch.set(value=torch.where(batch.states, 0.6, 0.0))
    recipe = load_recipe(ALL[name])
    assert recipe.advantage is not None
    advantage = recipe.advantage(add_rewards(with_judge(recipe, judged), batch))[0, 1:].tolist()
    assert advantage[-1] == pytest.approx(-0.6)
    if name in ("ppo", "vc_ppo", "psgpo"):  # λ = 0.95
        assert advantage == pytest.approx([-0.514425, -0.5415, -0.57, -0.6])


@pytest.mark.parametrize("name", names("target", "lambda_return"))
def test_a_cut_is_an_ending_for_the_value_model(name: str) -> None:
    """Every state has a target, and that of the whole completion is its score."""
    batch = completions(4, reward=[0.25], finish=Finish.LENGTH)
    batch = batch.set(value=torch.where(batch.states, 0.6, 0.0))
    if name in ("cd_q", "soft"):
        batch = batch.set(value_next=batch.value)
    target = value_target(load_recipe(ALL[name]), batch)[0]
    assert not target.isnan().any() and target[-1] == 0.25
    recipe_target = load_recipe(ALL[name]).target
    assert recipe_target is not None
    if recipe_target.options.get("lambda_", 1.0) == 1.0:
        assert target.tolist() == pytest.approx([0.25] * 5)


# ---- coefficients and normalisers -----------------------------------------------------------------------------------


def test_the_likelihood_of_rpo_has_the_coefficient_eta_beta() -> None:
    """Liu et al. 2024: η β = 0.005 · 0.01 at each chosen token, a hundredth of DPO's β σ(0) at the start."""
    batch = completions(100, 7).set(reward=torch.tensor([1.0, 0.0]))
    found = slope(shipped("preference/rpo"), 1, batch)
    assert found[0, 1:].tolist() == pytest.approx([-5e-5] * 100, rel=1e-4)
    assert not found[1].any()
    dpo = slope(shipped("preference/rpo"), 0, batch)
    assert dpo[0, 1:].tolist() == pytest.approx([-0.005] * 100, rel=1e-2)


def test_vineppo_sums_the_kl_over_a_completion_and_caps_it_at_each_token() -> None:
    """1e-4 · mean over completions of Σ_t k3: at 200 tokens that is 200 times its mean over tokens."""
    recipe = shipped("rl/vineppo")
    batch = completions(200, 200).set(advantage=torch.zeros(2, 201))
    apart = batch.mask * torch.tensor([0.1] * 101 + [-20.0] * 100)  # log π_ref - log π
    batch = batch.set(logp_ref=torch.where(batch.mask, -1.0, 0.0) + apart)
    found = slope(recipe, 1, batch.set(step_id=batch.step_id))
    expected = 1e-4 / 2 * (1 - math.exp(0.1))  # derivative of e^-x - 1 + x at x = -0.1, of two completions
    assert found[0, 1:101].tolist() == pytest.approx([expected] * 100, rel=1e-4)
    assert not found[0, 101:].any()  # k3 of 19 is above the cap of 10
    value, terms = total_loss(recipe.loss, Outputs(logp=torch.where(batch.mask, -1.0, 0.0)), with_shares(recipe, batch))
    total = 100 * (math.exp(0.1) - 1.1) + 100 * 10.0
    assert float(terms["kl"]) == pytest.approx(total, rel=1e-4)
    assert float(value) == pytest.approx(1e-4 * total, rel=1e-4)


def test_vineppo_whitens_with_the_unbiased_variance() -> None:
    """Branch values .2, .6 and .4 with a right answer: changes .4, -.2 and .6, of mean 4/15 and variance .5067/3."""
    batch = completions(3, 3, reward=[1.0]).set(baseline_only=torch.tensor([False, True]))
    batch = batch.set(value=torch.tensor([[0.2, 0.6, 0.4, 0.0]] * 2))
    found = advantages_of(shipped("rl/vineppo"), batch)[0, 1:].tolist()
    changes = [0.4, -0.2, 0.6]
    mean = sum(changes) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in changes) / 2)
    assert found == pytest.approx([(x - mean) / deviation for x in changes], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "term", "per_token"),
    [
        ("cpo", 1, 1 / 100),  # mean over tokens, as in the authors' code
        ("slic", 1, 1.0),
        ("aot", 0, 0.01 / 2),  # β σ(0) at the start
        ("aot_unpaired", 0, 0.01 / 2),
        ("hinge", 0, 0.05),  # γ
        ("cal_dpo", 1, 0.5 * 2 * 500.0),  # half the slope of (s - 1 / (2 · 0.001))²
    ],
)
def test_the_slope_at_each_token_of_the_chosen_answer(name: str, term: int, per_token: float) -> None:
    recipe = shipped(f"preference/{name}")
    batch = completions(100, 7).set(reward=torch.tensor([1.0, 0.0]))
    batch = batch.set(baseline=recipe.baseline(batch)) if recipe.baseline is not None else batch
    found = slope(recipe, term, batch)[0, 1:]
    assert found.tolist() == pytest.approx([-per_token] * 100, rel=2e-2 if term == 0 else 1e-4)


def test_cpl_discounts_nothing() -> None:
    """-0.1 σ(-h) at all 100 tokens of the chosen answer, and half of it at those of the rejected one."""
    batch = completions(100, 7).set(reward=torch.tensor([1.0, 0.0]))
    found = slope(shipped("preference/cpl"), 0, batch)
    wrong = 1 / (1 + math.exp(0.1 * (-100 + 0.5 * 7)))
    assert found[0, 1:].tolist() == pytest.approx([-0.1 * wrong] * 100, rel=1e-4)
    assert found[1, 1:8].tolist() == pytest.approx([0.05 * wrong] * 7, rel=1e-4)


@pytest.mark.parametrize(("chosen", "rejected"), [(100, 7), (7, 100)])
def test_r_dpo_learns_less_where_the_chosen_answer_is_the_longer_one(chosen: int, rejected: int) -> None:
    """-0.1 σ(-0.01 (n_w - n_l)) at each token of the chosen answer: σ(-0.93) = 0.283 or σ(0.93) = 0.717."""
    batch = completions(chosen, rejected).set(reward=torch.tensor([1.0, 0.0]))
    found = slope(shipped("preference/r_dpo"), 0, batch)
    wrong = 1 / (1 + math.exp(0.01 * (chosen - rejected)))
    assert found[0, 1 : chosen + 1].tolist() == pytest.approx([-0.1 * wrong] * chosen, rel=1e-4)


def test_the_targets_of_infonca_are_those_of_its_temperature() -> None:
    """Ratings that differ by 0.1 leave nothing for the lower one; equal ones share."""
    (term,) = shipped("preference/infonca").loss
    target = term.options["target"]
    ratings, valid = torch.tensor([[7.0, 6.9], [7.0, 7.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert target(ratings, valid).exp().tolist() == [[1.0, 0.0], [0.5, 0.5]]


TEMPERATURES = {
    "rl/vineppo": 0.6,
    "rl/lite_ppo": 0.99,
    "preference/dno": 0.7,
    "preference/iterative_dpo": 0.7,
    "preference/sppo_online": 0.7,
    "preference/comal": 0.8,
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_completions_are_sampled_at_the_paper_s_temperature_from_the_whole_distribution(name: str) -> None:
    sampling = shipped(name).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (TEMPERATURES[name], 1.0, 0)


def test_the_kl_of_rloo_is_the_paper_s() -> None:
    batch = completions(3, 3).set(reward=torch.tensor([1.0, 0.0]))
    batch = batch.set(logp_ref=batch.mask * torch.tensor([0.0, -1.5, -1.5, -1.0]))
    assert add_rewards(shipped("rl/rloo"), batch).reward.tolist() == pytest.approx([1 - 0.03, -0.03])


RATES = {
    "preference/dpo": 1e-6,
    "preference/exo": 1e-6,
    "preference/tr_dpo": 1e-6,
    "preference/alpha_po": 7e-7,
    "preference/egpo": 5e-7,
    "rl/intellect2": 3e-7,
    "rl/prime": 5e-7,
    "rl/dvpo": 2e-6,
    "rl/dvpo_static_q": 2e-6,
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_is_the_paper_s(name: str) -> None:
    assert shipped(name).optimizer.learning_rate == RATES[name]


def test_the_kl_of_reinforce_plus_plus_with_baseline_is_that_of_its_scripts() -> None:
    kl = shipped("rl/reinforce_plus_plus_baseline").loss[1]
    assert (kl.name, kl.options["estimator"], kl.coef) == ("kl", "k2", 1e-5)


def test_the_kl_penalty_of_remax_counts_for_its_own_token_alone() -> None:
    """Reward 1 against a greedy 0, and -0.05 x at each token; a sum to go would give .925, .95, .975 at x = 0.5."""
    recipe = shipped("rl/remax")
    batch = completions(3, 3).set(reward=torch.tensor([1.0, 0.0]), baseline_only=torch.tensor([False, True]))
    batch = batch.set(logp_ref=batch.mask * torch.tensor([0.0, -1.5, -1.5, -1.0]))
    assert recipe.advantage is not None
    assert recipe.advantage(add_rewards(recipe, batch))[0, 1:].tolist() == pytest.approx([0.975, 0.975, 1.0])


# ---- process rewards ------------------------------------------------------------------------------------------------


def test_the_baseline_of_pure_divides_by_the_longest_completion_that_can_be_sampled() -> None:
    """Gains of 4 tokens of a right answer add up to 4; the other completion's baseline is 4 / 1024, not 4 / 4."""
    recipe = shipped("rl/pure")
    assert recipe.advantage is not None
    assert recipe.advantage.options["token_center"] == recipe.sampling.max_tokens == 1024
    batch = completions(4, 2).set(reward=torch.tensor([1.0, 0.0]))
    found = recipe.advantage(batch)
    assert found[0, 1:].tolist() == pytest.approx([1.0] * 4)
    assert found[1, 1:3].tolist() == pytest.approx([-4 / 1024] * 2)


def test_pure_takes_the_kl_from_the_reward() -> None:
    """-0.001 k3 at each token, with k3 = e^-x - 1 + x of x = log π_old - log π_ref; no loss term.

    The penalty of a step's last token stays outside the softmax over the ratings of the steps.
    """
    recipe = with_judge(shipped("rl/pure"), judged)
    assert [part.name for part in recipe.loss] == ["clip"]
    batch = completions(3)
    batch = batch.set(logp_ref=batch.mask * torch.tensor([0.0, -1.5, -0.5, -1.0]))
    found = add_rewards(recipe, batch).step_reward[0, 1:].tolist()
    k3 = [math.exp(-x) - 1 + x for x in (0.5, -0.5, 0.0)]
    assert found == pytest.approx([-0.001 * k for k in k3], abs=1e-9)
    ratings = torch.tensor([0.0, 0.5, -0.5, 0.5])
    rated = add_rewards(with_judge(shipped("rl/pure"), lambda batch: ratings.expand(1, 4)), batch).step_reward
    worst = math.exp(5) / (math.exp(5) + 2 * math.exp(-5))
    assert float(rated[0, 2]) == pytest.approx(-0.5 * worst - 0.001 * k3[1], abs=1e-6)


def test_prime_divides_by_the_largest_return_of_the_batch() -> None:
    """Values fall by 0.01 a token: the largest sum from a token on is that of 8 tokens, so that the first is -1."""
    recipe = shipped("rl/prime")
    batch = completions(8, 2)
    batch = batch.set(value=-0.01 * torch.arange(9.0) * torch.ones(2, 1))
    rewards = add_rewards(recipe, batch).step_reward
    assert rewards[0, 1:].tolist() == pytest.approx([-1 / 8] * 8, rel=1e-4)
    assert rewards[1, 1:3].tolist() == pytest.approx([-1 / 8] * 2, rel=1e-4)


def test_psgpo_rates_steps_from_minus_one_to_one() -> None:
    """Labels of the paper are -1, 0 and 1: a step that is surely wrong costs something."""
    model = shipped("rl/psgpo").reward[0]
    assert model.options["signed"] and model.options["shared"]


def test_pqm_is_a_mean_over_solutions_and_not_over_their_steps() -> None:
    """A solution of five steps weighs as much as one of two."""
    batch = completions(5, 2)
    labels = batch.mask * torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    recipe = shipped("value/pqm")
    batch = batch.set(step_reward=labels, logp_ref=None)
    batch = with_shares(recipe, batch.set(target=value_target(recipe, batch)))
    value = torch.tensor([[0.0, 0.3, -0.4, 0.8, 1.1, 0.2]]).expand(2, 6)
    found, _ = total_value_loss(recipe.value_loss, Outputs(logp=torch.zeros(2, 6), value=value), batch)
    right = labels > 0
    each = [q_ranking(value[i, 1 : n + 1].tolist(), right[i, 1 : n + 1].tolist(), 4.0) for i, n in ((0, 5), (1, 2))]
    assert float(found) == pytest.approx(sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["vas", "dvpo_value"])
def test_values_of_vas_and_dvpo_are_a_mean_over_completions(name: str) -> None:
    """Five tokens without an error and two tokens of value 0: targets 0.95, 1 and 1, and half of their mean loss."""
    recipe = shipped(f"value/{name}")
    batch = completions(5, 2, reward=[1.0])
    value = torch.tensor([[1.0] * 6, [0.0] * 6])
    batch = batch.set(value=value, logp_ref=None)
    batch = with_shares(recipe, batch.set(target=value_target(recipe, batch)))
    found, _ = total_value_loss(recipe.value_loss, Outputs(logp=torch.zeros(2, 6), value=value), batch)
    assert float(found) == pytest.approx((0.95**2 + 1 + 1) / 2 / 3 / 2, rel=1e-5)


# ---- DVPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "ending"), [(None, 0.9), ("zero", 0.0)])
def test_dvpo_is_gae_on_the_frozen_values_with_the_kl_in_the_reward(last: str | None, ending: float) -> None:
    """λ = 0.95 and -0.1 x at each token: half the code's 0.2, for values from 0 to 1 in place of -1 to 1.

    No score is read. ``last: zero`` gives an ending the worth that it has in the authors' code.
    """
    recipe = load_recipe(ROOT / "recipes/rl/dvpo.yaml", [f"--advantage.last={last}"] if last else [])
    assert [part.name for part in recipe.loss] == ["clip"] and recipe.value is not None and recipe.value.frozen
    batch = completions(3, reward=[1.0]).set(value=torch.tensor([[0.3, 0.5, 0.4, 0.9]]))
    batch = batch.set(logp_ref=batch.mask * torch.tensor([0.0, -1.5, -0.5, -1.0]))
    values, penalty = [0.3, 0.5, 0.4, ending], [-0.1 * 0.5, 0.1 * 0.5, 0.0]
    errors = [penalty[t] + values[t + 1] - values[t] for t in range(3)]
    expected = [sum(0.95 ** (k - t) * errors[k] for k in range(t, 3)) for t in range(3)]
    assert recipe.advantage is not None
    assert recipe.advantage(add_rewards(recipe, batch))[0, 1:].tolist() == pytest.approx(expected, abs=1e-6)
