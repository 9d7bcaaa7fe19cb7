"""Loss terms: per token ``[N, L]``, to be minimised, zero (and of zero gradient) off the mask.

A term does not apply coefficients, weights or averages: those belong to the recipe's loss entry and normaliser.
It is called on micro-batches, so it may combine the tokens of one completion, but never several completions.

Notation: ρ_t = π(y_t) / π_old(y_t), the ratio of the policy now to the policy before the update; A_t is the advantage;
sg[x] is x without gradient. Log-ratios are clamped to ±20 before exp, so that no ratio is infinite.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, broadcast, seq_mean
from posttrain.option_types import AboveOne, AtLeastOne, Fraction, NonNegative, Positive
from posttrain.parts.credit import accumulate, at_following, at_state, step_starts, token_rewards
from posttrain.parts.preference.regularisers import nll, optimism, reference_kl
from posttrain.parts.preference.terms import listwise, pairwise, pointwise
from posttrain.parts.ratio import log_ratio, needed

__all__ = [
    "banded",
    "cispo",
    "clip",
    "entropy",
    "geometric",
    "kl",
    "listwise",
    "nll",
    "nll_positive",
    "optimism",
    "pairwise",
    "pointwise",
    "reference_kl",
    "reinforce",
    "soft_path",
]

Estimator = Literal["k1", "k2", "k3", "k3_k2"]


def reinforce(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """Policy-gradient loss: minus the log-prob of each token, weighted by its advantage.

    loss_t = -A_t log π(y_t)

    Williams 1992 (REINFORCE), doi:10.1007/BF00992696.
    """
    return (-_advantage(batch) * outputs.logp).where(batch.mask, 0.0)


def clip(
    outputs: Outputs,
    batch: Batch,
    *,
    low: Fraction = 0.2,
    high: NonNegative = 0.2,
    level: Literal["token", "sequence"] = "token",
    dual: AboveOne | None = None,
    cap: AboveOne | None = None,
) -> Float[Tensor, "N L"]:
    """Clipped policy-gradient surrogate: nothing is gained by a ratio outside [1 - low, 1 + high].

    loss_t = -min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t)

    Schulman et al. 2017 (PPO), eq. 7, arXiv:1707.06347.
    ``high`` above ``low``: Yu et al. 2025 (DAPO), eq. 10, arXiv:2503.14476.

    Args:
        level: ``sequence``: Zheng et al. 2025 (GSPO), section 4.3, arXiv:2507.18071.
            The geometric mean of a completion's ratios, s = exp(mean_t log ρ_t), replaces each of them, in the form
            whose gradient reaches every token: sg[s] · π(y_t) / sg[π(y_t)]. Use it with the normaliser
            ``seq_mean_of_token_mean``.
        dual: Ye et al. 2019 (dual-clip PPO), arXiv:1912.09729.
            c > 1 bounds the loss of A < 0 by -c A: a ratio beyond c gives no gradient.
        cap: Prime Intellect 2025 (INTELLECT-2, two-sided clipping), section 4.1, arXiv:2505.07291.
            δ > 1 + ``high`` replaces the first ρ_t by min(ρ_t, δ). This has the same effect as ``dual``: the bound
            changes nothing where A > 0, and c and δ bound the same ratio where A < 0.

    Raises:
        ValueError: for a bound on the wrong side of 1.
    """
    _check_bounds(low, high, dual, cap)
    log = log_ratio(outputs.logp, needed(batch, "logp_old"), batch.mask)
    if level == "sequence":
        log = _sequence_value(log, batch)
    ratio, advantage = log.exp(), _advantage(batch)
    unclipped = ratio if cap is None else ratio.clamp(max=cap)
    gain = torch.minimum(unclipped * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual * advantage), gain)
    return -gain


def cispo(outputs: Outputs, batch: Batch, *, floor: Fraction = 0.0, cap: AtLeastOne = 5.0) -> Float[Tensor, "N L"]:
    """Policy-gradient loss with a clipped importance weight: every token keeps a gradient, whatever its ratio.

    loss_t = -sg[clip(ρ_t, floor, cap)] A_t log π(y_t)

    MiniMax 2025 (CISPO), eq. 4 and 5, arXiv:2506.13585, with floor = 1 - ε_low, cap = 1 + ε_high and no lower bound.
    ``cap`` of 5: Khatri et al. 2025 (ScaleRL), arXiv:2510.13786.
    """
    if not 0 <= floor <= 1 <= cap:
        raise ValueError(f"cispo: the ratio is clipped to [floor, cap] around 1, not to [{floor}, {cap}]")
    ratio = log_ratio(outputs.logp, needed(batch, "logp_old"), batch.mask).exp()
    weight = ratio.clamp(floor, cap).detach()
    return (-weight * _advantage(batch) * outputs.logp).where(batch.mask, 0.0)


def geometric(
    outputs: Outputs, batch: Batch, *, low: NonNegative = 0.4, high: NonNegative = 0.4
) -> Float[Tensor, "N L"]:
    """Policy-gradient loss on the geometric mean of a completion's clipped ratios, so that outliers weigh little.

    loss_i = -s_i A_i
    s_i = exp(mean_t l_t)
    l_t = min(log ρ_t, high) if A_i > 0, max(log ρ_t, -low) else

    Zhao et al. 2025 (GMPO), arXiv:2507.20673.

    Each token holds -A_t sg[s_i] exp(l_t - sg[l_t]), so that under ``seq_mean_of_token_mean`` value and gradient are
    those of mean_i loss_i. As in the paper, A is one number per completion.

    Args:
        low, high: bounds of the *log*-ratio; the paper's range of ratios is (e^-0.4, e^0.4).
    """
    if low < 0 or high < 0:
        raise ValueError(f"geometric: low and high bound the log-ratio from -low to high, not {-low} to {high}")
    advantage = _advantage(batch)
    log = log_ratio(outputs.logp, needed(batch, "logp_old"), batch.mask)
    clipped = torch.where(advantage > 0, log.clamp(max=high), log.clamp(min=-low))
    return -advantage * _sequence_value(clipped, batch).exp()


def kl(
    outputs: Outputs,
    batch: Batch,
    *,
    estimator: Estimator = "k3",
    importance: bool = False,
    cap: Positive | None = None,
) -> Float[Tensor, "N L"]:
    """KL divergence from the reference policy, estimated at the sampled token from x = log π(y_t) - log π_ref(y_t).

    k1 = x, k2 = x² / 2, k3 = e^-x - 1 + x, with x clamped to ±20

    Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    k3 as a loss: Shao et al. 2024 (GRPO), eq. 4, arXiv:2402.03300.

    As values, k1 and k3 are unbiased and k2 is not. As losses on samples of π, their gradients estimate different
    quantities: E ∇k1 = 0, E ∇k2 = ∇KL(π ‖ π_ref), E ∇k3 = ∇KL(π_ref ‖ π).

    Args:
        estimator: ``k3_k2`` has the value of k3 and the gradient of k2.
        importance: DeepSeek-AI 2025 (DeepSeek-V3.2, unbiased KL estimate), section 3.1, arXiv:2512.02556.
            Multiplies by ρ_t, for samples of π_old; the expected gradient is then ∇KL(π ‖ π_ref) with every estimator,
            because ρ_t carries gradient with k1 and k3 and does not with k2 and k3_k2.
        cap: largest estimate of a token; a token beyond it has no gradient.
    """
    x = log_ratio(outputs.logp, needed(batch, "logp_ref"), batch.mask)
    k2, k3 = 0.5 * x.square(), torch.expm1(-x) + x
    value = {"k1": x, "k2": k2, "k3": k3, "k3_k2": k2 + (k3 - k2).detach()}[estimator]
    if importance:
        ratio = log_ratio(outputs.logp, needed(batch, "logp_old"), batch.mask).exp()
        value = value * (ratio if estimator in ("k1", "k3") else ratio.detach())
    return value if cap is None else value.clamp(max=cap)


def entropy(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """Negative entropy of the policy at each token, in nats: minimising it keeps the policy exploring.

    loss_t = -H(π(· | y_<t))

    Mnih et al. 2016 (A3C), arXiv:1602.01783.
    """
    if outputs.entropy is None:
        raise ValueError("the loss term entropy needs outputs.entropy, which the forward pass did not compute")
    return (-outputs.entropy).where(batch.mask, 0.0)


def banded(outputs: Outputs, batch: Batch, *, low: Fraction = 0.3, high: Positive = 5.0) -> Float[Tensor, "N L"]:
    """Policy-gradient loss with the importance weight against the engine; tokens outside a band are left out.

    loss_t = -sg[f(r_t)] A_t log π(y_t)
    r_t = π(y_t) / μ(y_t), f(r) = r if 1 - low < r < 1 + high, 0 else

    Hou et al. 2026 (SAO), eq. 1 to 3, arXiv:2607.07508, with 0.3 and 5 for mathematics, 0.8 and 3 for coding agents.

    μ is the distribution that the engine sampled from (``logp_sampler``). The policy before the update is not used, so
    one term bounds both staleness and the engine's own deviations.

    Raises:
        ValueError: if the band does not contain 1.
    """
    if not (0 < low <= 1 and high > 0):
        raise ValueError(
            f"banded: the band is 1 - low to 1 + high with 0 < low <= 1 and high > 0, not {low} and {high}"
        )
    ratio = log_ratio(outputs.logp.detach(), batch.logp_sampler, batch.mask).exp()
    weight = ratio.where((ratio > 1 - low) & (ratio < 1 + high), 0.0)
    return (-weight * _advantage(batch) * outputs.logp).where(batch.mask, 0.0)


def soft_path(
    outputs: Outputs, batch: Batch, *, beta: Positive = 0.03, level: Literal["token", "step", "response"] = "token"
) -> Float[Tensor, "N L"]:
    """Squared error of soft path consistency: the policy's log-ratio must agree with the rewards and the value.

    loss_t = (V(s_t) - R_t + β ρ_t + sg[β Σ_i>t ρ_i])², with ρ_t = log π(y_t) / π_ref(y_t), R_t the rewards from t on

    Wang et al. 2024 (OREO), arXiv:2412.16145; the value is trained by the value loss of the same name.
    ``response`` with V = mean reward of the prompt: Richemond et al. 2024 (DRO), arXiv:2405.19107.

    At the optimum of E[reward] - β KL(π ‖ π_ref) every term is 0. V is ``batch.value``, before the update. Use it with
    the normaliser ``seq_mean_of_token_mean``.

    Args:
        beta: temperature, in units of reward.
        level: ``step`` has one term per reasoning step, ``response`` one per completion, with gradient through all of
            its tokens. The term is at the first token, scaled so that the mean over tokens is the mean over terms.
    """
    ratio = log_ratio(outputs.logp, needed(batch, "logp_ref"), batch.mask)
    ahead = accumulate(ratio, batch.mask, 1.0).where(batch.mask, 0.0)
    starts, after = _segments(ahead, batch, level)
    gain = beta * (ahead - after + after.detach())
    target = accumulate(token_rewards(batch), batch.mask, 1.0) - at_state(needed(batch, "value").double(), batch.mask)
    counted = starts & batch.trained[:, None]
    terms = (gain - target.to(gain.dtype)).where(counted, 0.0).square()
    tokens, segments = batch.tokens_chosen[:, None], starts.sum(-1, keepdim=True)
    return terms * tokens / segments.clamp(min=1)


def nll_positive(outputs: Outputs, batch: Batch, *, threshold: float = 0.0) -> Float[Tensor, "N L"]:
    """Negative log-likelihood of the completions that the verifiers score above ``threshold``; unscored ones give 0.

    loss_t = -log π(y_t) if score_i > threshold, 0 else

    Yue et al. 2025 (VAPO), arXiv:2504.05118.

    The paper's mean is over the tokens of such completions: ``normaliser: {use: token_mean, of: positive}``.
    """
    chosen = batch.mask & (batch.score > threshold)[:, None]
    return (-outputs.logp).where(chosen, 0.0)


def _advantage(batch: Batch) -> Float[Tensor, "N L"]:
    """Advantages, exactly 0 off the mask."""
    return needed(batch, "advantage").where(batch.mask, 0.0)


def _segments(
    ahead: Float[Tensor, "N L"], batch: Batch, level: str
) -> tuple[Bool[Tensor, "N L"], Float[Tensor, "N L"]]:
    """The tokens that hold a term, and ``ahead`` behind the segment that begins at each of them."""
    if level == "token":
        return batch.mask, at_following(ahead, batch.mask)
    if level == "response":
        return batch.mask & (batch.mask.cumsum(-1) == 1), torch.zeros_like(ahead)
    if level != "step":
        raise ValueError(f"soft_path: level must be token, step or response, not {level!r}")
    starts = step_starts(batch)
    return starts, at_following(ahead.where(starts, 0.0), starts)


def _sequence_value(log: Float[Tensor, "N L"], batch: Batch) -> Float[Tensor, "N L"]:
    """Each completion's mean of ``log`` as the value, with the gradient of each token's own entry."""
    mean = broadcast(seq_mean(log.detach(), batch.mask), batch.mask)
    return mean + (log - log.detach())


def _check_bounds(low: float, high: float, dual: float | None, cap: float | None) -> None:
    """Raises ValueError for options of ``clip`` that exclude a ratio of 1 or each other."""
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip: low must be in [0, 1] and high at least 0, not low={low}, high={high}")
    if dual is not None and dual <= 1:
        raise ValueError(f"clip: dual is an upper bound of a ratio and must exceed 1, not {dual}")
    if cap is not None and cap <= 1 + high:
        raise ValueError(
            f"clip: cap must exceed 1 + high = {1 + high:g}, or it clips ratios that high allows; it is {cap}"
        )
