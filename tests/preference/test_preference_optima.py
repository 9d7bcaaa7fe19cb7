"""Optima of preference losses: a table trained with the shipped parts reaches the closed form of each.

The policy is a softmax over a handful of answers. Expected numbers are closed forms, or minima of the
papers' objectives found without these parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from parts_cases import close
from preference_cases import Weighted, answers, every_pair, forward, train, whole_loss
from torch import Tensor

from posttrain.batch import Batch
from posttrain.parts.preference import (
    list_links,
    list_targets,
    margins,
    pair_links,
    pair_targets,
    pair_weights,
    point_links,
    regularisers,
    scores,
)
from posttrain.parts.preference.terms import listwise, pairwise, pointwise

REFERENCE = (0.4, 0.3, 0.2, 0.1)
REWARD = (0.0, 1.0, 0.5, 2.0)
CYCLE = 5 / 9
"""Each of three answers beats the next one with this probability."""


ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]).double()
"""[i, j]: the probability that i beats j."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def normalised(weights: Sequence[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


def tilted(reference: Sequence[float], reward: Sequence[float], beta: float) -> list[float]:
    """Tilted distribution ref e^(r / beta) / Z: the optimum of RL with a KL penalty."""
    return normalised([p * math.exp(r / beta) for p, r in zip(reference, reward, strict=True)])


def labelled_pairs(pairs: Sequence[tuple[int, int]], weights: Sequence[float] | None = None) -> Batch:
    """Pairs of REFERENCE's answers with the probabilities of a Bradley-Terry model of REWARD."""
    return answers(
        [[(i, 1.0), (j, 0.0)] for i, j in pairs],
        REFERENCE,
        probability=[sigmoid(REWARD[i] - REWARD[j]) for i, j in pairs],
        weight=weights or [1.0] * len(pairs),
    )


def trained(terms: Weighted, batch: Batch, reference: Sequence[float] = REFERENCE, **options) -> Tensor:
    return torch.tensor(train(terms, batch, reference, **options))


soft_dpo = partial(pairwise, beta=0.5, target=pair_targets.soft)
weighted = (pair_weights.given,)


# ---- Consistent losses: ref e^(r / beta) / Z, however the pairs are sampled


@pytest.mark.parametrize(
    ("pairs", "weights"),
    [
        (every_pair(4), None),
        (every_pair(4), [3.0, 0.1, 1.0, 0.5, 2.0, 0.2]),
        ([(0, 1), (1, 2), (2, 3)], None),  # a chain: connected is enough
        ([(3, 0), (1, 0), (2, 0)], [0.1, 2.0, 1.0]),
    ],
)
def test_dpo_recovers_the_tilted_reference(pairs: list[tuple[int, int]], weights: list[float] | None) -> None:
    found = trained([(1.0, partial(soft_dpo, pair_weight=weighted))], labelled_pairs(pairs, weights))
    close(found, (0.0464, 0.25715, 0.06307, 0.63338), 1e-4)
    close(found, tilted(REFERENCE, REWARD, 0.5), 1e-6)
    value = [r - 0.5 * math.log(p / q) for r, p, q in zip(REWARD, found.tolist(), REFERENCE, strict=True)]
    assert value == pytest.approx([1.07705] * 4, abs=1e-5)  # beta log Z, whatever the answer


def test_dpo_on_unconnected_pairs_depends_on_where_it_starts() -> None:
    batch = labelled_pairs([(0, 1), (2, 3)])
    close(trained([(1.0, soft_dpo)], batch, start=(0, 0, 0, 0)), (0.06782, 0.37585, 0.05038, 0.50595), 1e-4)
    close(trained([(1.0, soft_dpo)], batch, start=(3, 3, 0, 0)), (0.14388, 0.79736, 0.00532, 0.05344), 1e-4)


