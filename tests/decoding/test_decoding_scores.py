"""Scores of prefixes: rollouts, log-probs of paths, model ratios, values; backups, edits and refinement."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from exact_world import PROMPT, String, World, distance, distribution_of, kl, make_world, table_score, tokens_of
from function_score import FunctionScore
from torch import nn

from posttrain.batch import Batch, Finish, Outputs
from posttrain.decoding.editing import edit
from posttrain.decoding.model_scores import LogRatio
from posttrain.decoding.prefix_scores import Logarithm, RolloutScore
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.refine import jacobi
from posttrain.decoding.shaping import Shaped
from posttrain.engines.base import Sampling
from posttrain.parts import value_losses
from posttrain.parts.targets import backup
from posttrain.rollout.rollouts import Prompts, to_batch

WORLD = make_world(0)
ENDING = make_world(1, eos=True)
PAIRS = make_world(3, vocabulary=2, length=3)
TOLERANCE = 1e-8

tensor_of = functools.partial(torch.tensor, dtype=torch.float64)


def prefix_of(string: String, world: World = WORLD) -> Prefix:
    finish = None
    if world.ended(string):
        finish = Finish.LENGTH if len(string) == world.length else Finish.STOPPED
    return Prefix(tokens=[*PROMPT, *string], start=len(PROMPT), finish=finish, steps=len(string))


def by_backup(world: World, kind: str, lambda_: float = 0.0) -> dict[String, float]:
    """Fixed point of values under the package's backup, by sweeps over all prefixes from 0.

    With λ the target of a state is (1 - λ) · backup of the values + λ · backup of the targets of the next states.
    """
    values = dict.fromkeys(world.prefixes, 0.0)
    for _ in range(world.length * 12 if lambda_ else world.length + 1):
        targets: dict[String, float] = {}
        for string in sorted(world.prefixes, key=len, reverse=True):
            if world.ended(string):
                targets[string] = world.reward[string]
                continue
            distribution = tensor_of(world.next_distribution(string)).log()
            nexts = [(*string, a) for a in range(world.vocabulary)]
            one, many = (
                float(backup(tensor_of([of[s] for s in nexts]), distribution, kind=kind, beta=world.beta))
                for of in (values, targets)
            )
            targets[string] = (1 - lambda_) * one + lambda_ * many
        values = targets
    return values


def greedy_return(world: World, string: String) -> float:
    while not world.ended(string):
        distribution = world.next_distribution(string)
        string = (*string, distribution.index(max(distribution)))
    return world.reward[string]


# --------------------------------------------------------------------------------------- rows 3 and 13 of the test bed


@pytest.mark.parametrize("world", [WORLD, ENDING])
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_fixed_points_of_mean_targets_are_mean_values(world: World, lambda_: float):
    """CD-Q: λ = 0; VAS: λ = 0.95; FUDGE, CD-FUDGE and IVO: λ = 1."""
    exact = world.mean_values()
    assert by_backup(world, "mean", lambda_) == pytest.approx(exact, abs=TOLERANCE)
    for prefix, probability in world.prefixes.items():
        brute = sum(p * world.reward[y] for y, p in world.strings.items() if y[: len(prefix)] == prefix)
        assert abs(exact[prefix] - brute / probability) < TOLERANCE


@pytest.mark.parametrize("world", [WORLD, ENDING])
def test_fixed_points_of_the_other_backups(world: World):
    assert by_backup(world, "soft") == pytest.approx(world.soft_values(), abs=TOLERANCE)
    assert by_backup(world, "max") == pytest.approx(world.max_values(), abs=TOLERANCE)
    greedy = by_backup(world, "greedy")
    assert greedy == pytest.approx({s: greedy_return(world, s) for s in world.prefixes}, abs=TOLERANCE)


@pytest.mark.parametrize("world", [WORLD, ENDING])
def test_rewards_come_back_from_greedy_values(world: World):
    """B-Coder's inverse operator: r(s, a) = Q(s, a) - Q(sa, argmax p); 0 but at the end."""
    greedy = by_backup(world, "greedy")
    for string in world.prefixes:
        if string and not world.ended(string):
            distribution = torch.tensor(world.next_distribution(string)).log()
            nexts = torch.tensor([greedy[*string, a] for a in range(world.vocabulary)], dtype=torch.float64)
            assert abs(greedy[string] - float(backup(nexts, distribution, kind="greedy"))) < TOLERANCE
        elif string:
            assert abs(greedy[string] - world.reward[string]) < TOLERANCE


