"""Labels reasoning steps by sampling: can the problem still be solved after this step?

Branches are sampled from prefixes that end with a step, and verified. All prefixes of all solutions go to the engine
together. A state s is a prompt with the first steps of a solution. MC(s) is the share of its branches that are right.
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
from posttrain.data.steps import cut, steps_by_text
from posttrain.engines.base import Sampling
from posttrain.errors import DataError
from posttrain.models.text import Decode
from posttrain.recipe.sections import CONFIG
from posttrain.rollout.branches import BranchPoint, branch_scores
from posttrain.rollout.collect import CompletionSource
from posttrain.seeds import sample_seed

Branch = Callable[[Sequence[BranchPoint]], Float[Tensor, "P K"]]
"""Function that returns the scores of K continuations of each of P branch points; NaN where one could not be scored."""


@checked_dataclass(config=CONFIG, kw_only=True, frozen=True)
class StepLabels:
    """Settings of step labels: the section ``label`` of a label recipe."""

    method: Literal["each_step", "binary_search"] = "each_step"
    """Steps that are branched. each_step: every step (Math-Shepherd). binary_search: the steps that a search for the
    first error of a wrong solution visits (OmegaPRM); right solutions need no branches."""
    estimate: Literal["hard", "soft"] = "hard"
    """Kind of label. hard: 1 if a branch is right, else 0. soft: the share of branches that are right."""
    completions: int = Field(default=8, ge=1)
    """Number of continuations of a state."""
    separator: str = Field(default="\n", min_length=1)
    """Text at the end of a step; several in a row count as one end."""
    threshold: float = 0.0
    """Score above which a completion is right."""


@dataclass(frozen=True)
class Solution:
    """A finished completion, cut into steps."""

    prompt: list[int]
    chosen: list[int]
    ends: list[int]  # number of chosen tokens up to the end of each step
    steps: list[str]  # text of each step, without the separator that joins them
    row: dict[str, Any]  # dataset columns of the prompt
    score: float
    seed: int
    number: int = 0  # number of the completion among all

    def prefix(self, count: int) -> BranchPoint:
        """The branch point after the first ``count`` steps."""
        seed = sample_seed(self.seed, count)
        return BranchPoint(self.prompt, self.chosen[: self.ends[count - 1]], self.row, seed, (0, 0))


@dataclass(frozen=True)
class Labelled:
    """A solution with the labels of its steps."""

    solution: Solution
    labels: list[float | None]  # label of each step; None: not known
    estimates: list[float | None]  # MC(s) after each step; of the last step 1 if the solution is right, else 0
    branches: list[int]  # number of scored continuations for each estimate


def find_solutions(
    batch: Batch, decode: Decode, separator: str, seed: int = 0, numbers: Sequence[int] | None = None
) -> list[Solution]:
    """Cuts the completions that ended and have a score into steps; other completions are left out.

    Args:
        decode: token ids to text as it was written, as in ``batch.texts``.
        seed: seed of the branches.
        numbers: number of each completion among all, on which the seed of its branches depends. Default: its row.

    Raises:
        DataError: if a completion has several turns, which an engine alone cannot continue.
    """
    step_id = steps_by_text(batch, decode, separator)
    solutions, starts = [], batch.prompt_length.tolist()
    for i in range(len(batch)):
        if batch.finish[i] != Finish.STOPPED or batch.score[i].isnan() or batch.baseline_only[i]:
            continue
        start, mask = starts[i], batch.mask[i]
        if int(batch.length[i]) != start + int(mask.sum()):
            raise DataError("step labels: completions of several turns, which an engine alone cannot continue")
        steps = step_id[i][mask]
        ends = (steps[1:] != steps[:-1]).nonzero().squeeze(-1).add(1).tolist() + [len(steps)]
        if len(ends) > 1 and batch.texts[i].startswith(separator):  # text before the first step belongs to it
            ends = ends[1:]
        solutions.append(
            Solution(
                prompt=batch.tokens[i, :start].tolist(),
                chosen=batch.tokens[i][mask].tolist(),
                ends=ends,
                steps=cut(batch.texts[i], separator, len(ends)),
                row=batch.rows[i],
                score=float(batch.score[i]),
                seed=sample_seed(seed, i if numbers is None else numbers[i]),
                number=i if numbers is None else numbers[i],
            )
        )
    return solutions


def each_step(solutions: Sequence[Solution], branch: Branch, options: StepLabels) -> list[Labelled]:
    """Labels every step by branches from it; the last step's label says if the solution is right.

    hard: y_i = 1 if any branch of step i is right, else 0;  soft: y_i = MC(s_i)

    Wang et al. 2023 (Math-Shepherd), arXiv:2312.08935, with 8 branches and hard labels.
    """
    states = [(i, count) for i, solution in enumerate(solutions) for count in range(1, len(solution.ends))]
    measured = _estimates(solutions, states, branch, options.threshold)
    labelled = []
    for i, solution in enumerate(solutions):
        estimates, counts = _with_ending(solution, {s: measured[i, s] for s in range(1, len(solution.ends))}, options)
        hard = [None if estimate is None else float(estimate > 0) for estimate in estimates]
        labelled.append(Labelled(solution, hard if options.estimate == "hard" else estimates, estimates, counts))
    return labelled


def binary_search(solutions: Sequence[Solution], branch: Branch, options: StepLabels) -> list[Labelled]:
    """Looks for the first wrong step of each wrong solution: the first state from which no branch is right.

    low = 0, high = number of steps;  m = (low + high) / 2:  low = m if MC(s_m) > 0 else high = m;  until high = low + 1

    Luo et al. 2024 (OmegaPRM), arXiv:2406.06592: about log2 of the number of steps a solution instead of
    all of them. The search assumes that a problem can be solved before its first wrong step, and not after it.

    hard: 1 before the first wrong step, 0 from it on; all steps of a right solution are 1. soft: MC(s) of the states
    that the search visited, None for other states.
    """
    low = [0] * len(solutions)
    high = [len(solution.ends) for solution in solutions]
    visited: list[dict[int, tuple[float, int]]] = [{} for _ in solutions]
    wrong = [i for i, solution in enumerate(solutions) if solution.score <= options.threshold]
    while states := [(i, (low[i] + high[i]) // 2) for i in wrong if high[i] - low[i] > 1]:
        for (i, middle), estimate in _estimates(solutions, states, branch, options.threshold).items():
            visited[i][middle] = estimate
            if estimate[0] > 0:
                low[i] = middle
            else:  # also if no branch could be scored, such as at the length limit: the solution cannot be completed
                high[i] = middle
    labelled = []
    for i, solution in enumerate(solutions):
        estimates, counts = _with_ending(solution, visited[i], options)
        first_wrong = high[i] - 1 if i in set(wrong) else len(solution.ends)
        hard: list[float | None] = [float(step < first_wrong) for step in range(len(solution.ends))]
        labelled.append(Labelled(solution, hard if options.estimate == "hard" else estimates, estimates, counts))
    return labelled


def make_step_labels(
    source: CompletionSource,
    batch: Batch,
    options: StepLabels,
    sampling: Sampling,
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[Labelled]:
    """Labels the steps of a batch's finished, scored completions.

    Args:
        source: the policy's engine, and the verifiers.
        batch: completions with their scores.
        options: the settings of step labels.
        sampling: sampling of the branches; a solution's steps and their branch have ``max_tokens`` together.
        seed: seed of the branches.
        numbers: number of each completion among all (see :func:`find_solutions`).
    """
    solutions = find_solutions(batch, source.decode, options.separator, seed, numbers)
    branch = partial(branch_scores, source, n=options.completions, sampling=sampling)
    return (each_step if options.method == "each_step" else binary_search)(solutions, branch, options)


def to_row(labelled: Labelled, threshold: float = 0.0) -> dict[str, Any]:
    """Makes a row in TRL's stepwise format, with the dataset's columns, estimates and numbers of branches."""
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
    """Share of right branches (NaN without any) and number of scored branches of each state (solution, steps)."""
    if not states:
        return {}
    scores = branch([solutions[i].prefix(count) for i, count in states])
    scored = ~scores.isnan()
    right = (scores > threshold).sum(-1)
    counts = scored.sum(-1)
    shares = (right / counts).tolist()  # 0 / 0 is NaN
    return {state: (shares[k], int(counts[k])) for k, state in enumerate(states)}


def _with_ending(
    solution: Solution, measured: dict[int, tuple[float, int]], options: StepLabels
) -> tuple[list[float | None], list[int]]:
    """Estimates and counts of all steps; the last step's estimate says if the solution is right, from its score."""
    estimates: list[float | None] = []
    counts = []
    for count in range(1, len(solution.ends)):
        share, scored = measured.get(count, (math.nan, 0))
        estimates.append(None if math.isnan(share) else share)
        counts.append(scored)
    return [*estimates, float(solution.score > options.threshold)], [*counts, 1]
