"""Monte-Carlo branches: continuations of prefixes of completions. Their mean score estimates the prefix's value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.data.steps import steps_by_text
from posttrain.engines.base import Completion, Sampling
from posttrain.errors import UserError
from posttrain.parts.credit import step_starts
from posttrain.parts.targets import branch_estimate
from posttrain.recipe.sections import BranchesSection
from posttrain.rollout.collect import CompletionSource
from posttrain.rollout.verifying import submitter
from posttrain.seeds import derived_seed, sample_seed
from posttrain.system.long_work import LongWork

BUCKETS = 8
"""Number of calls of the engine; prefixes that have about equally many tokens left share a call."""


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """A prompt with the first tokens of one of its completions, from which branches are sampled."""

    prompt: list[int]
    chosen: list[int]
    row: dict[str, Any]  # dataset columns of the prompt
    seed: int
    at: tuple[int, int]  # row and column of its value in the batch


def choose_branch_points(batch: Batch, *, prompts: int, per_prompt: int, seed: int) -> list[BranchPoint]:
    """Chooses branch points at random places of the completions of each group below ``prompts``.

    Place ``j`` of ``per_prompt`` is in the ``j``-th part of its completion. The choice depends only on ``seed`` and the
    group: it is the same on one rank as on several.

    Raises:
        UserError: if a completion has several turns, which an engine alone cannot continue.
    """
    points, starts = [], batch.prompt_length.tolist()
    for group in [name for name in batch.group.unique().tolist() if name < prompts]:
        rows = ((batch.group == group) & ~batch.baseline_only & batch.mask.any(-1)).nonzero().squeeze(-1).tolist()
        for j in range(per_prompt if rows else 0):
            point_seed = derived_seed(seed, group, j)
            row = rows[point_seed % len(rows)]
            start, length = starts[row], int(batch.mask[row].sum())
            if int(batch.length[row]) != start + length:
                raise UserError(
                    "branches: these completions have several turns, which an engine alone cannot continue; "
                    "--branches.prompts=0 leaves branches out"
                )
            share = (sample_seed(point_seed, 0) >> 10) / 2**53
            column = start + int((j + share) / per_prompt * length)
            tokens = batch.tokens[row].tolist()
            at = (row, column - 1)
            points.append(BranchPoint(tokens[:start], tokens[start:column], batch.rows[row], point_seed, at))
    return points


def branch_scores(
    source: CompletionSource, points: Sequence[BranchPoint], n: int, sampling: Sampling
) -> Float[Tensor, "P K"]:
    """Samples ``n`` continuations of each branch point and scores them; NaN where one has no score.

    A prefix and its continuation have ``sampling.max_tokens`` together, as the completion has that the prefix is from.
    The engine has one limit for all points of a call. Tokens beyond a point's own limit are cut off, which does not
    change the distribution of the rest.
    """
    assert source.engine is not None
    width = max(1, math.ceil(sampling.max_tokens / BUCKETS))
    buckets: dict[int, list[int]] = {}
    for number, point in enumerate(points):
        left = sampling.max_tokens - len(point.chosen)
        if left > 0:
            buckets.setdefault(min(sampling.max_tokens, -(-left // width) * width), []).append(number)
    work = LongWork("branches", n * sum(map(len, buckets.values())))
    for limit, numbers in sorted(buckets.items()):
        in_bucket = [points[i] for i in numbers]
        source.engine.generate(
            [point.prompt + point.chosen for point in in_bucket],
            replace(sampling, max_tokens=limit),
            n,
            seeds=[point.seed for point in in_bucket],
            on_completion=_verifying(source, in_bucket, numbers, sampling.max_tokens, work),
        )
        work.batch_ended()
    verdicts = source.verifiers.collect()
    scores = torch.full((len(points), n), math.nan)
    for (number, sample), verdict in verdicts.items():  # pyright: ignore[reportGeneralTypeIssues]
        scores[number, sample] = verdict.score
    return scores


def _verifying(
    source: CompletionSource, points: Sequence[BranchPoint], numbers: Sequence[int], max_tokens: int, work: LongWork
) -> Callable[[int, int, Completion], None]:
    """Returns a function that submits a prefix with its continuation to the verifiers as soon as it ends.

    Args:
        numbers: number of each point among all points.
        max_tokens: tokens of prefix and continuation together; the rest is cut off.
        work: counts the continuations.
    """

    submit = submitter(source.verifiers, source.decode)

    def done(position: int, sample: int, completion: Completion) -> None:
        point, number = points[position], numbers[position]
        whole = _whole(point, completion, max_tokens)
        text = source.decode(whole.tokens)
        submit((number, sample), text, whole, point.prompt, point.row, f"branch {number}")
        work.count()

    return done


def _whole(point: BranchPoint, completion: Completion, max_tokens: int) -> Completion:
    """The prefix with its continuation as one completion, which is cut off if it is longer than it may be."""
    tokens = point.chosen + completion.tokens
    finish = completion.finish if len(tokens) <= max_tokens else Finish.LENGTH
    return replace(completion, tokens=tokens[:max_tokens], finish=finish)


def value_at(value: Float[Tensor, "N L"], points: Sequence[BranchPoint]) -> Float[Tensor, " P"]:
    """Reads the predicted value of each branch point."""
    at = torch.tensor([point.at for point in points], dtype=torch.long).view(-1, 2)
    return value[at[:, 0], at[:, 1]]


def branch_values(
    source: CompletionSource, batch: Batch, options: BranchesSection, sampling: Sampling, seed: int
) -> Batch:
    """Fills ``batch.step_id``, and ``batch.value`` before each step with the mean score of branches from there.

    Kazemnejad et al. 2024 (VinePPO), arXiv:2410.01679. Equal prefixes, such as the prompt of a group, are
    branched once. The value is 0 inside steps, and where none of the branches could be scored.

    Args:
        seed: seed of the branches. They depend on it, the group and the place, and not on the rank.
    """
    batch = batch.set(step_id=steps_by_text(batch, source.decode, options.separator))
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, column in (step_starts(batch) & batch.trained[:, None]).nonzero().tolist():
        places.setdefault(tuple(batch.tokens[row, :column].tolist()), []).append((row, column - 1))
    points = [branch_point_at(batch, *states[0], seed) for states in places.values()]
    estimates = branch_estimate(branch_scores(source, points, options.completions, sampling)).nan_to_num(0.0)
    value = torch.zeros_like(batch.logp_sampler)
    for estimate, states in zip(estimates.tolist(), places.values(), strict=True):
        for row, column in states:
            value[row, column] = estimate
    return batch.set(value=value)


def branch_point_at(batch: Batch, row: int, state: int, seed: int) -> BranchPoint:
    """Makes the branch point of a completion's state: the completion up to column ``state``."""
    tokens, prompt = batch.tokens[row, : state + 1].tolist(), int(batch.mask[row].int().argmax())
    number = row - int((batch.group == batch.group[row]).int().argmax())  # position of the completion in its group
    point_seed = derived_seed(seed, int(batch.group[row]), number, state)
    return BranchPoint(tokens[:prompt], tokens[prompt:], batch.rows[row], point_seed, (row, state))
