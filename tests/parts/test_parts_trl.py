"""Losses and gradients against the code of TRL 1.16, on random tensors.

TRL computes its losses in methods of trainers. They are called here unbound, as they are, on a plain object that holds
the settings they read and hands them our log-probs where a trainer would run its model: TRL's arithmetic is real, only
the model is left out. What TRL does differently from the papers is in tests of its own.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, moved_outputs, rough_batch, seeds
from torch import Tensor

from posttrain.batch import Batch, Outputs, seq_sum
from posttrain.parts import losses, normalisers, weighting
from posttrain.parts.advantages import outcome

pytestmark = pytest.mark.engine  # importing TRL's trainers imports vLLM: many seconds
HORIZON = 16


def trainer(settings: dict[str, Any], logp: Tensor) -> SimpleNamespace:
    """The attributes of a trainer that ``_compute_loss`` reads, on one process without gradient accumulation."""
    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1, "beta": 0.0}
    values = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": HORIZON,
        **settings,
    }
    return SimpleNamespace(
        **values,
        args=SimpleNamespace(**arguments | {k: v for k, v in settings.items() if k in arguments}),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )


def trl_loss(batch: Batch, logp: Tensor, settings: dict[str, Any], extra: dict[str, Tensor] | None = None) -> Tensor:
    """The loss of TRL's GRPOTrainer. Tokens that the policy did not choose are a ``tool_mask`` to it."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    n, columns = batch.mask.shape
    assert batch.advantage is not None
    inputs = {
        "prompt_ids": batch.tokens[:, :0],
        "prompt_mask": batch.tokens[:, :0],
        "completion_ids": batch.tokens,
        "completion_mask": torch.ones(n, columns, dtype=torch.long),
        "tool_mask": batch.mask.long(),
        "advantages": batch.advantage.sum(-1) / batch.mask.sum(-1),
        "old_per_token_logps": batch.logp_old,
        "ref_per_token_logps": batch.logp_ref,
        "num_items_in_batch": batch.mask.sum(),
        **(extra or {}),
    }
    return GRPOTrainer._compute_loss(trainer(settings, logp), None, inputs)  # type: ignore[arg-type]


def case(seed: int, scale: float = 0.4) -> tuple[Batch, Outputs]:
    """A batch with one advantage a completion and observation tokens inside some."""
    batch = rough_batch(seed, plain=True)
    batch = batch.set(advantage=outcome(batch, center="group", scale="group"))
    outputs = moved_outputs(batch, seed, scale=scale)
    return batch, Outputs(logp=outputs.logp.detach().where(batch.mask, 0.0).requires_grad_())


def with_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    close(ours[0], theirs[0].double())
    close(ours[1], theirs[1].double())


clip, kl = losses.clip, losses.kl
LOSSES = {
    "GRPO": (
        {"loss_type": "grpo", "beta": 0.04},
        [(1.0, clip), (0.04, kl)],
        normalisers.seq_mean_of_token_mean,
    ),
    "GRPO with a corrected KL": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        [(1.0, clip), (0.04, partial(kl, importance=True))],
        normalisers.seq_mean_of_token_mean,
    ),
    "Dr. GRPO": ({"loss_type": "dr_grpo"}, [(1.0, clip)], partial(normalisers.seq_sum_over, length=HORIZON)),
    "DAPO": ({"loss_type": "dapo", "epsilon_high": 0.28}, [(1.0, partial(clip, high=0.28))], normalisers.token_mean),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        [(1.0, partial(clip, level="sequence", low=3e-4, high=4e-4))],
        normalisers.seq_mean_of_token_mean,
    ),
    "GSPO with a wide range": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        [(1.0, partial(clip, level="sequence"))],
        normalisers.seq_mean_of_token_mean,
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        [(1.0, partial(losses.cispo, cap=1.5))],
        normalisers.token_mean,
    ),
    "two-sided clipping": (
        {"loss_type": "dapo", "delta": 1.5, "beta": 0.001},
        [(1.0, partial(clip, cap=1.5)), (0.001, kl)],
        normalisers.token_mean,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds)
@examples(10)
def test_losses_and_gradients_are_those_of_trl(name: str, seed: int) -> None:
    settings, terms, normaliser = LOSSES[name]
    batch, outputs = case(seed)
    loss = sum(coef * (term(outputs, batch) * normaliser(batch)).sum() for coef, term in terms)
    assert isinstance(loss, Tensor)
    theirs = trl_loss(batch, outputs.logp, settings)
    same(with_gradient(loss, outputs.logp), with_gradient(theirs, outputs.logp))


