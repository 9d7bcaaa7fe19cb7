"""Evaluation: the policy's accuracy on held-out prompts, and the trained models on held-out completions."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from posttrain.batch import Batch, Finish, Outputs
from posttrain.data import Rows
from posttrain.data.examples.dataset_examples import Examples
from posttrain.engines.base import Sampling
from posttrain.recipe.sections import EvaluationSection
from posttrain.rollout.collect import CompletionSource, generate_and_verify, index_chunks, make_prompts
from posttrain.seeds import prompt_seeds
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes
from posttrain.training.held_out_values import evaluate_values
from posttrain.training.learner import Learner, policy_logp, reference_logp
from posttrain.training.metrics import PolicyMetrics, mean_sums


def evaluate_completions(
    options: EvaluationSection,
    processes: Processes,
    source: CompletionSource,
    rows: Rows,
    *,
    seed: int,
    store: Callable[[Batch, dict[str, list[float | None]]], None] = lambda batch, values: None,
) -> dict[str, float]:
    """Completes and verifies every row ``options.completions`` times; the rows are shared over the ranks.

    Every call uses the same seeds, so two evaluations differ only by the policy.

    Args:
        store: function that stores this rank's completions, with the values of each verifier.

    Returns:
        ``eval/score`` (mean of the scored completions), ``eval/accuracy`` (share with a positive score),
        ``eval/length`` (mean tokens), ``eval/truncated`` (share cut off at ``max_tokens``), ``eval/unscored`` (share).
    """
    start = time.perf_counter()
    indices = range(processes.rank, len(rows), processes.world)
    prompts = make_prompts(rows, indices, indices, prompt_seeds(seed, 0, 1, indices))
    sampling = Sampling.of(options.sampling)
    work = LongWork("evaluation, completions", len(prompts) * options.completions)
    generate = partial(generate_and_verify, source, prompts, options.completions, sampling, {}, work=work)
    batch, values = processes.together(generate)
    if len(batch):
        store(batch, values)
    sums = torch.zeros(6, dtype=torch.float64)
    if len(batch):
        score = batch.score[batch.scored].double()
        counts = (len(score), len(batch), int(batch.mask.sum()), int((batch.finish == Finish.LENGTH).sum()))
        sums += torch.tensor([float(score.sum()), float((score > 0).sum()), *counts], dtype=torch.float64)
    total, positive, scored, completions, tokens, truncated = processes.all_sum(sums).tolist()
    return {
        "eval/score": total / scored if scored else float("nan"),
        "eval/accuracy": positive / scored if scored else float("nan"),
        "eval/length": tokens / completions,
        "eval/truncated": truncated / completions,
        "eval/unscored": 1 - scored / completions,
        "time/evaluate_completions": time.perf_counter() - start,
    }


@torch.no_grad()
def evaluate_examples(learner: Learner, examples: Examples) -> dict[str, float]:
    """Measures the trained models on held-out completions, which are shared over the ranks.

    Returns:
        Of the policy, if it is trained: ``eval/preference/accuracy``, ``eval/preference/margin`` and the like, for a
        loss of preferences (see :class:`posttrain.training.metrics.PolicyMetrics`); for another loss ``eval/nll``, in
        nats a token. Of the value model, if it is trained: ``eval/value/loss``, and the quality of its values (see
        :func:`posttrain.training.held_out_values.evaluate_values`).
    """
    start = time.perf_counter()
    metrics = evaluate_policy(learner, examples) if learner.recipe.loss else {}
    if learner.recipe.value_loss:
        metrics |= evaluate_values(learner, examples)
    return {f"eval/{name}": value for name, value in metrics.items()} | {
        "time/evaluate_examples": time.perf_counter() - start
    }


def evaluate_policy(learner: Learner, examples: Examples) -> dict[str, float]:
    """Measures how the policy ranks held-out completions, or how likely they are, over all ranks."""
    measured = PolicyMetrics(learner.recipe.loss)
    for index in index_chunks(len(examples), learner.recipe.prompts_per_step):
        if own_index := learner.processes.share_of(index):
            batch = examples.batch(own_index)
            if learner.required.logp_ref and batch.logp_ref is None:
                batch = batch.set(logp_ref=reference_logp(learner, batch))
            outputs = Outputs(logp=policy_logp(learner, batch))
            batch = batch.set(logp_old=outputs.logp)
            if measured.ranks_completions:
                measured.add_preferences(outputs, batch)
            else:
                measured.add({"nll": mean_sums(-outputs.logp[batch.mask & ~batch.baseline_only[:, None]])})
    return measured.reduced(learner.processes)
