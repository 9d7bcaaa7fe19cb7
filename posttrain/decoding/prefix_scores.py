"""Scores of prefixes: texts, sums and products, log-probs of paths, rewards after a rollout, model ratios.

Scores made of language or value models are in :mod:`posttrain.decoding.model_scores`. M is the number of prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.batch import Finish
from posttrain.decoding.context import NotInRecipes
from posttrain.decoding.prefixes import (
    CandidateScore,
    NextTokenScore,
    Prefix,
    PrefixScore,
    ScoreKind,
    ScoreOption,
    continue_prefixes,
    grown,
    next_prefix,
    prefix_seed,
)
from posttrain.engines.base import Engine, Sampling
from posttrain.models.text import Decode
from posttrain.option_types import NonNegative
from posttrain.verify import signature_of


def next_scores(score: PrefixScore, prefixes: Sequence[Prefix], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The score of each prefix followed by each of its candidates.

    A score that emits a vocabulary vector is asked once a prefix, any other once a candidate, all in one batch; one
    that keeps what it has computed of the prefixes is asked for the candidates alone.
    """
    if isinstance(score, CandidateScore):
        return score.score_candidates(prefixes, candidates)
    if isinstance(score, NextTokenScore):
        vectors = score.score_next(prefixes)
        return vectors.gather(-1, candidates.to(vectors.device))
    extended = [
        next_prefix(prefix, token)
        for prefix, tokens in zip(prefixes, candidates.tolist(), strict=True)
        for token in tokens
    ]
    return score.score(extended).view(candidates.shape)


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """A function of texts as a score: a reward model with another tokenizer, a judge.

    Args:
        function: texts of prompts and texts of what was generated, to one number each.
        decode: token ids to text, with the tokenizer of the model that generates.
    """

    function: Callable[[Sequence[str], Sequence[str]], Sequence[float] | Tensor]
    decode: Decode
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        prompts = [self.decode(prefix.tokens[: prefix.start]) for prefix in prefixes]
        texts = [self.decode(prefix.generated) for prefix in prefixes]
        values = self.function(prompts, texts)
        return self.scale * torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class VerifierScore:
    """A verifier's score of what was generated, as training gives it: as it was written, with prompt and ending.

    A prefix that goes on counts as cut off.

    Args:
        verifier: function of a completion that may ask for ``prompt_text`` and ``finish``.
        decode: token ids to text, with the tokenizer of the model that generates.
    """

    verifier: Callable[..., float | None]
    decode: Decode
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`.

        Raises:
            ValueError: if the verifier does not apply.
        """
        signature = signature_of(self.verifier, {})
        values = []
        for prefix in prefixes:
            finish = Finish.LENGTH if prefix.finish is None else prefix.finish
            known = {"prompt_text": self.decode(prefix.tokens[: prefix.start]), "finish": finish.name.lower()}
            taken = {name: value for name, value in known.items() if signature.takes(name)}
            values.append(self.verifier(self.decode(prefix.generated), **taken))
        if None in values:
            raise ValueError("decoder: the verifier says that it does not apply, which is no score of a prefix")
        return self.scale * torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Sum:
    """Weighted sum Σ_i weight_i · score_i: several rewards at once (Mudgal et al. 2023, arXiv:2310.17022).

    A sum of means is the mean of the sum. A sum of soft values is no soft value, so its kind is ``other``.
    """

    terms: Sequence[tuple[float, PrefixScore]]
    beta: None = None
    scale: float = 1.0

    @property
    def kind(self) -> ScoreKind:
        return "mean" if all(score.kind == "mean" for _, score in self.terms) else "other"

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        return torch.stack([weight * score.score(prefixes).cpu() for weight, score in self.terms]).sum(0)


class NextTokenSum(Sum):
    """A sum of scores that all emit vocabulary vectors."""

    def score_next(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M V"]:
        """See :class:`posttrain.decoding.prefixes.NextTokenScore`."""
        vectors = [weight * score.score_next(prefixes).cpu() for weight, score in self.terms]  # type: ignore[union-attr]
        return torch.stack(vectors).sum(0)


class CandidateSum(Sum):
    """A sum of scores of which each gives one-token extensions in its own cheapest way."""

    def score_candidates(self, prefixes: Sequence[Prefix], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """See :class:`posttrain.decoding.prefixes.CandidateScore`."""
        values = [weight * next_scores(score, prefixes, candidates).cpu() for weight, score in self.terms]
        return torch.stack(values).sum(0)


def sum_scores(*terms: tuple[float, PrefixScore]) -> Sum:
    """The sum of weighted scores; it emits vocabulary vectors if all of them do."""
    return (NextTokenSum if all(isinstance(score, NextTokenScore) for _, score in terms) else CandidateSum)(terms)


@dataclass(frozen=True)
class Product:
    """Product Π_i score_i ^ exponent_i of scores that are not negative, such as probabilities of step correctness."""

    factors: Sequence[tuple[float, PrefixScore]]
    kind: ScoreKind = "other"
    beta: None = None
    scale: float = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`.

        Raises:
            ValueError: for a negative score, of which there are no powers.
        """
        values = [score.score(prefixes).cpu() for _, score in self.factors]
        if any(bool((value < 0).any()) for value in values):
            raise ValueError("a product of scores needs scores that are not negative; use a weighted sum of them")
        powers = [value.pow(exponent) for (exponent, _), value in zip(self.factors, values, strict=True)]
        return torch.stack(powers).prod(0)


@dataclass(frozen=True)
class Logarithm:
    """Logarithm log φ of a score φ > 0, such as the probability that a completion will have an attribute.

    Where φ(s) = E[φ(y) | s] it is the soft value of the reward log φ(y) at β = 1, so that shaping with strength 1
    samples p0(y) φ(y) / Z. Yang and Klein 2021 (FUDGE), arXiv:2104.05218.
    """

    of: ScoreOption
    scale: NotInRecipes[float] = 1.0

    @property
    def kind(self) -> ScoreKind:
        return "soft" if self.of.kind == "mean" else "other"

    @property
    def beta(self) -> float | None:
        return 1.0 if self.of.kind == "mean" else None

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`; -inf for a score of 0.

        Raises:
            ValueError: for a negative score.
        """
        values = self.of.score(prefixes)
        if bool((values < 0).any()):
            raise ValueError("the logarithm of a score needs one that is not negative, such as a probability")
        return values.log()


