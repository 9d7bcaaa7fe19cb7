"""Scalar reference of ``posttrain/parts`` and of the core recipes: every formula as plain loops over numbers.

Written from the papers and independent of the parts: no tensor operation, no function of the package. Slow and plain on
purpose. Python floats are float64, so what differs from the parts is their float32.

``logp`` is the policy's log-prob now and may be moved to take derivatives by differences; ``fixed`` is the same without
being moved, for what carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, stdev

Matrix = list[list[float]]
Term = Callable[[int, int], float]


@dataclass
class Rows:
    """A batch as lists. ``kept`` are the completions that selection has left."""

    mask: list[list[bool]]
    group: list[int]
    baseline_only: list[bool]
    stopped: list[bool]
    score: list[float]
    reward: list[float]
    step_reward: Matrix
    logp_old: Matrix
    logp_ref: Matrix
    logp_sampler: Matrix
    rewards: Matrix
    weights: list[float]
    entropy: Matrix
    kept: list[int] = field(default_factory=list)

    def tokens(self, i: int) -> list[int]:
        return [t for t, chosen in enumerate(self.mask[i]) if chosen]

    def scored(self, i: int) -> bool:
        return not math.isnan(self.reward[i])

    def trained(self) -> list[int]:
        return [i for i in self.kept if not self.baseline_only[i]]

    def counted(self) -> list[int]:
        """Completions that a normaliser counts."""
        return [i for i in self.trained() if self.tokens(i)]

    def group_of(self, i: int) -> list[int]:
        """Completions whose rewards are in the statistics of i's group."""
        return [j for j in self.trained() if self.group[j] == self.group[i] and self.scored(j)]

    def zeros(self) -> Matrix:
        return [[0.0] * len(row) for row in self.mask]


def read(batch, entropy=None) -> Rows:
    """The lists of a batch (and the entropies of a forward pass)."""
    return Rows(
        mask=batch.mask.tolist(),
        group=batch.group.tolist(),
        baseline_only=batch.baseline_only.tolist(),
        stopped=[finish == 0 for finish in batch.finish.tolist()],
        score=batch.score.tolist(),
        reward=batch.reward.tolist(),
        step_reward=batch.step_reward.tolist(),
        logp_old=batch.logp_old.tolist(),
        logp_ref=batch.logp_ref.tolist(),
        logp_sampler=batch.logp_sampler.tolist(),
        rewards=batch.rewards.tolist(),
        weights=list(batch.reward_columns.weights),
        entropy=[] if entropy is None else entropy.tolist(),
        kept=list(range(len(batch))),
    )


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def spread(values: list[float], ddof: int) -> float:
    """Standard deviation; 0 if there are too few values."""
    if len(values) <= ddof:
        return 0.0
    mean = fmean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - ddof))


# ---- advantages -----------------------------------------------------------------------------------------------------


def whole_reward(rows: Rows, i: int) -> float:
    return rows.reward[i] + sum(rows.step_reward[i][t] for t in rows.tokens(i))


def baseline(rows: Rows, i: int, center: str, value: Callable[[int], float]) -> float | None:
    """Baseline of a completion; None if it has none, so that its advantage is 0."""
    group = rows.group_of(i)
    if center == "none":
        return 0.0
    if center == "group":
        return fmean(value(j) for j in group)
    if center == "leave_one_out":
        others = [value(j) for j in group if j != i]
        return fmean(others) if others else None
    if center == "length":
        tokens = sum(len(rows.tokens(j)) for j in group)
        return sum(len(rows.tokens(j)) * value(j) for j in group) / tokens if tokens else None
    if center == "batch":
        return fmean(value(j) for j in rows.trained() if rows.scored(j))
    if center == "greedy":
        greedy = [
            value(j) for j in rows.kept if rows.baseline_only[j] and rows.group[j] == rows.group[i] and rows.scored(j)
        ]
        return fmean(greedy) if greedy else None
    raise ValueError(center)


def outcome(rows: Rows, center: str, scale: str = "none", ddof: int = 1, eps: float = 1e-4) -> Matrix:
    advantage = rows.zeros()
    whole = [whole_reward(rows, i) for i in range(len(rows.reward))]
    for i in rows.trained():
        base = baseline(rows, i, center, whole.__getitem__) if rows.scored(i) else None
        if base is None:
            continue
        result = whole[i] - base
        members = rows.group_of(i) if scale == "group" else [j for j in rows.trained() if rows.scored(j)]
        std = spread([whole[j] for j in members], ddof)
        if scale != "none" and std > 0:
            result /= std + eps
        for t in rows.tokens(i):
            advantage[i][t] = result
    return advantage


