"""Decode, verify, average: how good a policy is on held-out rows."""

from __future__ import annotations

import time
from functools import partial

import torch

from posttrain.batch import Finish
from posttrain.collect import Source, generate_and_verify, make_prompts, sampling_of
from posttrain.data import Rows
from posttrain.options import Evaluation
from posttrain.rollout import prompt_seeds
from posttrain.runtime import Runtime


def evaluate(options: Evaluation, runtime: Runtime, source: Source, rows: Rows, *, seed: int) -> dict[str, float]:
    """Mean score of ``options.n`` completions of every row, shared out over the ranks.

    The same seeds at every call: two evaluations differ by the policy alone.

    Returns:
        ``eval/score`` (mean of the scored completions), ``eval/accuracy`` (share with a positive score),
        ``eval/length`` (mean tokens), ``eval/truncated`` (share cut off at ``max_tokens``), ``eval/unscored`` (share).
    """
    start = time.perf_counter()
    mine = range(runtime.rank, len(rows), runtime.world)
    prompts = make_prompts(rows, mine, mine, prompt_seeds(seed, 0, 1, mine))
    sampling = sampling_of(options.sampling)
    batch, _ = runtime.together(partial(generate_and_verify, source, prompts, options.n, sampling, {}))
    sums = torch.zeros(6, dtype=torch.float64)
    if len(batch):
        score = batch.score[batch.scored].double()
        counts = (len(score), len(batch), int(batch.mask.sum()), int((batch.finish == Finish.LENGTH).sum()))
        sums += torch.tensor([float(score.sum()), float((score > 0).sum()), *counts], dtype=torch.float64)
    total, positive, scored, completions, tokens, truncated = runtime.all_sum(sums).tolist()
    return {
        "eval/score": total / scored if scored else float("nan"),
        "eval/accuracy": positive / scored if scored else float("nan"),
        "eval/length": tokens / completions,
        "eval/truncated": truncated / completions,
        "eval/unscored": 1 - scored / completions,
        "time/evaluate": time.perf_counter() - start,
    }
