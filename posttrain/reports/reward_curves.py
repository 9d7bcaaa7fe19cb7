"""Curves of a reward model: best-of-n, and how far optimising it can go before the gold reward falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor


def best_of_n(
    proxy: Float[Tensor, "*P N"], gold: Float[Tensor, "*P N"], sizes: Sequence[int]
) -> dict[int, Float[Tensor, "*P"]]:
    """Estimates the gold reward of the sample that the proxy ranks highest among n, without bias, from N ≥ n samples.

    E_n = Σ_i C(i - 1, n - 1) / C(N, n) · gold_(i), with gold_(i) of the sample whose proxy reward is the i-th lowest

    Nakano et al. 2021 (WebGPT), appendix I, arXiv:2112.09332; Gao et al. 2022, section 2, arXiv:2210.10760.
    With ``gold = proxy`` it is the expected maximum of n. Samples of equal proxy reward share their gold rewards.

    Args:
        proxy: rewards by which a sample is chosen, for N samples of each prompt.
        gold: rewards that the choice is measured by.
        sizes: n's.

    Raises:
        ValueError: if an n is not between 1 and N.
    """
    total = proxy.shape[-1]
    if bad := [n for n in sizes if not 1 <= n <= total]:
        raise ValueError(f"best of {bad[0]} cannot be estimated from {total} samples")
    gold = _mean_of_ties(proxy.double(), gold.double())
    ranked = gold.gather(-1, proxy.argsort(-1))
    return {
        n: ranked @ torch.tensor([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)], dtype=torch.float64)
        for n in sizes
    }


def _mean_of_ties(proxy: Float[Tensor, "*P N"], gold: Float[Tensor, "*P N"]) -> Float[Tensor, "*P N"]:
    """Averages gold rewards over samples of the same prompt and proxy reward."""
    same = (proxy[..., :, None] == proxy[..., None, :]).double()
    return (same @ gold[..., None]).squeeze(-1) / same.sum(-1)


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n from the policy that it samples from, in nats: log n - (n - 1) / n.

    Stiennon et al. 2020, appendix G.3, arXiv:2009.01325. It is an upper bound if samples can be equal: Beirami et al.
    2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_curve(proxy: Float[Tensor, "P N"], gold: Float[Tensor, "P N"], sizes: Sequence[int]) -> dict[str, Any]:
    """Computes proxy and gold reward of best-of-n by the proxy, and gold reward of best-of-n by the gold reward itself.

    Returns:
        Lists over ``n``: ``kl`` in nats, ``proxy``, ``gold``, ``oracle`` (means over prompts), ``gold_error`` (standard
        error of the mean over prompts).
    """
    gold_of_best, proxy_of_best = best_of_n(proxy, gold, sizes), best_of_n(proxy, proxy, sizes)
    oracle = best_of_n(gold, gold, sizes)
    prompts = len(proxy)
    return {
        "n": list(sizes),
        "kl": [best_of_n_kl(n) for n in sizes],
        "proxy": [float(proxy_of_best[n].mean()) for n in sizes],
        "gold": [float(gold_of_best[n].mean()) for n in sizes],
        "oracle": [float(oracle[n].mean()) for n in sizes],
        "gold_error": [float(gold_of_best[n].std() / prompts**0.5) if prompts > 1 else math.nan for n in sizes],
    }


def overoptimisation(kl: Sequence[float], gold: Sequence[float], *, method: str = "best_of_n") -> dict[str, float]:
    """Fits Gao et al.'s law of over-optimisation to gold rewards by least squares.

    d = sqrt(KL);  best_of_n: gold - gold_0 = d (α - β d);  rl: gold - gold_0 = d (α - β log d)

    Gao et al. 2022, section 3.1, arXiv:2210.10760. gold_0 is the reward at KL = 0, which must be among the points.

    Args:
        kl: divergences from the initial policy, in nats; one of them 0.
        gold: gold rewards at these divergences.
        method: ``best_of_n`` or ``rl``: how the policy was optimised.

    Returns:
        ``alpha``, ``beta``, ``peak_kl`` (KL at which the fitted gold reward is largest; infinite if it never falls) and
        ``residual`` (root mean square).

    Raises:
        ValueError: if the method is unknown, no point is at KL = 0, or fewer than two points are at a positive KL.
    """
    if method not in ("best_of_n", "rl"):
        raise ValueError(f"method must be best_of_n or rl, not {method!r}")
    points = sorted(zip(kl, gold, strict=True))
    if len(points) < 3 or points[0][0] != 0 or points[1][0] <= 0:
        raise ValueError("the fit needs the gold reward at KL = 0 and at two or more positive KLs")
    d = torch.tensor([point[0] for point in points[1:]], dtype=torch.float64).sqrt()
    gain = torch.tensor([point[1] for point in points[1:]], dtype=torch.float64) - points[0][1]
    columns = torch.stack([d, -d * (d if method == "best_of_n" else d.log())], -1)
    alpha, beta = torch.linalg.lstsq(columns, gain).solution.tolist()
    residual = float((columns @ torch.tensor([alpha, beta], dtype=torch.float64) - gain).square().mean().sqrt())
    return {"alpha": alpha, "beta": beta, "peak_kl": _peak(alpha, beta, method), "residual": residual}


def _peak(alpha: float, beta: float, method: str) -> float:
    """The KL at which the derivative is 0: α = 2 β d, or α = β (log d + 1)."""
    if beta <= 0:
        return math.inf
    if method == "best_of_n":
        return max(0.0, alpha / (2 * beta)) ** 2
    exponent = 2 * (alpha / beta - 1)
    return math.exp(exponent) if exponent < 700 else math.inf


def moments(rewards: Tensor) -> dict[str, float]:
    """Mean and standard deviation of rewards, NaN left out: ``shift`` and ``scale`` of an outcome model.

    Ziegler et al. 2019, arXiv:1909.08593, over samples of the initial policy.

    Raises:
        ValueError: if all rewards are the same.
    """
    known = rewards[~rewards.isnan()].double()
    if len(known) < 2 or not float(known.std()) > 0:
        raise ValueError("rewards that are all the same have no scale")
    return {"shift": float(known.mean()), "scale": float(known.std())}


def draw_curve(curve: dict[str, Any], fit: dict[str, float] | None = None) -> Figure:
    """Draws gold and proxy reward against sqrt(KL).

    Args:
        curve: result of :func:`best_of_n_curve`, or ``kl``, ``proxy`` and ``gold`` of a training run.
        fit: result of :func:`overoptimisation` for best-of-n, drawn in addition.
    """
    figure = Figure(figsize=(5.2, 4.0), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    distance = [math.sqrt(kl) for kl in curve["kl"]]
    axes.plot(distance, curve["proxy"], "--", marker="o", color="#b9770e", label="proxy reward")
    axes.errorbar(
        distance, curve["gold"], yerr=curve.get("gold_error"), marker="s", color="#1b4f72", label="gold reward"
    )
    if fit is not None:
        grid = torch.linspace(0, max(distance), 100).tolist()
        start = curve["gold"][curve["kl"].index(0.0)]
        fitted = [start + d * (fit["alpha"] - fit["beta"] * d) for d in grid]
        axes.plot(grid, fitted, ":", color="0.4", label="d (α - β d)")
    axes.set_xlabel("square root of the KL divergence from the initial policy (nats)")
    axes.set_ylabel("reward")
    axes.legend(frameon=False)
    return figure
