"""Preferences without a best answer: Nash equilibria on rock, paper, scissors, reached with the parts as shipped.

Everything is an exact expectation: all pairs are enumerated and weighted by their probability. M[i, j] is the
probability that i beats j, and the equilibrium of the game with a KL penalty is π* ~ ref e^(P(y > π*) / τ).
"""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import pytest
import torch
from parts_cases import close
from preference_cases import answers, every_pair, forward, whole_loss
from test_players import Table, players_of, shipped
from test_preference_optima import CYCLE, ROCK_PAPER_SCISSORS
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.decoding.mixture import mixed
from posttrain.parts.advantages import returns
from posttrain.parts.losses import reinforce
from posttrain.parts.preference import pair_links, pair_targets, pair_weights
from posttrain.parts.preference.games import mean_over_rivals, rivals
from posttrain.parts.preference.terms import pairwise
from posttrain.parts.rewards import kl_penalty

GAME = ROCK_PAPER_SCISSORS
REFERENCE = torch.tensor([0.6, 0.3, 0.1]).double()
UNIFORM = torch.full((3,), 1 / 3).double()
NASH = {0.2: (0.53812, 0.18123, 0.28064), 0.05: (0.37743, 0.2765, 0.34607)}
"""Equilibria with a KL penalty to REFERENCE, by the strength of the penalty."""


def slope(logits: Tensor, centre: Tensor, reward: Tensor, eta: float) -> Tensor:
    """Gradient of the regression of log-ratios to η times the difference of rewards, over all pairs."""
    logits = logits.detach().requires_grad_()
    reference = centre.exp().tolist()
    batch = answers([[(i, r) for i, r in enumerate(reward.tolist())]], reference)
    part = partial(
        pairwise, beta=1.0, link=pair_links.regression, target=partial(pair_targets.reward_gap, eta=eta), ties="keep"
    )
    loss = whole_loss([(1.0, part)], forward(logits, batch, reference), batch)
    return torch.autograd.grad(loss, logits)[0]


@cache
def inverse_curvature() -> Tensor:
    """Inverse curvature of the regression loss, which is quadratic in the logits, so that it is the same everywhere."""
    start, zero = torch.zeros(3).double(), torch.zeros(3).double()
    rows = [slope(start + unit, zero, zero, 1.0) - slope(start, zero, zero, 1.0) for unit in torch.eye(3).double()]
    return torch.linalg.pinv(torch.stack(rows), hermitian=True)


def regressed(centre: Tensor, reward: Tensor, eta: float) -> Tensor:
    """The policy at the minimum: centre · e^(η reward) / Z."""
    return (centre - inverse_curvature() @ slope(centre, centre, reward, eta)).softmax(-1)


def proximal(policy: Tensor, opponent: Tensor, *, eta: float, tau: float, reference: Tensor = REFERENCE) -> Tensor:
    """(ref^η π e^(η P(y > opponent) / τ))^(1 / (1 + η)): a half-step of Nash-MP, with a mixture as the reference."""
    centre = (eta * reference.log() + policy.log()) / (1 + eta)
    return regressed(centre, GAME @ opponent, eta / tau / (1 + eta))


def nash_mp(steps: int, *, eta: float, tau: float, reference: Tensor = REFERENCE) -> Tensor:
    policy = reference
    for _ in range(steps):
        half = proximal(policy, policy, eta=eta, tau=tau, reference=reference)
        policy = proximal(policy, half, eta=eta, tau=tau, reference=reference)
    return policy


def self_play(steps: int, *, eta: float, tau: float) -> Tensor:
    policy = REFERENCE
    for _ in range(steps):
        policy = proximal(policy, policy, eta=eta, tau=tau)
    return policy


def kl(p: Tensor, q: Tensor) -> float:
    return (p * (p / q).log()).sum().item()


def test_regression_is_a_step_of_mirror_descent() -> None:
    reward = torch.tensor([0.3, -1.0, 2.0]).double()
    close(regressed(REFERENCE.log(), reward, 0.7), (REFERENCE.log() + 0.7 * reward).softmax(-1), 1e-12)


