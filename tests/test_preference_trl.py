"""Preference losses and gradients against the code of TRL 1.16, on the same random model and batch.

TRL computes its losses in methods of trainers. They are called here unbound, as they are, on a plain object that holds
the settings they read. The model is a table of next-token logits given the last token: small, but a real one, whose
parameters take the gradient. What TRL does differently from the papers is in tests of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, seeds
from preference_cases import Term, Weighted, answers, whole_loss
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
from posttrain.parts.preference.baselines import mismatched, sorted_pairs, sorted_reference
from posttrain.parts.preference.terms import listwise, pairwise, pointwise

pytestmark = pytest.mark.engine  # importing TRL's trainers takes many seconds
PROMPT, COLUMNS, VOCABULARY, PAIRS = 3, 9, 7, 5


class Table(nn.Module):
    """Logits of the next token, given the last one; with what TRL's fused language-model heads return."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(VOCABULARY, VOCABULARY, generator=g, dtype=torch.float64))

    def forward(self, input_ids: Tensor, *, labels: Tensor | None = None, **unused: Any) -> SimpleNamespace:
        logits = self.table[input_ids]
        if labels is None:
            return SimpleNamespace(logits=logits)
        wanted, chosen = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        every = logits[:, :-1].log_softmax(-1)
        logp = every.gather(-1, wanted[..., None])[..., 0]
        zeros = torch.zeros_like(logp).detach()
        return SimpleNamespace(
            log_probs=logp.where(chosen, 0.0),
            log_sum_sq_probs=(2 * every).logsumexp(-1).where(chosen, 0.0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def ours(model: Table, batch: Batch) -> Outputs:
    """The same table, in our alignment."""
    every = model(batch.tokens).logits[:, :-1].log_softmax(-1)
    logp = every.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    pad = logp.new_zeros(len(batch), 1)
    collision = (2 * every).logsumexp(-1)
    return Outputs(
        logp=torch.cat([pad, logp], 1).where(batch.mask, 0.0), collision=torch.cat([pad, collision], 1).detach()
    )


def case(seed: int, *, same_length: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Batch, Table, Table]:
    """Pairs as TRL has them, all chosen completions before all rejected ones; policy and reference."""
    g = torch.Generator().manual_seed(seed)
    policy, reference = Table(seed).to(dtype), Table(seed + 1).to(dtype)
    batch = answers([[(0, 1.0), (0, 0.0)] for _ in range(PAIRS)], [1.0])
    batch = batch[[*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]]
    length = torch.randint(PROMPT + 1, COLUMNS + 1, (2 * PAIRS,), generator=g)
    length[0] = COLUMNS
    length = torch.full_like(length, COLUMNS) if same_length else length
    column = torch.arange(COLUMNS)
    mask = (column >= PROMPT) & (column < length[:, None])
    tokens = torch.randint(0, VOCABULARY, mask.shape, generator=g).where(column < length[:, None], 0)
    zeros = torch.zeros(mask.shape).double()
    shaped = {"logp_sampler": zeros, "step_reward": zeros, "logp_ref": zeros, "step_id": mask.long()}
    batch = batch.set(tokens=tokens, mask=mask, length=length, **shaped)
    with torch.no_grad():
        batch = batch.set(logp_ref=ours(reference, batch).logp, logp_old=ours(policy, batch).logp)
    return batch, policy, reference


def with_gradient(loss: Tensor, model: Table) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, model.table)
    return loss.detach(), gradient


def same(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    close(mine[0], theirs[0].double(), 1e-5)
    close(mine[1], theirs[1].double(), 1e-5)


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=lambda: None
)


def dpo_trainer(policy: Table, reference: Table, settings: dict[str, Any]) -> SimpleNamespace:
    values = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        **settings,
    }
    return SimpleNamespace(
        **values,
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        accelerator=ACCELERATOR,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def trl_dpo(batch: Batch, policy: Table, reference: Table, **settings: Any) -> Tensor:
    """The loss of TRL's DPOTrainer."""
    from trl import DPOTrainer

    attention = torch.arange(COLUMNS) < batch.length[:, None]
    inputs = {"input_ids": batch.tokens, "attention_mask": attention.long(), "completion_mask": batch.mask.long()}
    return DPOTrainer._compute_loss(dpo_trainer(policy, reference, settings), policy, inputs, False)  # type: ignore[arg-type]


def one(name: str, **settings: Any) -> dict[str, Any]:
    return {"loss_types": [name], **settings}


def point(link: Callable[..., Tensor], **options: Any) -> Term:
    """Chosen and rejected completions each by themselves, their losses added up."""
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
            {"f_divergence_type": theirs},
            [(1.0, partial(pairwise, score=partial(scores.f_divergence, divergence=ours_)))],
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


# ---- KTO


def unpaired(batch: Batch) -> Batch:
    """Each completion alone in its group, and each prompt once more before the next completion, without a label."""
    n = len(batch)
    column = torch.arange(COLUMNS)
    other = batch[[*range(1, n), 0]]
    tokens = torch.where(column < PROMPT, batch.tokens, other.tokens)
    mismatch = other.set(tokens=tokens, reward=torch.full((n,), math.nan).double(), greedy=torch.ones(n).bool())
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
