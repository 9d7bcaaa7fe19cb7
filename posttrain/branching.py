"""Values without a value model: completions sampled from the beginning of each reasoning step."""

from __future__ import annotations

import torch

from posttrain.batch import Batch
from posttrain.collect import Source
from posttrain.data.steps import steps_by_text
from posttrain.engines.base import Sampling
from posttrain.parts.credit import step_starts
from posttrain.parts.targets import branch_estimate
from posttrain.recipe.sections import Branches
from posttrain.report.branches import Prefix, continue_prefixes
from posttrain.seeds import sample_seed


def branch_values(source: Source, batch: Batch, options: Branches, sampling: Sampling, seed: int) -> Batch:
    """The batch with its steps, and as the value of the state before each step the mean score of branches from there.

    Kazemnejad et al. 2025 (VinePPO), eq. 4, arXiv:2410.01679. Equal prefixes, such as the prompt of a group, are
    branched once. States inside steps, and those none of whose branches could be scored, have value 0.

    Args:
        seed: of the branches, which depend on it, the group and the place alone, not on the rank.
    """
    batch = batch.set(step_id=steps_by_text(batch, source.decode, options.separator))
    trained = batch.scored & ~batch.greedy
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, column in (step_starts(batch) & trained[:, None]).nonzero().tolist():
        places.setdefault(tuple(batch.tokens[row, :column].tolist()), []).append((row, column - 1))
    prefixes = [prefix_at(batch, *where[0], seed) for where in places.values()]
    estimates = branch_estimate(continue_prefixes(source, prefixes, options.n, sampling)).nan_to_num(0.0)
    value = torch.zeros_like(batch.logp_sampler)
    for estimate, where in zip(estimates.tolist(), places.values(), strict=True):
        for row, state in where:
            value[row, state] = estimate
    return batch.set(value=value)


def prefix_at(batch: Batch, row: int, state: int, seed: int) -> Prefix:
    """What a completion begins with, up to column ``state``."""
    tokens, prompt = batch.tokens[row, : state + 1].tolist(), int(batch.mask[row].int().argmax())
    number = row - int((batch.group == batch.group[row]).int().argmax())  # of the completion in its group
    own = sample_seed(sample_seed(sample_seed(seed, int(batch.group[row])), number), state)
    return Prefix(tokens[:prompt], tokens[prompt:], batch.rows[row], own, (row, state))
