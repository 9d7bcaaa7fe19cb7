"""Populations on an exact world: best-of-n, blocks, beams, importance sampling and sequential Monte Carlo."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter

import pytest
import torch
from exact_world import (
    PROMPT,
    World,
    distance,
    distribution_of,
    kl,
    make_world,
    table_score,
    tokens_of,
    total_variation,
)
from function_score import FunctionScore
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoding import argmax, best_of_n, select_blockwise, softmax_at
from reference_kl import expected_best

from posttrain.batch import Finish
from posttrain.decoding.answers import vote, weighted
from posttrain.decoding.kl import best_of_n_kl_bound, blockwise_kl_bound
from posttrain.decoding.particles import (
    Particle,
    effective_size,
    keep,
    resample,
    systematic,
    tilted,
    top,
)
from posttrain.decoding.population import Population, PopulationResult
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.shaping import GuideWarning, Shaped
from posttrain.engines.base import Sampling

SMALL = make_world(3, vocabulary=2, length=3)
TINY = make_world(4, vocabulary=2, length=2)
ENDING = make_world(5, vocabulary=3, length=2, eos=True)


def answer_distribution(world: World, values, **options) -> dict:
    """The distribution of a population's answer."""
    score = table_score(values, "soft", world.beta)
    return distribution_of(
        lambda choosers: tokens_of(
            Population(world.engine(choosers), score, make_chooser=choosers, **options).generate(
                [PROMPT], world.sampling
            )
        )
    )


# ---------------------------------------------------------------------------------------- rows 5 and 6 of the test bed


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("world", [SMALL, ENDING])
def test_best_of_n_has_its_closed_form_and_its_kl_bound(world: World, n: int):
    found = answer_distribution(world, world.reward, branch=n)
    assert distance(found, best_of_n(world, n)) < 1e-9
    assert kl(found, world.strings) <= best_of_n_kl_bound(n) + 1e-9


@pytest.mark.parametrize("world", [SMALL, ENDING])
@pytest.mark.parametrize("block", [1, 2])
def test_blockwise_best_of_n(world: World, block: int):
    values = world.mean_values()
    found = answer_distribution(world, values, branch=2, block=block)
    assert distance(found, select_blockwise(world, values, block=block, count=2, select=argmax)) < 1e-12
    rounds = sum(p * math.ceil(len(y) / block) for y, p in found.items())
    assert kl(found, world.strings) <= blockwise_kl_bound(2, rounds) + 1e-9


def test_the_bound_that_is_measured_is_the_blockwise_one():
    world, values = ENDING, ENDING.mean_values()

    def run(choosers):
        decoder = Population(world.engine(choosers), table_score(values), branch=2, block=1, make_chooser=choosers)
        (completion,) = decoder.generate([PROMPT], world.sampling)[0]
        return tuple(completion.tokens), completion.measured["kl_bound"], completion.measured["generated"]

    outcomes = distribution_of(run)
    rounds = sum(p * len(tokens) for (tokens, *_), p in outcomes.items())
    assert sum(p * bound for (_, bound, _), p in outcomes.items()) == pytest.approx(blockwise_kl_bound(2, rounds))
    assert all(generated == 2 * len(tokens) for tokens, _, generated in outcomes)


