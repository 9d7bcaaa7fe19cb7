"""Monte-Carlo branches: continuations of prefixes of completions, whose mean outcome is what a value should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.data.steps import steps_by_text
from posttrain.engines.base import Completion, Sampling
from posttrain.errors import UserError
from posttrain.parts.credit import step_starts
from posttrain.parts.targets import branch_estimate
from posttrain.recipe.sections import BranchesSection
from posttrain.rollout.collect import CompletionSource
from posttrain.seeds import sample_seed

BUCKETS = 8
"""Calls of the engine: in each, prefixes that have about equally many tokens left."""


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """A prompt with the first tokens of a completion of it."""

    prompt: list[int]
    chosen: list[int]
    row: dict[str, Any]  # the dataset's columns
    seed: int
    at: tuple[int, int]  # row and column of the batch where its value stands


def choose_branch_points(batch: Batch, *, prompts: int, per_prompt: int, seed: int) -> list[BranchPoint]:
    """Prefixes at random places of the completions of each group below ``prompts``.

    Place ``j`` of ``per_prompt`` lies in the ``j``-th part of its completion. A function of ``seed`` and the group
    alone: the same on one rank as on several.

    Raises:
        UserError: for completions of several turns, which an engine alone cannot continue.
    """
    prefixes = []
    for group in [name for name in batch.group.unique().tolist() if name < prompts]:
        rows = ((batch.group == group) & ~batch.baseline_only & batch.mask.any(-1)).nonzero().squeeze(-1).tolist()
        for j in range(per_prompt if rows else 0):
            of_this = sample_seed(sample_seed(seed, group), j)
            row = rows[of_this % len(rows)]
            start, length = int(batch.mask[row].int().argmax()), int(batch.mask[row].sum())
            if int(batch.length[row]) != start + length:
                raise UserError(
                    "branches: these completions have several turns, which an engine alone cannot continue; "
                    "--branches.prompts=0 leaves branches out"
                )
            share = (sample_seed(of_this, 0) >> 10) / 2**53
            column = start + int((j + share) / per_prompt * length)
            tokens = batch.tokens[row].tolist()
            prefixes.append(BranchPoint(tokens[:start], tokens[start:column], batch.rows[row], of_this, (row, column - 1)))
    return prefixes


def branch_scores(source: CompletionSource, prefixes: Sequence[BranchPoint], n: int, sampling: Sampling) -> Float[Tensor, "P K"]:
    """Scores of ``n`` continuations of each prefix; NaN where one has none.

    A prefix and its continuation have ``sampling.max_tokens`` together, as the completions have that it comes from. The
    engine's limit is the same for all prefixes of a call: what exceeds a prefix's own is cut off, which changes nothing
    in the distribution.
    """
    assert source.engine is not None
    width = max(1, math.ceil(sampling.max_tokens / BUCKETS))
    buckets: dict[int, list[int]] = {}
    for index, prefix in enumerate(prefixes):
        left = sampling.max_tokens - len(prefix.chosen)
        if left > 0:
            buckets.setdefault(min(sampling.max_tokens, -(-left // width) * width), []).append(index)
    for limit, members in sorted(buckets.items()):
        few = [prefixes[i] for i in members]
        source.engine.generate(
            [prefix.prompt + prefix.chosen for prefix in few],
            replace(sampling, max_tokens=limit),
            n,
            seeds=[prefix.seed for prefix in few],
            on_completion=_verify(source, few, members, sampling.max_tokens),
        )
    verdicts = source.verifiers.collect()
    scores = torch.full((len(prefixes), n), math.nan)
    for (index, sample), verdict in verdicts.items():  # pyright: ignore[reportGeneralTypeIssues]
        scores[index, sample] = verdict.score
    return scores


def _verify(
    source: CompletionSource, prefixes: Sequence[BranchPoint], index: Sequence[int], most: int
) -> Callable[[int, int, Completion], None]:
    """Hands a prefix with its continuation to the verifiers as soon as it ends."""

    def done(position: int, sample: int, completion: Completion) -> None:
        prefix = prefixes[position]
        tokens = (prefix.chosen + completion.tokens)[:most]
        place = f"branch {index[position]}"
        source.verifiers.submit((index[position], sample), source.decode(tokens), tokens, prefix.row, place=place)

    return done


def value_at(value: Float[Tensor, "N L"], prefixes: Sequence[BranchPoint]) -> Float[Tensor, " P"]:
    """The predicted value of each prefix."""
    at = torch.tensor([prefix.at for prefix in prefixes], dtype=torch.long).view(-1, 2)
    return value[at[:, 0], at[:, 1]]


def branch_values(source: CompletionSource, batch: Batch, options: BranchesSection, sampling: Sampling, seed: int) -> Batch:
    """The batch with its steps, and as the value of the state before each step the mean score of branches from there.

    Kazemnejad et al. 2025 (VinePPO), eq. 4, arXiv:2410.01679. Equal prefixes, such as the prompt of a group, are
    branched once. States inside steps, and those none of whose branches could be scored, have value 0.

    Args:
        seed: of the branches, which depend on it, the group and the place alone, not on the rank.
    """
    batch = batch.set(step_id=steps_by_text(batch, source.decode, options.separator))
    trained = batch.scored & ~batch.baseline_only
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, column in (step_starts(batch) & trained[:, None]).nonzero().tolist():
        places.setdefault(tuple(batch.tokens[row, :column].tolist()), []).append((row, column - 1))
    prefixes = [branch_point_at(batch, *where[0], seed) for where in places.values()]
    estimates = branch_estimate(branch_scores(source, prefixes, options.completions, sampling)).nan_to_num(0.0)
    value = torch.zeros_like(batch.logp_sampler)
    for estimate, where in zip(estimates.tolist(), places.values(), strict=True):
        for row, state in where:
            value[row, state] = estimate
    return batch.set(value=value)


def branch_point_at(batch: Batch, row: int, state: int, seed: int) -> BranchPoint:
    """What a completion begins with, up to column ``state``."""
    tokens, prompt = batch.tokens[row, : state + 1].tolist(), int(batch.mask[row].int().argmax())
    number = row - int((batch.group == batch.group[row]).int().argmax())  # of the completion in its group
    own = sample_seed(sample_seed(sample_seed(seed, int(batch.group[row])), number), state)
    return BranchPoint(tokens[:prompt], tokens[prompt:], batch.rows[row], own, (row, state))
