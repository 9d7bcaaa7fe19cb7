"""Metrics of rollouts, updates and preferences, made of sums over all ranks."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from posttrain.batch import Author, Batch, Finish, Outputs, group_std, group_sum
from posttrain.parts.preference.groups import labelled
from posttrain.parts.preference.summary import summarise
from posttrain.parts.selection import mixed_groups
from posttrain.recipe.part import Part
from posttrain.system.memory import peak_bytes
from posttrain.system.processes import Processes
from posttrain.training.ranking import area_over_ranks


def rollout_metrics(batch: Batch, processes: Processes) -> dict[str, float]:
    """Length, score and reward statistics of the policy's own completions (no opponents, baselines or padding rows).

    Where the opponent writes all completions, as in IPO-MD, they are of the opponent's.
    ``groups/mixed`` is the share of groups whose scores differ: a group-centred method learns from no other.
    ``groups/equal`` is the share of groups with two scores or more that are all the same; ``groups/spread`` the mean
    standard deviation of the scores in a group.
    """
    author = Author.POLICY if bool(batch.by(Author.POLICY).any()) else Author.OPPONENT
    batch = batch[~batch.baseline_only & batch.mask.any(-1) & batch.by(author)]
    scored, mixed = batch.scored, mixed_groups(batch)
    reward, score = batch.reward[scored], batch.score[scored]
    first = _first_of_group(batch.group)
    several = group_sum(scored.double(), batch.group) > 1
    sums = {
        "reward/mean": mean_sums(reward),
        "reward/square": mean_sums(reward.square()),
        "reward/per_token": mean_sums(batch.step_reward.sum(-1)),
        "score/mean": mean_sums(score),
        "score/square": mean_sums(score.double().square()),
        "accuracy": mean_sums(score > 0),
        "unscored": mean_sums(~scored),
        "groups/mixed": mean_sums(mixed[first]),
        "groups/equal": mean_sums(several[first] & ~mixed[first]),
        "groups/spread": mean_sums(group_std(batch.score, batch.group, scored)[first]),
    }
    means = reduce_means(sums, processes)
    for name in ("reward", "score"):
        means[f"{name}/std"] = max(0.0, means.pop(f"{name}/square") - means[f"{name}/mean"] ** 2) ** 0.5
    return means | length_metrics(batch, processes)


def example_metrics(batch: Batch, processes: Processes) -> dict[str, float]:
    """Statistics of completions from the dataset: their labels and lengths. They say nothing about what is learned.

    ``label/mean`` and ``label/std`` are those of the ratings, ``label/positive`` the share above 0, and ``unlabelled``
    the share of completions without one.
    """
    batch = batch[~batch.baseline_only & batch.mask.any(-1)]
    label = batch.score[~batch.score.isnan()]
    sums = {
        "label/mean": mean_sums(label),
        "label/square": mean_sums(label.square()),
        "label/positive": mean_sums(label > 0),
        "unlabelled": mean_sums(batch.score.isnan()),
    }
    means = reduce_means(sums, processes)
    means["label/std"] = max(0.0, means.pop("label/square") - means["label/mean"] ** 2) ** 0.5
    return means | length_metrics(batch, processes)


def length_metrics(batch: Batch, processes: Processes) -> dict[str, float]:
    """Mean, standard deviation and maximum of the completions' lengths, in tokens, and the share that was cut off."""
    length = batch.tokens_chosen.double()
    sums = {
        "length/mean": mean_sums(length),
        "length/square": mean_sums(length.square()),
        "truncated": mean_sums(batch.finish == Finish.LENGTH),
    }
    means = reduce_means(sums, processes)
    means["length/std"] = max(0.0, means.pop("length/square") - means["length/mean"] ** 2) ** 0.5
    return means | {"length/max": float(processes.all_max(int(length.max()) if len(length) else 0))}


