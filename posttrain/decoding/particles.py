"""Particles of a population decoder, and the rules that pick the survivors of a round.

A pick is ``(families, choose) -> survivors``. A family holds the continuations of one particle, or the particle itself
if it had ended. There are as many survivors as families. Rules that choose the answer are in ``answers.py``.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from posttrain.decoding.prefixes import Prefix
from posttrain.engines.choice import Chooser
from posttrain.option_types import Inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Particle:
    """One of the completions that a population keeps."""

    prefix: Prefix
    version: int
    score: float = 0.0  # in reward units
    potential: float = 0.0  # log ψ: strength · score; 0 before anything was generated
    log_weight: float = 0.0  # log importance weight
    fresh: bool = False  # has grown and is not scored yet
    pinned: bool = False  # follows a given completion, and survives

    @property
    def ended(self) -> bool:
        return self.prefix.finish is not None


def rule_of(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a rule whose options are bound."""
    return getattr(rule, "target", getattr(rule, "func", rule))


ROUNDING = 1e-12
"""Width below which pieces of the unit interval are taken for rounding errors."""

Families = Sequence[Sequence[Particle]]
Pick = Annotated[
    Callable[[Families, Chooser], list[Particle]], Inner("posttrain.decoding.particles", ("families", "choose"))
]
"""A rule that chooses the survivors of a round."""


def top(families: Families, choose: Chooser, *, distinct: bool = False) -> list[Particle]:
    """Picks the highest potentials of all families together: best-of-n, blockwise best-of-n, beam search.

    Args:
        distinct: of equal token sequences only the first, as long as others are left.
    """
    pool = sorted((particle for family in families for particle in family), key=lambda one: -one.potential)
    if distinct:
        seen: dict[tuple[int, ...], Particle] = {}
        for particle in pool:
            seen.setdefault(tuple(particle.prefix.tokens), particle)
        firsts = {id(particle) for particle in seen.values()}
        pool.sort(key=lambda one: id(one) not in firsts)
    return pool[: len(families)]


def tilted(families: Families, choose: Chooser) -> list[Particle]:
    """Draws one particle of each family with probability proportional to exp(potential).

    Soft best-of-n: Verdun et al. 2025, arXiv:2505.03156; blocks: SVDD, Li et al. 2024, arXiv:2408.08252.
    """
    return [family[choose(softmax([one.potential for one in family]))] for family in families]


def keep(families: Families, choose: Chooser) -> list[Particle]:
    """Keeps every particle, so that particles are independent samples.

    Raises:
        ValueError: where particles branch, and would become more and more.
    """
    if any(len(family) > 1 for family in families):
        raise ValueError("keep: a population with `branch` above 1 needs a pick that chooses among the branches")
    return [family[0] for family in families]


def resample(
    families: Families,
    choose: Chooser,
    *,
    threshold: float = 0.5,
    scheme: Literal["multinomial", "systematic"] = "systematic",
) -> list[Particle]:
    """Sequential Monte Carlo: draws all particles anew in proportion to their weights, which are equal afterwards.

    Nothing is drawn while the effective sample size (Σ w)² / Σ w² is above ``threshold`` · particles; 0 never draws
    (sequential importance sampling), 1 always does. The sum of the weights stays an unbiased estimate.

    Where the first particle is a pinned one, that survives, and the others are drawn independently (conditional SMC,
    Andrieu et al. 2010).

    Zhao et al. 2024, arXiv:2404.17546; threshold: Liu and Chen 1998; systematic: Kitagawa 1996.

    Args:
        scheme: systematic draws take one random number and have less variance than independent ones.
    """
    count = len(families)
    pool = [particle for family in families for particle in family]
    log_weights = [particle.log_weight for particle in pool]
    total = logsumexp(log_weights)
    full = len(pool) == count
    rounded = threshold * count * (1 + 1e-9)  # equal weights have a size of count, give or take the last bit
    if full and (effective_size(log_weights) > rounded or all(one.ended for one in pool)):
        return pool
    if total == -math.inf:
        return pool[:count]
    shares = softmax(log_weights)
    pinned = pool[0].pinned
    if pinned:
        drawn = [0, *(choose(shares) for _ in range(count - 1))]
    elif scheme == "multinomial":
        drawn = [choose(shares) for _ in range(count)]
    else:
        drawn = systematic(shares, count, choose)
    equal = total - math.log(count)
    return [
        dataclasses.replace(pool[index], log_weight=equal, pinned=pinned and place == 0)
        for place, index in enumerate(drawn)
    ]


def systematic(shares: Sequence[float], count: int, choose: Chooser) -> list[int]:
    """``count`` indices, each on average count · share times and at most one more or less.

    They are those where the cumulative shares pass (u + 0), (u + 1), ... over count, with u uniform in [0, 1). They
    change with u only where count · (cumulative share) has its fractional parts, so one of the pieces is chosen.
    """
    edges = [count * edge for edge in itertools.accumulate(shares)]
    edges[-1] = float(count)  # whatever rounding says
    cuts = [0.0]
    for cut in sorted(edge % 1.0 for edge in edges):
        if cut - cuts[-1] > ROUNDING and 1.0 - cut > ROUNDING:
            cuts.append(cut)
    widths = [after - before for before, after in itertools.pairwise([*cuts, 1.0])]
    piece = choose(widths)
    u = cuts[piece] + widths[piece] / 2
    return [bisect.bisect_right(edges, u + place) for place in range(count)]


def highest(particles: Sequence[Particle]) -> int:
    """Index of the particle with the highest potential; the first one of several."""
    return max(range(len(particles)), key=lambda index: particles[index].potential)


def most_voted(
    answers: Sequence[Hashable], scores: Sequence[float], by: Literal["count", "sum", "max"] = "count"
) -> int | None:
    """Index of the best-scored entry with the answer that gets most votes; ``None`` if there is no answer.

    Majority (``count``): Wang et al. 2022, arXiv:2203.11171. ``sum`` of scores scaled to [0, 1] by their smallest and
    largest, and ``max``: Feng et al. 2023 (TS-LLM), arXiv:2309.17179.

    Args:
        answers: ``None`` for an entry without an answer, which has no vote.
    """
    low, spread = min(scores), max(scores) - min(scores) or 1.0
    votes: dict[Hashable, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            continue
        share = (score - low) / spread
        before = votes.get(answer, -math.inf if by == "max" else 0.0)
        votes[answer] = max(before, share) if by == "max" else before + (1.0 if by == "count" else share)
    if not votes:
        return None
    winner = max(votes, key=lambda answer: votes[answer])
    return max((i for i, answer in enumerate(answers) if answer == winner), key=lambda i: scores[i])


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities from logits; all equal if every logit is -inf."""
    largest = max(logits)
    if largest == -math.inf:
        return [1 / len(logits)] * len(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / sum(powers) for power in powers]


def logsumexp(values: Sequence[float]) -> float:
    """log Σ exp(value)."""
    largest = max(values)
    return largest if largest == -math.inf else largest + math.log(sum(math.exp(value - largest) for value in values))


def effective_size(log_weights: Sequence[float]) -> float:
    """Effective sample size (Σ w)² / Σ w²: the number of equally weighted particles that are worth as much."""
    return 1 / sum(share * share for share in softmax(log_weights))