def test_graded_labels_give_dpo_its_optimum_too() -> None:
    batch = answers([[(i, REWARD[i]) for i in range(4)]], REFERENCE)
    found = trained([(1.0, partial(pairwise, beta=0.5, target=pair_targets.bradley_terry))], batch)
    close(found, tilted(REFERENCE, REWARD, 0.5), 1e-6)


def test_the_exponential_loss_tilts_half_as_much() -> None:
    found = trained([(1.0, partial(soft_dpo, link=pair_links.exponential))], labelled_pairs(every_pair(4)))
    close(found, (0.17512, 0.35702, 0.14436, 0.32349), 1e-4)


def test_nca_recovers_the_tilted_reference_and_its_normalisation() -> None:
    """K samples of the reference, enumerated: each answer as often as the reference would write it."""
    times = [round(10 * p) for p in REFERENCE]
    group = [(i, REWARD[i]) for i in range(4) for _ in range(times[i])]
    target = partial(list_targets.softmax, temperature=0.5)
    batch = answers([group], REFERENCE)
    for link in (list_links.noise_contrastive, list_links.cross_entropy):
        found = trained([(1.0, partial(listwise, beta=1.0, link=link, target=target))], batch)
        close(found, tilted(REFERENCE, REWARD, 0.5), 1e-6)


def test_exo_and_dpo_agree_on_the_optimum_of_one_pair() -> None:
    """h = logit(1 - eps): 6.9068 at eps = 1e-3; so do smoothed labels, at 2.197 for eps = 0.1 and 1.386 for 0.2."""
    batch = answers([[(0, 1.0), (1, 0.0)]], (0.7, 0.3))

    def margin(term) -> float:
        found = trained([(1.0, term)], batch, (0.7, 0.3))
        return math.log(found[0] / found[1]) - math.log(0.7 / 0.3)

    exo = partial(listwise, beta=1.0, link=list_links.reverse_kl)
    assert margin(partial(exo, target=partial(list_targets.best, eps=1e-3))) == pytest.approx(6.9068, abs=1e-3)
    for eps, h in ((0.1, 2.197), (0.2, 1.386)):
        smoothed = partial(pairwise, beta=1.0, target=partial(pair_targets.smoothed, eps=eps))
        assert margin(smoothed) == pytest.approx(h, abs=1e-3)
        assert margin(partial(exo, target=partial(list_targets.best, eps=eps))) == pytest.approx(h, abs=1e-3)


def test_exo_on_lists_recovers_the_tilted_reference() -> None:
    batch = answers([[(i, REWARD[i]) for i in range(4)]], REFERENCE)
    exo = partial(listwise, beta=0.5, link=list_links.reverse_kl, target=partial(list_targets.softmax, temperature=1.0))
    close(trained([(1.0, exo)], batch), tilted(REFERENCE, REWARD, 0.5), 1e-6)


def test_rebel_takes_a_step_of_mirror_descent() -> None:
    old, reward = (0.2, 0.5, 0.3), (0.0, 1.0, 2.0)
    rebel = partial(pairwise, beta=1.0, link=pair_links.regression, target=pair_targets.reward_gap)
    found = trained([(1.0, rebel)], answers([[(i, reward[i]) for i in range(3)]], old), old)
    close(found, (0.05297, 0.35996, 0.58708), 1e-4)


def test_modpo_tilts_by_the_weighted_sum_of_rewards() -> None:
    """w = (0.7, 0.3): beta and the margin over w_0; the labels are of the first reward."""
    reference, first, second = (0.5, 0.3, 0.2), (0.0, 1.0, 2.0), (1.0, 0.5, 0.0)
    pairs = every_pair(3)
    batch = answers(
        [[(i, 1.0), (j, 0.0)] for i, j in pairs],
        reference,
        probability=[sigmoid(first[i] - first[j]) for i, j in pairs],
        margin=[0.3 * (second[i] - second[j]) for i, j in pairs],
    )
    modpo = partial(pairwise, beta=0.5 / 0.7, target=pair_targets.soft, margin=(partial(margins.given, scale=1 / 0.7),))
    found = trained([(1.0, modpo)], batch, reference)
    close(found, (0.15595, 0.28109, 0.56296), 1e-4)
    optima = (tilted(reference, first, 0.5), tilted(reference, second, 0.5))
    soup = normalised([a**0.7 * b**0.3 for a, b in zip(*optima, strict=True)])
    close(found, soup, 1e-6)  # averaged logits of the two optima