def update_sums(outputs: Outputs, batch: Batch, given: Bool[Tensor, " N"]) -> dict[str, Tensor]:
    """Sums over a micro-batch's chosen tokens that compare the three policies: sampler, old and now.

    ``policy/entropy`` is estimated by -log p of the tokens that the policy sampled. Of tokens that it did not sample
    the same number is no entropy, but the negative log-likelihood ``nll``. ``policy/kl_old`` and ``sampler/kl`` are
    estimated by e^x - 1 - x, which is never negative.

    Args:
        given: completions from the dataset.

    Returns:
        [sum, count] pairs.
    """
    mask = batch.mask & (batch.loss_share != 0 if batch.loss_share is not None else batch.mask)
    now, sampler = outputs.logp.detach()[mask], batch.logp_sampler[mask]
    old = batch.logp_old[mask] if batch.logp_old is not None else now
    known = ~sampler.isnan()  # NaN for completions from the dataset: the sampler's log-probs are unknown
    moved, gap = now - old, (old - sampler)[known]
    from_dataset = given[:, None].expand_as(mask)[mask]
    own = batch.by(Author.POLICY)[:, None].expand_as(mask)[mask] & ~from_dataset
    sums = {
        "policy/entropy": mean_sums(-now[own]),
        "nll": mean_sums(-now[from_dataset]),
        "policy/ratio": mean_sums(moved.exp()),
        "policy/kl_old": mean_sums(moved.expm1() - moved),
        "sampler/difference": mean_sums(gap.abs()),
        "sampler/kl": mean_sums(gap.expm1() - gap),
    }
    if batch.logp_ref is not None:
        apart = batch.logp_ref[mask] - now
        sums["policy/kl_ref"] = mean_sums(apart.expm1() - apart)
    return sums


class PolicyMetrics:
    """Collects what the passes over micro-batches say about the policy, and makes metrics of it over all ranks."""

    def __init__(self, terms: Sequence[Part]) -> None:
        self._term = next((term for term in terms if term.fact("ranks_completions")), None)
        self._sums: list[dict[str, Tensor]] = []
        self._rewards: list[Tensor] = []  # implicit rewards of labelled completions
        self._desirable: list[Tensor] = []  # True where the label is above 0

    @property
    def ranks_completions(self) -> bool:
        """True if a loss term is one of preferences: its implicit rewards are measured."""
        return self._term is not None

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds the [sum, count] pairs of a micro-batch."""
        self._sums.append(dict(sums))

    def add_preferences(self, outputs: Outputs, batch: Batch) -> None:
        """Adds how the policy ranks the completions of a micro-batch, by the first loss term of preferences."""
        if self._term is None:
            return
        score, beta = (self._term.every_option[name] for name in ("score", "beta"))
        summary = summarise(outputs, batch, score, beta)
        self.add({f"preference/{name}": mean_sums(values) for name, values in summary.items()})
        with torch.no_grad():
            rows = labelled(batch)
            self._rewards.append((beta * score(outputs, batch))[rows])
            self._desirable.append(batch.reward[rows] > 0)

    def reduced(self, processes: Processes) -> dict[str, float]:
        """The metrics over all ranks; a metric of which nothing was counted on any rank is left out.

        Where no two completions of a group have different labels there is no pair to rank. Then the margin is the
        difference of the mean implicit rewards of the two kinds, and ``preference/auc`` the probability that a random
        desirable completion has the higher implicit reward.
        """
        shares = [share for share in processes.gather(add_sums(self._sums)) if share]
        means = {name: float(total / count) for name, (total, count) in add_sums(shares).items() if count}
        labelled_means = {name: means.pop(name) for name in list(means) if name.startswith("preference/by_label/")}
        if self._term is None or "preference/accuracy" in means:
            return means
        means |= {name.replace("by_label/", ""): mean for name, mean in labelled_means.items()}
        if {"preference/chosen_reward", "preference/rejected_reward"} <= means.keys():
            means["preference/margin"] = means["preference/chosen_reward"] - means["preference/rejected_reward"]
        area = area_over_ranks(self._rewards, self._desirable, processes)
        return means if math.isnan(area) else means | {"preference/auc": area}


def add_sums(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the [sum, count] pairs of several micro-batches; a name may be missing in some of them."""
    names = dict.fromkeys(name for pairs in sums for name in pairs)
    return {name: torch.stack([pairs[name].cpu() for pairs in sums if name in pairs]).sum(0) for name in names}


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
    if peak := peak_bytes():
        return peak / 2**20
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