def returns(rows: Rows, gamma: float = 1.0, center: str = "none", own: bool = False) -> Matrix:
    advantage = rows.zeros()
    for i in rows.trained():
        if not rows.scored(i):
            continue
        base = baseline(rows, i, center, rows.reward.__getitem__)
        final = 0.0 if base is None else rows.reward[i] - base
        tokens = rows.tokens(i)
        for k, t in enumerate(tokens):
            counted = tokens[k : k + 1] if own else tokens[k:]
            later = sum(gamma**n * rows.step_reward[i][u] for n, u in enumerate(counted))
            advantage[i][t] = later + gamma ** (len(tokens) - 1 - k) * final
    return advantage


def whiten(rows: Rows, advantage: Matrix, shift: bool = True, ddof: int = 0, eps: float = 1e-8) -> Matrix:
    places = [(i, t) for i in rows.trained() if rows.scored(i) for t in rows.tokens(i)]
    values = [advantage[i][t] for i, t in places]
    mean, variance = (fmean(values), spread(values, ddof) ** 2) if values else (0.0, 0.0)
    result = rows.zeros()
    for i, t in places:
        result[i][t] = (advantage[i][t] - mean) / math.sqrt(variance + eps) + (0.0 if shift else mean)
    return result


# ---- normalisers ----------------------------------------------------------------------------------------------------


def token_mean(rows: Rows, term: Term) -> float:
    places = [(i, t) for i in rows.counted() for t in rows.tokens(i)]
    return sum(term(i, t) for i, t in places) / max(len(places), 1)


def seq_mean_of_token_mean(rows: Rows, term: Term) -> float:
    each = [fmean(term(i, t) for t in rows.tokens(i)) for i in rows.counted()]
    return fmean(each) if each else 0.0


def seq_mean_of_token_sum(rows: Rows, term: Term) -> float:
    each = [sum(term(i, t) for t in rows.tokens(i)) for i in rows.counted()]
    return fmean(each) if each else 0.0


def seq_sum_over(rows: Rows, term: Term, length: int) -> float:
    each = [sum(term(i, t) for t in rows.tokens(i)) / length for i in rows.counted()]
    return fmean(each) if each else 0.0


def token_sum(rows: Rows, term: Term) -> float:
    return sum(term(i, t) for i in rows.counted() for t in rows.tokens(i))


# ---- loss terms, a token at a time ----------------------------------------------------------------------------------


def log_ratio(logp: Matrix, before: Matrix, i: int, t: int) -> float:
    return clamp(logp[i][t] - before[i][t], -20.0, 20.0)


def surrogate(ratio: float, a: float, low: float, high: float, dual: float = 0.0, cap: float = math.inf) -> float:
    """Clipped surrogate min(min(ratio, cap) a, clip(ratio) a), at least dual * a for a < 0 if there is a ``dual``."""
    gain = min(min(ratio, cap) * a, clamp(ratio, 1 - low, 1 + high) * a)
    return max(gain, dual * a) if dual and a < 0 else gain


def clip(
    rows: Rows, a: Matrix, logp: Matrix, low: float, high: float, dual: float = 0.0, cap: float = math.inf
) -> Term:
    return lambda i, t: -surrogate(math.exp(log_ratio(logp, rows.logp_old, i, t)), a[i][t], low, high, dual, cap)


def sequence_ratio(rows: Rows, logp: Matrix, i: int) -> float:
    return math.exp(fmean(log_ratio(logp, rows.logp_old, i, t) for t in rows.tokens(i)))


def clip_sequence(rows: Rows, a: Matrix, logp: Matrix, low: float, high: float) -> Term:
    """Loss of GSPO with one advantage for each completion: the same number at all of its tokens."""
    return lambda i, t: -surrogate(sequence_ratio(rows, logp, i), a[i][t], low, high)


def geometric(rows: Rows, a: Matrix, logp: Matrix, low: float, high: float) -> Term:
    """Loss of GMPO: one number for all tokens of a completion, from its one advantage."""

    def term(i: int, t: int) -> float:
        logs = [log_ratio(logp, rows.logp_old, i, u) for u in rows.tokens(i)]
        one_sided = [min(x, high) if a[i][t] > 0 else max(x, -low) for x in logs]
        return -a[i][t] * math.exp(fmean(one_sided))

    return term


def reinforce(a: Matrix, logp: Matrix) -> Term:
    return lambda i, t: -a[i][t] * logp[i][t]


