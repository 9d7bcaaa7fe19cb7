"""Scalar reference of the parts about values: every formula as plain loops over numbers, see ``reference.py``.

Sums are written as the papers write them, n-step returns and all, not as the recursions of the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from reference import Matrix, log_ratio

Vector = list[float]
NAN = math.nan


@dataclass
class Rows:
    """A batch as lists."""

    mask: list[list[bool]]
    group: list[int]
    baseline_only: list[bool]
    stopped: list[bool]
    step_id: list[list[int]]
    columns: list[dict]
    score: Vector
    reward: Vector
    step_reward: Matrix
    logp_ref: Matrix
    logp_sampler: Matrix
    value: Matrix
    value_next: Matrix | None
    target: Matrix
    advantage: Matrix

    def tokens(self, i: int) -> list[int]:
        return [t for t, chosen in enumerate(self.mask[i]) if chosen]

    def trained(self, i: int) -> bool:
        return not self.baseline_only[i] and not math.isnan(self.reward[i])

    def states(self, i: int) -> list[int]:
        return sorted({t for t in self.tokens(i)} | {t - 1 for t in self.tokens(i) if t})

    def learned(self, i: int) -> list[int]:
        return [c for c in self.states(i) if not math.isnan(self.target[i][c])]

    def zeros(self, fill: float = 0.0) -> Matrix:
        return [[fill] * len(row) for row in self.mask]

    def steps(self, i: int) -> list[list[int]]:
        """The chosen tokens of each reasoning step."""
        found: list[list[int]] = []
        for t in self.tokens(i):
            if found and self.step_id[i][found[-1][0]] == self.step_id[i][t]:
                found[-1].append(t)
            else:
                found.append([t])
        return found


def read(batch) -> Rows:
    def lists(name: str):
        tensor = getattr(batch, name)
        return None if tensor is None else tensor.tolist()

    names = ("mask", "group", "baseline_only", "step_id", "score", "reward", "step_reward", "logp_ref", "logp_sampler")
    filled = {name: lists(name) for name in (*names, "value", "value_next", "target", "advantage")}
    return Rows(stopped=[finish == 0 for finish in batch.finish.tolist()], columns=list(batch.rows), **filled)


def rewards(rows: Rows, i: int) -> Vector:
    tokens = rows.tokens(i)
    return [rows.step_reward[i][t] + (rows.reward[i] if t == tokens[-1] else 0.0) for t in tokens]


def lam(rows: Rows, i: int, lambda_: float, alpha: float | None) -> float:
    return lambda_ if alpha is None else max(0.0, 1 - 1 / (alpha * len(rows.tokens(i))))


def next_values(rows: Rows, i: int, table: Matrix, truncated: str) -> Vector:
    """Value after each chosen token: that of the state before the next one; at the end the value of the rest."""
    tokens = rows.tokens(i)
    cut = not rows.stopped[i] and truncated == "bootstrap"
    return [table[i][t - 1] for t in tokens[1:]] + [table[i][tokens[-1]] if cut else 0.0]


# ---- targets and advantages -----------------------------------------------------------------------------------------


def n_step(r: Vector, after: Vector, k: int, n: int, gamma: float) -> float:
    """n-step return: rewards of n tokens from the k-th on, plus the value after them."""
    seen = sum(gamma**j * r[k + j] for j in range(n))
    return seen + gamma**n * after[k + n - 1]


def mixed_return(r: Vector, after: Vector, k: int, gamma: float, lambda_: float) -> float:
    """λ-return, Sutton and Barto 2018: every n-step return, weighed by λ."""
    left = len(r) - k
    weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, left)] + [lambda_ ** (left - 1)]
    return sum(w * n_step(r, after, k, n, gamma) for n, w in enumerate(weights, 1))


def lambda_return(
    rows: Rows, gamma: float = 1.0, lambda_: float = 1.0, alpha: float | None = None, truncated: str = "end"
) -> Matrix:
    result = rows.zeros(NAN)
    for i in range(len(rows.mask)):
        tokens = rows.tokens(i)
        if not tokens or not rows.trained(i):
            continue
        weight, r = lam(rows, i, lambda_, alpha), rewards(rows, i)
        for c in rows.states(i):
            later = [k for k, t in enumerate(tokens) if t > c]
            if later and rows.value_next is None:
                result[i][c] = mixed_return(r, next_values(rows, i, rows.value, truncated), later[0], gamma, weight)
            elif later:
                result[i][c] = expected_return(rows, i, later, weight, truncated)
            elif rows.stopped[i] or truncated == "end":
                result[i][c] = rows.reward[i]
    return result


def soft_return(rows: Rows, beta: float, truncated: str = "end") -> Matrix:
    """Soft return: reward still to come, minus β times the sampler's log-ratio for it."""
    result = lambda_return(rows, truncated="end")
    for i in range(len(rows.mask)):
        for c in rows.states(i):
            result[i][c] -= beta * paid(rows, rows.logp_sampler, i, c)
            if truncated == "bootstrap" and not rows.stopped[i]:
                result[i][c] = NAN
    return result


