"""Rejection sampling on an exact world: exact draws of the tilted distribution, and log Z bounded from both sides."""

from __future__ import annotations

import functools
import math

import pytest
from exact_world import PROMPT, World, distance, distribution_of, kl, make_world, table_score, tokens_of

from posttrain.decoding.answers import weighted
from posttrain.decoding.particles import keep, resample, tilted, top
from posttrain.decoding.population import Population
from posttrain.decoding.rejection import Rejection
from posttrain.errors import UserError

TINY = make_world(4, vocabulary=2, length=2)
ENDING = make_world(5, vocabulary=3, length=2, eos=True)
SMC = {"particles": 2, "block": 1, "pick": functools.partial(resample, threshold=1.0, scheme="multinomial")}


def decoder_of(world: World, choosers, *, values=None, width: int = 1, rounds: int = 1, highest=None, **population):
    engine = world.engine(choosers)
    particles = Population(
        engine,
        table_score(values or world.reward),
        final_score=table_score(world.reward),
        make_chooser=choosers,
        **{"strength": 1 / world.beta, **population},
    )
    highest = max(world.reward.values()) if highest is None else highest
    return Rejection(engine, particles, highest=highest, width=width, rounds=rounds, make_chooser=choosers)


def outcomes(world: World, *names: str, **options) -> dict:
    """The distribution of an answer with whether it was accepted and what else was measured."""

    def run(choosers):
        ((completion,),) = decoder_of(world, choosers, **options).generate([PROMPT], world.sampling)
        return tuple(completion.tokens), *(completion.measured.get(name) for name in ("accepted", *names))

    return distribution_of(run)


def given_accepted(distribution: dict) -> dict:
    share = sum(p for outcome, p in distribution.items() if outcome[1])
    found: dict = {}
    for outcome, p in distribution.items():
        if outcome[1]:
            found[outcome[0]] = found.get(outcome[0], 0.0) + p / share
    return found


@pytest.mark.parametrize(("world", "width", "rounds"), [(TINY, 1, 1), (TINY, 2, 1), (TINY, 1, 3), (ENDING, 1, 2)])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_what_is_accepted_has_the_tilted_distribution(world: World, width: int, rounds: int, margin: float):
    """The acceptance rate is Z / exp(λ highest)."""
    highest = max(world.reward.values()) + margin
    distribution = outcomes(world, width=width, rounds=rounds, highest=highest, pick=keep)
    assert distance(given_accepted(distribution), world.tilted()) < 1e-12
    rate = math.exp(world.log_z() - highest / world.beta)
    share = sum(p for (_, accepted), p in distribution.items() if accepted)
    assert share == pytest.approx(1 - (1 - rate) ** (width * rounds), abs=1e-12)


def test_where_nothing_is_accepted_the_answer_is_drawn_by_weight():
    """The answer comes from draws that chance has all rejected."""
    distribution = outcomes(TINY, "log_z", width=2, pick=keep)
    refused = {y: 1 - math.exp((r - max(TINY.reward.values())) / TINY.beta) for y, r in TINY.reward.items()}
    expected: dict = {}
    for first, p in TINY.strings.items():
        for second, q in TINY.strings.items():
            weights = [math.exp(TINY.reward[y] / TINY.beta) for y in (first, second)]
            for y, weight in zip((first, second), weights, strict=True):
                expected[y] = expected.get(y, 0.0) + p * q * refused[first] * refused[second] * weight / sum(weights)
    found = {y: p for (y, accepted, log_z), p in distribution.items() if not accepted and log_z is None}
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("values", ["mean", "soft"])
def test_log_z_lies_between_the_estimates_without_and_with_the_draw(values: str):
    """Their mean difference is no less than both divergences of SMC's answers and the tilted distribution."""
    table = TINY.mean_values() if values == "mean" else TINY.soft_values()
    distribution = outcomes(TINY, "log_z", "log_z_upper", "kl_bound", values=table, **SMC)
    share = sum(p for outcome, p in distribution.items() if outcome[1])
    means = [sum(p / share * outcome[i] for outcome, p in distribution.items() if outcome[1]) for i in (2, 3, 4)]
    lower, upper, divergence = means
    assert lower < TINY.log_z() < upper
    assert divergence > kl(TINY.tilted(), TINY.strings)
    answers = distribution_of(
        lambda choosers: tokens_of(
            Population(
                TINY.engine(choosers),
                table_score(table),
                final_score=table_score(TINY.reward),
                strength=1 / TINY.beta,
                final=weighted,
                make_chooser=choosers,
                **SMC,
            ).generate([PROMPT], TINY.sampling)
        )
    )
    assert upper - lower > kl(answers, TINY.tilted()) + kl(TINY.tilted(), answers)


def test_a_score_above_the_highest_is_told():
    highest = sorted(TINY.reward.values())[-2]
    with pytest.raises(UserError, match=r"decoder.highest: a completion scores .* is exact only under the highest"):
        outcomes(TINY, highest=highest, pick=keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pick": resample, "branch": 2}, "`branch` is 1"),
        ({"pick": top}, "resample or keep"),
        ({"pick": tilted}, "keep"),
    ],
)
def test_populations_that_cannot_hold_a_pinned_particle_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        decoder_of(TINY, None, **options)
