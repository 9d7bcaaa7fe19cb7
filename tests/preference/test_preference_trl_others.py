"""KTO, losses without a reference, TPO and online DPO against TRL's own code, as in ``test_preference_trl.py``."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, seeds
from preference_cases import Weighted, whole_loss
from preference_trl import (
    ACCELERATOR,
    COLUMNS,
    PAIRS,
    PROMPT,
    Table,
    case,
    dpo_trainer,
    ours,
    same,
    with_gradient,
)
from torch import Tensor

from posttrain.batch import Batch
from posttrain.parts.preference import (
    margins,
    pair_links,
    pair_targets,
    point_links,
    regularisers,
    scores,
)
from posttrain.parts.preference.baselines import mismatched
from posttrain.parts.preference.terms import pairwise, pointwise

pytestmark = pytest.mark.engine  # importing TRL's trainers takes many seconds
# ---- KTO


def unpaired(batch: Batch) -> Batch:
    """Each completion alone in its group, and each prompt once more before the next completion, without a label."""
    n = len(batch)
    column = torch.arange(COLUMNS)
    other = batch[[*range(1, n), 0]]
    tokens = torch.where(column < PROMPT, batch.tokens, other.tokens)
    mismatch = other.set(tokens=tokens, reward=torch.full((n,), math.nan).double(), baseline_only=torch.ones(n).bool())
    both = Batch.concatenate([batch, mismatch])
    return both.set(group=torch.arange(2 * n))


def trl_kto(batch: Batch, policy: Table, reference: Table, **settings: Any) -> Tensor:
    """The loss of TRL's KTOTrainer."""
    from trl import KTOTrainer

    values = {"loss_type": "kto", "calculate_KL": True, "desirable_weight": 1.0, "undesirable_weight": 1.0, **settings}
    trainer = dpo_trainer(policy, reference, values)
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    attention = (torch.arange(COLUMNS) < batch.length[:, None]).long()
    rows, kl = batch.scored, ~batch.scored
    inputs = {
        "input_ids": batch.tokens[rows],
        "attention_mask": attention[rows],
        "completion_mask": batch.mask[rows].long(),
        "KL_input_ids": batch.tokens[kl],
        "KL_attention_mask": attention[kl],
        "KL_completion_mask": batch.mask[kl].long(),
        "label": batch.reward[rows] > 0,
    }
    return KTOTrainer._compute_loss(trainer, policy, inputs, False)  # type: ignore[arg-type]


def scored_before(batch: Batch, policy: Table, reference: Table) -> Batch:
    with torch.no_grad():
        return batch.set(logp_old=ours(policy, batch).logp, logp_ref=ours(reference, batch).logp)


@given(seed=seeds)
@examples(6)
def test_kto_is_that_of_trl(seed: int) -> None:
    batch, policy, reference = case(seed)
    batch = scored_before(unpaired(batch), policy, reference)
    batch = batch.set(baseline=mismatched(batch))
    term = partial(pointwise, link=partial(point_links.sigmoid, desirable=1.2, undesirable=0.9))
    mine = whole_loss([(1.0, term)], ours(policy, batch), batch)
    theirs = trl_kto(batch, policy, reference, desirable_weight=1.2, undesirable_weight=0.9)
    same(with_gradient(mine, policy), with_gradient(theirs, policy))


@given(seed=seeds)
@examples(6)
def test_apo_zero_on_single_completions_is_that_of_trl(seed: int) -> None:
    batch, policy, reference = case(seed)
    batch = scored_before(unpaired(batch), policy, reference)
    mine = whole_loss([(1.0, pointwise)], ours(policy, batch), batch)
    theirs = trl_kto(batch, policy, reference, loss_type="apo_zero_unpaired", calculate_KL=False)
    same(with_gradient(mine, policy), with_gradient(theirs, policy))


# ---- Without a reference