@pytest.mark.parametrize(("tau", "eta", "steps"), [(0.2, 0.5, 12), (0.05, 0.1, 32)])
def test_the_last_iterate_of_nash_mp_is_the_equilibrium(tau: float, eta: float, steps: int) -> None:
    found = nash_mp(steps, eta=eta, tau=tau)
    close(found, NASH[tau], 1e-3)
    close(found, (REFERENCE.log() + GAME @ found / tau).softmax(-1), 2e-3)


def test_nash_mp_converges_where_self_play_diverges() -> None:
    nash = torch.tensor(NASH[0.05]).double()
    for eta in (0.1, 0.2):
        assert kl(nash, nash_mp(22, eta=eta, tau=0.05)) < 5e-5
    assert kl(nash, self_play(100, eta=0.1, tau=0.05)) == pytest.approx(0.3354, abs=1e-3)
    assert kl(nash, self_play(20, eta=0.2, tau=0.05)) > 0.8
    assert kl(nash, nash_mp(20, eta=0.5, tau=0.05)) > 0.5  # too long a step for both


def test_the_recipe_of_nash_mp_fits_its_half_step() -> None:
    """The target and the centre of the regression are right with η = β = 0.1."""
    (term,) = shipped("nash_mp").loss
    policy, opponent = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.5, 0.1, 0.4]).double()
    before = term.options["score"].options["previous"]
    centre = (1 - before) * REFERENCE.log() + before * policy.log()
    found = regressed(centre, GAME @ opponent, term.options["target"].options["eta"])
    close(found, proximal(policy, opponent, eta=0.1, tau=0.1), 1e-3)


def test_a_uniform_reference_has_a_uniform_equilibrium() -> None:
    close(nash_mp(3, eta=0.1, tau=0.05, reference=UNIFORM), UNIFORM)


def test_the_best_response_to_the_last_policy_runs_in_a_circle() -> None:
    def response(policy: Tensor) -> Tensor:
        return regressed(REFERENCE.log(), GAME @ policy, 1 / 0.05)

    policy = REFERENCE
    for _ in range(12):
        policy = response(policy)
    again = response(response(response(policy)))
    close(again, policy, 1e-4)
    assert kl(policy, response(policy)) > 1


def test_nash_md_with_a_falling_step() -> None:
    """π_{t+1} ~ mix_t e^(η P(y > mix_t)), with mix_t ~ π_t^(1 - η τ) ref^(η τ) and η = 2 / (τ (t + 2))."""
    tau, policy = 0.2, REFERENCE
    nash = nash_mp(40, eta=0.5, tau=tau)
    found = {}
    for t in range(100):
        eta = 2 / (tau * (t + 2))
        mixture = ((1 - eta * tau) * policy.log() + eta * tau * REFERENCE.log()).log_softmax(-1)
        policy = regressed(mixture, GAME @ mixture.exp(), eta)
        found[t + 1] = kl(nash, policy)
    assert found[10] == pytest.approx(9.8e-3, rel=0.02) and found[100] == pytest.approx(6.1e-5, rel=0.02)
    assert all(value <= 8 / (tau**2 * (t + 1)) for t, value in found.items())


def test_multiplicative_weights_cycle_but_their_mean_is_the_equilibrium() -> None:
    policy, mean = torch.tensor([0.4, 0.3, 0.3]).double(), torch.zeros(3).double()
    for _ in range(300):
        policy = regressed(policy.log(), GAME @ policy, 0.5)
        mean += policy / 300
    close(mean, UNIFORM, 2e-2)
    assert policy.min() < 0.05


def group_of(choices: list[int]) -> tuple[Batch, Tensor]:
    """One group of answers, and the table of who beats whom."""
    return answers([[(i, 0.0) for i in choices]], UNIFORM.tolist()), GAME[choices][:, choices]


