"""The metrics of one step of the loop: rollouts, values, updates, verifiers, and where the seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from posttrain.batch import Batch
from posttrain.rollout.collect import Collected, verifier_means
from posttrain.training.metrics import example_metrics, peak_memory_mb, rollout_metrics
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
    run: TrainingRun, batch: Batch, collected: Collected, learned: Mapping[str, float], clock: Clock
) -> dict[str, float]:
    """All metrics of a step, over all ranks.

    Args:
        batch: the batch as the update saw it.
        learned: metrics of the values and of the update.
        clock: holds the seconds of the stages.
    """
    processes = run.processes
    data = example_metrics if run.recipe.examples is not None else rollout_metrics
    metrics = data(batch, processes) | dict(learned) | verifier_means(collected.values, processes)
    if run.recipe.value and run.recipe.value.ready_at is not None:
        metrics["policy/waits"] = float(run.policy_waits)
    metrics |= {"prompts/drawn": float(collected.prompts_drawn), "prompts/rounds": float(collected.rounds)}
    metrics |= failure_counts(run)
    tokens = float(processes.all_sum(torch.tensor(collected.tokens)))
    whole = clock.whole
    seconds = clock.seconds | collected.seconds
    seconds |= {"other": whole - sum(seconds.values()), "step": whole}
    metrics |= {f"time/{stage}": value for stage, value in seconds.items()}
    return metrics | {"time/tokens_per_second": tokens / whole, "time/peak_memory_mb": peak_memory_mb()}


def failure_counts(run: TrainingRun) -> dict[str, float]:
    """Number of verifier calls of this step that failed under ``on_error: skip``, by verifier, on all ranks."""
    failures, names = run.source.verifiers.failures, run.source.verifiers.names
    totals = run.processes.all_sum(torch.tensor([float(failures[name]) for name in names])).tolist()
    return {f"failures/{name}": total for name, total in zip(names, totals, strict=True) if total}