def test_looking_ahead_as_far_as_the_end_makes_any_value_the_best_one():
    """T^m Q^π = Q* for m >= T - 1; m = 0 is Q^π. PGTS, arXiv:2506.07054."""
    world = make_world(4, vocabulary=3, length=4)
    q, best = world.mean_values(), world.max_values()
    gaps = []
    for _ in range(world.length):
        gaps.append(max(abs(q[s] - best[s]) for s in q if s))
        q = {
            s: q[s]
            if world.ended(s)
            else float(
                backup(
                    torch.tensor([q[*s, a] for a in range(3)], dtype=torch.float64),
                    torch.tensor(world.next_distribution(s)).log(),
                    kind="max",
                )
            )
            for s in q
        }
    assert gaps[0] > 0.5 and gaps == sorted(gaps, reverse=True)
    assert gaps[world.length - 1] < 1e-12


# ---------------------------------------------------------------------------------------------- row 10 of the test bed


def guided_distribution(world: World, values, strength: float, anchor: World | None = None) -> dict:
    """The shaped decoder's distribution of strings."""
    base = anchor or world
    score = table_score(values)
    return distribution_of(
        lambda choosers: tokens_of(
            Shaped(base.engine(choosers), score, strength=strength).generate([PROMPT], world.sampling)
        )
    )


def expected(world: World, distribution, label) -> dict[String, float]:
    """E[label(y, prefix) | prefix] under a distribution of strings: what a value fitted to it says."""
    values = {}
    for prefix in world.prefixes:
        through = {y: p for y, p in distribution.items() if y[: len(prefix)] == prefix}
        values[prefix] = sum(p * label(y, prefix) for y, p in through.items()) / sum(through.values())
    return values


def as_world(world: World, distribution) -> World:
    """A copy of the world with another base distribution."""
    mass = {prefix: sum(p for y, p in distribution.items() if y[: len(prefix)] == prefix) for prefix in world.prefixes}
    logits = {
        PROMPT + s: [math.log(mass[*s, a] / mass[s]) for a in range(world.vocabulary)]
        for s in world.prefixes
        if not world.ended(s)
    }
    return dataclasses.replace(world, logits=logits)


def later_kl(world: World, distribution):
    """r - β Σ log(π / π_ref) over the tokens after the prefix."""
    now = as_world(world, distribution)

    def label(y: String, prefix: String) -> float:
        ratios = [
            math.log(now.next_distribution(y[:t])[y[t]] / world.next_distribution(y[:t])[y[t]])
            for t in range(len(prefix), len(y))
        ]
        return world.reward[y] - world.beta * sum(ratios)

    return label


def test_iterated_guidance_with_a_fixed_anchor_and_soft_targets_is_the_tilted_distribution():
    """After as many rounds as there are tokens. IVO with targets R - β Σ_later log(π / π_ref)."""
    world, distribution = PAIRS, PAIRS.strings
    for _ in range(world.length):
        distribution = guided_distribution(
            world, expected(world, distribution, later_kl(world, distribution)), 1 / world.beta
        )
    assert distance(distribution, world.tilted()) < 1e-6


def test_iterated_guidance_with_a_fixed_anchor_and_plain_targets_has_its_own_fixed_point():
    world, distribution = PAIRS, PAIRS.strings
    objectives = [world.objective(distribution)]
    for _ in range(30):
        after = guided_distribution(
            world, expected(world, distribution, lambda y, prefix: world.reward[y]), 1 / world.beta
        )
        step, distribution = distance(after, distribution), after
        objectives.append(world.objective(distribution))
    assert step < 1e-6
    assert distance(distribution, world.tilted()) > 1e-3
    assert objectives[0] < objectives[-1] < world.objective(world.tilted()) - 1e-4