BOUNDED = {
    "soft best of n": {"branch": 3, "pick": tilted},
    "soft blocks": {"branch": 2, "block": 1, "pick": tilted},
    "vote": {"particles": 3, "pick": keep, "final": lambda particles, choose, decode: 2 * (particles[0].score > 0)},
    "best of all": {"particles": 2, "branch": 2},
    "importance sampling": {"particles": 3, "pick": keep, "final": weighted},
    "sis": {"particles": 2, "block": 1, "pick": functools.partial(resample, threshold=0.0), "final": weighted},
    "smc": {"particles": 2, "block": 1, "pick": functools.partial(resample, threshold=1.0), "final": weighted},
    "twisted smc": {"particles": 2, "block": 1, "pick": resample, "final": weighted, "shaped": True},
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("values", ["soft", "mean"])
def test_the_mean_of_the_bounds_is_above_the_enumerated_kl(name: str, values: str):
    world, options = TINY, dict(BOUNDED[name])
    shaped = options.pop("shaped", False)
    score = table_score(world.soft_values() if values == "soft" else world.mean_values())

    def run(choosers):
        engine = world.engine(choosers)
        engine = Shaped(engine, score, strength=1 / world.beta) if shaped else engine
        decoder = Population(engine, score, strength=1 / world.beta, make_chooser=choosers, **options)
        (completion,) = decoder.generate([PROMPT], world.sampling)[0]
        return tuple(completion.tokens), completion.measured["kl_bound"]

    outcomes = distribution_of(run)
    found: dict = {}
    for (tokens, _), p in outcomes.items():
        found[tokens] = found.get(tokens, 0.0) + p
    exact, bound = kl(found, world.strings), sum(p * value for (_, value), p in outcomes.items())
    assert exact > 1e-3
    assert exact <= bound + 1e-9
    assert bound < 3.5 * exact + 0.7  # and it says something


def test_a_mean_value_does_not_make_the_tilted_distribution_and_the_population_says_so():
    with pytest.warns(GuideWarning, match="the score is a mean value; only a soft value"):
        Population(TINY.engine(), table_score(TINY.mean_values()), strength=1 / TINY.beta, pick=tilted, tilted=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuideWarning)
        soft = table_score(TINY.soft_values(), "soft", TINY.beta)
        Population(TINY.engine(), soft, strength=1 / TINY.beta, pick=tilted, tilted=True)


def test_a_beam_has_no_bound():
    for options in ({"particles": 2, "branch": 2, "block": 1}, {"particles": 2, "block": 1, "pick": resample}):
        decoder = Population(TINY.engine(), table_score(TINY.mean_values()), **options)
        assert "kl_bound" not in decoder.generate([PROMPT], TINY.sampling)[0][0].measured


@pytest.mark.parametrize("world", [SMALL, ENDING])
@pytest.mark.parametrize(("block", "count"), [(1, 2), (2, 2), (None, 2)])
def test_soft_selection_of_blocks(world: World, block: int | None, count: int):
    """Soft best-of-n with whole completions, SVDD with blocks."""
    values = world.soft_values()
    strength = 1 / world.beta
    found = answer_distribution(world, values, branch=count, block=block, pick=tilted, strength=strength)
    expected = select_blockwise(world, values, block=block or world.length, count=count, select=softmax_at(strength))
    assert distance(found, expected) < 1e-12


def test_soft_selection_from_many_blocks_comes_near_the_tilted_distribution():
    """TV to the tilted distribution falls like 1 / M; at M = 1 it is the base distribution's."""
    values, strength = TINY.soft_values(), 1 / TINY.beta
    found = [
        total_variation(
            answer_distribution(TINY, values, branch=m, block=1, pick=tilted, strength=strength), TINY.tilted()
        )
        for m in (1, 2, 3)
    ]
    assert found[0] == pytest.approx(total_variation(TINY.strings, TINY.tilted()), abs=1e-12)
    assert found[0] > 1.3 * found[1] > 1.3**2 * found[2]
    nearly = select_blockwise(TINY, values, block=1, count=12, select=softmax_at(strength))
    assert total_variation(nearly, TINY.tilted()) < 0.1 * found[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"pick": tilted}, {"pick": resample}, {"pick": keep}, {"block": 1}, {"block": 2, "pick": resample}],
)
def test_one_particle_without_branches_samples_the_base_distribution(options: dict):
    assert distance(answer_distribution(SMALL, SMALL.soft_values(), **options), SMALL.strings) < 1e-12


def test_a_block_as_long_as_the_completion_is_best_of_n():
    assert distance(answer_distribution(SMALL, SMALL.max_values(), branch=2, block=3), best_of_n(SMALL, 2)) < 1e-12


def test_two_beams_that_branch_twice_are_four_candidates():
    """IVO's beam on strings of one block: the best of P · n independent ones."""
    found = answer_distribution(TINY, TINY.reward, particles=2, branch=2)
    assert distance(found, best_of_n(TINY, 4)) < 1e-12


