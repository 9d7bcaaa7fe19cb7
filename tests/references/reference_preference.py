"""Scalar reference of ``posttrain/parts/preference``: every formula as plain loops over numbers.

Written from the papers and independent of the parts: no tensor operation, no function of the package. ``logp`` is the
policy's log-prob now and may be moved to take derivatives by differences; ``rows.fixed`` is the same without being
moved, for what carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Matrix = list[list[float]]
Score = Callable[[int], float]


@dataclass
class Rows:
    """A batch as lists, and one forward pass."""

    mask: list[list[bool]]
    group: list[int]
    baseline_only: list[bool]
    label: list[float]
    columns: list[dict[str, Any]]
    logp_old: Matrix
    logp_ref: Matrix
    baseline: list[float]
    logp: Matrix
    fixed: Matrix
    kl: Matrix
    fixed_kl: Matrix
    collision: Matrix

    def tokens(self, i: int) -> list[int]:
        return [t for t, chosen in enumerate(self.mask[i]) if chosen]

    def present(self) -> list[int]:
        return [i for i in range(len(self.mask)) if self.tokens(i) and not self.baseline_only[i]]

    def labelled(self) -> list[int]:
        return [i for i in self.present() if not math.isnan(self.label[i])]

    def groups(self) -> list[list[int]]:
        """Completions with at least one token, with any label."""
        return [
            [i for i in self.present() if self.group[i] == g] for g in sorted({self.group[i] for i in self.present()})
        ]

    def comparable(self, group: list[int]) -> list[int]:
        return [i for i in group if i in set(self.labelled())]


def read(batch, outputs) -> Rows:
    """The lists of a batch and of a forward pass."""
    logp, kl = outputs.logp.tolist(), outputs.kl_ref.tolist()
    return Rows(
        mask=batch.mask.tolist(),
        group=batch.group.tolist(),
        baseline_only=batch.baseline_only.tolist(),
        label=batch.reward.tolist(),
        columns=list(batch.rows),
        logp_old=batch.logp_old.tolist(),
        logp_ref=batch.logp_ref.tolist(),
        baseline=batch.baseline.tolist() if batch.baseline is not None else [0.0] * len(batch),
        logp=logp,
        fixed=[list(row) for row in logp],
        kl=kl,
        fixed_kl=[list(row) for row in kl],
        collision=outputs.collision.tolist(),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# ---- Scores


def ratios(rows: Rows, i: int) -> list[float]:
    return [rows.logp[i][t] - rows.logp_ref[i][t] for t in rows.tokens(i)]


def log_ratio(rows: Rows) -> Score:
    return lambda i: sum(ratios(rows, i))


def mean_log_ratio(rows: Rows) -> Score:
    return lambda i: fmean(ratios(rows, i)) if rows.tokens(i) else 0.0


def desensitised(rows: Rows, alpha: float) -> Score:
    def score(i: int) -> float:
        lengths = [len(rows.tokens(j)) for j in rows.labelled() if rows.group[j] == rows.group[i]]
        shortest = min(lengths) if lengths else 0
        return sum(ratios(rows, i)[:shortest]) + alpha * sum(ratios(rows, i)[shortest:])

    return score


def discounted(rows: Rows, gamma: float) -> Score:
    return lambda i: sum(gamma**k * ratio for k, ratio in enumerate(ratios(rows, i)))


def discounted_mean(rows: Rows, gamma: float) -> Score:
    def score(i: int) -> float:
        weights = [gamma**k for k in range(len(rows.tokens(i)))]
        return discounted(rows, gamma)(i) / sum(weights) if weights else 0.0

    return score


def log_prob(rows: Rows) -> Score:
    return lambda i: sum(rows.logp[i][t] for t in rows.tokens(i))


def mean_log_prob(rows: Rows) -> Score:
    return lambda i: fmean([rows.logp[i][t] for t in rows.tokens(i)]) if rows.tokens(i) else 0.0


def of_ratio(rows: Rows, f: Callable[[float], float]) -> Score:
    """Score f(z) of the ratio z of the completion's probabilities."""
    return lambda i: f(math.exp(log_ratio(rows)(i)))


def of_mean_probability(rows: Rows, f: Callable[[float], float]) -> Score:
    return lambda i: f(math.exp(mean_log_prob(rows)(i))) if rows.tokens(i) else 0.0


# ---- Pairs


Pair = Callable[[int, int], float]
Link = Callable[[float, float], float]


def mixed(f: Callable[[float], float]) -> Link:
    return lambda h, p: p * f(h) + (1 - p) * f(-h)


def discopop(tau: float) -> Callable[[float], float]:
    def loss(h: float) -> float:
        m = sigmoid(h / tau)
        return (1 - m) * -log_sigmoid(h) + m * math.exp(-h)

    return loss