def test_iterated_guidance_with_a_moving_anchor_goes_to_the_best_string():
    world, distribution = PAIRS, PAIRS.strings
    for _ in range(35):
        values = expected(world, distribution, lambda y, prefix: world.reward[y])
        distribution = guided_distribution(world, values, 5.0, anchor=as_world(world, distribution))
    best = max(world.reward, key=lambda y: world.reward[y])
    assert distribution[best] > 1 - 1e-6
    assert kl(distribution, world.strings) == pytest.approx(-math.log(world.strings[best]), abs=1e-4)


# ---------------------------------------------------------------------------------------------- row 15 of the test bed


class Strata:
    """Makes choosers so that the j-th of ``count`` samples draws the j-th of as many equal slices of all strings."""

    def __init__(self, count: int) -> None:
        self.count, self.made = count, 0

    def __call__(self, seed: int):
        place = (self.made % self.count + 0.5) / self.count
        self.made += 1

        def choose(probabilities):
            nonlocal place
            for index, probability in enumerate(probabilities):
                if place < probability:
                    place /= probability
                    return index
                place -= probability
            raise AssertionError(probabilities)

        return choose


def quarters() -> World:
    """Next-token probabilities 1/4 and 3/4: 64 slices hold every string of three tokens as often as p0 says."""
    world = make_world(5, vocabulary=2, length=3)
    flip = {prefix: index % 2 for index, prefix in enumerate(world.logits)}
    distributions = {p: [math.log(3), 0.0] if flip[p] else [0.0, math.log(3)] for p in world.logits}
    return dataclasses.replace(world, logits=distributions)


def rollouts(world: World, **options) -> RolloutScore:
    reward = FunctionScore(function=lambda prefixes: [world.reward[tuple(p.generated)] for p in prefixes])
    return RolloutScore(
        engine=world.engine(Strata(64)), reward=reward, sampling=world.sampling, completions=64, **options
    )


def test_rollouts_with_importance_weights_have_the_tilted_policys_value():
    """TQ*, indirect: rollouts of a policy aligned to r_BL, weighted, give Q under the policy aligned to r.

    The aligned policy is ρ_BL ∝ p exp(r_BL / β). With w = exp((r - r_BL) / β), Σ w r / Σ w is E[r] under
    p exp(r / β) / Z.
    """
    aligned = quarters()
    beta, other = aligned.beta, {y: 0.3 * len(set(y)) - 0.2 * y[0] for y in aligned.reward}
    unnormalised = {y: p * math.exp(-other[y] / beta) for y, p in aligned.strings.items()}
    plain = as_world(aligned, {y: w / sum(unnormalised.values()) for y, w in unnormalised.items()})
    assert distance(dataclasses.replace(plain, reward=other).tilted(), aligned.strings) < 1e-12
    exact = expected(plain, plain.tilted(), lambda y, prefix: plain.reward[y])
    score = rollouts(aligned, tilt=table_score({y: (r - other[y]) / beta for y, r in aligned.reward.items()}))
    strings = list(aligned.prefixes)
    found = score.score([prefix_of(string, aligned) for string in strings]).tolist()
    assert dict(zip(strings, found, strict=True)) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("kind", ["mean", "soft", "max"])
def test_rollouts_without_weights_have_the_engines_own_value(kind: str):
    world = quarters()
    exact = {"mean": world.mean_values, "soft": world.soft_values, "max": world.max_values}[kind]()
    score = rollouts(world, kind=kind, beta=world.beta)
    strings = list(world.prefixes)
    found = score.score([prefix_of(string, world) for string in strings]).tolist()
    assert dict(zip(strings, found, strict=True)) == pytest.approx(exact, abs=1e-10)
    assert score.kind == kind