def test_win_rates_of_a_group() -> None:
    """Rock, paper, scissors and rock again, where the row beats the next one; the mean is ½ without any baseline."""
    batch, table = group_of([0, 1, 2, 0])
    compared = rivals(batch, "group")
    close(mean_over_rivals(table, compared), (0.5, 1 / 3, 2 / 3, 0.5))
    close(mean_over_rivals(table, compared, itself=True), (0.5, 1.5 / 4, 2.5 / 4, 0.5))
    first = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    tables = (first + 1 - first.transpose(-1, -2)) / 2  # P(i, j) + P(j, i) = 1
    for antisymmetric in tables:
        assert mean_over_rivals(antisymmetric, compared).mean().item() == pytest.approx(0.5)
    alone, table = group_of([1])
    assert mean_over_rivals(table, rivals(alone, "group")).tolist() == [0.5]


# ---- Losses on pairs of the policy's own samples


def on_policy_pairs(policy: Tensor, game: Tensor, centre: Tensor):
    """All pairs of two draws of a policy, with their probability and that of the preference model."""
    pairs = every_pair(3)
    return answers(
        [[(i, 1.0), (j, 0.0)] for i, j in pairs],
        centre.exp().tolist(),
        probability=[game[i, j].item() for i, j in pairs],
        weight=[2 * (policy[i] * policy[j]).item() * len(pairs) for i, j in pairs],
    )


def square(tau: float):
    return partial(
        pairwise,
        beta=1.0,
        link=partial(pair_links.square, tau=tau),
        target=pair_targets.soft,
        pair_weight=(pair_weights.given,),
    )