def test_distinct_beams_differ():
    prefixes = [Prefix(tokens=[0, token], start=1, finish=Finish.LENGTH) for token in (1, 1, 2, 3)]
    family = [
        Particle(prefix=prefix, version=0, potential=value)
        for prefix, value in zip(prefixes, (3.0, 3.0, 2.0, 1.0), strict=True)
    ]
    none = list
    assert [one.prefix.tokens[1] for one in top([family[:2], family[2:]], none)] == [1, 1]
    assert [one.prefix.tokens[1] for one in top([family[:2], family[2:]], none, distinct=True)] == [1, 2]
    both = top([family[:1], family[1:2]], none, distinct=True)
    assert [one.prefix.tokens[1] for one in both] == [1, 1]  # nothing else is left


# ----------------------------------------------------------------------------------------------- row 7 of the test bed


def estimates(
    world: World, twists, *, shaped: bool, particles: int = 2, pinned=None, block: int | None = 1, ends=(), **options
) -> dict:
    """The distribution of log Ẑ."""

    def run(choosers):
        engine = world.engine(choosers)
        score, final = table_score(twists), table_score(world.reward)
        if shaped:
            engine = Shaped(engine, score, strength=1 / world.beta)
        decoder = Population(
            engine,
            score,
            final_score=final,
            particles=particles,
            block=block,
            separator=ends,
            strength=1 / world.beta,
            make_chooser=choosers,
            pick=functools.partial(resample, **options),
        )
        given = None if pinned is None else [pinned]
        return round(decoder.populations([PROMPT], world.sampling, pinned=given)[0].log_z, 13)

    return distribution_of(run)


TWISTS = {
    "soft": TINY.soft_values(),
    "mean": TINY.mean_values(),
    "wrong": make_world(8, vocabulary=2, length=2).soft_values(),
}


@pytest.mark.parametrize("shaped", [False, True], ids=["base", "twisted"])
@pytest.mark.parametrize("twists", TWISTS)
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 1.0, "scheme": "multinomial"},
        {"threshold": 1.0, "scheme": "systematic"},
        {"threshold": 0.9, "scheme": "systematic"},
    ],
    ids=["never", "multinomial", "systematic", "adaptive"],
)
def test_the_estimate_of_z_is_unbiased_whatever_the_twists(twists: str, shaped: bool, options: dict):
    found = estimates(TINY, TWISTS[twists], shaped=shaped, **options)
    assert abs(sum(p * math.exp(value) for value, p in found.items()) - math.exp(TINY.log_z())) < 1e-10
    lower = sum(p * value for value, p in found.items())
    assert lower <= TINY.log_z() + 1e-12


