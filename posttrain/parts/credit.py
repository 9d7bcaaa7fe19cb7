"""Helpers of returns, advantages and value targets: rewards per token, states of tokens, and one recursion.

The state in which chosen token t was chosen is the prefix that ends with column t - 1. Its next state is the one in
which the next chosen token t' was chosen, column t' - 1: tool output in between is stepped over, without a discount.
After the last chosen token nothing follows a completion that stopped. What would have followed one that was cut off is
unknown: ``truncated: end`` takes the cut as its ending, ``bootstrap`` puts the value at the last chosen token's column
in place of it. Sums are taken in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch import Batch, Finish, broadcast

Truncated = Literal["bootstrap", "end"]


def last_chosen(mask: Bool[Tensor, "N L"]) -> Bool[Tensor, "N L"]:
    """True at each completion's last chosen token."""
    return mask & (following(mask) == mask.shape[1])


def following(mask: Bool[Tensor, "N L"]) -> Int[Tensor, "N L"]:
    """Column of the first chosen token after each column; L where there is none."""
    columns = mask.shape[1]
    chosen = torch.arange(columns, device=mask.device).expand_as(mask).where(mask, columns)
    at_or_after = chosen.flip(-1).cummin(-1).values.flip(-1)
    return torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=columns)


def at_following(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], fill: float = 0.0) -> Float[Tensor, "N L"]:
    """Takes ``values`` at the first chosen token after each column; ``fill`` where there is none."""
    return torch.nn.functional.pad(values, (0, 1), value=fill).gather(-1, following(mask))


def at_state(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Takes ``values`` at the state in which each chosen token was chosen; 0 off the mask."""
    return torch.nn.functional.pad(values[:, :-1], (1, 0)).where(mask, 0.0)


def step_ends(batch: Batch) -> Bool[Tensor, "N L"]:
    """True at the last chosen token of each reasoning step or turn."""
    return _before_change(batch.step_id, batch.mask)


def step_starts(batch: Batch) -> Bool[Tensor, "N L"]:
    """True at the first chosen token of each reasoning step or turn."""
    return _before_change(batch.step_id.flip(-1), batch.mask.flip(-1)).flip(-1)


def token_rewards(batch: Batch) -> Float[Tensor, "N L"]:
    """Reward of each chosen token: ``step_reward``, plus ``reward`` at the last one (0 where it is unscored)."""
    outcome = batch.reward.double().where(batch.scored, 0.0)
    return batch.step_reward.double().where(batch.mask, 0.0) + broadcast(outcome, last_chosen(batch.mask))


def row_lambda(batch: Batch, lambda_: float, alpha: float | None) -> Float[Tensor, " N"]:
    """λ of each completion: ``lambda_``, or with ``alpha`` max(0, 1 - 1 / (α l)), where l tokens were chosen.

    Yue et al. 2025 (VAPO, length-adaptive GAE), section 4.2, arXiv:2504.05118.
    """
    if alpha is None:
        return torch.full_like(batch.reward, lambda_, dtype=torch.float64)
    return (1 - 1 / (alpha * batch.tokens_chosen.double().clamp(min=1))).clamp(min=0)


def open_ended(batch: Batch, truncated: Truncated) -> Bool[Tensor, "N L"]:
    """True at the last chosen token of completions that were cut off, if those are to be bootstrapped."""
    cut = (batch.finish != int(Finish.STOPPED)) & (truncated == "bootstrap")
    return last_chosen(batch.mask) & cut[:, None]


def weigh_worst(rewards: Float[Tensor, "N L"], ends: Bool[Tensor, "N L"], temperature: float) -> Float[Tensor, "N L"]:
    """Step rewards r*_k = softmax_k(-r_k / T) r_k, of which a completion's worst dominates; 0 off the ends of steps.

    Cheng et al. 2025 (PURE, min-form credit assignment), arXiv:2504.15275. T near 0 leaves the worst step alone, a
    large T the mean of all steps.
    """
    share = torch.softmax((-rewards / temperature).where(ends, -torch.inf), -1)
    return (share * rewards).where(ends, 0.0)


def accumulate(
    terms: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], decay: float | Float[Tensor, " N"]
) -> Float[Tensor, "N L"]:
    """Decayed sum of ``terms`` from each chosen token on: y_t = x_t + decay · y_t', with t' the next chosen token.

    Off the mask it holds the sum from the next chosen token on. The terms off the mask must be 0.
    """
    if isinstance(decay, float) and decay == 1.0:
        return terms.flip(-1).cumsum(-1).flip(-1)
    running, sums = torch.zeros_like(terms[:, 0]), torch.empty_like(terms)
    for t in reversed(range(terms.shape[1])):
        running = torch.where(mask[:, t], terms[:, t] + decay * running, running)
        sums[:, t] = running
    return sums


def _before_change(step_id: Int[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Bool[Tensor, "N L"]:
    """True at each chosen token whose next chosen token belongs to another step, or that has none."""
    return mask & (at_following(step_id.double(), mask, fill=-1.0) != step_id)
