"""Preference losses: special cases that equal other losses, values by hand, and numbers that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, seeds
from preference_cases import Term, moved, preferences, whole_loss
from torch import Tensor

from posttrain.batch import Batch, Outputs
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
from posttrain.parts.preference.terms import listwise, pairwise
from posttrain.recipe.resolve import check_options, positional


@pytest.mark.parametrize(
    "score",
    [
        scores.log_ratio,
        partial(scores.log_ratio, level="mean"),
        partial(scores.log_ratio, tail=0.5, discount=0.9),
        *(partial(scores.f_divergence, divergence=d) for d in ("forward_kl", "jensen_shannon", "alpha", "chi_squared")),
    ],
)
@given(seed=seeds)
@examples(2)
def test_every_score_is_exactly_0_at_the_reference(score: Callable[[Outputs, Batch], Tensor], seed: int) -> None:
    for batch in (preferences(seed), preferences(seed, size=5)):
        for dtype in (torch.float64, torch.float32):
            assert batch.logp_ref is not None
            here = Outputs(logp=batch.logp_ref.to(dtype))
            found = score(here, batch.set(logp_ref=batch.logp_ref.to(dtype)))
            if isinstance(score, partial) and score.keywords.get("divergence") == "jensen_shannon":
                close(found, torch.zeros(len(batch)), 1e-7)  # log 2 - log 2 in floating point
            else:
                assert not found.any()


def value(term: Term, batch: Batch, outputs: Outputs) -> Tensor:
    return whole_loss([(1.0, term)], outputs, batch)


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (partial(listwise, target=list_targets.best), pairwise),
        (
            partial(listwise, target=partial(list_targets.best, eps=0.2)),
            partial(pairwise, target=partial(pair_targets.smoothed, eps=0.2)),
        ),
        (partial(listwise, link=list_links.plackett_luce), pairwise),
        (partial(pairwise, target=partial(pair_targets.smoothed, eps=0.0)), pairwise),
        (partial(pairwise, target=partial(pair_targets.debiased, eps=0.0)), pairwise),
        (partial(pairwise, link=partial(pair_links.logistic, bound=1e9)), pairwise),
        (partial(pairwise, score=partial(scores.log_ratio, tail=1.0, discount=1.0)), pairwise),
        (partial(pairwise, margin=(partial(margins.rejected_share, bias=1.0),)), pairwise),
        (partial(pairwise, margin=(partial(margins.constant, gamma=0.0),)), pairwise),
        (partial(pairwise, margin=(partial(margins.length_gap, alpha=0.0),)), pairwise),
        (partial(pairwise, margin=(partial(margins.chosen_loss, lam=0.0),)), pairwise),
        (partial(pairwise, margin=(partial(margins.token_kl, alpha=0.0),)), pairwise),
        (
            partial(pairwise, score=partial(scores.f_divergence, divergence="alpha", alpha=1e-9)),
            pairwise,
        ),
        (
            partial(pairwise, score=partial(scores.power, alpha=1e-9)),
            partial(pairwise, score=partial(scores.log_prob, level="mean")),
        ),
    ],
)
@given(seed=seeds)
@examples(2)
def test_limits_fall_back_to_the_general_form(special: Term, general: Term, seed: int) -> None:
    batch = preferences(seed)
    outputs = moved(batch, seed)
    close(value(special, batch, outputs), value(general, batch, outputs), 1e-6)


SYMMETRIC = ("logistic", "hinge", "square", "exponential", "sigmoid", "logistic_exponential")


@pytest.mark.parametrize("name", SYMMETRIC)
@given(seed=seeds)
@examples(3)
def test_swapping_both_completions_and_their_probability_changes_nothing(name: str, seed: int) -> None:
    link = getattr(pair_links, name)
    g = torch.Generator().manual_seed(seed)
    h, p = torch.randn(20, generator=g).double(), torch.rand(20, generator=g).double()
    close(link(h, p), link(-h, 1 - p), 1e-12)


def at_zero(link: Callable[..., Tensor], target: float = 1.0) -> tuple[float, float]:
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = link(h, torch.tensor([target]).double())
    loss.sum().backward()
    assert h.grad is not None
    return loss.item(), h.grad.item()


def test_values_and_slopes_of_the_links_at_a_margin_of_0() -> None:
    assert at_zero(pair_links.logistic) == pytest.approx((math.log(2), -0.5))
    assert at_zero(pair_links.hinge) == pytest.approx((1.0, -1.0))
    assert at_zero(partial(pair_links.square, tau=0.1)) == pytest.approx((25.0, -10.0))
    assert at_zero(pair_links.logistic, 0.9 / 0.8) == pytest.approx((math.log(2), -0.5 * (1.25)))
    assert at_zero(pair_links.sigmoid) == pytest.approx((0.5, -0.25))
    score = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_target = torch.tensor([[0.999, 0.001]]).double().log()
    (slope,) = torch.autograd.grad(list_links.reverse_kl(score, log_target, torch.ones(1, 2).bool()).sum(), score)
    assert slope[0, 0].item() == pytest.approx(-1.727, abs=1e-3)


def test_the_debiased_loss_is_that_of_clean_labels_in_the_mean() -> None:
    """(1 - e) L(h) + e L(-h) = the logistic loss, to rounding."""
    h = torch.linspace(-5, 5, 101).double()
    for eps in (0.05, 0.2, 0.4):
        p = torch.full_like(h, (1 - eps) / (1 - 2 * eps))
        mean = (1 - eps) * pair_links.logistic(h, p) + eps * pair_links.logistic(-h, p)
        close(mean, pair_links.logistic(h, torch.ones_like(h)), 1e-13)


def test_completions_of_one_token_do_not_tell_sum_mean_and_tail_apart() -> None:
    batch = preferences(3, plain=True)
    first = batch.mask & (batch.mask.cumsum(-1) == 1)
    batch = batch.set(mask=first)
    outputs = moved(batch, 3)
    for options in ({"level": "mean"}, {"tail": 0.1}, {"discount": 0.5}):
        other = partial(pairwise, score=partial(scores.log_ratio, **options))
        close(value(other, batch, outputs), value(pairwise, batch, outputs), 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: pair_targets.soft(p, name="weights"), "no column 'weights'.*probability"),
        (lambda p: pair_targets.soft(p, name="ten"), "hold probabilities, but holds 10"),
        (lambda p: pair_weights.given(p, name="minus"), "at least 0, but holds -1"),
        (lambda p: margins.given(p, name="text"), "hold numbers, but holds 'no'"),
    ],
)
def test_wrong_numbers_are_named(call: Callable[..., Tensor], message: str) -> None:
    from posttrain.parts.preference.groups import Pairs, find_pairs

    batch = preferences(0, plain=True)
    batch = batch.set(rows=tuple({**row, "ten": 10, "minus": -1, "text": "no"} for row in batch.rows))
    with pytest.raises(ValueError, match=message):
        call(Pairs(moved(batch, 0), batch, batch.reward, *find_pairs(batch)))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (partial(pairwise, margin=(margins.token_kl,)), "outputs.kl_ref"),
        (partial(pairwise, pair_weight=(pair_weights.on_policy,)), "outputs.collision"),
        (partial(pairwise, margin=(margins.baseline,)), "slot `baseline`"),
        (partial(pairwise, score=partial(scores.f_divergence, divergence="alpha", alpha=0.0)), "log_ratio"),
        (partial(pairwise, score=partial(scores.power, alpha=0.0)), "log_prob"),
        (partial(listwise, link=list_links.reverse_kl, target=list_targets.best), "give the target best an `eps`"),
        (regularisers.reference_kl, "outputs.kl_ref"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(term: Term, message: str) -> None:
    batch = preferences(0, plain=True).set(baseline=None)
    with pytest.raises(ValueError, match=message):
        term(Outputs(logp=moved(batch, 0).logp), batch)


@pytest.mark.parametrize(
    ("part", "option", "number"),
    [
        (pairwise, "beta", 0.0),
        (pair_targets.smoothed, "eps", 0.6),
        (pair_targets.debiased, "eps", 0.5),
        (list_targets.best, "eps", 1.0),
        (list_targets.softmax, "temperature", 0.0),
        (point_links.linear, "alpha", 2.0),
        (regularisers.optimism, "bound", 0.0),
        (scores.log_ratio, "tail", 1.1),
        (margins.rejected_share, "bias", -0.1),
    ],
)
def test_recipes_with_numbers_out_of_range_are_refused(part: Term, option: str, number: float) -> None:
    _, problems = check_options(part, {option: number}, positional(part))
    assert [at for at, _ in problems] == [(option,)]