def expected_return(rows: Rows, i: int, later: list[int], weight: float, truncated: str) -> float:
    """λ-return with backups: Σ_j λ^j ((1 - λ) B_j + λ r_j) over the later tokens, with B_j of the state before j."""
    assert rows.value_next is not None
    tokens, r = rows.tokens(i), rewards(rows, i)
    rest = rows.value_next[i][tokens[-1]] if not rows.stopped[i] and truncated == "bootstrap" else 0.0
    terms = [(1 - weight) * rows.value_next[i][tokens[k] - 1] + weight * r[k] for k in later]
    return sum(weight**j * term for j, term in enumerate(terms)) + weight ** len(later) * rest


def gae(
    rows: Rows,
    gamma: float,
    lambda_: float,
    alpha: float | None = None,
    truncated: str = "end",
    last: str = "reward",
) -> Matrix:
    result = rows.zeros()
    for i in range(len(rows.mask)):
        tokens = rows.tokens(i)
        if not tokens or not rows.trained(i):
            continue
        after, r = next_values(rows, i, rows.value, truncated), rewards(rows, i)
        if last != "reward":
            r[-1] -= rows.reward[i]
        if last == "value":
            after[-1] = rows.value[i][tokens[-1]]
        errors = [r[k] + gamma * after[k] - rows.value[i][t - 1] for k, t in enumerate(tokens)]
        decay = gamma * lam(rows, i, lambda_, alpha)
        for k, t in enumerate(tokens):
            result[i][t] = sum(decay**j * error for j, error in enumerate(errors[k:]))
    return result


def value_change(rows: Rows, level: str, last: str) -> Matrix:
    result = rows.zeros()
    for i in range(len(rows.mask)):
        tokens = rows.tokens(i)
        if not tokens or not rows.trained(i):
            continue
        segments = rows.steps(i) if level == "step" else [[t] for t in tokens]
        final = rows.value[i][tokens[-1]] if last == "value" else rows.reward[i]
        values = [rows.value[i][segment[0] - 1] for segment in segments] + [final]
        for k, segment in enumerate(segments):
            for t in segment:
                result[i][t] = values[k + 1] - values[k]
    return result


def static_q(rows: Rows) -> Matrix:
    result = rows.zeros()
    for i in range(len(rows.mask)):
        for t in rows.tokens(i) if rows.trained(i) else []:
            result[i][t] = rows.value[i][t]
    return result


def worst_weighed(rewards: Vector, temperature: float) -> Vector:
    """Rewards of a completion's steps, each times its share in the softmax of -r / T."""
    weights = softmax([-r / temperature for r in rewards])
    return [w * r for w, r in zip(weights, rewards, strict=True)]


def token_centred(rows: Rows, length: int) -> Matrix:
    """Returns against the other completions' sum of returns over a constant number of tokens."""
    result = rows.zeros()
    gains = {}
    for i in range(len(rows.mask)):
        if rows.trained(i):
            r = rewards(rows, i) if rows.tokens(i) else []
            gains[i] = [sum(r[k:]) for k in range(len(r))]
    for i, mine in gains.items():
        others = [sum(gains[j]) for j in gains if rows.group[j] == rows.group[i] and j != i]
        base = sum(others) / (len(others) * length) if others else 0.0
        for t, gain in zip(rows.tokens(i), mine, strict=True):
            result[i][t] = gain - base
    return result


def implicit_returns(rows: Rows) -> Matrix:
    """PRIME: each reward against the others of the group, then summed."""
    result = rows.zeros()
    for i in range(len(rows.mask)):
        tokens = rows.tokens(i)
        others = [j for j in range(len(rows.mask)) if j != i and rows.trained(j) and rows.group[j] == rows.group[i]]
        if not rows.trained(i) or not tokens:
            continue
        means = [fmean(rows.step_reward[j][t] for t in rows.tokens(j)) if rows.tokens(j) else 0.0 for j in others]
        mine = fmean(rows.step_reward[i][t] for t in tokens)
        process = fmean(means) if others else mine
        outcome = fmean(rows.reward[j] for j in others) if others else rows.reward[i]
        for k, t in enumerate(tokens):
            result[i][t] = sum(rows.step_reward[i][u] - process for u in tokens[k:]) + rows.reward[i] - outcome
    return result