@pytest.mark.parametrize("shaped", [False, True], ids=["base", "twisted"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("twists", TWISTS)
def test_a_pinned_particle_makes_an_upper_bound(twists: str, shaped: bool, threshold: float):
    upper = 0.0
    for string, probability in TINY.tilted().items():
        found = estimates(TINY, TWISTS[twists], shaped=shaped, pinned=string, threshold=threshold)
        upper += probability * sum(p * value for value, p in found.items())
    lower = sum(p * value for value, p in estimates(TINY, TWISTS[twists], shaped=shaped, threshold=threshold).items())
    exact = twists == "soft" and shaped
    assert lower <= TINY.log_z() + 1e-12 and TINY.log_z() - 1e-12 <= upper
    assert (upper - lower < 1e-12) is exact


@pytest.mark.parametrize(("block", "ends"), [(1, ()), (None, (0,)), (2, (1,))])
@pytest.mark.parametrize("world", [TINY, SMALL])
def test_the_bound_is_exact_in_expectation_of_its_inverse(world: World, block: int | None, ends: tuple[int, ...]):
    """E over tilted samples and conditional SMC of 1 / Ẑ is 1 / Z, also where blocks end with a token."""
    twists, options = world.mean_values(), {"block": block, "ends": ends, "threshold": 1.0}
    mean = sum(
        probability * p * math.exp(-value)
        for string, probability in world.tilted().items()
        for value, p in estimates(world, twists, shaped=False, pinned=string, **options).items()
    )
    assert abs(mean - math.exp(-world.log_z())) < 1e-10


@pytest.mark.parametrize("world", [SMALL, TINY])
def test_optimal_twists_and_proposal_have_no_variance(world: World):
    found = estimates(world, world.soft_values(), shaped=True, threshold=0.5)
    assert list(found) == [pytest.approx(world.log_z(), abs=1e-10)]


def test_strings_that_end_early_wait_with_their_weight():
    found = estimates(ENDING, ENDING.mean_values(), shaped=False, threshold=1.0, scheme="multinomial")
    assert abs(sum(p * math.exp(value) for value, p in found.items()) - math.exp(ENDING.log_z())) < 1e-10


def test_branches_share_their_parents_weight():
    def run(choosers):
        decoder = Population(
            TINY.engine(choosers),
            table_score(TWISTS["wrong"]),
            final_score=table_score(TINY.reward),
            particles=1,
            branch=2,
            block=1,
            strength=1 / TINY.beta,
            pick=resample,
            make_chooser=choosers,
        )
        return round(decoder.populations([PROMPT], TINY.sampling)[0].log_z, 13)

    found = distribution_of(run)
    assert abs(sum(p * math.exp(value) for value, p in found.items()) - math.exp(TINY.log_z())) < 1e-10


def test_weighted_samples_come_near_the_tilted_distribution():
    values = dict.fromkeys(TINY.prefixes, 0.0) | dict(TINY.reward)
    options = {"strength": 1 / TINY.beta, "final": weighted, "pick": keep}
    near = [
        total_variation(answer_distribution(TINY, values, particles=particles, **options), TINY.tilted())
        for particles in (1, 2, 3)
    ]
    assert near[0] > near[1] > near[2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6).filter(lambda x: sum(x) > 0.1), st.integers(1, 5))
def test_systematic_draws_take_the_nearest_counts(shares: list[float], count: int):
    shares = [share / sum(shares) for share in shares]
    means = [0.0] * len(shares)
    for drawn, probability in distribution_of(lambda choosers: tuple(systematic(shares, count, choosers(0)))).items():
        assert len(drawn) == count
        for index, share in enumerate(shares):
            assert abs(drawn.count(index) - count * share) < 1 + 1e-9
            means[index] += probability * drawn.count(index)
    assert means == pytest.approx([count * share for share in shares], abs=1e-9)


def test_a_threshold_of_one_draws_from_equal_weights_too():
    """Their effective size is 2 give or take the last bit: -0.9 and its neighbour once gave 2.0000000000000004."""
    weights = [-0.9, -0.9 + 1e-16]
    families = [[Particle(prefix=Prefix(tokens=[0], start=1), version=0, log_weight=weight)] for weight in weights]
    assert effective_size(weights) > 2
    survivors = resample(families, lambda shares: 1, threshold=1.0, scheme="multinomial")
    assert all(one.prefix is families[1][0].prefix for one in survivors)
    assert resample(families, lambda shares: 0, threshold=0.5) == [family[0] for family in families]


def test_weights_of_zero():
    dead = [[Particle(prefix=Prefix(tokens=[0], start=1), version=0, log_weight=-math.inf)] for _ in range(2)]
    assert [one.log_weight for one in resample(dead, list, threshold=1.0)] == [-math.inf] * 2
    assert effective_size([0.0, -math.inf]) == pytest.approx(1.0)
    assert PopulationResult([family[0] for family in dead], 0, 0).log_z == -math.inf


# ---------------------------------------------------------------------------------------------------------- the answer


def particles(*answers_and_scores: tuple[int, float]) -> list[Particle]:
    return [
        Particle(prefix=Prefix(tokens=[0, answer], start=1, finish=Finish.STOPPED), version=0, potential=score)
        for answer, score in answers_and_scores
    ]


def answer(tokens):
    return None if tokens[0] == 9 else tokens[0]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("count", 2),  # answer 1 three times; its best-scored
        ("sum", 3),  # 1: .1 + .3 + .2, 2: .9
        ("max", 4),  # answer 3 has the best score
    ],
)
def test_votes(by: str, expected: int):
    """Scores scaled to [0, 1]: (0, 10) -> (0, 1); answer 9 counts as none and gets no votes."""
    pool = particles((1, 1.0), (1, 2.0), (1, 3.0), (2, 9.0), (3, 9.5), (9, 10.0), (9, 0.0))
    if by == "sum":
        pool[4] = particles((3, 5.0))[0]
    assert vote(pool, lambda shares: 0, tuple, answer=answer, by=by) == expected


def test_a_vote_without_answers_goes_to_the_best_score():
    assert vote(particles((9, 1.0), (9, 2.0)), lambda shares: 0, tuple, answer=answer) == 1


