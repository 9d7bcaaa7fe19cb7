"""Scalar reference of every recipe with values: the paper's formula and numbers as plain loops.

Loops over one part stand in ``reference.py`` and ``reference_values.py``; nothing here calls the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import reference
import reference_values
from reference import Loss, Matrix, clip, kl, plus, seq_mean_of_token_sum, token_mean, whiten
from reference_values import bce, gae, lambda_return, mse, value_change

ValueLoss = Callable[[Matrix, Matrix], float]
"""The type of a scalar loss: a function of (values, log-probs of the policy)."""


@dataclass
class Case:
    """A batch as lists for both kinds of loops, which share the lists of rewards.

    ``judged`` is what a process model says at each token.
    """

    core: reference.Rows
    rows: reference_values.Rows
    judged: Matrix


class Losses(NamedTuple):
    """Losses of one optimiser step; ``value`` is None if no value model learns."""

    policy: Loss
    value: ValueLoss | None = None


def read(batch, judged) -> Case:
    core, rows = reference.read(batch), reference_values.read(batch)
    rows.reward, rows.step_reward = core.reward, core.step_reward
    return Case(core, rows, judged.tolist())


# ---- what several recipes share --------------------------------------------------------------------------------------


def clipped(case: Case, a: Matrix, low: float = 0.2, high: float = 0.2, penalty: float = 0.0) -> Loss:
    """PPO's surrogate, with a penalty on k3, as the mean over all tokens."""
    core = case.core

    def loss(logp: Matrix, fixed: Matrix) -> float:
        return token_mean(core, plus(clip(core, a, logp, low, high), penalty, kl(core, logp, fixed, "k3")))

    return loss


def taught(case: Case, target: Matrix) -> dict[int, list[int]]:
    """States of each completion at which the value model learns; completions without any are left out."""
    places = {i: [c for c in case.rows.states(i) if not math.isnan(target[i][c])] for i in case.core.trained()}
    return {i: columns for i, columns in places.items() if columns}


def squared(case: Case, target: Matrix, allowed: float | None = None, *, by_completion: bool = False) -> ValueLoss:
    """Half the squared error, as the mean over all states that learn, or over completions of such means."""
    states = {i: columns for i, columns in taught(case, target).items() if columns}
    count = sum(len(columns) for columns in states.values())
    old = case.rows.value

    def loss(v: Matrix, logp: Matrix) -> float:
        return sum(
            mse(v[i][c], target[i][c], old[i][c], allowed) / (len(states) * len(columns) if by_completion else count)
            for i, columns in states.items()
            for c in columns
        )

    return loss


def add_judgements(case: Case) -> None:
    for i, row in enumerate(case.core.step_reward):
        for t in case.core.tokens(i):
            row[t] += case.judged[i][t]


# ---- recipes ---------------------------------------------------------------------------------------------------------


def ppo(case: Case) -> Losses:
    reference.add_kl_to_step_reward(case.core, 0.05)
    a = whiten(case.core, gae(case.rows, 1.0, 0.95))
    value = squared(case, lambda_return(case.rows, lambda_=0.95), 0.2)
    return Losses(clipped(case, a), lambda v, logp: 0.1 * value(v, logp))


def vc_ppo(case: Case) -> Losses:
    a = gae(case.rows, 1.0, 0.95)
    return Losses(clipped(case, a), squared(case, lambda_return(case.rows)))


def vapo(case: Case, alpha: float = 0.05) -> Losses:
    core = case.core
    surrogate = clipped(case, gae(case.rows, 1.0, 1.0, alpha=alpha), 0.2, 0.28)
    right = [(i, t) for i in core.trained() if core.score[i] > 0 for t in core.tokens(i)]

    def policy(logp: Matrix, fixed: Matrix) -> float:
        likelihood = sum(logp[i][t] for i, t in right) / max(len(right), 1)
        return surrogate(logp, fixed) - 0.1 * likelihood

    return Losses(policy, squared(case, lambda_return(case.rows)))


