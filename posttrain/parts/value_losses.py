"""Losses of a value model ``(outputs, batch) -> [N, L]``: one number per state, to be minimised.

They are zero, with zero gradient, off the states and where the target is NaN. Notation: V_t is the value model's output
at column t, T_t its target (``batch.target``), V_old the value before the update (``batch.value``).

Losses of whole completions or groups are divided among their states so that the mean over the states with a target is
the mean over completions or groups, if these have equal sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from posttrain.batch import Batch, Outputs, broadcast, group_sum
from posttrain.option_types import BelowHalf, Fraction, NonNegative, OpenFraction, Positive, facts
from posttrain.parts import categorical
from posttrain.parts.credit import (
    Truncated,
    accumulate,
    at_following,
    following,
    last_chosen,
    open_ended,
    token_rewards,
)
from posttrain.parts.ratio import log_ratio, needed

# ---- losses of a single number --------------------------------------------------------------------------------------


def mse(outputs: Outputs, batch: Batch, *, clip: Positive | None = None) -> Float[Tensor, "N L"]:
    """Half the squared error of the value.

    loss_t = ½ (V_t - T_t)²,  with ``clip`` ½ max((V_t - T_t)², (V_old + clamp(V_t - V_old, ±clip) - T_t)²)

    Clipping: Huang et al. 2024 (N+ details of RLHF), arXiv:2403.17031, with 0.2.

    Args:
        clip: largest change of a value by one update; moving further does not lower the loss.
    """
    target, learned = _targets(batch)
    value = _value(outputs, learned)
    loss = (value - target).square()
    if clip is not None:
        old = needed(batch, "value").where(learned, 0.0)
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target).square())
    return 0.5 * loss


def huber(outputs: Outputs, batch: Batch, *, delta: Positive = 1.0) -> Float[Tensor, "N L"]:
    """Huber loss: squared error near the target, linear further than ``delta`` from it.

    loss_t = ½ u² if |u| <= δ, δ (|u| - ½ δ) else, with u = V_t - T_t

    Huber 1964, doi:10.1214/aoms/1177703732.
    """
    target, learned = _targets(batch)
    return F.huber_loss(_value(outputs, learned), target, reduction="none", delta=delta)


def expectile(outputs: Outputs, batch: Batch, *, tau: OpenFraction = 0.7) -> Float[Tensor, "N L"]:
    """Expectile regression: a squared error in which targets above the value weigh more than those below.

    loss_t = |τ - 1[u < 0]| u², with u = T_t - V_t

    Kostrikov et al. 2021 (IQL), eq. 5, arXiv:2110.06169. With one-step targets and τ -> 1 it learns the value of the
    best token in the data; τ = ½ is ``mse``.
    """
    target, learned = _targets(batch)
    error = target - _value(outputs, learned)
    return torch.where(error < 0, 1 - tau, tau) * error.square()


@facts(soft_value="beta")
def soft_path(outputs: Outputs, batch: Batch, *, beta: Positive = 0.03) -> Float[Tensor, "N L"]:
    """Squared error of soft path consistency: the value is the return from here on, minus the policy's KL cost for it.

    loss_t = (V_t - T_t + β Σ_i>t sg[log π(y_i) - log π_ref(y_i)])², over the chosen tokens i after column t

    Wang et al. 2024 (OREO), arXiv:2412.16145. T_t is ``lambda_return`` with λ = 1; the policy is trained by
    the loss of the same name with the same β.

    Args:
        beta: temperature, in units of reward.
    """
    target, learned = _targets(batch)
    ratio = log_ratio(outputs.logp.detach(), needed(batch, "logp_ref"), batch.mask)
    ahead = at_following(accumulate(ratio, batch.mask, 1.0), batch.mask)
    return (_value(outputs, learned) - target + beta * ahead).square().where(learned, 0.0)


# ---- losses of a distribution ---------------------------------------------------------------------------------------


def hl_gauss(outputs: Outputs, batch: Batch, *, sigma: Positive = categorical.SIGMA) -> Float[Tensor, "N L"]:
    """Cross-entropy with a Gaussian around the target: regression as classification.

    loss_t = -Σ_i p_i(T_t) log softmax_i

    Farebrother et al. 2024 (Stop Regressing), arXiv:2403.03950.

    A target near the outer centres loses a tail of its Gaussian and is decoded too far inside: by 0.80 σ at an outer
    centre, by 0.0044 σ at three deviations from the outer edge. Let the bins reach a little further than the rewards,
    such as from -0.018 to 1.018 with 101 bins for rewards in [0, 1].

    Args:
        sigma: standard deviation in bin widths.
    """
    target, learned = _targets(batch)
    logits, support = _bins(outputs, learned)
    return _cross_entropy(categorical.hl_gauss_target(target, support, sigma=sigma), logits, learned)


def two_hot(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """Cross-entropy with the target as probabilities of the two bins around it.

    Schrittwieser et al. 2019 (MuZero), appendix F, arXiv:1911.08265.
    """
    target, learned = _targets(batch)
    logits, support = _bins(outputs, learned)
    return _cross_entropy(categorical.two_hot_target(target, support), logits, learned)


def c51(outputs: Outputs, batch: Batch, *, gamma: Fraction = 1.0, truncated: Truncated = "end") -> Float[Tensor, "N L"]:
    """Cross-entropy with the reward plus the next state's distribution, so that the return's distribution is learned.

    loss_t = -Σ_i p_i log softmax_i,  p = projection of r_t' + γ Z(s_t'') on the bins, without gradient

    Bellemare et al. 2017 (C51), algorithm 1, arXiv:1707.06887. ``batch.target`` only marks the states that learn.
    """
    _, learned = _targets(batch)
    logits, support = _bins(outputs, batch.states)  # the next state counts, whether or not it learns itself
    now = logits.detach().softmax(-1)
    ends, cut, following_token = last_chosen(batch.mask), open_ended(batch, truncated), following(batch.mask)
    later = torch.where(cut[..., None], now, _at(now, following_token - 1))  # at the state of the next chosen token
    discounted = gamma * support.expand_as(now).where((~ends | cut)[..., None], 0.0)  # nothing follows an ending
    returns = categorical.project(later, token_rewards(batch).to(now.dtype)[..., None] + discounted, support)
    outcome = categorical.two_hot_target(batch.reward.where(batch.scored, 0.0), support)[:, None]
    return _cross_entropy(torch.where(ends[..., None], outcome, _at(returns, following_token)), logits, learned)


def quantile(outputs: Outputs, batch: Batch, *, kappa: NonNegative = 1.0) -> Float[Tensor, "N L"]:
    """Quantile regression: output i learns the (i + ½) / K quantile of the targets.

    loss_t = Σ_i |τ_i - 1[u_i < 0]| H_κ(u_i), with u_i = T_t - q_i and H_κ Huber's loss over κ

    Dabney et al. 2017 (QR-DQN), arXiv:1710.10044.

    Args:
        kappa: error at which H_κ turns linear; 0 gives exact quantiles.
    """
    target, learned = _targets(batch)
    quantiles = _logits(outputs).where(learned[..., None], 0.0)
    return quantile_huber(quantiles, target[..., None], kappa=kappa).where(learned, 0.0)


def quantile_huber(
    quantiles: Float[Tensor, "*S K"], targets: Float[Tensor, "*S M"], *, kappa: NonNegative = 1.0
) -> Float[Tensor, "*S"]:
    """Loss of ``quantile`` for M equally likely targets: summed over quantiles, mean over targets."""
    levels = (torch.arange(quantiles.shape[-1], device=quantiles.device) + 0.5) / quantiles.shape[-1]
    error = targets[..., None, :] - quantiles[..., :, None]
    size = error.abs()
    smooth = size if kappa == 0 else torch.where(size <= kappa, 0.5 * size.square() / kappa, size - 0.5 * kappa)
    return ((levels[:, None] - (error < 0).to(error.dtype)).abs() * smooth).sum(-2).mean(-1)


def bce(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """Binary cross-entropy with a target that is a probability, or 0 or 1.

    loss_t = -T_t log σ(x_t) - (1 - T_t) log(1 - σ(x_t)), with x_t the head's logit

    Yang and Klein 2021 (FUDGE), arXiv:2104.05218; process labels: Lightman et al. 2023, arXiv:2305.20050.

    Raises:
        ValueError: for a target outside [0, 1].
    """
    target, learned = _targets(batch)
    if bool(((target < 0) | (target > 1)).any()):
        low, high = target.min().item(), target.max().item()
        raise ValueError(
            f"bce: targets are probabilities, but they reach from {low:g} to {high:g}; scale the rewards to [0, 1] or "
            "use another value_loss, such as mse"
        )
    logit = _logits(outputs)[..., 0].where(learned, 0.0)
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none").where(learned, 0.0)


# ---- losses of steps, completions and groups ------------------------------------------------------------------------


@facts(compares_values=True)
def q_ranking(outputs: Outputs, batch: Batch, *, margin: float = 4.0) -> Float[Tensor, "N L"]:
    """Ranks a completion's steps: values of correct steps rise from 0, one above the other; wrong ones are ζ below 0.

    loss = -1/(|C| + 1[W]) (1[W] log(1 / (1 + E_W)) + Σ_c∈C log(e^Q_c / (1 + Σ_c'<c e^Q_c' + e^Q_c + E_W)))
    E_W = Σ_w∈W e^(Q_w + ζ), with 1[W] = 1 if there is a wrong step

    Li and Li 2024 (PQM), eq. 10, arXiv:2410.11287, with the normaliser ``seq_mean_of_token_mean``.

    Steps are the states with a target, in order; those with a target above ½ are correct. Each term is at its own step,
    the term of the wrong steps at the first of them, scaled so that the mean over a completion's steps is its loss.

    Args:
        margin: ζ.
    """
    target, learned = _targets(batch)
    score = _value(outputs, learned)
    correct, wrong = learned & (target > 0.5), learned & (target <= 0.5)
    log_wrong = torch.logsumexp((score + margin).where(wrong, -torch.inf), -1, keepdim=True)  # log E_W
    base = torch.cat([torch.zeros_like(log_wrong), log_wrong], -1).logsumexp(-1, keepdim=True)  # log(1 + E_W)
    up_to = torch.logcumsumexp(torch.cat([base, score.where(correct, -torch.inf)], -1), -1)[:, 1:]
    first_wrong = wrong & (wrong.cumsum(-1) == 1)
    terms = torch.where(correct, up_to - score, torch.where(first_wrong, base, 0.0))
    ranked = correct.sum(-1, keepdim=True) + wrong.any(-1, keepdim=True)
    return terms * learned.sum(-1, keepdim=True) / ranked.clamp(min=1)


@facts(compares_values=True)
def bradley_terry(
    outputs: Outputs, batch: Batch, *, margin: str | None = None, label_smoothing: BelowHalf = 0.0
) -> Float[Tensor, "N L"]:
    """Bradley-Terry loss of pairs: the better completion should have the higher value.

    loss_ij = -(1 - ε) log σ(V_i - V_j - m_i) - ε log σ(V_j - V_i + m_i), for all i, j of a group with R_i > R_j

    Ouyang et al. 2022, eq. 1, arXiv:2203.02155 (mean over a group's pairs); Bradley and Terry 1952.
    Margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288.
    Label smoothing: Mitchell 2023, "A note on DPO with noisy preferences"; ε is the share of pairs with swapped
    labels.

    V is the value of the whole completion, at its last chosen token; ``target: {use: outcome_label, at: end}``.

    Args:
        margin: column of the data with m_i, read from the better completion's row; 0 if the row has none.
        label_smoothing: ε.
    """
    value, pairs, share = _pairs(outputs, batch)
    gap = value[:, None] - value[None, :] - _column(batch, margin, value)[:, None]
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return broadcast((losses.where(pairs, 0.0) * share).sum(-1), _compared(batch))


def centred(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """Keeps the mean value of each pair near 0, because ``bradley_terry`` lets it drift.

    loss_ij = (V_i + V_j)², for all i, j of a group with R_i > R_j

    Eisenstein et al. 2023, arXiv:2312.09244; TRL uses it with a coefficient of 0.01.
    """
    value, pairs, share = _pairs(outputs, batch)
    losses = (value[:, None] + value[None, :]).square()
    return broadcast((losses.where(pairs, 0.0) * share).sum(-1), _compared(batch))


@facts(soft_value="beta")
def contrastive_twist(
    outputs: Outputs, batch: Batch, *, beta: Positive = 1.0, importance: bool = False
) -> Float[Tensor, "N L"]:
    """Raises values at the prefixes of tilted samples and lowers them where the twisted prior puts its mass.

    loss_t = Σ_i (sg[w-_it] - w+_it) V_it / β over the group at column t
    w+_it ∝ ratio_i exp(R_i / β),  w-_it ∝ ratio_it exp(V_it / β),  each summing to 1

    Zhao et al. 2024 (contrastive twist learning), arXiv:2404.17546, with self-normalised weights.

    Its minimum at each column is the soft value, up to one constant for all prefixes of that length. A completion that
    has ended still counts at later columns, with its reward.

    Args:
        beta: temperature of the tilted distribution p_ref exp(R / β), in units of reward.
        importance: for completions that are not samples of the reference policy: ratio is p_ref(y_1:t) over their
            probability under the sampler, such as a guided decoder. Off, it is 1.
    """
    value, learned, present, positive, ratio = _twist(outputs, batch, beta, importance)
    log_twist = torch.where(learned, value, batch.reward[:, None].where(present, 0.0)) / beta
    negative = _group_softmax(ratio + log_twist.detach(), present, batch.group)
    return ((negative - positive) * value / beta * _depth_count(learned, batch.group)).where(learned, 0.0)


@facts(soft_value="beta")
def noise_contrastive(
    outputs: Outputs, batch: Batch, *, beta: Positive = 1.0, importance: bool = False
) -> Float[Tensor, "N L"]:
    """Classifies prefixes as tilted samples or as samples of the reference policy; the value is the classifier's logit.

    loss_t = -Σ_i (w+_it log σ(V_it / β) + w0_it log(1 - σ(V_it / β))) over the group at column t
    w+_it ∝ ratio_i exp(R_i / β),  w0_it ∝ ratio_it,  each summing to 1

    Lawson et al. 2022 (SIXO), arXiv:2206.05952, as in Zhao et al. 2024, arXiv:2404.17546.

    Its minimum is the soft value minus that of the prompt. ``beta`` and ``importance``: see ``contrastive_twist``.
    """
    value, learned, present, positive, ratio = _twist(outputs, batch, beta, importance)
    base = _group_softmax(ratio, present, batch.group)
    losses = positive * F.softplus(-value / beta) + base * F.softplus(value / beta)
    return (losses * _depth_count(learned, batch.group)).where(learned, 0.0)


# ---- shared ---------------------------------------------------------------------------------------------------------


def _targets(batch: Batch) -> tuple[Float[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Targets with 0 for missing ones, and the states that have a target."""
    target = needed(batch, "target")
    learned = batch.states & ~target.isnan()
    return target.where(learned, 0.0), learned


def _value(outputs: Outputs, learned: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """The model's values at the states that learn, 0 elsewhere."""
    if outputs.value is None:
        raise ValueError("this value loss reads outputs.value, and there is no value model")
    return outputs.value.where(learned, 0.0)


def _logits(outputs: Outputs) -> Float[Tensor, "N L K"]:
    """The outputs of a head that gives more than the value itself."""
    if outputs.value_logits is None:
        raise ValueError(
            "this value loss reads the outputs of a head of several numbers or of a probability: set `value.head.type` "
            "to categorical (hl_gauss, two_hot, c51), quantile (quantile) or bernoulli (bce)"
        )
    return outputs.value_logits


def _bins(outputs: Outputs, places: Bool[Tensor, "N L"]) -> tuple[Float[Tensor, "N L K"], Float[Tensor, " K"]]:
    """Logits of the bins at some places, 0 elsewhere, and the centres of the bins."""
    if outputs.support is None:
        raise ValueError("this value loss needs bins: set `value.head.type: categorical`")
    return _logits(outputs).where(places[..., None], 0.0), outputs.support


def _cross_entropy(
    target: Float[Tensor, "N L K"], logits: Float[Tensor, "N L K"], learned: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L"]:
    """Cross-entropy of target probabilities and a categorical head at the states that learn."""
    return -(target * logits.log_softmax(-1)).sum(-1).where(learned, 0.0)


def _at(values: Float[Tensor, "N L K"], columns: Int[Tensor, "N L"]) -> Float[Tensor, "N L K"]:
    """Takes ``values`` at other columns of the same rows; columns beyond the last one give the last one."""
    inside = columns.clamp(0, values.shape[1] - 1)
    return values.gather(1, inside[..., None].expand_as(values))


def _compared(batch: Batch) -> Bool[Tensor, "N L"]:
    """The last chosen token of each completion that has a target there."""
    return _targets(batch)[1] & last_chosen(batch.mask)


def _pairs(outputs: Outputs, batch: Batch) -> tuple[Float[Tensor, " N"], Bool[Tensor, "N N"], Float[Tensor, "N 1"]]:
    """Values of whole completions, a table that is True at compared pairs (better, worse), and a pair's loss share."""
    places = _compared(batch)
    value = _value(outputs, places).sum(-1)
    usable = places.any(-1) & batch.trained
    together = (batch.group[:, None] == batch.group) & usable[:, None] & usable
    pairs = together & (batch.reward[:, None] > batch.reward)
    count = group_sum(pairs.sum(-1).to(value.dtype), batch.group)
    members = group_sum(usable.to(value.dtype), batch.group)
    return value, pairs, (members / count.clamp(min=1))[:, None]


def _column(batch: Batch, name: str | None, like: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """A column of numbers of the dataset, 0 where a row has none."""

    def number(row: dict[str, Any]) -> float:
        return 0.0 if name is None or row.get(name) is None else float(row[name])

    return torch.tensor([number(row) for row in batch.rows], dtype=like.dtype, device=like.device)


def _twist(
    outputs: Outputs, batch: Batch, beta: float, importance: bool
) -> tuple[Float[Tensor, "N L"], Bool[Tensor, "N L"], Bool[Tensor, "N L"], Float[Tensor, "N L"], Float[Tensor, "N L"]]:
    """Values, the states that learn, the completions present at each column, w+, and log ratio_it."""
    trained = batch.trained[:, None]
    learned = _targets(batch)[1] & trained
    ended = following(batch.mask) == batch.mask.shape[1]
    present = (learned | (ended & ~batch.states)) & trained & batch.mask.any(-1, keepdim=True)
    ratio = torch.zeros_like(batch.logp_sampler)
    if importance:
        ratio = (needed(batch, "logp_ref") - batch.logp_sampler).where(batch.mask, 0.0).cumsum(-1)
    tilted = ratio[:, -1:] + batch.reward[:, None].where(present, 0.0) / beta
    return _value(outputs, learned), learned, present, _group_softmax(tilted, present, batch.group), ratio


def _group_softmax(
    logits: Float[Tensor, "N L"], present: Bool[Tensor, "N L"], group: Int[Tensor, " N"]
) -> Float[Tensor, "N L"]:
    """Softmax in each column over the present completions of each group; 0 for absent ones."""
    _, index = group.unique(return_inverse=True)
    index = index[:, None].expand_as(logits)
    filled = logits.where(present, -torch.inf)
    top = torch.full_like(filled, -torch.inf).scatter_reduce(0, index, filled, "amax").gather(0, index)
    weight = (filled - top).where(present, -torch.inf).exp()
    return weight / torch.zeros_like(weight).scatter_add(0, index, weight).gather(0, index).clamp(min=1e-30)


def _depth_count(learned: Bool[Tensor, "N L"], group: Int[Tensor, " N"]) -> Float[Tensor, "N L"]:
    """Number of completions of the group that learn at each column."""
    _, index = group.unique(return_inverse=True)
    index = index[:, None].expand_as(learned)
    return torch.zeros(learned.shape, device=learned.device).scatter_add(0, index, learned.float()).gather(0, index)
