"""Token-wise shaping on an exact world: the distributions that it must have, to rounding."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from exact_world import (
    PROMPT,
    TableOfNext,
    World,
    distance,
    distribution_of,
    kl,
    make_world,
    table_score,
    tokens_of,
    total_variation,
)
from reference_kl import tilted_kl

from posttrain.decoding.kl import next_token_kl
from posttrain.decoding.prefix_scores import sum_scores
from posttrain.decoding.shaping import GuideWarning, Shaped, choose_candidates, shaped_distribution
from posttrain.engines.base import Sampling

WORLDS = [make_world(0), make_world(1, eos=True), make_world(2, vocabulary=2, length=4)]


def shaped(world: World, score, **options) -> dict:
    """The distribution of whole strings under a shaped decoder."""
    return distribution_of(
        lambda choosers: tokens_of(Shaped(world.engine(choosers), score, **options).generate([PROMPT], world.sampling))
    )


def by_hand(world: World, values, strength: float) -> dict:
    """Π_t p0(a) exp(strength · V(sa)) / Z(s), in scalar loops."""
    distribution, level = {}, {(): 1.0}
    while level:
        following = {}
        for string, probability in level.items():
            powers = [
                p * math.exp(strength * values[(*string, a)]) for a, p in enumerate(world.next_distribution(string))
            ]
            for a, power in enumerate(powers):
                following[(*string, a)] = probability * power / sum(powers)
        distribution |= {s: p for s, p in following.items() if world.ended(s)}
        level = {s: p for s, p in following.items() if not world.ended(s)}
    return distribution


# --------------------------------------------------------------------------------------- rows 1, 2, 4, 9 of the test b


@pytest.mark.parametrize("world", WORLDS)
def test_the_engine_samples_its_table(world: World):
    distribution = distribution_of(
        lambda choosers: tokens_of(world.engine(choosers).generate([PROMPT], world.sampling))
    )
    assert distance(distribution, world.strings) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
def test_soft_values_by_recursion_are_those_by_brute_force(world: World):
    values = world.soft_values()
    for prefix, probability in world.prefixes.items():
        inside = [
            p / probability * math.exp(world.reward[y] / world.beta)
            for y, p in world.strings.items()
            if y[: len(prefix)] == prefix
        ]
        assert abs(values[prefix] - world.beta * math.log(sum(inside))) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", ["one by one", "vectors"])
def test_soft_values_at_strength_one_over_beta_give_the_tilted_distribution(world: World, form: str):
    values = world.soft_values()
    score = table_score(values, "soft", world.beta)
    if form == "vectors":
        score = TableOfNext(values, world.vocabulary, "soft", world.beta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(shaped(world, score, strength=1 / world.beta, tilted=True), world.tilted()) < 1e-12
    assert abs(world.objective(world.tilted()) - world.beta * world.log_z()) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
def test_mean_values_give_another_distribution_and_the_decoder_says_so(world: World):
    score = table_score(world.mean_values())
    with pytest.warns(GuideWarning, match="mean value; only a soft value"):
        distribution = shaped(world, score, strength=1 / world.beta, tilted=True)
    assert distance(distribution, by_hand(world, world.mean_values(), 1 / world.beta)) < 1e-12
    assert total_variation(distribution, world.tilted()) > 0.01
    assert world.objective(distribution) < world.objective(world.tilted()) - 1e-3


def test_a_soft_value_of_another_temperature_is_told_of_too():
    world = WORLDS[0]
    score = table_score(world.soft_values(), "soft", world.beta)
    with pytest.warns(GuideWarning, match=r"beta 0\.7, but strength is 1\.0"):
        Shaped(world.engine(), score, tilted=True)


@pytest.mark.parametrize("options", [{}, {"k": 2, "rest": "state"}, {"every": 2}, {"head": 0.4}])
@pytest.mark.parametrize("world", WORLDS)
def test_both_estimates_of_the_kl_are_the_enumerated_one(world: World, options: dict):
    def run(choosers):
        decoder = Shaped(world.engine(choosers), table_score(world.mean_values()), strength=1.5, **options)
        (completion,) = decoder.generate([PROMPT], world.sampling)[0]
        measured = completion.measured
        return tuple(completion.tokens), sum(completion.logps), measured["base_logp"], measured["kl"]

    outcomes = distribution_of(run)
    distribution = {tokens: p for (tokens, *_), p in outcomes.items()}
    exact = kl(distribution, world.strings)
    assert exact > 0.01
    assert abs(sum(p * step_kl for (_, _, _, step_kl), p in outcomes.items()) - exact) < 1e-12
    assert abs(sum(p * (logp - base) for (_, logp, base, _), p in outcomes.items()) - exact) < 1e-12
    for (tokens, logp, base, _), p in outcomes.items():
        assert abs(math.exp(logp) - p) < 1e-12  # the completion's log-probs are of the shaped distribution
        assert abs(math.exp(base) - world.strings[tokens]) < 1e-12


def test_kl_to_the_tilted_distribution():
    world = WORLDS[0]
    distribution = by_hand(world, world.mean_values(), 1.0)
    repeated = [(y, math.log(p)) for y, p in distribution.items()]
    weights = torch.tensor([p for p in distribution.values()], dtype=torch.float64) * len(
        distribution
    )  # the mean becomes E_q
    logp = torch.tensor([logp for _, logp in repeated], dtype=torch.float64)
    logp0 = torch.tensor([math.log(world.strings[y]) for y, _ in repeated], dtype=torch.float64)
    reward = torch.tensor([world.reward[y] for y, _ in repeated], dtype=torch.float64)
    estimate = tilted_kl(weights * logp, weights * logp0, weights * reward, beta=world.beta, log_z=world.log_z())
    assert abs(float(estimate) - kl(distribution, world.tilted())) < 1e-12


# ----------------------------------------------------------------------------------------------- row 11: candidate rul


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rest", ["drop", "mean", "state", "residual"])
def test_with_all_tokens_as_candidates_every_rule_is_full_shaping(world: World, rest: str):
    score = table_score(world.mean_values())
    distribution = shaped(world, score, strength=1.3, k=world.vocabulary, rest=rest)
    assert distance(distribution, by_hand(world, world.mean_values(), 1.3)) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
def test_one_candidate_alone_is_greedy_decoding(world: World):
    greedy = tokens_of(world.engine().generate([PROMPT], dataclasses.replace(world.sampling, temperature=0.0)))
    assert shaped(world, table_score(world.mean_values()), k=1, rest="drop") == {greedy: pytest.approx(1.0)}


def test_what_each_rule_gives_to_the_rest():
    """p0 = (.5, .3, .15, .05); the two most probable are candidates with strength · score 1 and -1; the state's is .2.

    drop: .5e : .3/e : 0 : 0;  mean: the rest times e^0;  state: times e^.2;
    residual: the rest shares e^.2 - .5e - .3/e < 0, which is 0; with state 1 it shares e - .5e - .3/e.
    """
    logp0 = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    candidates, valid = choose_candidates(logp0, k=2)
    values = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    inside = [0.5 * math.e, 0.3 / math.e]

    def distribution(rest, state=0.2) -> list[float]:
        shaped = shaped_distribution(
            logp0, candidates, values, valid, rest=rest, state=torch.tensor([state], dtype=torch.float64)
        )
        return shaped.exp()[0].tolist()

    def normalised(weights: list[float]) -> list[float]:
        return [weight / sum(weights) for weight in weights]

    assert distribution("drop") == pytest.approx(normalised([*inside, 0.0, 0.0]), abs=1e-14)
    assert distribution("mean") == pytest.approx(normalised([*inside, 0.15, 0.05]), abs=1e-14)
    assert distribution("state") == pytest.approx(
        normalised([*inside, 0.15 * math.exp(0.2), 0.05 * math.exp(0.2)]), abs=1e-14
    )
    assert distribution("residual") == pytest.approx(normalised([*inside, 0.0, 0.0]), abs=1e-14)
    left = math.e - sum(inside)
    assert distribution("residual", 1.0) == pytest.approx(normalised([*inside, left * 0.75, left * 0.25]), abs=1e-14)


def test_residual_mass_is_exact_for_candidates_of_a_self_consistent_soft_value():
    world = WORLDS[0]
    distribution = shaped(
        world, table_score(world.soft_values(), "soft", world.beta), strength=1 / world.beta, k=2, rest="residual"
    )
    assert distance(distribution, world.tilted()) < 1e-12  # one token is outside: its mass is the residual


def test_the_head_of_the_distribution_has_a_size_of_its_own_in_each_row():
    logp0 = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]).log()
    candidates, valid = choose_candidates(logp0, head=0.4)
    assert candidates.tolist()[0] == [0, 1] and valid.tolist() == [[True, True], [True, False]]
    distribution = shaped_distribution(logp0, candidates, torch.zeros(2, 2), valid, rest="drop").exp()
    assert torch.allclose(distribution, torch.tensor([[2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0]]))


def test_shaping_every_second_token():
    world = WORLDS[2]
    values = world.mean_values()
    distribution = shaped(world, table_score(values), strength=2.0, every=2)
    constant = {s: v if len(s) % 2 else 0.0 for s, v in values.items()}  # a constant at tokens 1 and 3 changes nothing
    assert distance(distribution, by_hand(world, constant, 2.0)) < 1e-12


# ------------------------------------------------------------------------------------------------------------ the rest


def test_weighted_sums_have_one_knob_a_term():
    world = WORLDS[0]
    other = make_world(9)
    both = sum_scores((0.7, table_score(world.mean_values())), (-0.4, table_score(other.mean_values())))
    values = {s: 0.7 * v - 0.4 * other.mean_values()[s] for s, v in world.mean_values().items()}
    assert distance(shaped(world, both), by_hand(world, values, 1.0)) < 1e-12
    assert both.kind == "mean"


def test_temperature_zero_takes_the_mode_of_the_shaped_distribution():
    world = WORLDS[0]
    sampling = Sampling(max_tokens=world.length, temperature=0.0)
    decoder = Shaped(world.engine(), table_score(world.max_values()), strength=1e6)
    assert world.reward[tokens_of(decoder.generate([PROMPT], sampling))] == max(world.reward.values())


def test_given_continuations_are_measured_as_if_they_had_been_sampled():
    world = WORLDS[1]
    decoder = Shaped(world.engine(), table_score(world.mean_values()), strength=1.5)
    distribution = by_hand(world, world.mean_values(), 1.5)
    strings = list(distribution)
    for string, completion in zip(
        strings, decoder.forced([PROMPT] * len(strings), strings, world.sampling), strict=True
    ):
        assert tuple(completion.tokens) == string
        assert abs(math.exp(sum(completion.logps)) - distribution[string]) < 1e-12
        assert abs(math.exp(completion.measured["base_logp"]) - world.strings[string]) < 1e-12


def test_filters_and_shapers_do_not_mix():
    world = WORLDS[0]
    decoder = Shaped(world.engine(), table_score(world.mean_values()))
    with pytest.raises(ValueError, match=r"top_p 0\.9.*restrict the shaper's candidates"):
        decoder.generate([PROMPT], Sampling(max_tokens=2, top_p=0.9))
    with pytest.raises(ValueError, match="not both"):
        Shaped(world.engine(), table_score({}), k=3, head=0.1)


def test_impossible_tokens_add_nothing_to_the_kl():
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert float(next_token_kl(logp, torch.tensor([[0.25, 0.25, 0.5]]).log())) == pytest.approx(math.log(2))