# ---- Divergences


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_ipo_stays_finite_on_certain_labels(tau: float) -> None:
    """π(y1) = σ(½ / τ), where DPO goes to 1."""
    ipo = partial(pairwise, beta=1.0, link=partial(pair_links.square, tau=tau))
    found = trained([(1.0, ipo)], answers([[(0, 1.0), (1, 0.0)]], (0.5, 0.5)), (0.5, 0.5))
    assert found[0].item() == pytest.approx(sigmoid(0.5 / tau), abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # Pairs of two independent draws of (0.6, 0.3, 0.1): ref e^(p(y beats mu) / tau)
        ({(0, 1): 0.18, (1, 2): 0.03, (2, 0): 0.06}, (0.36564, 0.24783, 0.38653)),
        ({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}, (1 / 3, 1 / 3, 1 / 3)),
        # Not a product: the solution of a Laplacian system
        ({(0, 1): 0.7, (1, 2): 0.2, (2, 0): 0.1}, (0.43569, 0.28897, 0.27534)),
    ],
)
def test_ipo_depends_on_how_pairs_are_sampled(
    weights: dict[tuple[int, int], float], expected: tuple[float, ...]
) -> None:
    reference = (1 / 3, 1 / 3, 1 / 3)
    batch = answers(
        [[(i, 1.0), (j, 0.0)] for i, j in weights],
        reference,
        probability=[CYCLE] * 3,
        weight=list(weights.values()),
    )
    ipo = partial(
        pairwise,
        beta=1.0,
        link=partial(pair_links.square, tau=0.1),
        target=pair_targets.soft,
        pair_weight=weighted,
    )
    close(trained([(1.0, ipo)], batch, reference), expected, 1e-4)


def test_f_divergences_have_their_own_optimum() -> None:
    reference, reward = (0.5, 0.3, 0.2), (0.0, 0.3, 0.5)
    batch = answers([[(i, reward[i]) for i in range(3)]], reference)
    term = partial(pairwise, beta=1.0, target=pair_targets.bradley_terry, score=scores.f_divergence)
    close(trained([(1.0, term)], batch, reference), (0.31652, 0.32928, 0.3542), 1e-4)


def test_chi_squared_has_its_own_optimum() -> None:
    """z + log z = (r - Z) / beta, with z = π / ref"""
    batch = answers([[(i, REWARD[i]) for i in range(4)]], REFERENCE)
    score = partial(scores.f_divergence, divergence="chi_squared")
    found = trained([(1.0, partial(pairwise, beta=1.0, target=pair_targets.bradley_terry, score=score))], batch)
    close(found, (0.28154, 0.35516, 0.18554, 0.17775), 1e-4)
    link = [p / q + math.log(p / q) for p, q in zip(found.tolist(), REFERENCE, strict=True)]
    assert [r - z for r, z in zip(REWARD, link, strict=True)] == pytest.approx([REWARD[0] - link[0]] * 4, abs=1e-6)


# ---- Single completions


KTO_REFERENCE = (0.4, 0.4, 0.2)


def desirable_with(probabilities: Sequence[float]) -> Batch:
    """Each answer as often as the reference writes it, liked with a probability: completions alone in their group."""
    groups = [
        [(i, float(good))]
        for i, (q, p) in enumerate(zip(KTO_REFERENCE, probabilities, strict=True))
        for good, share in ((1, p), (0, 1 - p))
        for _ in range(round(100 * q * share))
    ]
    return answers(groups, KTO_REFERENCE)