@given(seed=seeds)
@examples(10)
def test_truncated_importance_is_trls_correction_for_vllm(seed: int) -> None:
    """TRL computes min(π_old / μ, cap) when it generates; its loss multiplies by it."""
    batch, outputs = case(seed)
    assert batch.logp_old is not None
    ratio = (batch.logp_old - batch.logp_sampler).exp().clamp(max=1.02)
    settings = {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_correction": True}
    theirs = trl_loss(batch, outputs.logp, settings, {"importance_sampling_ratio": ratio})
    weight = weighting.truncated_importance(outputs, batch, cap=1.02)
    ours = (clip(outputs, batch) * weight * normalisers.token_mean(batch)).sum()
    same(with_gradient(ours, outputs.logp), with_gradient(theirs, outputs.logp))


@given(seed=seeds)
@examples(10)
def test_geometric_is_gmpo_of_trl(seed: int) -> None:
    from trl.experimental.gmpo import GMPOTrainer

    batch, outputs = case(seed)
    assert batch.advantage is not None
    inputs = {
        "prompt_ids": batch.tokens[:, :0],
        "prompt_mask": batch.tokens[:, :0],
        "completion_ids": batch.tokens,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantage.sum(-1) / batch.mask.sum(-1),
        "old_per_token_logps": batch.logp_old,
    }
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.15}
    theirs = GMPOTrainer._compute_loss(trainer(settings, outputs.logp), None, inputs)  # type: ignore[arg-type]
    term = losses.geometric(outputs, batch, low=0.1, high=0.15)
    ours = (term * normalisers.seq_mean_of_token_mean(batch)).sum()
    same(with_gradient(ours, outputs.logp), with_gradient(theirs, outputs.logp))


def trl_rloo(batch: Batch, logp: Tensor) -> Tensor:
    from trl.trainer.rloo_trainer import RLOOTrainer

    assert batch.advantage is not None and batch.logp_old is not None
    inputs = {
        "prompt_ids": batch.tokens[:, :0],
        "prompt_mask": batch.tokens[:, :0],
        "completion_ids": batch.tokens,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantage.sum(-1) / batch.mask.sum(-1),
        "old_logps": seq_sum(batch.logp_old, batch.mask),
    }
    return RLOOTrainer._compute_loss(trainer({}, logp), None, inputs)  # type: ignore[arg-type]


@given(seed=seeds)
@examples(10)
def test_rloo_on_policy_has_the_gradient_of_trl(seed: int) -> None:
    """The paper's REINFORCE, -A log π(y), and TRL's clipped ratio of whole completions, at ratio 1."""
    batch, outputs = case(seed, scale=0.0)
    assert batch.logp_old is not None
    batch = batch.set(logp_old=outputs.logp.detach(), advantage=outcome(batch, center="leave_one_out"))
    ours = (losses.reinforce(outputs, batch) * normalisers.seq_mean_of_token_sum(batch)).sum()
    theirs = trl_rloo(batch, outputs.logp)
    close(with_gradient(ours, outputs.logp)[1], with_gradient(theirs, outputs.logp)[1].double())


def test_rloo_off_policy_differs_because_trl_clips_the_ratio_of_the_completion() -> None:
    """Published: no ratio and no clip (section on REINFORCE). TRL: the product of all ratios, clipped as in PPO."""
    batch, outputs = case(1)
    batch = batch.set(advantage=outcome(batch, center="leave_one_out"))
    ours = (losses.reinforce(outputs, batch) * normalisers.seq_mean_of_token_sum(batch)).sum()
    theirs = trl_rloo(batch, outputs.logp)
    assert (with_gradient(ours, outputs.logp)[1] - with_gradient(theirs, outputs.logp)[1]).abs().max() > 0.01


def test_completions_without_tokens_differ_because_trl_counts_them() -> None:
    """TRL's mean over completions has those without a chosen token in its denominator; here they do not count."""
    batch, outputs = case(1)
    mask = batch.mask.clone()
    mask[0] = False
    batch = batch.set(mask=mask, advantage=outcome(batch.set(mask=mask), center="group"))
    assert batch.advantage is not None
    advantages = batch.advantage.sum(-1) / mask.sum(-1).clamp(min=1)
    theirs = trl_loss(batch, outputs.logp, {"loss_type": "grpo"}, {"advantages": advantages})
    ours = (clip(outputs, batch) * normalisers.seq_mean_of_token_mean(batch)).sum()
    close(ours * (len(batch) - 1) / len(batch), theirs.detach().double())


@given(seed=seeds)
@examples(10)
def test_the_standard_deviation_is_trls(seed: int) -> None:
    """GRPO's z-scores from TRL's own nanstd, unscored completions among them."""
    from trl.trainer.utils import nanstd

    batch = rough_batch(seed, groups=4, size=5, plain=True)
    g = torch.Generator().manual_seed(seed)
    reward = batch.reward.where(torch.rand(len(batch), generator=g) > 0.2, torch.nan)
    batch = batch.set(reward=reward, step_reward=torch.zeros_like(batch.step_reward))
    grouped = reward.view(4, 5)
    mean = grouped.nanmean(1, keepdim=True)
    theirs = ((grouped - mean) / (nanstd(grouped, dim=1).view(4, 1) + 1e-4)).nan_to_num(0.0).view(-1)
    found = outcome(batch, center="group", scale="group")
    first = batch.mask.int().argmax(-1)
    close(found.gather(1, first[:, None]).squeeze(1), theirs.double(), 1e-5)