def test_the_same_prefix_is_rolled_out_in_the_same_way():
    reward = table_score(WORLD.reward)
    score = RolloutScore(engine=WORLD.engine(), reward=reward, sampling=WORLD.sampling, completions=2)
    first, second, third = score.score([prefix_of((1,)), prefix_of((2,)), prefix_of((1,))]).tolist()
    assert first == third == float(score.score([prefix_of((1,))])[0]) != second
    with pytest.raises(ValueError, match="needs beta"):
        dataclasses.replace(score, kind="soft")
    with pytest.raises(ValueError, match="not 'greedy'"):
        dataclasses.replace(score, kind="greedy")


def test_rollouts_stop_at_their_horizon():
    lengths = []
    reward = FunctionScore(function=lambda prefixes: [lengths.append(len(p.generated)) or 0.0 for p in prefixes])
    score = RolloutScore(engine=WORLD.engine(), reward=reward, sampling=WORLD.sampling, horizon=1)
    score.score([prefix_of(()), prefix_of((1, 1))])
    assert sorted(lengths) == [1, 3]


# ------------------------------------------------------------------------------------------------ row 8 of the test bed


def sampled_batch(world: World, reward) -> Batch:
    """64 completions that hold every string as often as its probability says, by the engine and the rollout's code."""
    completions = world.engine(Strata(64)).generate([PROMPT], world.sampling, 64, seeds=[0])
    prompts = Prompts(tokens=[list(PROMPT)], rows=[{}], places=["here"], group=[0], seeds=[0])
    batch = to_batch(prompts, completions, {(0, j): "" for j in range(64)})
    rewards = torch.tensor([reward[tuple(c.tokens)] for c in completions[0]], dtype=torch.float64)
    return batch.set(reward=rewards, target=torch.zeros(batch.mask.shape, dtype=torch.float64))


def gradient(world: World, batch: Batch, table, loss) -> torch.Tensor:
    """Gradient of the summed value loss ``loss(outputs, batch)`` by the value of each prefix."""
    strings = list(world.prefixes)
    values = torch.tensor([table[s] for s in strings], dtype=torch.float64, requires_grad=True)
    places = [[strings.index(tuple(row[1 : t + 1])) for t in range(len(row))] for row in batch.tokens.tolist()]
    at_columns = values[torch.tensor(places)]
    outputs = Outputs(logp=torch.zeros(batch.mask.shape), value=at_columns, value_logits=at_columns[..., None])
    loss(outputs, batch)[:, 1:].sum().backward()  # without the empty response, which twists leave out
    assert values.grad is not None
    return values.grad


def test_twist_losses_have_no_gradient_at_the_optimal_twists():
    """CTL, SIXO, and the squared error to the soft backup (RL), at V* and not beside it."""
    world = quarters()
    soft = world.soft_values()
    batch = sampled_batch(world, world.reward)
    targets = [[soft[tuple(row[1 : t + 1])] for t in range(len(row))] for row in batch.tokens.tolist()]
    backed = batch.set(target=torch.tensor(targets, dtype=torch.float64))
    centred = {s: v - soft[()] for s, v in soft.items()}  # SIXO's classifier is relative to Z
    beside = {s: v + 0.1 * s[0] if s else v for s, v in soft.items()}
    contrastive = functools.partial(value_losses.contrastive_twist, beta=world.beta)
    noise = functools.partial(value_losses.noise_contrastive, beta=world.beta)
    for loss, data, optimum in ((contrastive, batch, soft), (noise, batch, centred), (value_losses.mse, backed, soft)):
        # the last column is the reward itself, no free value: exclude whole strings
        at_optimum = gradient(world, data, optimum, loss)[: len(world.prefixes) - len(world.strings)]
        assert at_optimum.abs().max() < 1e-8
        assert gradient(world, data, beside, loss)[: len(world.prefixes) - len(world.strings)].abs().max() > 1e-4


