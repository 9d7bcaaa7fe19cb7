"""Completions that are given instead of sampled: what a step of an offline recipe learns from."""

from __future__ import annotations

import time

import torch

from posttrain.batch import blank_row
from posttrain.collect import Collected
from posttrain.data import PromptSampler
from posttrain.examples.given import Examples
from posttrain.recipe import Recipe
from posttrain.runtime import Runtime


def draw_examples(recipe: Recipe, runtime: Runtime, examples: Examples, sampler: PromptSampler, step: int) -> Collected:
    """``prompts_per_step`` groups of given completions on all ranks together, as if they had just been sampled.

    Every rank draws the same list and takes its share.
    """
    start = time.perf_counter()
    index = sampler.draw(recipe.prompts_per_step)
    share = recipe.prompts_per_step // runtime.world
    mine = index[runtime.rank * share : (runtime.rank + 1) * share]
    batch = runtime.together(lambda: examples.batch(mine))
    group = batch.group.unique(return_inverse=True)[1] + runtime.rank * share
    batch = batch.set(group=group, step=step, all_sum=runtime.all_sum)
    chosen = torch.ones(len(batch), dtype=torch.bool)
    for part in recipe.select:
        chosen &= part(batch)
    kept = batch[chosen] if bool(chosen.any()) else blank_row(batch)
    return Collected(kept, {}, len(index), 1, 0, {"read": time.perf_counter() - start})