def pairs_of(rows: Rows, group: list[int], extremes: bool, ties: bool) -> list[tuple[int, int]]:
    members = rows.comparable(group)
    label = rows.label
    found = []
    for i in members:
        for j in members:
            won = label[i] > label[j]
            tied = ties and label[i] == label[j] and i < j
            best = all(label[i] >= label[k] for k in members)
            worst = all(label[j] <= label[k] for k in members)
            if (won or tied) and (not extremes or (best and worst)):
                found.append((i, j))
    return found


def pairwise(
    rows: Rows,
    *,
    score: Score,
    beta: float = 0.1,
    link: Link,
    target: Pair = lambda w, r: 1.0,
    margin: Sequence[Pair] = (),
    weight: Pair = lambda w, r: 1.0,
    extremes: bool = False,
    ties: bool = False,
) -> float:
    """Mean over groups of the mean over their pairs; a group without a pair counts with 0."""
    total = 0.0
    for group in rows.groups():
        losses = []
        for w, r in pairs_of(rows, group, extremes, ties):
            h = beta * (score(w) - score(r)) - sum(m(w, r) for m in margin)
            losses.append(weight(w, r) * link(h, target(w, r)))
        total += fmean(losses) if losses else 0.0
    return total / max(1, len(rows.groups()))


def agreement(rows: Rows, cap: float) -> Pair:
    """WPO's weight of a pair."""

    def one(i: int) -> float:
        return math.exp(fmean([rows.fixed[i][t] - rows.collision[i][t] for t in rows.tokens(i)]))

    return lambda w, r: min(cap, one(w) * one(r))


def kl_of(rows: Rows, i: int, fixed: bool) -> float:
    return sum((rows.fixed_kl if fixed else rows.kl)[i][t] for t in rows.tokens(i))


# ---- Single completions and lists


def pointwise(
    rows: Rows, *, score: Score, beta: float = 0.1, link: Callable[[float, float], float], within: str = "mean"
) -> float:
    total = 0.0
    for group in rows.groups():
        members = rows.comparable(group)
        losses = {i: link(beta * (score(i) - rows.baseline[i]), rows.label[i]) for i in members}
        if within == "mean_of_each_label":
            kinds = [[i for i in members if (rows.label[i] > 0) == kind] for kind in (True, False)]
            total += sum(fmean([losses[i] for i in kind]) for kind in kinds if kind)
        elif members:
            total += sum(losses.values()) / (len(members) if within == "mean" else 1)
    return total / max(1, len(rows.groups()))


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def one_best(eps: float) -> Callable[[Sequence[float]], list[float]]:
    def target(labels: Sequence[float]) -> list[float]:
        best = [label == max(labels) for label in labels]
        if all(best):
            return [1 / len(labels)] * len(labels)
        return [(1 - eps) / sum(best) if b else eps / (len(labels) - sum(best)) for b in best]

    return target


def listwise(
    rows: Rows,
    *,
    score: Score,
    beta: float = 0.1,
    link: Callable[[list[float], list[float], list[float]], float],
    target: Callable[[Sequence[float]], list[float]] = softmax,
) -> float:
    """Listwise loss, with ``link(z, q, labels)``."""
    total = 0.0
    for group in rows.groups():
        members = rows.comparable(group)
        if len(members) > 1:
            labels = [rows.label[i] for i in members]
            total += link([beta * score(i) for i in members], target(labels), labels)
    return total / max(1, len(rows.groups()))


def info_nca(z: list[float], q: list[float], labels: list[float]) -> float:
    return -sum(qk * math.log(pk) for qk, pk in zip(q, softmax(z), strict=True))


def nca(z: list[float], q: list[float], labels: list[float]) -> float:
    return -sum(qk * log_sigmoid(zk) + log_sigmoid(-zk) / len(z) for qk, zk in zip(q, z, strict=True))


def exo(z: list[float], q: list[float], labels: list[float]) -> float:
    return sum(pk * (math.log(pk) - math.log(qk)) for qk, pk in zip(q, softmax(z), strict=True))


def plackett_luce(z: list[float], q: list[float], labels: list[float]) -> float:
    order = sorted(range(len(z)), key=lambda k: -labels[k])
    loss = 0.0
    while order:
        loss -= math.log(softmax([z[k] for k in order])[0])
        order = order[1:]
    return loss


# ---- Regularisers


def chosen_rows(rows: Rows, group: list[int], kind: str) -> list[int]:
    if kind == "unlabelled":
        return [i for i in group if math.isnan(rows.label[i])]
    if kind == "marked":
        return [i for i in group if rows.columns[i]["calibration"]]
    members = rows.comparable(group)
    if kind == "labelled" or not members:
        return members
    wanted = (max if kind == "best" else min)(rows.label[i] for i in members)
    return [i for i in members if rows.label[i] == wanted]


def regulariser(rows: Rows, kind: str, value: Score) -> float:
    """Mean over groups of the mean of ``value`` over some of their completions."""
    total = 0.0
    for group in rows.groups():
        some = chosen_rows(rows, group, kind)
        total += fmean([value(i) for i in some]) if some else 0.0
    return total / max(1, len(rows.groups()))
