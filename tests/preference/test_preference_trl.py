"""Preference losses and gradients against the code of TRL 1.16, on the same random model and batch.

TRL computes its losses in methods of trainers. They are called here unbound, as they are, on a plain object that holds
the settings they read. The model is a table of next-token logits given the last token: small, but a real one, whose
parameters take the gradient. What TRL does differently from the papers is in tests of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, seeds
from preference_cases import Term, Weighted, whole_loss
from preference_trl import (
    COLUMNS,
    PAIRS,
    PROMPT,
    case,
    ours,
    same,
    trl_dpo,
    with_gradient,
)
from torch import Tensor, nn

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
from posttrain.parts.preference.baselines import sorted_pairs, sorted_reference
from posttrain.parts.preference.terms import listwise, pairwise, pointwise

pytestmark = pytest.mark.engine  # importing TRL's trainers takes many seconds


def one(name: str, **settings: Any) -> dict[str, Any]:
    return {"loss_types": [name], **settings}


def point(link: Callable[..., Tensor], **options: Any) -> Term:
    """Sum of the losses of chosen and rejected completions, each alone."""
    return partial(pointwise, link=link, within="sum", **options)


nca = partial(listwise, link=list_links.noise_contrastive, target=list_targets.best)
mean_ratio = partial(scores.log_ratio, level="mean")
bco = point(point_links.logistic)
DPO: dict[str, tuple[dict[str, Any], Weighted]] = {
    "DPO": (one("sigmoid"), [(1.0, pairwise)]),
    "hinge": (one("hinge"), [(1.0, partial(pairwise, link=pair_links.hinge))]),
    "IPO": (
        one("ipo"),
        [(1.0, partial(pairwise, beta=1.0, score=mean_ratio, link=partial(pair_links.square, tau=0.1)))],
    ),
    "EXO": (
        one("exo_pair", label_smoothing=1e-3),
        [(1.0, partial(listwise, link=list_links.reverse_kl, target=partial(list_targets.best, eps=1e-3)))],
    ),
    "NCA": (one("nca_pair", beta=0.01), [(1.0, partial(nca, beta=0.01))]),
    "robust DPO": (
        one("robust", label_smoothing=0.1),
        [(1.0, partial(pairwise, target=partial(pair_targets.debiased, eps=0.1)))],
    ),
    "BCO without its baseline": (one("bco_pair"), [(1.0, bco)]),
    "SPPO, hard": (one("sppo_hard"), [(1.0, point(partial(point_links.square, scale=10.0), beta=1.0))]),
    "APO-zero": (one("apo_zero"), [(1.0, point(point_links.sigmoid))]),
    "APO-down": (
        one("apo_down"),
        [(1.0, partial(pairwise, link=pair_links.sigmoid)), (1.0, point(point_links.sigmoid_down))],
    ),
    "DiscoPOP": (
        one("discopop", beta=0.05),
        [(1.0, partial(pairwise, beta=0.05, link=pair_links.logistic_exponential))],
    ),
    "length-normalised DPO": (one("sigmoid_norm", beta=5.0), [(1.0, partial(pairwise, beta=5.0, score=mean_ratio))]),
    "LD-DPO": ({"ld_alpha": 0.5}, [(1.0, partial(pairwise, score=partial(scores.log_ratio, tail=0.5)))]),
    **{
        f"f-DPO, {ours_}": (
            {"f_divergence_type": theirs, "f_alpha_divergence_coef": 0.3},
            [
                (1.0, partial(pairwise, score=partial(scores.f_divergence, divergence=ours_, alpha=0.7)))
            ],  # TRL's is 1 - α
        )
        for theirs, ours_ in (
            ("forward_kl", "forward_kl"),
            ("js_divergence", "jensen_shannon"),
            ("alpha_divergence", "alpha"),
        )
    },
    "WPO, which TRL leaves uncapped": (
        {"use_weighting": True},
        [(1.0, partial(pairwise, pair_weight=(partial(pair_weights.on_policy, cap=math.inf),)))],
    ),
    "mixture of two": (
        {"loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        [(0.8, pairwise), (0.2, bco)],
    ),
}


@pytest.mark.parametrize("name", DPO)
@given(seed=seeds)
@examples(4)
def test_losses_and_gradients_are_those_of_trls_dpo_trainer(name: str, seed: int) -> None:
    settings, terms = DPO[name]
    single = "alpha" in name  # TRL computes that divergence up to float32 alone
    batch, policy, reference = case(seed, dtype=torch.float32 if single else torch.float64)
    mine = whole_loss(terms, ours(policy, batch), batch)
    same(with_gradient(mine, policy), with_gradient(trl_dpo(batch, policy, reference, **settings), policy))


@pytest.mark.parametrize("eps", [0.0, 0.1])
@given(seed=seeds)
@examples(4)
def test_sorted_margins_are_trls_aot(eps: float, seed: int) -> None:
    batch, policy, reference = case(seed)
    outputs = ours(policy, batch)
    target = partial(pair_targets.smoothed, eps=eps)
    paired = partial(pairwise, target=target, margin=(margins.baseline,))
    mine = whole_loss([(1.0, paired)], outputs, batch.set(baseline=sorted_reference(batch)))
    theirs = trl_dpo(batch, policy, reference, **one("aot", label_smoothing=eps))
    same(with_gradient(mine, policy), with_gradient(theirs, policy))
    outputs = ours(policy, batch)
    mine = whole_loss([(1.0, partial(pairwise, target=target))], outputs, batch.set(group=sorted_pairs(batch)))
    theirs = trl_dpo(batch, policy, reference, **one("aot_unpaired", label_smoothing=eps))
    same(with_gradient(mine, policy), with_gradient(theirs, policy))


def test_the_sft_term_of_trl_is_a_mean_over_the_tokens_of_the_batch() -> None:
    """The papers average over pairs: each chosen completion counts the same, however long it is."""
    nll: Weighted = [(1.0, partial(regularisers.nll, level="mean"))]
    batch, policy, reference = case(0, same_length=True)
    mine = whole_loss(nll, ours(policy, batch), batch)
    same(with_gradient(mine, policy), with_gradient(trl_dpo(batch, policy, reference, **one("sft")), policy))
    batch, policy, reference = case(0)
    outputs = ours(policy, batch)
    theirs = trl_dpo(batch, policy, reference, **one("sft"))
    chosen = batch.reward > 0
    close(theirs, -outputs.logp[chosen].sum() / batch.tokens_chosen[chosen].sum())
    mine = whole_loss(nll, outputs, batch)
    close(mine, -(outputs.logp.sum(-1) / batch.tokens_chosen)[chosen].mean())
    assert abs(mine - theirs) > 1e-3


def test_label_smoothing_does_nothing_to_trls_sigmoid_loss() -> None:
    """Conservative DPO smooths the labels of the logistic loss; TRL reads the setting in other losses alone."""
    batch, policy, reference = case(1)
    plain, smooth = (trl_dpo(batch, policy, reference, label_smoothing=eps) for eps in (0.0, 0.2))
    assert plain == smooth
    term = partial(pairwise, target=partial(pair_targets.smoothed, eps=0.2))
    mine = whole_loss([(1.0, term)], ours(policy, batch), batch)
    h = pairwise_margin(batch, ours(policy, batch))
    logistic = nn.functional.logsigmoid
    close(mine, -(0.8 * logistic(h) + 0.2 * logistic(-h)).mean())
    assert abs(mine - smooth) > 1e-3


def pairwise_margin(batch: Batch, outputs: Outputs) -> Tensor:
    assert batch.logp_ref is not None
    s = 0.1 * (outputs.logp - batch.logp_ref).sum(-1)
    return s[:PAIRS] - s[PAIRS:]


def test_the_weights_of_wpo_are_capped_at_1_here_and_not_in_trl() -> None:
    batch, policy, reference = case(2)
    policy.table.data *= 4  # a policy that is sure of its tokens, and completions that it would write
    tokens = batch.tokens.clone()
    for t in range(PROMPT, COLUMNS):
        tokens[:, t] = policy.table[tokens[:, t - 1]].argmax(-1)
    batch = batch.set(tokens=tokens.where(batch.mask | (torch.arange(COLUMNS) < PROMPT), 0))
    with torch.no_grad():
        batch = batch.set(logp_ref=ours(reference, batch).logp)
    weighted = partial(pairwise, pair_weight=(pair_weights.on_policy,))
    mine, plain = (whole_loss([(1.0, term)], ours(policy, batch), batch) for term in (weighted, pairwise))
    close(mine, plain)
    assert trl_dpo(batch, policy, reference, use_weighting=True) > plain + 1e-3


def test_bco_has_a_baseline_in_the_paper_and_none_in_trl() -> None:
    batch, policy, reference = case(3)
    batch = batch.set(baseline=torch.full((len(batch),), 2.0).double())
    outputs = ours(policy, batch)
    assert batch.logp_ref is not None
    z = 0.1 * ((outputs.logp - batch.logp_ref).sum(-1) - 2.0)
    expected = -nn.functional.logsigmoid(torch.cat([z[:PAIRS], -z[PAIRS:]])).sum() / PAIRS
    close(whole_loss([(1.0, bco)], outputs, batch), expected)
    assert abs(trl_dpo(batch, policy, reference, **one("bco_pair")) - expected) > 1e-3