def trl_inputs(batch: Batch) -> dict[str, Tensor]:
    attention = (torch.arange(COLUMNS) < batch.length[:, None]).long()
    inputs = {}
    for name, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        inputs[f"{name}_input_ids"] = batch.tokens[rows]
        inputs[f"{name}_attention_mask"] = attention[rows]
        inputs[f"{name}_labels"] = batch.tokens[rows].masked_fill(~batch.mask[rows], -100)
    return inputs


def reference_free(trainer: type, policy: Table, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """The loss of TRL's CPOTrainer or ORPOTrainer."""
    this = SimpleNamespace(
        **{"beta": 0.1, "alpha": 0.0, "label_smoothing": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 0.0} | settings,
        accelerator=ACCELERATOR,
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        padding_value=0,
        pad_token_id=0,
        get_batch_logps=trainer.get_batch_logps,  # type: ignore[attr-defined]
        concatenated_inputs=trainer.concatenated_inputs,  # type: ignore[attr-defined]
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(this, name, partial(getattr(trainer, name), this))
    return trainer.get_batch_loss_metrics(this, policy, inputs)[0]  # type: ignore[attr-defined]


mean_prob = partial(scores.log_prob, level="mean")
CPO: dict[str, tuple[dict[str, Any], Weighted]] = {
    "CPO without NLL": ({"loss_type": "sigmoid"}, [(1.0, partial(pairwise, score=scores.log_prob))]),
    "CPO, smoothed": (
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        [(1.0, partial(pairwise, score=scores.log_prob, target=pair_targets.smoothed))],
    ),
    "SLiC without NLL": (
        {"loss_type": "hinge"},
        [(1.0, partial(pairwise, score=scores.log_prob, link=pair_links.hinge))],
    ),
    "IPO without a reference": (
        {"loss_type": "ipo"},
        [(1.0, partial(pairwise, beta=1.0, score=mean_prob, link=partial(pair_links.square, tau=0.1)))],
    ),
    "SimPO": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.6},
        [(1.0, partial(pairwise, beta=2.0, score=mean_prob, margin=(margins.constant,)))],
    ),
    "AlphaPO": (
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
        [(1.0, partial(pairwise, beta=2.5, score=scores.power, margin=(partial(margins.constant, gamma=0.1),)))],
    ),
}


@pytest.mark.parametrize("name", CPO)
@given(seed=seeds)
@examples(4)
def test_losses_and_gradients_are_those_of_trls_cpo_trainer(name: str, seed: int) -> None:
    from trl.experimental.cpo import CPOTrainer

    settings, terms = CPO[name]
    batch, policy, _ = case(seed)
    mine = whole_loss(terms, ours(policy, batch), batch)
    theirs = reference_free(CPOTrainer, policy, trl_inputs(batch), **settings)
    same(with_gradient(mine, policy), with_gradient(theirs, policy))


def test_the_nll_of_cpo_is_a_mean_over_tokens_in_trl() -> None:
    """Equal where completions are equally long, with the paper's mean over pairs of means over tokens."""
    from trl.experimental.cpo import CPOTrainer

    terms: Weighted = [
        (1.0, partial(pairwise, score=scores.log_prob)),
        (1.0, partial(regularisers.nll, level="mean")),
    ]
    for same_length in (True, False):
        batch, policy, _ = case(4, same_length=same_length)
        mine = whole_loss(terms, ours(policy, batch), batch)
        theirs = reference_free(CPOTrainer, policy, trl_inputs(batch), loss_type="sigmoid", cpo_alpha=1.0)
        if same_length:
            same(with_gradient(mine, policy), with_gradient(theirs, policy))
        else:
            assert abs(mine - theirs) > 1e-3


