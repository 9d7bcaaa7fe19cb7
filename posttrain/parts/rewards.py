"""Rewards beside the verifiers': ``batch -> [N]``, added to ``batch.reward``, or ``[N, L]``, to ``batch.step_reward``.

The slot's ``weight`` scales them. An unscored completion stays unscored: NaN plus a number is NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, seq_sum
from posttrain.option_types import PositiveCount
from posttrain.parts.credit import at_state, step_ends
from posttrain.parts.ratio import needed


def overlong(batch: Batch, *, limit: PositiveCount, buffer: PositiveCount) -> Float[Tensor, " N"]:
    """Soft penalty on completions that come close to the length limit.

    r = 0 if l <= limit - buffer, (limit - buffer - l) / buffer if l <= limit, -1 else; l tokens were chosen

    Yu et al. 2025 (DAPO), eq. 13, arXiv:2503.14476, where verifiers give ±1, limit is 20480 and buffer 4096.

    Raises:
        ValueError: unless 0 < ``buffer`` <= ``limit``.
    """
    if not 0 < buffer <= limit:
        raise ValueError(
            f"overlong: buffer is the last part of limit, so 0 < buffer <= limit, not {buffer} and {limit}"
        )
    return ((limit - buffer - batch.tokens_chosen) / buffer).clamp(-1.0, 0.0).float()


def length(batch: Batch, *, threshold: float = 0.0) -> Float[Tensor, " N"]:
    """Favours the shorter of a group's completions, and never rewards one that is wrong.

    λ = 0.5 - (l - l_min) / (l_max - l_min)
    r = λ if correct, min(0, λ) if wrong, 0 where all of the group are of one length

    Kimi Team 2025 (Kimi k1.5), section 2.3.3, arXiv:2501.12599.

    Correct means a verifier score above ``threshold``; l_min and l_max are of the group's scored completions. Greedy
    baselines get 0.
    """
    tokens = batch.tokens_chosen.float()
    valid = ~batch.score.isnan() & ~batch.baseline_only
    _, index = batch.group.unique(return_inverse=True)
    longest = torch.zeros_like(tokens).scatter_reduce(0, index, tokens.where(valid, -torch.inf), "amax")[index]
    shortest = torch.full_like(tokens, torch.inf).scatter_reduce(0, index, tokens.where(valid, torch.inf), "amin")[
        index
    ]
    spread = longest - shortest
    favour = 0.5 - (tokens - shortest) / spread.clamp(min=1.0)
    favour = torch.where(batch.score > threshold, favour, favour.clamp(max=0.0))
    return favour.where(valid & (spread > 0), 0.0)


def kl_penalty(batch: Batch, *, level: Literal["token", "sequence"] = "token") -> Tensor:
    """Minus the log-ratio of the policy before the update to the reference policy, whose mean is minus their KL.

    r_t = -(log π_old(y_t) - log π_ref(y_t))

    Stiennon et al. 2020, arXiv:2009.01325; a token at a time: Ouyang et al. 2022, arXiv:2203.02155.

    Args:
        level: ``token`` gives r_t, ``[N, L]``; ``sequence`` its sum over the completion, ``[N]``.
    """
    penalty = (needed(batch, "logp_ref") - needed(batch, "logp_old")).where(batch.mask, 0.0)
    return penalty if level == "token" else seq_sum(penalty, batch.mask)


def at_step_ends(
    scores: Float[Tensor, "N L"], batch: Batch, *, divide: Literal["none", "steps"] = "none"
) -> Float[Tensor, "N L"]:
    """A process model's scores as rewards: each at the last token of its step.

    r_k = R_φ(x, steps up to k), divided by the number of steps with ``steps``

    Dai et al. 2025 (PSGPO), arXiv:2410.17621: undivided, a policy earns by writing more lines.
    """
    ends = step_ends(batch)
    rewards = scores.where(ends, 0.0)
    return rewards / ends.sum(-1, keepdim=True).clamp(min=1) if divide == "steps" else rewards


def value_gain(batch: Batch) -> Float[Tensor, "N L"]:
    """What each token adds to the value, before the update: rewards that sum to the value of the whole completion.

    r_t = V_t - V(s_t), with s_t the prefix in which token t was chosen

    Of an implicit value r_t = β log π_φ(y_t) / π_base(y_t): Yuan et al. 2024 (Free process rewards), arXiv:2412.01981;
    online: Cui et al. 2025 (PRIME), arXiv:2502.01456.
    """
    value = needed(batch, "value").where(batch.states, 0.0)
    return (value - at_state(value, batch.mask)).where(batch.mask, 0.0)