def test_fudges_cross_entropy_has_no_gradient_at_the_expected_label():
    world = quarters()
    chance = dataclasses.replace(world, reward={y: 1 / (1 + math.exp(-r)) for y, r in world.reward.items()})
    batch = sampled_batch(chance, chance.reward)
    batch = batch.set(target=batch.reward[:, None].expand(batch.mask.shape))
    logits = {s: math.log(v / (1 - v)) for s, v in chance.mean_values().items()}
    assert gradient(chance, batch, logits, value_losses.bce).abs().max() < 1e-8
    assert gradient(chance, batch, dict.fromkeys(logits, 0.0), value_losses.bce).abs().max() > 1e-3


@pytest.mark.parametrize("world", [WORLD, ENDING])
def test_twisted_prefix_distributions_are_the_marginals_of_the_tilted_distribution(world: World):
    """π_t(s) ∝ p0(s) exp(V*(s) / β) over prefixes of t tokens, and strings that ended before, is σ's marginal."""
    soft, tilted = world.soft_values(), world.tilted()
    for t in range(1, world.length + 1):
        cut = {s: p for s, p in world.prefixes.items() if len(s) == t or (len(s) < t and world.ended(s) and s)}
        weights = {s: p * math.exp(soft[s] / world.beta) for s, p in cut.items()}
        for s, weight in weights.items():
            marginal = sum(p for y, p in tilted.items() if y[:t] == s)
            assert abs(weight / sum(weights.values()) - marginal) < 1e-8


def test_the_logarithm_of_a_probability_is_a_soft_value():
    """FUDGE: shaping by log E[φ | s] samples p0 φ / Z."""
    phi = {y: 1 / (1 + math.exp(-r)) for y, r in WORLD.reward.items()}
    chance = dataclasses.replace(WORLD, reward=phi)
    score = Logarithm(table_score(chance.mean_values()))
    assert (score.kind, score.beta) == ("soft", 1.0)
    distribution = distribution_of(
        lambda choosers: tokens_of(
            Shaped(WORLD.engine(choosers), score, tilted=True).generate([PROMPT], WORLD.sampling)
        )
    )
    total = sum(p * phi[y] for y, p in WORLD.strings.items())
    assert distance(distribution, {y: p * phi[y] / total for y, p in WORLD.strings.items()}) < 1e-12
    with pytest.raises(ValueError, match="not negative"):
        Logarithm(table_score(WORLD.mean_values())).score([prefix_of(s) for s in WORLD.strings])


# ---------------------------------------------------------------------------------------------- row 14 of the test bed


def table_distribution(world: World):
    """The distribution of a world's table, as :class:`LogRatio` wants it."""
    engine = world.engine()

    def distribution(prefixes):
        following = engine.next_logps([prefix.tokens for prefix in prefixes])
        paths = [
            sum(
                math.log(world.next_distribution(tuple(p.generated[:t]))[p.generated[t]])
                for t in range(len(p.generated))
            )
            for p in prefixes
        ]
        return torch.tensor(paths, dtype=torch.float64), following

    return distribution


def test_proxy_tuning_is_guidance_by_an_autoregressive_reward_model():
    """p0 (p⁺ / p⁻)^α normalised, and p0 p_r^α with p_r ∝ p⁺ / p⁻ of each state."""
    tuned, plain = make_world(21), make_world(22)
    strength = 0.8
    ratio = {
        prefix: [
            math.log(a / b)
            for a, b in zip(tuned.next_distribution(prefix[1:]), plain.next_distribution(prefix[1:]), strict=True)
        ]
        for prefix in WORLD.logits
    }
    reward_model = dataclasses.replace(WORLD, logits=ratio)
    proxy = LogRatio(plus=table_distribution(tuned), minus=table_distribution(plain))
    autoregressive = LogRatio(plus=table_distribution(reward_model))
    distributions = [
        distribution_of(
            lambda choosers, score=score: tokens_of(
                Shaped(WORLD.engine(choosers), score, strength=strength).generate([PROMPT], WORLD.sampling)
            )
        )
        for score in (proxy, autoregressive)
    ]
    assert distance(*distributions) < 1e-12
    powers = [p * math.exp(strength * r) for p, r in zip(WORLD.next_distribution(()), ratio[PROMPT], strict=True)]
    first = {a: sum(p for y, p in distributions[0].items() if y[0] == a) for a in range(3)}
    assert first == pytest.approx({a: power / sum(powers) for a, power in enumerate(powers)}, abs=1e-12)