@dataclass(frozen=True, kw_only=True)
class PathLogp:
    """Length-normalised log-prob Σ_t log p(token_t) / L^α of the generated tokens, under the engine that drew them.

    α = 0: the log-prob itself (beam search); α = 1: its mean. L counts steps, as proofs count tactics, or tokens.
    Xin et al. 2025 (BFS-Prover), arXiv:2502.03438.
    """

    alpha: NonNegative = 0.0
    unit: Literal["steps", "tokens"] = "steps"
    kind: NotInRecipes[ScoreKind] = "other"
    beta: NotInRecipes[None] = None
    scale: NotInRecipes[float] = 1.0

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`."""
        return torch.tensor([self._value(prefix) for prefix in prefixes], dtype=torch.float64)

    def _value(self, prefix: Prefix) -> float:
        length = prefix.steps if self.unit == "steps" else len(prefix.generated)
        return sum(prefix.logps) / max(length, 1) ** self.alpha


@dataclass(frozen=True, kw_only=True)
class RolloutScore:
    """Mean, soft or largest reward of completions that are rolled out from the prefix.

    Q(s) = Σ_j w_j r_j / Σ_j w_j over n rollouts y_j ~ engine(. | s),  w_j = exp(tilt(s y_j)), or 1 without a tilt
    kind soft: β log (Σ_j w_j exp(r_j / β) / Σ_j w_j);  kind max: max_j r_j

    Chakraborty et al. 2024 (TQ*), direct (no tilt) and indirect transfer (tilt = (r - r_BL) / β), arXiv:2405.20495.
    One greedy rollout is the posterior-mean guess of SVDD-PM (Li et al. 2024, arXiv:2408.08252).

    Args:
        engine: rolls out; its policy is what the value is of.
        reward: of completions that have ended.
        sampling: of rollouts; ``max_tokens`` counts from the prompt on.
        completions: number of rollouts of a prefix.
        horizon: most tokens of a rollout, 20 in TQ*'s code; rewards of rollouts that it cuts are of what there is.
        tilt: log importance weight of a whole completion.
    """

    engine: Engine
    reward: PrefixScore
    sampling: Sampling
    completions: int = 1
    horizon: int | None = None
    tilt: PrefixScore | None = None
    kind: ScoreKind = "mean"
    beta: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "soft", "max"):
            raise ValueError(f"rollouts make a mean, soft or max value, not {self.kind!r}")
        if self.kind == "soft" and self.beta is None:
            raise ValueError("a soft value needs beta, its temperature in units of the reward")

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """See :class:`posttrain.decoding.prefixes.PrefixScore`. A prefix is always rolled out in the same way."""
        ended, owner = self._rolled_out(prefixes)
        reward = self.reward.score(ended).double().cpu()
        log_weight = torch.zeros(len(ended)).double() if self.tilt is None else self.tilt.score(ended).double().cpu()
        values = []
        for index in range(len(prefixes)):
            own = torch.tensor(owner) == index
            values.append(self._value(reward[own], log_weight[own]))
        return torch.stack(values)

    def _value(self, reward: Float[Tensor, " n"], log_weight: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        if self.kind == "max":
            return reward.max()
        share = log_weight.log_softmax(-1)
        if self.kind == "soft":
            return self.beta * torch.logsumexp(share + reward / self.beta, -1)  # type: ignore[operator]
        return (share.exp() * reward).sum()

    def _rolled_out(self, prefixes: Sequence[Prefix]) -> tuple[list[Prefix], list[int]]:
        """Completions, each with the index of its prefix. A prefix that has ended is its own completion."""
        room = [self.sampling.max_tokens > len(prefix.generated) and prefix.finish is None for prefix in prefixes]
        open_ = [index for index, going in enumerate(room) if going]
        ended = [prefix for prefix, going in zip(prefixes, room, strict=True) if not going]
        owner = [index for index, going in enumerate(room) if not going]
        going = [prefixes[index] for index in open_]
        seeds = [prefix_seed(prefix) for prefix in going]
        rolled = continue_prefixes(self.engine, going, self.sampling, self.completions, seeds, block=self.horizon)
        for index, continuations in zip(open_, rolled, strict=True):
            ended += [grown(prefixes[index], continuation, self.sampling, ()) for continuation in continuations]
            owner += [index] * len(continuations)
        return ended, owner