def gradient_of_online_ipo(logits: Tensor, tau: float, game: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    batch = on_policy_pairs(logits.detach().softmax(-1), game, REFERENCE.log())
    loss = whole_loss([(1.0, square(tau))], forward(logits, batch, REFERENCE.tolist()), batch)
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_online_ipo_descends_the_self_play_objective(tau: float) -> None:
    """Its gradient is -4 / τ times that of P(π > sg[π]) - τ KL(π ‖ ref), so its fixed point is the equilibrium."""
    for seed in range(3):
        logits = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
        policy = logits.softmax(-1)
        objective = policy @ GAME @ policy.detach() - tau * (policy * (policy / REFERENCE).log()).sum()
        (expected,) = torch.autograd.grad(objective, logits)
        close(gradient_of_online_ipo(logits, tau, GAME), -4 / tau * expected)


def test_the_equilibrium_is_a_fixed_point_of_online_ipo() -> None:
    close(gradient_of_online_ipo(nash_mp(40, eta=0.5, tau=0.2).log(), 0.2, GAME), torch.zeros(3))
    assert gradient_of_online_ipo(REFERENCE.log(), 0.2, GAME).abs().max() > 1e-2
    cycle = torch.tensor([[0.5, CYCLE, 1 - CYCLE], [1 - CYCLE, 0.5, CYCLE], [CYCLE, 1 - CYCLE, 0.5]]).double()
    other = torch.tensor([0.62793, 0.2609, 0.11117]).double()
    close(gradient_of_online_ipo(other.log(), 0.2, cycle), torch.zeros(3), 1e-4)


def test_inpo_regresses_to_a_mixture_of_reference_and_last_iterate() -> None:
    """π ~ ref^(τ/b) π_t^(1 - τ/b) e^(P(y > π_t) / b), exact where pairs are two draws of π_t."""
    old, b, tau = torch.tensor([0.2, 0.5, 0.3]).double(), 0.5, 0.2
    centre = tau / b * REFERENCE.log() + (1 - tau / b) * old.log()
    batch = on_policy_pairs(old, GAME, centre)
    logits = old.log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=60, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = whole_loss([(1.0, square(b))], forward(logits, batch, centre.exp().tolist()), batch)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    close(logits.softmax(-1), (0.3897, 0.46308, 0.14722), 1e-4)
    close(logits.softmax(-1), (centre + GAME @ old / b).softmax(-1), 1e-6)


def test_the_kl_term_of_nash_md_needs_what_follows() -> None:
    """Two tokens, given by logits of 1 against 0: rewards to go give ∇KL(π ‖ ref), those of each token alone do not."""
    theta = torch.tensor([0.0, 0.0, 2.0]).double().requires_grad_()
    sequences = [(a, b) for a in (0, 1) for b in (0, 1)]

    def logps(logits: Tensor) -> Tensor:
        """Log-probs ``[4, 2]`` of both tokens, the second one after the first one."""
        chosen = torch.tensor(sequences)
        logit = torch.stack([logits[0].expand(4), logits[1 + chosen[:, 0]]], 1)
        return torch.where(chosen == 1, logit, -logit).sigmoid().log()

    logp, reference = logps(theta), logps(torch.tensor([0.0, 0.0, -1.0]).double())
    batch = answers([[(0, 0.0)]] * 4, [1.0])
    batch = batch.set(mask=torch.ones(4, 2).bool(), step_reward=(reference - logp).detach())
    probability = logp.detach().sum(-1).exp()
    for advantage, expected in ((returns(batch), (0.20718, 0, 0.15749)), (batch.step_reward, (0, 0, 0.15749))):
        loss = (reinforce(Outputs(logp=logp), batch.set(advantage=advantage)) * probability[:, None]).sum()
        (slope_,) = torch.autograd.grad(loss, theta, retain_graph=True)
        close(slope_, expected, 1e-5)


# ---- Groups of the policy's own samples, and the shipped recipes' own options


def sampled_groups(sampler: Tensor, size: int, centre: Tensor = REFERENCE) -> Batch:
    """Every group of so many draws, with its probability; the rewards are win rates as the recipes take them."""
    groups = list(itertools.product(range(3), repeat=size))
    weight = [float(sampler[list(group)].prod()) * len(groups) for group in groups]
    batch = answers([[(i, 0.0) for i in group] for group in groups], centre.tolist(), weight=weight)
    drawn = torch.tensor([i for group in groups for i in group])
    return batch.set(reward=mean_over_rivals(GAME[drawn][:, drawn], rivals(batch, "group"), itself=True))


@cache
def options_of_egpo() -> dict[str, Any]:
    """Options of the loss term in the recipe; those of IPO-MD differ in ``eta`` alone."""
    (term,) = shipped("egpo").loss
    return dict(term.options)


def regression_slope(logits: Tensor, sampler: Tensor, tau: float, size: int = 2) -> Tensor:
    """Gradient of the loss of EGPO's recipe on draws of a sampler."""
    changed = {"target": partial(pair_targets.reward_gap, eta=1 / tau), "pair_weight": (pair_weights.given,)}
    part = partial(pairwise, **options_of_egpo() | changed)
    logits = logits.detach().clone().requires_grad_()
    batch = sampled_groups(sampler, size)
    loss = whole_loss([(1.0, part)], forward(logits, batch, REFERENCE.tolist()), batch)
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_win_rates_that_count_a_tie_with_itself_give_online_ipo_in_groups_of_any_size(size: int) -> None:
    logits = torch.randn(3, generator=torch.Generator().manual_seed(size)).double()
    found = regression_slope(logits, logits.softmax(-1), 0.2, size)
    close(found, gradient_of_online_ipo(logits, 0.2, GAME))


def test_the_equilibrium_of_ipo_md_is_a_fixed_point_with_both_completions_from_the_mixture() -> None:
    """Calandriello et al. 2024: π* ~ ref e^(P(y > mixture of π* and ref) / τ); τ = 0.2, half of each.

    With one completion of the policy instead, as the recipe once had it, the gradient there is far from 0.
    """
    (term,) = shipped("ipo_md").loss
    same_but_eta = dict(options_of_egpo()) | {"target": term.options["target"]}
    assert str(term.options) == str(same_but_eta)
    policy = REFERENCE
    for _ in range(400):
        mixture = mixed(policy.log(), REFERENCE.log(), 0.5).exp()
        policy = (0.9 * policy.log() + 0.1 * (REFERENCE.log() + GAME @ mixture / 0.2)).softmax(-1)
    close(policy, (0.594, 0.098, 0.308), 1e-3)
    mixture = mixed(policy.log(), REFERENCE.log(), 0.5).exp()
    close(regression_slope(policy.log(), mixture, 0.2), torch.zeros(3), 1e-6)
    assert regression_slope(policy.log(), policy, 0.2).abs().max() > 0.1


def test_extragradient_converges_where_self_play_diverges() -> None:
    """EGPO by plain gradient steps, through the object that looks ahead in a run; the same loss without it diverges."""
    nash = torch.tensor(NASH[0.05]).double()
    policy = Table(REFERENCE.tolist())
    players = players_of(policy, shipped("egpo"))

    def step(sampler: Tensor) -> None:
        slope_ = regression_slope(policy.logits, sampler, 0.05)
        with torch.no_grad():
            policy.logits.sub_(0.1 * slope_)

    for _ in range(30):
        players.remember()
        step(policy.distribution)
        players.go_back()
        with players.one_step_ahead():
            sampler = policy.distribution
        step(sampler)
    assert kl(nash, policy.distribution) < 1e-6
    with torch.no_grad():
        policy.logits.copy_(REFERENCE.log())
    for _ in range(60):
        step(policy.distribution)
    assert kl(nash, policy.distribution) > 0.3


def iterated(name: str, tau: float, b: float, steps: int) -> Tensor:
    """Iterations of INPO's regression, with the moves of the reference that a recipe asks for."""
    policy, reference = Table(REFERENCE.tolist()), Table(REFERENCE.tolist())
    players = players_of(policy, shipped(name), reference=reference)
    for step in range(1, steps + 1):
        centre = tau / b * reference.distribution.log() + (1 - tau / b) * policy.distribution.log()
        found = regressed(centre, GAME @ policy.distribution, 1 / b)
        with torch.no_grad():
            policy.logits.copy_(found.log())
        players.after(step)
    return policy.distribution


def test_inpo_ends_at_the_equilibrium_with_its_kl_penalty_and_comal_at_the_one_without() -> None:
    close(iterated("inpo", 0.2, 1.0, 60), NASH[0.2], 1e-4)
    close(iterated("comal", 0.2, 1.0, 120), UNIFORM, 1e-3)


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_nash_md_ascends_the_win_rate_against_the_mixture(share: float) -> None:
    """Its gradient is that of P(π > mixture) - τ KL(π ‖ ref), with the mixture held still."""
    recipe = shipped("nash_md", f"--opponent.share={share}")
    tau = recipe.reward[0].weight
    logits = torch.tensor([0.3, -0.4, 0.9]).double().requires_grad_()
    policy = logits.softmax(-1)
    opponent = mixed(policy.detach().log(), REFERENCE.log(), share).exp()
    objective = policy @ GAME @ opponent - tau * (policy * (policy / REFERENCE).log()).sum()
    (expected,) = torch.autograd.grad(objective, logits)
    pairs = list(itertools.product(range(3), repeat=2))
    batch = answers([[(i, 0.0), (j, 0.0)] for i, j in pairs], REFERENCE.tolist())
    batch = batch.set(baseline_only=torch.tensor([False, True] * 9))
    drawn = torch.tensor([i for pair in pairs for i in pair])
    reward = mean_over_rivals(GAME[drawn][:, drawn], rivals(batch, recipe.compare.options["against"])) - 0.5  # type: ignore[union-attr]
    outputs = forward(logits, batch, REFERENCE.tolist())
    batch = batch.set(reward=reward, logp_old=outputs.logp.detach())
    batch = batch.set(step_reward=tau * kl_penalty(batch))
    terms = reinforce(outputs, batch.set(advantage=returns(batch)))[~batch.baseline_only].sum(-1)
    probability = torch.tensor([(policy[i] * opponent[j]).item() for i, j in pairs]).double()
    (found,) = torch.autograd.grad((terms * probability).sum(), logits)
    close(-found, expected, 1e-7)