def test_kto_starts_at_a_half_and_ends_in_a_corner() -> None:
    """The answer that most prefer takes all probability in the end; ref e^(r / beta) is not the optimum."""
    batch = desirable_with((0.7, 0.55, 0.3))
    kto = partial(pointwise, beta=1.0)
    logits = torch.tensor(KTO_REFERENCE).double().log().requires_grad_()
    start = whole_loss([(1.0, kto)], forward(logits, batch, KTO_REFERENCE), batch)
    assert start.item() == pytest.approx(0.5)
    found = trained([(1.0, kto)], batch, KTO_REFERENCE, limit=15.0, start=KTO_REFERENCE, steps=40)
    close(found, (0.8, 0.2, 0.0), 2e-3)


def test_kto_slopes_at_the_reference() -> None:
    score = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = point_links.sigmoid(0.1 * score, torch.tensor([1.0, -1.0]).double(), desirable=1.0, undesirable=1.5)
    loss.sum().backward()
    close(loss, (0.5, 0.75))
    assert score.grad is not None
    close(score.grad, (-0.1 / 4, 0.1 * 1.5 / 4))


ACCEPTED, REJECTED = (0.1, 0.2, 0.2, 0.5), (0.6, 0.3, 0.05, 0.05)


def pmpo(alpha: float, beta: float) -> tuple[Weighted, Batch]:
    """Batch of one prompt with every accepted and rejected sample, and the KL term at its state."""
    good = [(i, 1.0) for i, p in enumerate(ACCEPTED) for _ in range(round(20 * p))]
    bad = [(i, -1.0) for i, p in enumerate(REJECTED) for _ in range(round(20 * p))]
    likelihood = partial(
        pointwise,
        beta=1.0,
        score=scores.log_prob,
        link=partial(point_links.linear, alpha=alpha),
        within="mean_of_each_label",
    )
    return [(1.0, likelihood), (beta, regularisers.reference_kl)], answers([good + bad], REFERENCE)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 0.5, (0.2, 0.23333, 0.2, 0.36667)),
        (0.5, 0.8, (0.0875, 0.2375, 0.29375, 0.38125)),
        (0.0, 2.0, (0.2, 0.3, 0.35, 0.15)),
    ],
)
def test_pmpo_mixes_accepted_rejected_and_reference(alpha: float, beta: float, expected: tuple[float, ...]) -> None:
    """π = (α q_a - (1 - α) q_r + β ref) / (2 α - 1 + β)"""
    found = trained(*pmpo(alpha, beta))
    close(found, expected, 1e-4)
    mixed = [alpha * a - (1 - alpha) * r + beta * q for a, r, q in zip(ACCEPTED, REJECTED, REFERENCE, strict=True)]
    close(found, normalised(mixed), 1e-6)


@pytest.mark.parametrize(("alpha", "threshold"), [(0.0, 1.5), (0.5, 0.625)])
def test_pmpo_needs_enough_kl_where_it_rejects(alpha: float, threshold: float) -> None:
    """Below the threshold the most rejected answer has no probability that would be enough: it goes to 0."""
    assert trained(*pmpo(alpha, 1.1 * threshold))[0] > 0.01
    terms, batch = pmpo(alpha, 0.8 * threshold)
    assert trained(terms, batch, limit=12.0, start=REFERENCE)[0] < 1e-6