def vineppo(case: Case) -> Losses:
    core = case.core
    surrogate = clipped(case, whiten(core, value_change(case.rows, "step", "reward"), ddof=1))

    def policy(logp: Matrix, fixed: Matrix) -> float:
        return surrogate(logp, fixed) + 1e-4 * seq_mean_of_token_sum(core, kl(core, logp, fixed, "k3", cap=10.0))

    return Losses(policy)


def dvpo(case: Case) -> Losses:
    reference.add_kl_to_step_reward(case.core, 0.1)
    return Losses(clipped(case, whiten(case.core, gae(case.rows, 1.0, 0.95, last="value"), ddof=1)))


def dvpo_static_q(case: Case) -> Losses:
    a = whiten(case.core, reference_values.static_q(case.rows), ddof=1)
    return Losses(clipped(case, a, penalty=0.2))


def sao(case: Case) -> Losses:
    rows = case.rows
    rows.advantage = gae(rows, 1.0, 1.0, alpha=1.5)

    def policy(logp: Matrix, fixed: Matrix) -> float:
        return token_mean(case.core, lambda i, t: reference_values.banded(rows, logp, fixed, i, t, 0.3, 5.0))

    return Losses(policy, squared(case, lambda_return(rows)))


def oreo(case: Case, level: str) -> Losses:
    """Losses of OREO: means over completions of the mean over their terms."""
    rows, beta = case.rows, 0.03
    rows.target = lambda_return(rows)
    states = taught(case, rows.target)

    def policy(logp: Matrix, fixed: Matrix) -> float:
        each = [reference_values.soft_path_policy(rows, logp, fixed, i, beta, level) for i in case.core.counted()]
        return fmean(each) if each else 0.0

    def value(v: Matrix, logp: Matrix) -> float:
        each = [
            fmean(reference_values.soft_path_value(rows, v, logp, i, c, beta) for c in columns)
            for i, columns in states.items()
        ]
        return fmean(each) if each else 0.0

    return Losses(policy, value)


def oreo_token(case: Case) -> Losses:
    return oreo(case, "token")


def oreo_step(case: Case) -> Losses:
    return oreo(case, "step")


def oreo_response(case: Case) -> Losses:
    return oreo(case, "response")


def pure(case: Case) -> Losses:
    for i in range(len(case.core.mask)):
        ends = [step[-1] for step in case.rows.steps(i)]
        worst = reference_values.worst_weighed([case.judged[i][t] for t in ends], 0.1) if ends else []
        for t, judgement in zip(ends, worst, strict=True):
            case.core.step_reward[i][t] += judgement
    reference.add_kl_to_step_reward(case.core, 1e-3, "k3")
    return Losses(clipped(case, whiten(case.core, reference_values.token_centred(case.rows, 1024), ddof=1)))


def psgpo(case: Case) -> Losses:
    add_judgements(case)
    a = whiten(case.core, gae(case.rows, 1.0, 0.95))
    return Losses(clipped(case, a), squared(case, lambda_return(case.rows, lambda_=0.95), 0.2))


def prime(case: Case) -> Losses:
    """Losses of PRIME: the value of a prefix is β times its log-ratio, so a token's reward is its change."""
    core, rows = case.core, case.rows
    core.kept = reference.mixed_groups(core)
    gains = {
        i: [rows.value[i][t] - (rows.value[i][t - 1] if t - 1 in rows.states(i) else 0.0) for t in core.tokens(i)]
        for i in range(len(core.mask))
    }
    trained = [i for i in core.trained() if core.scored(i)]
    largest = max((abs(sum(gains[i][k:])) for i in trained for k in range(len(gains[i]))), default=0.0)
    for i, mine in gains.items():
        for t, gain in zip(core.tokens(i), mine, strict=True):
            core.step_reward[i][t] += gain / (largest + 1e-6)
    a = whiten(core, reference_values.implicit_returns(rows), ddof=1)
    ends = [(i, rows.tokens(i)[-1]) for i in core.counted() if core.scored(i)]

    def value(v: Matrix, logp: Matrix) -> float:
        return sum(bce(v[i][t], core.reward[i]) for i, t in ends) / max(len(ends), 1)

    return Losses(clipped(case, a), value)


