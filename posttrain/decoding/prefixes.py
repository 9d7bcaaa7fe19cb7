"""Prefixes, scores of prefixes, and continuing completions from prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from posttrain.batch import Finish
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.option_types import Inner
from posttrain.seeds import derived_seed

ScoreKind = Literal["mean", "soft", "max", "greedy", "other"]
"""The quantity that a score estimates, for the reward r of completions of a prefix s under the base policy:
mean: E[r | s]; soft: beta log E[exp(r / beta) | s]; max: the largest r; greedy: the greedy one's; other: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """A prompt and the beginning of a completion, or all of it."""

    tokens: Sequence[int]  # prompt and what was generated
    start: int  # length of the prompt
    logps: Sequence[float] = ()  # of the generated tokens, under the distribution they were drawn from; may be unknown
    steps: int = 0  # blocks or steps that were generated
    finish: Finish | None = None  # None: it goes on

    @property
    def generated(self) -> Sequence[int]:
        """The tokens after the prompt."""
        return self.tokens[self.start :]

    def extended(self, completion: Completion, *, goes_on: bool = False) -> Prefix:
        """The prefix with a continuation.

        Args:
            goes_on: what ended the continuation does not end the completion.
        """
        return dataclasses.replace(
            self,
            tokens=[*self.tokens, *completion.tokens],
            logps=[*self.logps, *completion.logps],
            steps=self.steps + 1,
            finish=None if goes_on else completion.finish,
        )


@runtime_checkable
class PrefixScore(Protocol):
    """A score of prefixes: one number for each, larger is better."""

    @property
    def kind(self) -> ScoreKind:
        """The quantity that the score estimates."""
        ...

    @property
    def beta(self) -> float | None:
        """Temperature of a soft value."""
        ...

    @property
    def scale(self) -> float:
        """Reward units of one unit of the underlying model's output; ``score`` is in reward units."""
        ...

    def score(self, prefixes: Sequence[Prefix]) -> Float[Tensor, " M"]:
        """The score of each prefix; prefixes may be completions that have ended."""
        ...


ScoreOption = Annotated[PrefixScore, Inner("posttrain.decoding.scores", ("context",))]
"""A prefix score; in a recipe a part that makes one, such as ``{use: value, model: runs/mc/value}``."""

OptionalScore = Annotated[PrefixScore | None, Inner("posttrain.decoding.scores", ("context",))]


@runtime_checkable
class NextTokenScore(PrefixScore, Protocol):
    """A score that gives all one-token extensions of a prefix at once: a Q or twist head, a ratio of models."""

    def score_next(self, prefixes: Sequence[Prefix]) -> Float[Tensor, "M V"]:
        """The score of each prefix followed by each token."""
        ...


@runtime_checkable
class CandidateScore(PrefixScore, Protocol):
    """A score that gives one-token extensions of a prefix more cheaply than as many prefixes."""

    def score_candidates(self, prefixes: Sequence[Prefix], candidates: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """The score of each prefix followed by each of its candidates."""
        ...


def next_prefix(prefix: Prefix, token: int) -> Prefix:
    """The prefix with one more token."""
    return dataclasses.replace(prefix, tokens=[*prefix.tokens, token])


def continue_prefixes(
    engine: Engine,
    prefixes: Sequence[Prefix],
    sampling: Sampling,
    n: int,
    seeds: Sequence[int],
    *,
    block: int | None = None,
    ends: Sequence[int] = (),
) -> list[list[Completion]]:
    """``n`` continuations of each prefix, in one call of the engine wherever all have the same room left.

    Args:
        sampling: ``max_tokens`` counts from the prompt on.
        block: most tokens of a continuation; default: up to the end.
        ends: tokens that end a continuation, beside those that end a completion.
    """
    rooms = [sampling.max_tokens - len(prefix.generated) for prefix in prefixes]
    budgets = [room if block is None else min(block, room) for room in rooms]
    stops = (*sampling.stop_token_ids, *ends)
    done: list[list[Completion]] = [[] for _ in prefixes]
    for budget in sorted(set(budgets)):
        members = [index for index, own in enumerate(budgets) if own == budget]
        extra = _starts(engine, [prefixes[index] for index in members])
        continued = engine.generate(
            [prefixes[index].tokens for index in members],
            dataclasses.replace(sampling, max_tokens=budget, stop_token_ids=stops),
            n,
            seeds=[seeds[index] for index in members],
            **extra,
        )
        for index, completions in zip(members, continued, strict=True):
            done[index] = completions
    return done


def _starts(engine: Engine, prefixes: Sequence[Prefix]) -> dict[str, Any]:
    """Further arguments for engines that score prefixes: where each prompt ends."""
    return {"starts": [prefix.start for prefix in prefixes]} if getattr(engine, "takes_starts", False) else {}


def grown(prefix: Prefix, continuation: Completion, sampling: Sampling, ends: Sequence[int]) -> Prefix:
    """The prefix with its continuation. It has ended unless only its block or step is over."""
    room = sampling.max_tokens - len(prefix.generated) - len(continuation.tokens)
    last = continuation.tokens[-1] if continuation.tokens else None
    step_over = last in ends and last not in sampling.stop_token_ids
    block_over = continuation.finish is Finish.LENGTH or (continuation.finish is Finish.STOPPED and step_over)
    after = prefix.extended(continuation, goes_on=block_over)
    return dataclasses.replace(after, finish=Finish.LENGTH) if block_over and room == 0 else after


def prefix_seed(prefix: Prefix) -> int:
    """A seed that depends on the tokens alone, so that the same prefix is always continued in the same way."""
    return derived_seed(len(prefix.tokens), *prefix.tokens)