# ---- losses: a function of (rows, i, c, ...) at a state with a target ------------------------------------------------


def mse(v: float, target: float, old: float, clip: float | None) -> float:
    loss = (v - target) ** 2
    if clip is not None:
        loss = max(loss, (max(old - clip, min(old + clip, v)) - target) ** 2)
    return loss / 2


def huber(v: float, target: float, delta: float) -> float:
    u = abs(v - target)
    return u * u / 2 if u <= delta else delta * (u - delta / 2)


def expectile(v: float, target: float, tau: float) -> float:
    u = target - v
    return (tau if u >= 0 else 1 - tau) * u * u


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def cross_entropy(target: Vector, logits: Vector) -> float:
    return -sum(p * math.log(q) for p, q in zip(target, softmax(logits), strict=True) if p > 0)


def gauss_below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def hl_gauss_target(y: float, support: Vector, sigma: float = 0.75) -> Vector:
    width = support[1] - support[0]
    y = max(support[0], min(support[-1], y))
    mass = [
        gauss_below((z + width / 2 - y) / (sigma * width)) - gauss_below((z - width / 2 - y) / (sigma * width))
        for z in support
    ]
    return [m / sum(mass) for m in mass]


def two_hot_target(y: float, support: Vector) -> Vector:
    y = max(support[0], min(support[-1], y))
    result = [0.0] * len(support)
    k = min(int((y - support[0]) / (support[1] - support[0])), len(support) - 2)
    share = (y - support[k]) / (support[k + 1] - support[k])
    result[k], result[k + 1] = 1 - share, share
    return result


def project(probabilities: Vector, atoms: Vector, support: Vector) -> Vector:
    result = [0.0] * len(support)
    for p, atom in zip(probabilities, atoms, strict=True):
        for k, share in enumerate(two_hot_target(atom, support)):
            result[k] += p * share
    return result


def c51(rows: Rows, logits: list[list[Vector]], support: Vector, i: int, c: int, gamma: float, truncated: str) -> float:
    tokens, r = rows.tokens(i), rewards(rows, i)
    k = next((k for k, t in enumerate(tokens) if t > c), None)
    if k is None:
        return cross_entropy(two_hot_target(rows.reward[i], support), logits[i][c])
    if k + 1 < len(tokens):
        later = softmax(logits[i][tokens[k + 1] - 1])
        target = project(later, [r[k] + gamma * z for z in support], support)
    elif not rows.stopped[i] and truncated == "bootstrap":
        target = project(softmax(logits[i][tokens[k]]), [r[k] + gamma * z for z in support], support)
    else:
        target = two_hot_target(r[k], support)
    return cross_entropy(target, logits[i][c])


def quantile(quantiles: Vector, targets: Vector, kappa: float) -> float:
    total = 0.0
    for i, q in enumerate(quantiles):
        level = (i + 0.5) / len(quantiles)
        for y in targets:
            u = y - q
            size = abs(u) if kappa == 0 else (u * u / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)) / kappa
            total += abs(level - (u < 0)) * size / len(targets)
    return total