def test_sppo_regresses_to_a_step_of_multiplicative_weights() -> None:
    """Rock, paper, scissors; log-ratios regressed to η (P - ½) miss the step's normaliser by 0.0049."""
    old = (0.5, 0.3, 0.2)
    win = ROCK_PAPER_SCISSORS @ torch.tensor(old).double()
    times = [round(10 * p) for p in old]
    group = [(i, win[i].item()) for i in range(3) for _ in range(times[i])]
    sppo = partial(pointwise, beta=1.0, link=partial(point_links.square, scale=1.0))
    found = trained([(1.0, sppo)], answers([group], old), old)
    close(found, (0.52299, 0.25715, 0.21986), 1e-4)
    exact = normalised([p * math.exp(w) for p, w in zip(old, win.tolist(), strict=True)])
    close(torch.tensor(exact), (0.52308, 0.25696, 0.21996), 1e-4)


# ---- Optimism and pessimism


UNIFORM = (1 / 3, 1 / 3, 1 / 3)


def vpo(coef: float, calibration: Sequence[int]) -> tuple[Weighted, Batch]:
    """Batch of one pair, with 0.8 as the first one's probability to win, and calibration samples without a label."""
    dpo = partial(pairwise, beta=1.0, target=pair_targets.soft)
    samples = [(answer, math.nan) for answer in calibration]
    batch = answers([[(0, 1.0), (1, 0.0), *samples]], UNIFORM, probability=[0.8])
    return [(1.0, dpo), (coef, partial(regularisers.optimism, bound=50.0))], batch


def descended(terms: Weighted, batch: Batch) -> Tensor:
    """Policy after 400 steps of gradient descent at 0.1 from the reference; DPO alone ends at (0.571, 0.143, 0.286)."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        loss = whole_loss(terms, forward(logits, batch, UNIFORM), batch)
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.1 * slope).detach().requires_grad_()
    return logits.detach().softmax(-1)


@pytest.mark.engine  # 800 steps
def test_vpo_spreads_or_withdraws_from_the_reference() -> None:
    close(descended(*vpo(0.05, [0, 1, 2])), (0.613, 0.142, 0.245), 1e-3)
    close(descended(*vpo(0.05, [0, 1])), (0.341, 0.082, 0.577), 1e-3)


@pytest.mark.parametrize(
    ("coef", "calibration", "expected"),
    [
        (0.05, [0, 1, 2], (0.062, 0.017, 0.921)),
        (-0.05, [0, 1, 2], (0.527, 0.140, 0.333)),
        (-0.05, [0, 0, 0, 0, 1], (0.788, 0.197, 0.014)),  # what is chosen: the first with 0.8
    ],
)
def test_vpo_in_a_bounded_class_of_policies(coef: float, calibration: list[int], expected: tuple[float, ...]) -> None:
    """Logits in [-2, 2]: the best of the minima from several starts."""
    terms, batch = vpo(coef, calibration)
    starts = [(0.0, 0.0, 0.0), (0.5, 0.0, -1.0), (-0.5, -1.0, 1.0)]
    found = [trained(terms, batch, UNIFORM, start=start, limit=2.0, steps=25) for start in starts]
    losses = [whole_loss(terms, forward(policy.double().log(), batch, UNIFORM), batch).item() for policy in found]
    close(found[losses.index(min(losses))], expected, 2e-3)


def test_optimism_is_unbounded_but_for_its_clip() -> None:
    """Calibrated on the pair, all mass may go to the unseen answer; the clip ends that where both are 3 nats down."""
    dpo = partial(pairwise, beta=1.0, target=pair_targets.soft)
    batch = answers([[(0, 1.0), (1, 0.0), (0, math.nan), (1, math.nan)]], UNIFORM, probability=[0.8])

    def unseen(bound: float) -> tuple[float, float]:
        terms: Weighted = [(1.0, dpo), (0.5, partial(regularisers.optimism, bound=bound))]
        policy = trained(terms, batch, UNIFORM, limit=20.0)
        return policy[2].item(), whole_loss(terms, forward(policy.double().log(), batch, UNIFORM), batch).item()

    clipped, loss = unseen(3.0)
    assert loss > math.log(0.5) - 0.5 * 3.0  # bounded below
    assert clipped < 0.99 < unseen(15.0)[0]
