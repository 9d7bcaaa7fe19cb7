"""Preference losses: values and gradients against scalar loops, invariances, and special cases of each other."""

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
            lambda rows: lambda w, o: 0.01 * (len(rows.tokens(o)) - len(rows.tokens(w))),
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
        of_ratio(lambda z: (1 - z**-0.3) / 0.3),
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
            assert not each[batch.baseline_only].any()


def permuted(batch: Batch, outputs: Outputs, index: Tensor) -> tuple[Batch, Outputs]:
    assert outputs.kl_ref is not None and outputs.collision is not None
    some = Outputs(logp=outputs.logp[index], kl_ref=outputs.kl_ref[index], collision=outputs.collision[index])
    return batch[index], some


def wider(outputs: Outputs, columns: int) -> Outputs:
    """Adds columns of NaN to the batch and the outputs."""
    assert outputs.kl_ref is not None and outputs.collision is not None
    padded = partial(torch.nn.functional.pad, pad=(0, columns), value=torch.nan)
    return Outputs(logp=padded(outputs.logp), kl_ref=padded(outputs.kl_ref), collision=padded(outputs.collision))


TIE_ORDER = {"lists: ranking", "pairs: soft", "pairs: given weight", "pairs: given margin and length"}
"""Terms that ask which of two equal completions comes first, or that read a number of that row."""


@pytest.mark.parametrize("name", TERMS)
def test_row_order_padding_and_the_split_along_groups_change_nothing(name: str) -> None:
    size, seed = (2 if name in TIE_ORDER else 3), 5
    batch = preferences(seed, size=size)
    outputs = moved(batch, seed)
    batch = batch.set(loss_share=group_mean_of_token_sum(batch))
    term = TERMS[name]

    def total(some: Batch, there: Outputs) -> Tensor:
        assert some.loss_share is not None
        return (term(there, some) * some.loss_share).where(some.mask, 0.0).sum()

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
    counted = batch.mask.any(-1) & ~batch.baseline_only
    groups = len(set(batch.group[counted].tolist()))
    expected = (batch.mask & counted[:, None]) / max(1, groups)
    close(weight, expected)
    rows = halves(batch)
    for mine, index in zip(on_ranks([batch[i] for i in rows], group_mean_of_token_sum), rows, strict=True):
        close(mine, expected[index])