def bce(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def q_ranking(scores: Vector, correct: list[bool], margin: float) -> float:
    """PQM's loss of one completion."""
    wrong = sum(math.exp(q + margin) for q, right in zip(scores, correct, strict=True) if not right)
    terms = [math.log(1 / (1 + wrong))] if wrong else []
    before = 1.0
    for q, right in zip(scores, correct, strict=True):
        if right:
            terms.append(math.log(math.exp(q) / (before + math.exp(q) + wrong)))
            before += math.exp(q)
    return -fmean(terms) if terms else 0.0


def pairs(rows: Rows, group: int) -> list[tuple[int, int]]:
    members = [
        i
        for i in range(len(rows.mask))
        if rows.group[i] == group and rows.trained(i) and rows.tokens(i) and rows.tokens(i)[-1] in rows.learned(i)
    ]
    return [(i, j) for i in members for j in members if rows.reward[i] > rows.reward[j]]


def bradley_terry(rows: Rows, v: Matrix, group: int, column: str | None, smoothing: float) -> float:
    """Bradley-Terry loss: mean over the pairs of a group; 0 without pairs."""
    losses = []
    for i, j in pairs(rows, group):
        gap = (
            v[i][rows.tokens(i)[-1]] - v[j][rows.tokens(j)[-1]] - (rows.columns[i].get(column) or 0.0 if column else 0)
        )
        losses.append((1 - smoothing) * math.log1p(math.exp(-gap)) + smoothing * math.log1p(math.exp(gap)))
    return fmean(losses) if losses else 0.0


def centred(rows: Rows, v: Matrix, group: int) -> float:
    losses = [(v[i][rows.tokens(i)[-1]] + v[j][rows.tokens(j)[-1]]) ** 2 for i, j in pairs(rows, group)]
    return fmean(losses) if losses else 0.0


def paid(rows: Rows, logp: Matrix, i: int, c: int) -> float:
    """Log-ratio that the policy pays: Σ over the chosen tokens after column c of the log-ratio to the reference."""
    return sum(log_ratio(logp, rows.logp_ref, i, t) for t in rows.tokens(i) if t > c)


def soft_path_value(rows: Rows, v: Matrix, logp: Matrix, i: int, c: int, beta: float) -> float:
    return (v[i][c] - rows.target[i][c] + beta * paid(rows, logp, i, c)) ** 2


# ---- twists: of a group at a column ---------------------------------------------------------------------------------


def present(rows: Rows, group: int, c: int) -> list[int]:
    """Completions of a group that have a learned state at a column, or have ended before it."""
    members = [i for i in range(len(rows.mask)) if rows.group[i] == group and rows.trained(i) and rows.tokens(i)]
    return [i for i in members if c in rows.learned(i) or c > rows.tokens(i)[-1]]


def prefix_ratio(rows: Rows, i: int, c: int, importance: bool) -> float:
    if not importance:
        return 0.0
    return sum(rows.logp_ref[i][t] - rows.logp_sampler[i][t] for t in rows.tokens(i) if t <= c)


def twist_weights(rows: Rows, v: Matrix, here: list[int], c: int, beta: float, importance: bool):
    last = len(rows.mask[0])
    positive = softmax([prefix_ratio(rows, i, last, importance) + rows.reward[i] / beta for i in here])
    twists = [(v[i][c] if c in rows.learned(i) else rows.reward[i]) / beta for i in here]
    negative = softmax([prefix_ratio(rows, i, c, importance) + x for i, x in zip(here, twists, strict=True)])
    base = softmax([prefix_ratio(rows, i, c, importance) for i in here])
    return positive, negative, base


def twist_sums(rows: Rows, v: Matrix, fixed: Matrix, beta: float, importance: bool, contrastive: bool) -> float:
    """The sum over groups and columns of the loss times the number of completions that learn there."""
    total = 0.0
    for group in set(rows.group):
        for c in range(len(rows.mask[0])):
            here = present(rows, group, c)
            learning = [i for i in here if c in rows.learned(i)]
            if not learning:
                continue
            positive, negative, base = twist_weights(rows, fixed, here, c, beta, importance)
            for k, i in enumerate(here):
                if i not in learning:
                    continue
                x = v[i][c] / beta
                nce = positive[k] * math.log1p(math.exp(-x)) + base[k] * math.log1p(math.exp(x))
                total += len(learning) * ((negative[k] - positive[k]) * x if contrastive else nce)
    return total


# ---- losses of the policy -------------------------------------------------------------------------------------------


def banded(rows: Rows, logp: Matrix, fixed: Matrix, i: int, t: int, low: float, high: float) -> float:
    ratio = math.exp(log_ratio(fixed, rows.logp_sampler, i, t))
    return -ratio * rows.advantage[i][t] * logp[i][t] if 1 - low < ratio < 1 + high else 0.0


def soft_path_policy(rows: Rows, logp: Matrix, fixed: Matrix, i: int, beta: float, level: str) -> float:
    """Policy loss of soft path consistency: mean over the terms of one completion."""
    tokens = rows.tokens(i)
    if not tokens or not rows.trained(i):
        return 0.0
    segments = {"token": [[t] for t in tokens], "step": rows.steps(i), "response": [tokens]}[level]
    losses = []
    for segment in segments:
        to_come = sum(r for r, t in zip(rewards(rows, i), tokens, strict=True) if t >= segment[0])
        here = sum(log_ratio(logp, rows.logp_ref, i, t) for t in segment)
        ahead = sum(log_ratio(fixed, rows.logp_ref, i, t) for t in tokens if t > segment[-1])
        losses.append((rows.value[i][segment[0] - 1] - to_come + beta * (here + ahead)) ** 2)
    return fmean(losses)