def test_contrastive_decoding_is_a_ratio_on_the_head_of_the_distribution():
    """Scores log p_expert - log p_amateur over tokens with p >= 0.1 max p: strength 1 with minus the amateur alone."""
    amateur = make_world(23)
    decoder = Shaped(WORLD.engine(), LogRatio(minus=table_distribution(amateur)), head=0.1)
    logp0 = WORLD.engine().next_logps([PROMPT])
    distribution, _ = decoder.distribution(logp0, [prefix_of(())])
    scores = [
        math.log(p / q) if p >= 0.1 * max(WORLD.next_distribution(())) else -math.inf
        for p, q in zip(WORLD.next_distribution(()), amateur.next_distribution(()), strict=True)
    ]
    expected_distribution = torch.tensor(scores, dtype=torch.float64).log_softmax(-1)
    assert torch.allclose(distribution[0], expected_distribution, atol=1e-12)


def test_ratios_of_paths_and_of_next_tokens_agree():
    ratio = LogRatio(plus=table_distribution(make_world(21)), minus=table_distribution(make_world(22)), scale=2.0)
    state = prefix_of((1,))
    one_by_one = [float(ratio.score([prefix_of((1, a))])[0]) for a in range(3)]
    assert ratio.score_next([state])[0].tolist() == pytest.approx(one_by_one, abs=1e-12)
    with pytest.raises(ValueError, match="`plus`, `minus` or both"):
        LogRatio()


def test_a_linear_values_edit_is_a_constant_bias_of_the_logits():
    torch.manual_seed(0)
    hidden, direction = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    output = torch.randn(7, 5, dtype=torch.float64)
    moved = edit(hidden, lambda h: h @ direction, step_size=0.3, steps=4)
    bias = (hidden + moved) @ output.T - hidden @ output.T
    assert torch.allclose(bias, (4 * 0.3 * output @ direction).expand(3, 7), atol=1e-12, rtol=0)


def test_edits_follow_the_gradient_where_it_is_now():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    hidden = torch.randn(4, 5, dtype=torch.float64)

    def value(h):
        return network(h)[..., 0]

    expected_move = torch.zeros_like(hidden)
    for _ in range(3):
        at = (hidden + expected_move).requires_grad_()
        value(at).sum().backward()
        expected_move = expected_move + 0.1 * at.grad
    moved = edit(hidden, value, step_size=0.1, steps=3)
    assert torch.allclose(moved, expected_move, atol=1e-12, rtol=0)
    assert bool((value(hidden + moved) > value(hidden)).all())


@pytest.mark.parametrize("seed", range(5))
def test_jacobi_sweeps_arrive_at_the_greedy_completion(seed: int):
    world = make_world(seed, vocabulary=3, length=4)
    engine = world.engine()
    (greedy,) = engine.generate([PROMPT], Sampling(max_tokens=4, temperature=0.0))[0]

    def greedy_next(tokens: torch.Tensor) -> torch.Tensor:
        (row,) = tokens.tolist()
        best = [engine.next_logps([row[:t]]).argmax(-1).item() for t in range(1, len(row))]
        return torch.tensor([[*best, 0]])  # nothing is read of what follows the last token

    for draft in world.strings:
        refined, changed = jacobi(greedy_next, PROMPT, draft)
        assert refined == greedy.tokens
        assert changed <= 4 and (changed == 0) == (list(draft) == greedy.tokens)
        once, _ = jacobi(greedy_next, PROMPT, draft, sweeps=1)
        assert once[0] == greedy.tokens[0]