def without_values(formula: Callable[[reference.Rows], Loss]) -> Callable[[Case], Losses]:
    return lambda case: Losses(formula(case.core))


RECIPES: dict[str, Callable[[Case], Losses]] = {
    **{name: without_values(formula) for name, formula in reference.RECIPES.items()},
    "ppo": ppo,
    "vc_ppo": vc_ppo,
    "vapo": vapo,
    "vineppo": vineppo,
    "dvpo": dvpo,
    "dvpo_static_q": dvpo_static_q,
    "sao": sao,
    "oreo_token": oreo_token,
    "oreo_step": oreo_step,
    "oreo_response": oreo_response,
    "pure": pure,
    "psgpo": psgpo,
    "prime": prime,
}


# ---- value models alone: the loss of one optimiser step --------------------------------------------------------------


def labels(case: Case) -> Matrix:
    """Labels: the reward of the completion at each of its states."""
    result = case.rows.zeros(math.nan)
    for i in range(len(case.rows.mask)):
        for c in case.rows.states(i) if case.rows.trained(i) else []:
            result[i][c] = case.rows.reward[i]
    return result


def averaged(case: Case, target: Matrix, loss_of: Callable[[float, float], float]) -> ValueLoss:
    """The mean over all states that learn."""
    places = [(i, c) for i, columns in taught(case, target).items() for c in columns]

    def loss(v: Matrix, logp: Matrix) -> float:
        return sum(loss_of(v[i][c], target[i][c]) for i, c in places) / max(len(places), 1)

    return loss


def twist(case: Case, contrastive: bool) -> ValueLoss:
    case.rows.target = labels(case)
    count = sum(map(len, taught(case, case.rows.target).values()))

    def loss(v: Matrix, logp: Matrix) -> float:
        return reference_values.twist_sums(case.rows, v, v, 0.5, False, contrastive) / max(count, 1)

    return loss


def tilted_weight(case: Case, i: int, beta: float) -> float:
    """Weight exp((r - r_BL) / β), with r_BL = β log(μ / π_ref), over its mean in the group."""
    rows = case.rows

    def log_weight(j: int) -> float:
        ratio = sum(rows.logp_ref[j][t] - rows.logp_sampler[j][t] for t in rows.tokens(j))
        return rows.reward[j] / beta + ratio

    group = [j for j in range(len(rows.mask)) if rows.group[j] == rows.group[i] and rows.trained(j)]
    return math.exp(log_weight(i)) / fmean(math.exp(log_weight(j)) for j in group)


def tq_star_indirect(case: Case) -> ValueLoss:
    target = labels(case)
    places = [(i, c, tilted_weight(case, i, 1.0)) for i, columns in taught(case, target).items() for c in columns]

    def loss(v: Matrix, logp: Matrix) -> float:
        return sum(0.5 * w * (v[i][c] - target[i][c]) ** 2 for i, c, w in places) / max(len(places), 1)

    return loss


VALUES: dict[str, Callable[[Case], ValueLoss]] = {
    "vas": lambda case: squared(case, lambda_return(case.rows, lambda_=0.95), by_completion=True),
    "fudge": lambda case: averaged(case, labels(case), bce),
    "contrastive_twist": lambda case: twist(case, contrastive=True),
    "sixo": lambda case: twist(case, contrastive=False),
    "tq_star": lambda case: squared(case, labels(case)),
    "tq_star_indirect": tq_star_indirect,
    "ivo_value": lambda case: squared(case, labels(case)),
}