@given(seed=seeds)
@examples(6)
def test_orpo_is_that_of_trl_but_for_the_prompt(seed: int) -> None:
    """TRL's likelihood term covers the prompt too, and is a mean over all tokens of the batch."""
    from trl.experimental.orpo import ORPOTrainer

    batch, policy, _ = case(seed, same_length=True)
    odds = partial(pairwise, beta=1.0, score=scores.log_odds)
    theirs = reference_free(ORPOTrainer, policy, trl_inputs(batch))
    full = policy(batch.tokens[:PAIRS]).logits[:, :-1].log_softmax(-1)
    with_prompt = -full.gather(-1, batch.tokens[:PAIRS, 1:, None]).mean()
    outputs = ours(policy, batch)
    mine = with_prompt + whole_loss([(0.1, odds)], outputs, batch)
    same(with_gradient(mine, policy), with_gradient(theirs, policy))
    orpo: Weighted = [(1.0, partial(regularisers.nll, level="mean")), (0.1, odds)]
    completions = -outputs.logp[:PAIRS].sum() / batch.mask[:PAIRS].sum()
    close(whole_loss(orpo, outputs, batch) - whole_loss([(0.1, odds)], outputs, batch), completions)


# ---- TPO and online DPO


def test_tpo_is_that_of_trl_where_completions_are_equally_long() -> None:
    """A gold completion stands in each group without a label; TRL's likelihood of it is a mean over all tokens."""
    from trl.experimental.tpo import TPOTrainer

    batch, policy, _ = case(5, same_length=True)
    gold = case(6, same_length=True)[0][list(range(PAIRS))]
    three = Batch.concatenate([batch, gold.set(reward=torch.full((PAIRS,), math.nan).double())])
    trainer = dpo_trainer(policy, policy, {"loss_type": "sigmoid", "beta": 0.01, "tpo_alpha": 1.0})
    inputs = {"input_ids": three.tokens, "attention_mask": three.mask.long(), "completion_mask": three.mask.long()}
    theirs = TPOTrainer._compute_loss(trainer, policy, inputs, False)  # type: ignore[arg-type]
    tpo: Weighted = [
        (1.0, partial(pairwise, beta=0.01, score=scores.log_prob)),
        (1.0, partial(regularisers.nll, rows="unlabelled", level="mean")),
    ]
    same(with_gradient(whole_loss(tpo, ours(policy, three), three), policy), with_gradient(theirs, policy))


@given(seed=seeds)
@examples(4)
def test_online_dpo_and_ipo_are_those_of_trl(seed: int) -> None:
    """TRL's online IPO sums log-ratios where its offline IPO averages them; the paper sums them."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    batch, policy, reference = case(seed)
    reward = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(seed)).double()
    square = partial(pairwise, beta=1.0, link=partial(pair_links.square, tau=0.1))
    for loss_type, term in (("sigmoid", pairwise), ("ipo", square)):
        losses: list[Tensor] = []
        step(OnlineDPOTrainer, batch, policy, reference, reward, loss_type, losses)
        mine = whole_loss([(1.0, term)], ours(policy, batch), batch.set(reward=reward))
        same(with_gradient(mine, policy), with_gradient(losses[0], policy))


def step(
    trainer: type, batch: Batch, policy: Table, reference: Table, reward: Tensor, loss_type: str, losses: list[Tensor]
) -> None:
    """A training step of TRL's OnlineDPOTrainer, on completions that it is given instead of sampling them."""
    attention = (torch.arange(COLUMNS) < batch.length[:, None]).long()
    generated = batch.tokens[:, :PROMPT], attention[:, :PROMPT], batch.tokens[:, PROMPT:], attention[:, PROMPT:], None
    this = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda *unused: generated,
        eos_token_ids=[0],
        max_length=COLUMNS,
        ref_model=reference,
        beta=0.1,
        reward_funcs=[lambda **unused: reward.tolist()],
        reward_processing_classes=[None],
        reward_weights=None,
        processing_class=SimpleNamespace(batch_decode=lambda ids, **unused: ["text"] * len(ids)),
        stats=defaultdict(list),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, backward=losses.append),
    )
    for name in ("_forward", "_calculate_rewards_from_functions"):
        setattr(this, name, partial(getattr(trainer, name), this))
    trainer.training_step(this, policy, {"prompt": ["prompt"] * PAIRS})  # type: ignore[attr-defined]