def test_majority_of_independent_samples():
    """P = 3: token 0 first in two of three or more wins: 3 p² - 2 p³."""
    world = make_world(6, vocabulary=2, length=1)
    p = world.next_distribution(())[0]
    found = answer_distribution(
        world, world.reward, particles=3, pick=keep, final=functools.partial(vote, answer=answer), decode=tuple
    )
    assert found[0,] == pytest.approx(3 * p**2 - 2 * p**3)


def test_branches_must_be_chosen_among():
    with pytest.raises(ValueError, match="a pick that chooses"):
        answer_distribution(TINY, TINY.reward, branch=2, pick=keep)
    with pytest.raises(ValueError, match="branch 0"):
        Population(TINY.engine(), table_score({}), branch=0)


def test_the_expected_best_of_n_from_n_samples():
    """Rewards 1, 2, 4: one of them 7/3, best of two (2 + 4 + 4) / 3, best of three 4."""
    assert expected_best(torch.tensor([4.0, 1.0, 2.0])).tolist() == pytest.approx([7 / 3, 10 / 3, 4.0])


# ----------------------------------------------------------------------------------------------------------- interface


def test_samples_depend_on_their_own_seed_alone():
    decoder = Population(SMALL.engine(), table_score(SMALL.mean_values()), branch=2, block=1, pick=tilted)
    together = decoder.generate([PROMPT] * 3, SMALL.sampling, 2, seeds=[5, 6, 7])
    alone = decoder.generate([PROMPT], SMALL.sampling, 2, seeds=[6])
    assert together[1] == alone[0]
    assert len({tuple(c.tokens) for group in together for c in group}) > 1


def test_completions_are_reported_once_with_the_engines_log_probs():
    seen = {}
    decoder = Population(ENDING.engine(), table_score(ENDING.mean_values()), particles=2, branch=2, block=1)
    outputs = decoder.generate(
        [PROMPT] * 4, ENDING.sampling, 2, seeds=range(4), on_completion=lambda i, j, c: seen.setdefault((i, j), c)
    )
    assert seen == {(i, j): c for i, group in enumerate(outputs) for j, c in enumerate(group)}
    for completion in seen.values():
        assert math.exp(sum(completion.logps)) == pytest.approx(ENDING.strings[tuple(completion.tokens)])
        assert completion.finish == (Finish.STOPPED if completion.tokens[-1] == ENDING.eos else Finish.LENGTH)


def test_blocks_end_at_their_own_tokens_too():
    """Blocks of any length that end with token 1; the score is of their last token, so 1 wins where it was drawn."""
    world = make_world(7, vocabulary=3, length=4)
    lengths = []

    def scored(prefixes):
        lengths.extend(len(prefix.generated) for prefix in prefixes if prefix.finish is None)
        assert all(prefix.generated[-1] == 1 for prefix in prefixes if prefix.finish is None)
        return [float(prefix.generated[-1] == 1) for prefix in prefixes]

    decoder = Population(world.engine(), FunctionScore(function=scored), branch=2, separator=(1,))
    outputs = decoder.generate([PROMPT] * 8, Sampling(max_tokens=4), seeds=range(8))
    assert all(len(c.tokens) == 4 and c.finish is Finish.LENGTH for (c,) in outputs)
    assert len(set(lengths)) > 1


# ------------------------------------------------------------------------ samples of real seeds follow the distribution


@pytest.mark.parametrize(
    ("decoder", "exact"),
    [
        (lambda engine: Shaped(engine, table_score(SMALL.soft_values()), strength=1 / SMALL.beta), SMALL.tilted),
        (lambda engine: Population(engine, table_score(SMALL.reward), branch=2), lambda: best_of_n(SMALL, 2)),
    ],
    ids=["shaped", "best of two"],
)
def test_samples_follow_the_exact_distribution(decoder, exact):
    """χ² of 1500 samples in 8 cells: mean 7, standard deviation 3.7; below 30 but once in 10 000 seeds."""
    samples = decoder(SMALL.engine()).generate([PROMPT], SMALL.sampling, 1500, seeds=[17])[0]
    counts = Counter(tuple(completion.tokens) for completion in samples)
    distribution = exact()
    assert set(counts) <= set(distribution)
    assert sum((counts[y] - 1500 * p) ** 2 / (1500 * p) for y, p in distribution.items()) < 30
