"""The metrics of one step of the loop: rollouts, values, updates, verifiers, and where the seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor

from posttrain.batch import Batch
from posttrain.rollout.collect import Collected, verifier_means
from posttrain.system.processes import Processes
from posttrain.training.checkpoints import parts_with_memory
from posttrain.training.metrics import (
    example_metrics,
    mean_sums,
    peak_memory_mb,
    reduce_means,
    rollout_metrics,
)
from posttrain.training.recipe import Recipe
from posttrain.training.setup import TrainingRun


class Clock:
    """Measures a step: the seconds of each named stage, and of the step as a whole since the clock was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the seconds that pass inside to those of the stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def whole(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


def step_metrics(
    run: TrainingRun,
    batch: Batch,
    kept: Bool[Tensor, " N"],
    collected: Collected,
    learned: Mapping[str, float],
    clock: Clock,
) -> dict[str, float]:
    """All metrics of a step, over all ranks.

    Args:
        batch: the batch as the update saw it.
        kept: completions that the update learned from.
        learned: metrics of the values and of the update.
        clock: holds the seconds of the stages.
    """
    processes = run.processes
    metrics = completion_metrics(run.recipe, batch, kept, collected, processes) | dict(learned)
    if run.recipe.value and run.recipe.value.ready_at is not None:
        metrics["policy/waits"] = float(run.policy_waits)
    metrics |= {"prompts/drawn": float(collected.prompts_drawn), "prompts/rounds": float(collected.rounds)}
    if run.recipe.select and run.recipe.examples is None:
        metrics["prompts/missing"] = float(collected.prompts_missing)
    if batch.advantage is not None:
        idle = ~(batch.advantage != 0).any(-1)
        metrics |= reduce_means({"advantage/zero": mean_sums(idle[kept & batch.mask.any(-1)])}, processes)
    metrics |= reward_metrics(batch[kept], processes)
    for part in parts_with_memory(run.recipe).values():
        metrics |= part.metrics() if hasattr(part, "metrics") else {}
    metrics |= failure_counts(run)
    tokens = float(processes.all_sum(torch.tensor(collected.tokens)))
    whole = clock.whole
    seconds = clock.seconds | collected.seconds
    seconds |= {"other": whole - sum(seconds.values()), "step": whole}
    metrics |= {f"time/{stage}": value for stage, value in seconds.items()}
    return metrics | {"time/tokens_per_second": tokens / whole, "time/peak_memory_mb": peak_memory_mb()}


def completion_metrics(
    recipe: Recipe, batch: Batch, kept: Bool[Tensor, " N"], collected: Collected, processes: Processes
) -> dict[str, float]:
    """Statistics of all completions that were drawn; under ``kept/`` of those that the update learned from.

    ``kept/`` is there only if the recipe has ``select`` or ``keep``. Rewards are computed after ``select``: the metrics
    of what was drawn have no ``reward/`` if the recipe makes something else of the scores.
    """
    of_batch = example_metrics if recipe.examples is not None else rollout_metrics
    if not recipe.select and not recipe.keep:
        return of_batch(batch, processes) | verifier_means(collected.values, processes)
    drawn, values = batch, collected.values
    if recipe.select:
        dropped = collected.dropped
        drawn = collected.batch if dropped is None else Batch.concatenate([collected.batch, dropped])
        values = {name: [*column, *collected.dropped_values[name]] for name, column in values.items()}
    metrics = of_batch(drawn, processes) | verifier_means(values, processes)
    if recipe.select and recipe.changes_scores:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("reward/")}
    rows = kept.nonzero().squeeze(-1).tolist()
    kept_values = {name: [column[i] for i in rows] for name, column in collected.values.items()}
    of_kept = of_batch(batch[kept], processes) | verifier_means(kept_values, processes)
    return metrics | {f"kept/{name}": value for name, value in of_kept.items()}


def reward_metrics(batch: Batch, processes: Processes) -> dict[str, float]:
    """Mean, standard deviation and share of missing values of each reward, over the completions learned from.

    Empty in a recipe with one reward, which ``reward/mean`` is about.
    """
    if batch.rewards is None or batch.rewards.shape[-1] < 2:
        return {}
    metrics = {}
    counted = batch.mask.any(-1)
    for name, column in zip(batch.reward_columns.names, batch.rewards[counted].double().unbind(-1), strict=True):
        known = column[~column.isnan()]
        sums = {"mean": mean_sums(known), "square": mean_sums(known.square()), "missing": mean_sums(column.isnan())}
        means = reduce_means(sums, processes)
        means["std"] = max(0.0, means.pop("square") - means["mean"] ** 2) ** 0.5
        metrics |= {f"rewards/{name}/{figure}": value for figure, value in means.items()}
    return metrics


def failure_counts(run: TrainingRun) -> dict[str, float]:
    """Number of verifier calls of this step that failed under ``on_error: skip``, by verifier, on all ranks."""
    failures, names = run.source.verifiers.failures, run.source.verifiers.names
    totals = run.processes.all_sum(torch.tensor([float(failures[name]) for name in names])).tolist()
    return {f"failures/{name}": total for name, total in zip(names, totals, strict=True) if total}
