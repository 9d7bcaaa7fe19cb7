"""Rewards in addition to the verifiers' score: ``batch -> [N]`` or ``[N, L]``.

Numbers ``[N]`` are added to ``batch.reward``, numbers ``[N, L]`` to ``batch.step_reward``. The slot's ``weight`` scales
them. An unscored completion stays unscored: NaN plus a number is NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, group_max, group_min, seq_sum
from posttrain.option_types import PositiveCount
from posttrain.parts.credit import accumulate, at_state
from posttrain.parts.ratio import log_ratio, needed


def overlong(batch: Batch, *, limit: PositiveCount, buffer: PositiveCount) -> Float[Tensor, " N"]:
    """Penalty on completions near the length limit, which grows linearly from 0 to -1 over the last tokens.

    r = 0 if l <= limit - buffer, (limit - buffer - l) / buffer if l <= limit, -1 else; l tokens were chosen

    Yu et al. 2025 (DAPO), eq. 13, arXiv:2503.14476, where verifiers give ±1, limit is 20480 and buffer 4096.

    Raises:
        ValueError: if not 0 < ``buffer`` <= ``limit``.
    """
    if not 0 < buffer <= limit:
        raise ValueError(
            f"overlong: buffer is the last part of limit, so 0 < buffer <= limit, not {buffer} and {limit}"
        )
    return ((limit - buffer - batch.tokens_chosen) / buffer).clamp(-1.0, 0.0).float()


def length(batch: Batch, *, threshold: float = 0.0) -> Float[Tensor, " N"]:
    """Length reward that favours the shorter completions of a group and is never positive for a wrong one.

    λ = 0.5 - (l - l_min) / (l_max - l_min)
    r = λ if correct, min(0, λ) if wrong, 0 where all completions of the group have the same length

    Kimi Team 2025 (Kimi k1.5), section 2.3.3, arXiv:2501.12599.

    Correct means a verifier score above ``threshold``; l_min and l_max are of the group's scored completions. Baselines
    (``batch.baseline_only``) get 0.
    """
    tokens = batch.tokens_chosen.float()
    valid = ~batch.score.isnan() & ~batch.baseline_only
    shortest = group_min(tokens, batch.group, valid)
    spread = group_max(tokens, batch.group, valid) - shortest
    favour = 0.5 - (tokens - shortest) / spread.clamp(min=1.0)
    favour = torch.where(batch.score > threshold, favour, favour.clamp(max=0.0))
    return favour.where(valid & (spread > 0), 0.0)


def kl_penalty(
    batch: Batch, *, level: Literal["token", "sequence"] = "token", estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """KL penalty: minus an estimate of the KL divergence of the policy before the update from the reference.

    r_t = -x (k1) or -(e^-x - 1 + x) (k3), with x = log π_old(y_t) - log π_ref(y_t)

    Stiennon et al. 2020, arXiv:2009.01325; a token at a time: Ouyang et al. 2022, arXiv:2203.02155.
    k3: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.

    Args:
        level: ``token`` gives r_t, ``[N, L]``; ``sequence`` its sum over the completion, ``[N]``.
        estimator: ``k3`` never rewards a token; its log-ratio is clamped to ±20.
    """
    if estimator == "k1":
        penalty = (needed(batch, "logp_ref") - needed(batch, "logp_old")).where(batch.mask, 0.0)
    else:
        x = log_ratio(needed(batch, "logp_old"), needed(batch, "logp_ref"), batch.mask)
        penalty = -(torch.expm1(-x) + x)
    return penalty if level == "token" else seq_sum(penalty, batch.mask)


def value_gain(batch: Batch, *, scale: Literal["none", "largest_return"] = "none") -> Float[Tensor, "N L"]:
    """Reward of each token: the change of the value that it caused, before the update.

    r_t = V_t - V(s_t), with s_t the prefix in which token t was chosen

    With an implicit value, r_t = β log π_φ(y_t) / π_base(y_t): Yuan et al. 2024 (Free process rewards),
    arXiv:2412.01981; online: Cui et al. 2025 (PRIME), arXiv:2502.01456.

    A completion's rewards sum to the value of the whole completion, less that of the prompt.

    Args:
        scale: ``largest_return`` divides all rewards by max_it |Σ_k>=t r_ik| + 1e-6, the largest sum of rewards from a
            token on, over the trained completions of all ranks: as in the code of PRIME, where it is over one rank's.
    """
    value = needed(batch, "value").where(batch.states, 0.0)
    gain = (value - at_state(value, batch.mask)).where(batch.mask, 0.0)
    if scale == "none":
        return gain
    sums = accumulate(gain.double(), batch.mask, 1.0).where(batch.mask & batch.trained[:, None], 0.0)
    return gain / (batch.largest(sums.abs()) + 1e-6)
