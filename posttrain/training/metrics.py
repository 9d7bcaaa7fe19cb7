"""Metrics of rollouts, updates and preferences, made of sums over all ranks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.batch import Author, Batch, Finish, Outputs, group_std
from posttrain.parts.preference.summary import summarise
from posttrain.parts.selection import mixed_groups
from posttrain.recipe.part import Part
from posttrain.system.processes import Processes


def rollout_metrics(batch: Batch, processes: Processes) -> dict[str, float]:
    """Length, score and reward statistics of the policy's own completions (no opponents, baselines or padding rows).

    ``groups/mixed`` is the share of groups whose scores differ: a group-centred method learns from no other.
    ``groups/spread`` is the mean standard deviation of the scores in a group.
    """
    batch = batch[~batch.baseline_only & batch.mask.any(-1) & batch.by(Author.POLICY)]
    scored = batch.scored
    reward, score = batch.reward[scored], batch.score[scored]
    spread = group_std(batch.score, batch.group, scored)
    first = _first_of_group(batch.group)
    length = batch.tokens_chosen.double()
    sums = {
        "reward/mean": mean_sums(reward),
        "reward/square": mean_sums(reward.square()),
        "reward/per_token": mean_sums(batch.step_reward.sum(-1)),
        "score/mean": mean_sums(score),
        "accuracy": mean_sums(score > 0),
        "unscored": mean_sums(~scored),
        "length/mean": mean_sums(length),
        "length/square": mean_sums(length.square()),
        "truncated": mean_sums(batch.finish == Finish.LENGTH),
        "groups/mixed": mean_sums(mixed_groups(batch)[first]),
        "groups/spread": mean_sums(spread[first]),
    }
    means = reduce_means(sums, processes)
    means["reward/std"] = max(0.0, means.pop("reward/square") - means["reward/mean"] ** 2) ** 0.5
    means["length/std"] = max(0.0, means.pop("length/square") - means["length/mean"] ** 2) ** 0.5
    longest = processes.all_max(int(length.max()) if len(length) else 0)
    return means | {"length/max": float(longest)}


def update_sums(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Sums over a micro-batch's chosen tokens that compare the three policies: sampler, old and now.

    ``policy/entropy`` is estimated by -log p of the sampled tokens; ``policy/kl_old`` and ``sampler/kl`` by the
    estimator e^x - 1 - x, which is never negative. Returns [sum, count] pairs.
    """
    mask = batch.mask & (batch.loss_share != 0 if batch.loss_share is not None else batch.mask)
    now, sampler = outputs.logp.detach()[mask], batch.logp_sampler[mask]
    old = batch.logp_old[mask] if batch.logp_old is not None else now
    known = ~sampler.isnan()  # NaN for completions from the dataset: the sampler's log-probs are unknown
    moved, gap = now - old, (old - sampler)[known]
    sums = {
        "policy/entropy": mean_sums(-now),
        "policy/ratio": mean_sums(moved.exp()),
        "policy/kl_old": mean_sums(moved.expm1() - moved),
        "sampler/difference": mean_sums(gap.abs()),
        "sampler/kl": mean_sums(gap.expm1() - gap),
    }
    if batch.logp_ref is not None:
        apart = batch.logp_ref[mask] - now
        sums["policy/kl_ref"] = mean_sums(apart.expm1() - apart)
    return sums


def preference_sums(terms: Sequence[Part], outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Sums that say how the policy ranks the completions of a micro-batch, by the first loss term of preferences.

    Returns [sum, count] pairs; none if the loss has no such term.
    """
    term = next((term for term in terms if term.fact("ranks_completions")), None)
    if term is None:
        return {}
    options = term.every_option
    summary = summarise(outputs, batch, options["score"], options["beta"])
    return {f"preference/{name}": mean_sums(values) for name, values in summary.items()}


def add_sums(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the [sum, count] pairs of several micro-batches."""
    return {name: torch.stack([pairs[name] for pairs in sums]).sum(0) for name in sums[0]} if sums else {}


def reduce_means(sums: Mapping[str, Tensor], processes: Processes) -> dict[str, float]:
    """Turns [sum, count] pairs into means over all ranks, in one reduction; NaN if nothing was counted."""
    if not sums:
        return {}
    totals = processes.all_sum(torch.stack([pair.double().cpu() for pair in sums.values()]))
    return {name: float(s / c) if c else float("nan") for name, (s, c) in zip(sums, totals, strict=True)}


def peak_memory_mb() -> float:
    """Peak memory so far, in MiB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def mean_sums(values: Tensor) -> Tensor:
    """The [sum, count] pair of a tensor's values."""
    return torch.stack([values.double().sum(), torch.tensor(values.numel(), device=values.device).double()])


def _first_of_group(group: Tensor) -> Tensor:
    """True at the first completion of each group."""
    first = torch.zeros(len(group), dtype=torch.bool)
    seen: set[int] = set()
    for row, name in enumerate(group.tolist()):
        first[row] = name not in seen
        seen.add(name)
    return first
