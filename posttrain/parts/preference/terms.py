"""Loss terms over preferences ``(outputs, batch) -> [N, L]``: pairs, single completions and lists.

Every term needs whole groups in a micro-batch. The loss of a group is at the first chosen token of one or more of its
completions and is 0 elsewhere: with the normaliser ``group_mean_of_token_sum`` the loss is the mean over groups.
Completions without a label (NaN reward) or a chosen token, and baselines (``batch.baseline_only``), are left out.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, group_sum
from posttrain.option_types import Positive, facts
from posttrain.parts.preference import list_links, list_targets, pair_links, pair_targets, point_links, scores
from posttrain.parts.preference.groups import (
    Pairs,
    Selection,
    Ties,
    at_first_token,
    find_lists,
    find_pairs,
    labelled,
    share,
)
from posttrain.parts.preference.inner import (
    ListLink,
    ListTarget,
    Margin,
    PairLink,
    PairTarget,
    PairWeight,
    PointLink,
    Score,
)


@facts(learns_without_advantage=True, compares_group=True, ranks_completions=True)
def pairwise(
    outputs: Outputs,
    batch: Batch,
    *,
    beta: Positive = 0.1,
    score: Score = scores.log_ratio,
    link: PairLink = pair_links.logistic,
    target: PairTarget = pair_targets.hard,
    margin: tuple[Margin, ...] = (),
    pair_weight: tuple[PairWeight, ...] = (),
    select: Selection = "all",
    ties: Ties = "drop",
) -> Float[Tensor, "N L"]:
    """Pairwise preference loss: compares the better and the worse completion of each pair.

    loss_group = mean over its pairs of w · link(beta (s_w - s_l) - Σ m, target)

    Rafailov et al. 2023 (DPO), eq. 7, arXiv:2305.18290, with all defaults.

    Args:
        beta: factor of the scores. A larger beta keeps the policy closer to the reference.
        score: score s of each completion.
        link: function from margin and target to a loss.
        target: target of each pair, mostly the probability that its chosen completion is the better one.
        margin: margins m, which are subtracted.
        pair_weight: weights w, which are multiplied together, without gradient.
        select: every pair of a group, or only its best completions against its worst.
        ties: ``keep`` also pairs completions with equal labels, for targets that give the probability of each winning.
    """
    chosen, rejected = find_pairs(batch, select=select, ties=ties)
    pairs = Pairs(outputs, batch, beta * score(outputs, batch), chosen, rejected, beta)
    gap = pairs.margin
    for part in margin:
        gap = gap - part(pairs)
    loss = link(gap, target(pairs).to(gap.dtype))
    for part in pair_weight:
        loss = loss * part(pairs).detach()
    shared = loss / group_sum(loss.new_ones(loss.shape), batch.group[chosen])
    return at_first_token(pairs.score.new_zeros(len(batch)).index_add(0, chosen, shared), batch.mask)


@facts(learns_without_advantage=True, ranks_completions=True)
def pointwise(
    outputs: Outputs,
    batch: Batch,
    *,
    beta: Positive = 0.1,
    score: Score = scores.log_ratio,
    link: PointLink = point_links.sigmoid,
    within: Literal["sum", "mean", "mean_of_each_label"] = "mean",
) -> Float[Tensor, "N L"]:
    """Pointwise preference loss: compares each completion with its own label.

    loss_group = sum or mean over its completions of link(beta (s - b), label), with b = ``batch.baseline`` or 0

    Ethayarajh et al. 2024 (KTO), eq. 7, arXiv:2402.01306, with all defaults and the baseline ``mismatched``.

    Args:
        beta: factor of the scores.
        score: score s of each completion.
        link: function from score and label to a loss.
        within: sum or mean over the completions of a group, or the mean over the desirable ones (label above 0) plus
            the mean over the undesirable ones. All three are equal for a completion that is alone in its group.
    """
    valid = labelled(batch)
    label = batch.reward.where(valid, 0.0)
    z = score(outputs, batch)
    if batch.baseline is not None:
        z = z - batch.baseline
    loss = link(beta * z, label.to(z.dtype)).where(valid, 0.0)
    if within == "mean":
        loss = loss * share(batch, valid)
    elif within == "mean_of_each_label":
        loss = loss * share(batch, valid, within=2 * batch.group + (label > 0))
    return at_first_token(loss, batch.mask)


@facts(learns_without_advantage=True, compares_group=True, ranks_completions=True)
def listwise(
    outputs: Outputs,
    batch: Batch,
    *,
    beta: Positive = 0.1,
    score: Score = scores.log_ratio,
    link: ListLink = list_links.cross_entropy,
    target: ListTarget = list_targets.softmax,
) -> Float[Tensor, "N L"]:
    """Listwise preference loss: compares all completions of a group at once.

    loss_group = link(beta s, log q), with q the target distribution over the group

    Chen et al. 2024 (InfoNCA), arXiv:2402.05369, with all defaults.

    Args:
        beta: factor of the scores.
        score: score s of each completion.
        link: function from scores and target to a loss.
        target: target probabilities q, from the labels.
    """
    lists = find_lists(batch)
    z = beta * score(outputs, batch)
    log_target = target(lists.table(batch.reward).to(z.dtype), lists.valid)
    loss = link(lists.table(z), log_target, lists.valid)
    return at_first_token(z.new_zeros(len(batch)).index_add(0, lists.index[:, 0], loss), batch.mask)
