"""Preference losses: values and gradients against scalar loops, invariances, and what falls back to what."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import reference_preference as r
import torch
from hypothesis import given
from parts_cases import close, examples, halves, on_ranks, pad, seeds
from preference_cases import Term, moved, preferences, whole_loss
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.parts.normalisers import group_mean_of_token_sum
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
from posttrain.resolve import check_options, positional

Scalar = Callable[[r.Rows], float]
dpo: r.Link = r.mixed(lambda h: -r.log_sigmoid(h))


def label_gap(rows: r.Rows) -> r.Pair:
    return lambda w, o: rows.label[w] - rows.label[o]


def pair(part: Term, score=r.log_ratio, link: r.Link = dpo, **options) -> tuple[Term, Scalar]:
    """A pairwise term and its scalar loop; options that depend on the rows are functions of them."""

    def scalar(rows: r.Rows) -> float:
        made = {k: v(rows) if k in ("target", "weight") else v for k, v in options.items()}
        made["margin"] = [m(rows) for m in options.get("margin", ())]
        return r.pairwise(rows, score=score(rows), link=link, **made)

    return part, scalar


def of_ratio(f: Callable[[float], float]):
    return partial(r.of_ratio, f=f)


PAIRS: dict[str, tuple[Term, Scalar]] = {
    "logistic": pair(pairwise),
    "extremes": pair(partial(pairwise, select="extremes"), extremes=True),
    "ties": pair(
        partial(pairwise, ties="keep"),
        ties=True,
        target=lambda rows: lambda w, o: 1.0 if rows.label[w] > rows.label[o] else 0.5,
    ),
    "bounded": pair(
        partial(pairwise, link=partial(pair_links.logistic, bound=0.05)),
        link=r.mixed(lambda h: -r.log_sigmoid(max(-0.05, min(0.05, h)))),
    ),
    "hinge": pair(
        partial(pairwise, beta=1.0, link=partial(pair_links.hinge, slack=0.5)),
        beta=1.0,
        link=r.mixed(lambda h: max(0.0, 0.5 - h)),
    ),
    "square": pair(
        partial(pairwise, beta=1.0, link=partial(pair_links.square, tau=0.2)),
        beta=1.0,
        link=lambda h, p: (h - (p - 0.5) / 0.2) ** 2,
    ),
    "exponential": pair(partial(pairwise, link=pair_links.exponential), link=r.mixed(lambda h: math.exp(-h))),
    "sigmoid": pair(partial(pairwise, link=pair_links.sigmoid), link=r.mixed(lambda h: 1 - r.sigmoid(h))),
    "blend": pair(
        partial(pairwise, link=partial(pair_links.logistic_exponential, tau=0.2)), link=r.mixed(r.discopop(0.2))
    ),
    "smoothed": pair(partial(pairwise, target=pair_targets.smoothed), target=lambda rows: lambda w, o: 0.9),
    "debiased": pair(partial(pairwise, target=pair_targets.debiased), target=lambda rows: lambda w, o: 0.9 / 0.8),
    "soft": pair(
        partial(pairwise, target=pair_targets.soft),
        target=lambda rows: lambda w, o: rows.columns[w]["probability"],
    ),
    "Bradley-Terry": pair(
        partial(pairwise, target=partial(pair_targets.bradley_terry, temperature=2.0)),
        target=lambda rows: lambda w, o: r.sigmoid(label_gap(rows)(w, o) / 2),
    ),
    "regression": pair(
        partial(pairwise, beta=1.0, link=pair_links.regression, target=partial(pair_targets.reward_gap, eta=0.3)),
        beta=1.0,
        link=lambda h, target: (h - target) ** 2,
        target=lambda rows: lambda w, o: 0.3 * label_gap(rows)(w, o),
    ),
    "constant margin": pair(
        partial(pairwise, margin=(partial(margins.constant, gamma=0.7),)), margin=[lambda rows: lambda w, o: 0.7]
    ),
    "given margin and length": pair(
        partial(pairwise, margin=(partial(margins.given, scale=0.5), margins.length_gap)),
        margin=[
            lambda rows: lambda w, o: 0.5 * rows.columns[w]["margin"],
            lambda rows: lambda w, o: 0.01 * (len(rows.tokens(w)) - len(rows.tokens(o))),
        ],
    ),
    "log margin": pair(
        partial(pairwise, margin=(margins.reward_gap,)),
        margin=[lambda rows: lambda w, o: math.log(label_gap(rows)(w, o))],
    ),
    "linear margin": pair(
        partial(pairwise, margin=(partial(margins.reward_gap, form="linear", scale=0.2),)),
        margin=[lambda rows: lambda w, o: 0.2 * label_gap(rows)(w, o)],
    ),
    "loss of the chosen": pair(
        partial(pairwise, margin=(margins.chosen_loss,)),
        margin=[lambda rows: lambda w, o: 50 * max(0.0, -0.1 * r.log_ratio(rows)(w))],
    ),
    "share of the rejected": pair(
        partial(pairwise, margin=(partial(margins.rejected_share, bias=0.3),)),
        margin=[lambda rows: lambda w, o: -0.7 * 0.1 * r.log_ratio(rows)(o)],
    ),
    "token KL": pair(
        partial(pairwise, margin=(margins.token_kl,)),
        margin=[lambda rows: lambda w, o: 0.1 * 0.5 * (r.kl_of(rows, o, False) - r.kl_of(rows, w, True))],
    ),
    "token KL of both": pair(
        partial(pairwise, margin=(partial(margins.token_kl, alpha=1.0, chosen_gradient=True),)),
        margin=[lambda rows: lambda w, o: 0.1 * (r.kl_of(rows, o, False) - r.kl_of(rows, w, False))],
    ),
    "baseline": pair(
        partial(pairwise, margin=(margins.baseline,)), margin=[lambda rows: lambda w, o: 0.1 * rows.baseline[w]]
    ),
    "given weight": pair(
        partial(pairwise, pair_weight=(pair_weights.given,)),
        weight=lambda rows: lambda w, o: rows.columns[w]["weight"],
    ),
    "on-policy weight": pair(
        partial(pairwise, pair_weight=(partial(pair_weights.on_policy, cap=0.8),)),
        weight=lambda rows: r.agreement(rows, 0.8),
    ),
    "mean": pair(partial(pairwise, score=partial(scores.log_ratio, level="mean")), r.mean_log_ratio),
    "tail": pair(partial(pairwise, score=partial(scores.log_ratio, tail=0.3)), partial(r.desensitised, alpha=0.3)),
    "discount": pair(
        partial(pairwise, score=partial(scores.log_ratio, discount=0.9)), partial(r.discounted, gamma=0.9)
    ),
    "discounted mean": pair(
        partial(pairwise, score=partial(scores.log_ratio, discount=0.9, level="mean")),
        partial(r.discounted_mean, gamma=0.9),
    ),
    "no reference": pair(partial(pairwise, score=scores.log_prob), r.log_prob),
    "mean without reference": pair(partial(pairwise, score=partial(scores.log_prob, level="mean")), r.mean_log_prob),
    "forward KL": pair(
        partial(pairwise, score=partial(scores.f_divergence, divergence="forward_kl")), of_ratio(lambda z: -1 / z)
    ),
    "Jensen-Shannon": pair(partial(pairwise, score=scores.f_divergence), of_ratio(lambda z: math.log(2 * z / (1 + z)))),
    "alpha": pair(
        partial(pairwise, score=partial(scores.f_divergence, divergence="alpha", alpha=0.3)),
        of_ratio(lambda z: (z**-0.7 - 1) / -0.7),
    ),
    "chi-squared": pair(
        partial(pairwise, score=partial(scores.f_divergence, divergence="chi_squared")),
        of_ratio(lambda z: z + math.log(z)),
    ),
    "log-odds": pair(
        partial(pairwise, score=scores.log_odds), partial(r.of_mean_probability, f=lambda p: math.log(p / (1 - p)))
    ),
    "power": pair(
        partial(pairwise, score=scores.power), partial(r.of_mean_probability, f=lambda p: (1 - p**-0.25) / 0.25)
    ),
}


def point(part: Term, link: Callable[[float, float], float], **options) -> tuple[Term, Scalar]:
    return part, lambda rows: r.pointwise(rows, score=r.log_ratio(rows), link=link, **options)


def kto(z: float, label: float) -> float:
    return 1.3 * (1 - r.sigmoid(z)) if label > 0 else 0.7 * (1 - r.sigmoid(-z))


POINTS: dict[str, tuple[Term, Scalar]] = {
    "sigmoid": point(partial(pointwise, link=partial(point_links.sigmoid, desirable=1.3, undesirable=0.7)), kto),
    "sum of sigmoids": point(
        partial(pointwise, within="sum", link=partial(point_links.sigmoid, desirable=1.3, undesirable=0.7)),
        kto,
        within="sum",
    ),
    "sigmoid down": point(
        partial(pointwise, link=point_links.sigmoid_down), lambda z, label: r.sigmoid(z) if label > 0 else 0.0
    ),
    "classifier": point(
        partial(pointwise, link=partial(point_links.logistic, undesirable=2.0)),
        lambda z, label: -r.log_sigmoid(z) if label > 0 else -2 * r.log_sigmoid(-z),
    ),
    "squares": point(
        partial(pointwise, beta=1.0, link=partial(point_links.square, scale=3.0)),
        lambda z, label: (z - 3 * (label - 0.5)) ** 2,
        beta=1.0,
    ),
    "linear": point(
        partial(pointwise, within="mean_of_each_label", link=partial(point_links.linear, alpha=0.3)),
        lambda z, label: -0.3 * z if label > 0 else 0.7 * z,
        within="mean_of_each_label",
    ),
}


def lists(part: Term, link, **options) -> tuple[Term, Scalar]:
    return part, lambda rows: r.listwise(rows, score=r.log_ratio(rows), link=link, **options)


LISTS: dict[str, tuple[Term, Scalar]] = {
    "cross entropy": lists(listwise, r.info_nca),
    "noise contrastive": lists(partial(listwise, link=list_links.noise_contrastive), r.nca),
    "reverse KL": lists(partial(listwise, link=list_links.reverse_kl), r.exo),
    "reverse KL to the best": lists(
        partial(listwise, link=list_links.reverse_kl, target=partial(list_targets.best, eps=0.1)),
        r.exo,
        target=r.one_best(0.1),
    ),
    "contrast with the best": lists(
        partial(listwise, link=list_links.noise_contrastive, target=list_targets.best), r.nca, target=r.one_best(0.0)
    ),
    "ranking": lists(partial(listwise, link=list_links.plackett_luce), r.plackett_luce),
}


def regulariser(part: Term, kind: str, value: Callable[[r.Rows], r.Score]) -> tuple[Term, Scalar]:
    return part, lambda rows: r.regulariser(rows, kind, value(rows))


def negative(score: Callable[[r.Rows], r.Score]) -> Callable[[r.Rows], r.Score]:
    return lambda rows: lambda i: -score(rows)(i)


REGULARISERS: dict[str, tuple[Term, Scalar]] = {
    "NLL": regulariser(regularisers.nll, "best", negative(r.log_prob)),
    "NLL of the worst, mean": regulariser(
        partial(regularisers.nll, rows="worst", level="mean"), "worst", negative(r.mean_log_prob)
    ),
    "NLL of all": regulariser(partial(regularisers.nll, rows="labelled"), "labelled", negative(r.log_prob)),
    "optimism": regulariser(
        partial(regularisers.optimism, bound=0.5), "unlabelled", lambda rows: lambda i: max(-0.5, r.log_ratio(rows)(i))
    ),
    "optimism where marked": regulariser(
        partial(regularisers.optimism, name="calibration"), "marked", lambda rows: lambda i: r.log_ratio(rows)(i)
    ),
    "KL": regulariser(regularisers.reference_kl, "labelled", lambda rows: lambda i: r.kl_of(rows, i, False)),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"pairs": PAIRS, "points": POINTS, "lists": LISTS, "regularisers": REGULARISERS}.items()
    for name, case in cases.items()
}
TERMS = {name: term for name, (term, _) in CASES.items()}


def shifted(outputs: Outputs, direction: Outputs, step: float) -> Outputs:
    assert outputs.kl_ref is not None and direction.kl_ref is not None
    return Outputs(
        logp=outputs.logp.detach() + step * direction.logp,
        kl_ref=outputs.kl_ref.detach() + step * direction.kl_ref,
        collision=outputs.collision,
    )


def gradient(term: Term, outputs: Outputs, batch: Batch) -> Outputs:
    loss = whole_loss([(1.0, term)], outputs, batch)
    assert outputs.kl_ref is not None
    found = torch.autograd.grad(loss, [outputs.logp, outputs.kl_ref], allow_unused=True, materialize_grads=True)
    return Outputs(logp=found[0], kl_ref=found[1])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_scalar_loops(name: str, size: int) -> None:
    """Gradients along one random direction at a time, by central differences of the scalar loop."""
    term, scalar = CASES[name]
    for seed in (size, 10 + size):
        batch = preferences(seed, size=size, groups=3)
        outputs = moved(batch, seed)
        rows = r.read(batch, outputs)
        close(whole_loss([(1.0, term)], outputs, batch), scalar(rows), 2e-7)
        found = gradient(term, outputs, batch)
        g = torch.Generator().manual_seed(seed)
        noise = [torch.randn(batch.mask.shape, generator=g).double().where(batch.mask, 0.0) for _ in range(2)]
        direction = Outputs(logp=noise[0], kl_ref=noise[1])
        sides = []
        for step in (1e-5, -1e-5):
            there = shifted(outputs, direction, step)
            rows.logp, rows.kl = there.logp.tolist(), there.kl_ref.tolist()  # type: ignore[union-attr]
            sides.append(scalar(rows))
        assert found.kl_ref is not None
        slope = (found.logp * noise[0]).sum() + (found.kl_ref * noise[1]).sum()
        close(slope, (sides[0] - sides[1]) / 2e-5, 1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_no_gradient_off_the_mask_and_none_to_what_is_not_compared(name: str) -> None:
    for seed, size in ((1, 2), (2, 4)):
        batch = preferences(seed, size=size, groups=2)
        outputs = moved(batch, seed)
        found = gradient(TERMS[name], outputs, batch)
        for each in (found.logp, found.kl_ref):
            assert each is not None
            assert each.isfinite().all()
            assert not each[~batch.mask].any()
            assert not each[batch.greedy].any()


def permuted(batch: Batch, outputs: Outputs, index: Tensor) -> tuple[Batch, Outputs]:
    assert outputs.kl_ref is not None and outputs.collision is not None
    some = Outputs(logp=outputs.logp[index], kl_ref=outputs.kl_ref[index], collision=outputs.collision[index])
    return batch[index], some


def wider(outputs: Outputs, columns: int) -> Outputs:
    """With further columns that hold NaN."""
    assert outputs.kl_ref is not None and outputs.collision is not None
    padded = partial(torch.nn.functional.pad, pad=(0, columns), value=torch.nan)
    return Outputs(logp=padded(outputs.logp), kl_ref=padded(outputs.kl_ref), collision=padded(outputs.collision))


TIE_ORDER = {"lists: ranking", "pairs: soft", "pairs: given weight", "pairs: given margin and length"}
"""What asks which of two equal completions comes first, or reads a number of that row."""


@pytest.mark.parametrize("name", TERMS)
def test_row_order_padding_and_the_split_along_groups_change_nothing(name: str) -> None:
    size, seed = (2 if name in TIE_ORDER else 3), 5
    batch = preferences(seed, size=size)
    outputs = moved(batch, seed)
    batch = batch.set(weight=group_mean_of_token_sum(batch))
    term = TERMS[name]

    def total(some: Batch, there: Outputs) -> Tensor:
        assert some.weight is not None
        return (term(there, some) * some.weight).where(some.mask, 0.0).sum()

    whole = total(batch, outputs)
    close(total(pad(batch, 2, torch.nan), wider(outputs, 2)), whole, 1e-9)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    close(total(*permuted(batch, outputs, order)), whole, 1e-9)
    parts = [(batch.group == g).nonzero().squeeze(-1) for g in batch.group.unique()]
    close(torch.stack([total(*permuted(batch, outputs, part)) for part in parts]).sum(), whole, 1e-9)


@given(seed=seeds)
@examples(4)
def test_the_normaliser_counts_groups_on_all_ranks(seed: int) -> None:
    batch = preferences(seed)
    weight = group_mean_of_token_sum(batch)
    counted = batch.mask.any(-1) & ~batch.greedy
    groups = len(set(batch.group[counted].tolist()))
    expected = (batch.mask & counted[:, None]) / max(1, groups)
    close(weight, expected)
    rows = halves(batch)
    for mine, index in zip(on_ranks([batch[i] for i in rows], group_mean_of_token_sum), rows, strict=True):
        close(mine, expected[index])


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
            partial(pairwise, score=partial(scores.f_divergence, divergence="alpha", alpha=1 + 1e-9)),
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
        (lambda p: pair_targets.soft(p, name="ten"), "hold probabilities, and holds 10"),
        (lambda p: pair_weights.given(p, name="minus"), "at least 0, and holds -1"),
        (lambda p: margins.given(p, name="text"), "hold numbers, and holds 'no'"),
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
        (partial(pairwise, score=partial(scores.f_divergence, divergence="alpha", alpha=1.0)), "log_ratio"),
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