def cispo(rows: Rows, a: Matrix, logp: Matrix, fixed: Matrix, floor: float, cap: float) -> Term:
    def term(i: int, t: int) -> float:
        return -clamp(math.exp(log_ratio(fixed, rows.logp_old, i, t)), floor, cap) * a[i][t] * logp[i][t]

    return term


def estimate(x: float, estimator: str) -> float:
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]


def kl(
    rows: Rows, logp: Matrix, fixed: Matrix, estimator: str, importance: bool = False, cap: float = math.inf
) -> Term:
    def term(i: int, t: int) -> float:
        x, still = log_ratio(logp, rows.logp_ref, i, t), log_ratio(fixed, rows.logp_ref, i, t)
        if estimator == "k3_k2":
            value = estimate(still, "k3") + estimate(x, "k2") - estimate(still, "k2")
        else:
            value = estimate(x, estimator)
        if not importance:
            return min(value, cap)
        moving = logp if estimator in ("k1", "k3") else fixed
        return min(value * math.exp(log_ratio(moving, rows.logp_old, i, t)), cap)

    return term


def nll_positive(rows: Rows, logp: Matrix, threshold: float = 0.0) -> Term:
    return lambda i, t: -logp[i][t] if rows.score[i] > threshold else 0.0


# ---- weights of loss terms ------------------------------------------------------------------------------------------


def off_policy_ratio(rows: Rows, i: int, t: int) -> float:
    return math.exp(log_ratio(rows.logp_old, rows.logp_sampler, i, t))


def truncated_importance(rows: Rows, cap: float) -> Term:
    return lambda i, t: min(off_policy_ratio(rows, i, t), cap)


def masked_importance(rows: Rows, low: float, high: float) -> Term:
    def term(i: int, t: int) -> float:
        weight = off_policy_ratio(rows, i, t)
        return weight if low <= weight <= high else 0.0

    return term


def masked_sequence(rows: Rows, low: float, high: float) -> Term:
    def term(i: int, t: int) -> float:
        logs = [log_ratio(rows.logp_old, rows.logp_sampler, i, u) for u in rows.tokens(i)]
        return 1.0 if low <= math.exp(fmean(logs)) <= high else 0.0

    return term


# ---- selection and rewards ------------------------------------------------------------------------------------------


def mixed_groups(rows: Rows) -> list[int]:
    kept = []
    for i in rows.kept:
        group = [j for j in rows.trained() if rows.group[j] == rows.group[i]]
        scores = {rows.score[j] for j in group if not math.isnan(rows.score[j])}
        if len(scores) > 1:
            kept.append(i)
    return kept


def overlong(rows: Rows, i: int, limit: int, buffer: int) -> float:
    length = len(rows.tokens(i))
    if length <= limit - buffer:
        return 0.0
    return (limit - buffer - length) / buffer if length <= limit else -1.0


def length_reward(rows: Rows, i: int, threshold: float = 0.0) -> float:
    group = [j for j in rows.trained() if rows.group[j] == rows.group[i] and not math.isnan(rows.score[j])]
    lengths = [len(rows.tokens(j)) for j in group]
    if i not in group or max(lengths) == min(lengths):
        return 0.0
    favour = 0.5 - (len(rows.tokens(i)) - min(lengths)) / (max(lengths) - min(lengths))
    return favour if rows.score[i] > threshold else min(0.0, favour)


def add_kl_to_step_reward(rows: Rows, weight: float, estimator: str = "k1") -> None:
    for i, row in enumerate(rows.step_reward):
        for t in rows.tokens(i):
            row[t] -= weight * estimate(rows.logp_old[i][t] - rows.logp_ref[i][t], estimator)


def add_kl_to_reward(rows: Rows, weight: float) -> None:
    for i in range(len(rows.reward)):
        rows.reward[i] -= weight * sum(rows.logp_old[i][t] - rows.logp_ref[i][t] for t in rows.tokens(i))


# ---- recipes: the loss of a batch, by the paper's formula and with its numbers --------------------------------------

Loss = Callable[[Matrix, Matrix], float]
"""The type of a scalar loss: a function of (logp, fixed)."""


def plus(first: Term, coef: float, second: Term) -> Term:
    return lambda i, t: first(i, t) + coef * second(i, t)


def grpo(rows: Rows) -> Loss:
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: seq_mean_of_token_mean(
        rows, plus(clip(rows, a, logp, 0.2, 0.2), 0.04, kl(rows, logp, fixed, "k3"))
    )


def dr_grpo(rows: Rows) -> Loss:
    a = outcome(rows, "group")
    return lambda logp, fixed: seq_sum_over(rows, clip(rows, a, logp, 0.2, 0.2), 1024)


