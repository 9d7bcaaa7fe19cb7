"""Labels of reasoning steps, made by sampling: can the problem still be solved after this step?

Branches are sampled from prefixes that end with a step, and verified. All prefixes of all solutions go to the engine
together. A state is a prompt with the first steps of a solution; MC(s) is the share of its branches that end well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.data.steps import Decode, cut, steps_by_text
from posttrain.engines.base import Sampling
from posttrain.errors import DataError
from posttrain.recipe.sections import CONFIG
from posttrain.rollout.branches import BranchPoint, branch_scores
from posttrain.rollout.collect import CompletionSource
from posttrain.seeds import sample_seed

Branch = Callable[[Sequence[BranchPoint]], Float[Tensor, "P K"]]
"""Scores of K continuations of each of P prefixes; NaN where one could not be scored."""


@checked_dataclass(config=CONFIG, kw_only=True, frozen=True)
class StepLabels:
    """How steps are labelled."""

    method: Literal["each_step", "binary_search"] = "each_step"
    """each_step: branches from every step (Math-Shepherd). binary_search: of wrong solutions, from the steps at which
    the search for the first error looks (OmegaPRM); right solutions need none."""
    estimate: Literal["hard", "soft"] = "hard"
    """hard: 1 where a branch is right, else 0. soft: the share of branches that are right."""
    completions: int = Field(default=8, ge=1)
    """Continuations of a state."""
    separator: str = Field(default="\n", min_length=1)
    """What a step ends with; several in a row count as one end."""
    threshold: float = 0.0
    """A completion is right if its score is above."""


@dataclass(frozen=True)
class Solution:
    """A finished completion, cut into steps."""

    prompt: list[int]
    chosen: list[int]
    ends: list[int]  # chosen tokens up to the end of each step
    steps: list[str]  # without the separator behind each but the last
    row: dict[str, Any]
    score: float
    seed: int

    def prefix(self, count: int) -> BranchPoint:
        """The state after the first ``count`` steps."""
        seed = sample_seed(self.seed, count)
        return BranchPoint(self.prompt, self.chosen[: self.ends[count - 1]], self.row, seed, (0, 0))


@dataclass(frozen=True)
class Labelled:
    """A solution with what was found of each step."""

    solution: Solution
    labels: list[float | None]  # None: not known
    estimates: list[float | None]  # MC(s) after the step; the last one's is whether the solution is right
    branches: list[int]  # scored continuations behind each estimate


def find_solutions(batch: Batch, decode: Decode, separator: str, seed: int = 0) -> list[Solution]:
    """The completions of a batch that ended and have a score, cut into steps; the others are left out.

    Args:
        decode: token ids to text, special tokens left out, as in ``batch.texts``.
        seed: of their branches.

    Raises:
        DataError: for completions of several turns, which an engine alone cannot continue.
    """
    step_id = steps_by_text(batch, decode, separator)
    solutions = []
    for i in range(len(batch)):
        if batch.finish[i] != Finish.STOPPED or batch.score[i].isnan() or batch.baseline_only[i]:
            continue
        start, mask = int(batch.mask[i].int().argmax()), batch.mask[i]
        if int(batch.length[i]) != start + int(mask.sum()):
            raise DataError("step labels: completions of several turns, which an engine alone cannot continue")
        steps = step_id[i][mask]
        ends = (steps[1:] != steps[:-1]).nonzero().squeeze(-1).add(1).tolist() + [len(steps)]
        if len(ends) > 1 and batch.texts[i].startswith(separator):  # what stands before the first step belongs to it
            ends = ends[1:]
        solutions.append(
            Solution(
                prompt=batch.tokens[i, :start].tolist(),
                chosen=batch.tokens[i][mask].tolist(),
                ends=ends,
                steps=cut(batch.texts[i], separator, len(ends)),
                row=batch.rows[i],
                score=float(batch.score[i]),
                seed=sample_seed(seed, i),
            )
        )
    return solutions


def each_step(solutions: Sequence[Solution], branch: Branch, options: StepLabels) -> list[Labelled]:
    """Branches from every step; the label of the last step is whether the solution is right.

    hard: y_i = 1 if any branch of step i is right, else 0;  soft: y_i = MC(s_i)

    Wang et al. 2024 (Math-Shepherd), eq. 3 and 4, arXiv:2312.08935, with 8 branches and hard labels.
    """
    states = [(i, count) for i, solution in enumerate(solutions) for count in range(1, len(solution.ends))]
    found = _estimates(solutions, states, branch, options.threshold)
    labelled = []
    for i, solution in enumerate(solutions):
        estimates, counts = _with_ending(solution, {s: found[i, s] for s in range(1, len(solution.ends))}, options)
        hard = [None if estimate is None else float(estimate > 0) for estimate in estimates]
        labelled.append(Labelled(solution, hard if options.estimate == "hard" else estimates, estimates, counts))
    return labelled


def binary_search(solutions: Sequence[Solution], branch: Branch, options: StepLabels) -> list[Labelled]:
    """Looks for the first wrong step of each wrong solution: the first state from which no branch is right.

    low = 0, high = number of steps;  m = (low + high) / 2:  low = m if MC(s_m) > 0 else high = m;  until high = low + 1

    Luo et al. 2024 (OmegaPRM), arXiv:2406.06592: about log2 of the number of steps a solution instead of
    all of them. That a problem cannot be solved after its first wrong step, and can before, is taken for granted.

    hard: 1 before the first wrong step, 0 from it on; all steps of a right solution are 1. soft: MC(s) of the states
    that were looked at, None for the others.
    """
    low = [0] * len(solutions)
    high = [len(solution.ends) for solution in solutions]
    looked: list[dict[int, tuple[float, int]]] = [{} for _ in solutions]
    wrong = [i for i, solution in enumerate(solutions) if solution.score <= options.threshold]
    while states := [(i, (low[i] + high[i]) // 2) for i in wrong if high[i] - low[i] > 1]:
        for (i, middle), found in _estimates(solutions, states, branch, options.threshold).items():
            looked[i][middle] = found
            if found[0] > 0:
                low[i] = middle
            else:  # without a branch that could be scored, such as at the length limit, there is no way on either
                high[i] = middle
    labelled = []
    for i, solution in enumerate(solutions):
        estimates, counts = _with_ending(solution, looked[i], options)
        first_wrong = high[i] - 1 if i in set(wrong) else len(solution.ends)
        hard: list[float | None] = [float(step < first_wrong) for step in range(len(solution.ends))]
        labelled.append(Labelled(solution, hard if options.estimate == "hard" else estimates, estimates, counts))
    return labelled


def make_step_labels(
    source: CompletionSource, batch: Batch, decode: Decode, options: StepLabels, sampling: Sampling, *, seed: int = 0
) -> list[Labelled]:
    """Labels the steps of a batch's finished, scored completions.

    Args:
        source: engine of the policy, and verifiers.
        batch: completions with their scores.
        decode: token ids to text, special tokens left out.
        options: what is sampled, and what becomes of it.
        sampling: a solution's steps and their branch have ``max_tokens`` together.
        seed: of the branches.
    """
    solutions = find_solutions(batch, decode, options.separator, seed)
    branch = partial(branch_scores, source, n=options.completions, sampling=sampling)
    return (each_step if options.method == "each_step" else binary_search)(solutions, branch, options)


def to_row(labelled: Labelled, threshold: float = 0.0) -> dict[str, Any]:
    """A row in TRL's stepwise format, with the data set's columns and how the labels came about."""
    solution = labelled.solution
    return {
        **solution.row,
        "completions": solution.steps,
        "labels": labelled.labels,
        "estimates": labelled.estimates,
        "branches": labelled.branches,
        "reward": float(solution.score > threshold),
    }


def _estimates(
    solutions: Sequence[Solution], states: Sequence[tuple[int, int]], branch: Branch, threshold: float
) -> dict[tuple[int, int], tuple[float, int]]:
    """Share of right branches (NaN without any) and number of scored ones of each state (solution, steps)."""
    if not states:
        return {}
    scores = branch([solutions[i].prefix(count) for i, count in states])
    scored = ~scores.isnan()
    right = (scores > threshold).sum(-1)
    counts = scored.sum(-1)
    shares = (right / counts).tolist()  # 0 / 0 is NaN
    return {state: (shares[k], int(counts[k])) for k, state in enumerate(states)}


def _with_ending(
    solution: Solution, found: dict[int, tuple[float, int]], options: StepLabels
) -> tuple[list[float | None], list[int]]:
    """Estimates and counts of all steps: the last one's is the solution's own score."""
    estimates: list[float | None] = []
    counts = []
    for count in range(1, len(solution.ends)):
        share, scored = found.get(count, (math.nan, 0))
        estimates.append(None if math.isnan(share) else share)
        counts.append(scored)
    return [*estimates, float(solution.score > options.threshold)], [*counts, 1]