def dapo(rows: Rows, limit: int = 1024, buffer: int = 204) -> Loss:
    rows.kept = mixed_groups(rows)
    for i in range(len(rows.reward)):
        rows.reward[i] += 0.5 * overlong(rows, i, limit, buffer)
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: token_mean(rows, clip(rows, a, logp, 0.2, 0.28))


def rloo(rows: Rows) -> Loss:
    add_kl_to_reward(rows, 0.03)
    a = outcome(rows, "leave_one_out")
    return lambda logp, fixed: seq_mean_of_token_sum(rows, reinforce(a, logp))


def plain_reinforce(rows: Rows) -> Loss:
    a = outcome(rows, "batch")
    return lambda logp, fixed: seq_mean_of_token_sum(rows, reinforce(a, logp))


def reinforce_plus_plus(rows: Rows) -> Loss:
    add_kl_to_step_reward(rows, 0.01)
    a = whiten(rows, returns(rows))
    return lambda logp, fixed: token_mean(rows, clip(rows, a, logp, 0.2, 0.2))


def reinforce_plus_plus_baseline(rows: Rows) -> Loss:
    a = whiten(rows, outcome(rows, "group"))
    return lambda logp, fixed: token_mean(rows, plus(clip(rows, a, logp, 0.2, 0.2), 1e-5, kl(rows, logp, fixed, "k2")))


def gspo(rows: Rows) -> Loss:
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: seq_mean_of_token_mean(rows, clip_sequence(rows, a, logp, 3e-4, 4e-4))


def cispo_recipe(rows: Rows) -> Loss:
    rows.kept = mixed_groups(rows)
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: token_mean(rows, cispo(rows, a, logp, fixed, 0.0, 5.0))


def gmpo(rows: Rows) -> Loss:
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: seq_mean_of_token_mean(rows, geometric(rows, a, logp, 0.4, 0.4))


def remax(rows: Rows) -> Loss:
    add_kl_to_step_reward(rows, 0.05)
    a = returns(rows, center="greedy", own=True)
    return lambda logp, fixed: seq_mean_of_token_sum(rows, reinforce(a, logp))


def opo(rows: Rows) -> Loss:
    a = outcome(rows, "length")
    return lambda logp, fixed: token_mean(rows, reinforce(a, logp))


def lite_ppo(rows: Rows) -> Loss:
    a = outcome(rows, "group", "batch")
    return lambda logp, fixed: token_mean(rows, clip(rows, a, logp, 0.2, 0.2))


def gdpo(rows: Rows) -> Loss:
    def z(i: int, k: int) -> float:
        values = [rows.rewards[j][k] for j in rows.group_of(i)]
        spread = stdev(values) if len(values) > 1 else 0.0
        return (rows.rewards[i][k] - fmean(values)) / (spread + 1e-4) if spread > 0 else 0.0

    trained = [i for i in rows.trained() if rows.scored(i)]
    sums = {i: sum(w * z(i, k) for k, w in enumerate(rows.weights)) for i in trained}
    rows.reward = [sums.get(i, 0.0 if rows.scored(i) else math.nan) for i in range(len(rows.reward))]
    a = outcome(rows, "batch", "batch")
    return lambda logp, fixed: seq_mean_of_token_mean(rows, clip(rows, a, logp, 0.2, 0.2))


def intellect2(rows: Rows) -> Loss:
    a = outcome(rows, "group", "group")
    return lambda logp, fixed: token_mean(
        rows, plus(clip(rows, a, logp, 0.2, 0.2, cap=4.0), 0.001, kl(rows, logp, fixed, "k3"))
    )


RECIPES: dict[str, Callable[[Rows], Loss]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "rloo": rloo,
    "reinforce": plain_reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gspo": gspo,
    "cispo": cispo_recipe,
    "gmpo": gmpo,
    "remax": remax,
    "opo": opo,
    "gdpo": gdpo,
    "lite_ppo": lite_ppo,
    "intellect2": intellect2,
}


def gradient(loss: Loss, logp: Matrix, places: list[tuple[int, int]], step: float = 1e-5) -> Matrix:
    """Derivatives of a loss by central differences at some tokens, 0 elsewhere; about 1e-9 exact."""
    result = [[0.0] * len(row) for row in logp]
    moved = [list(row) for row in logp]
    for i, t in places:
        moved[i][t] = logp[i][t] + step
        above = loss(moved, logp)
        moved[i][t] = logp[i][t] - step
        result[i][t] = (above - loss(moved, logp)) / (2 * step)
        moved[i][t] = logp[i][t]
    return result
