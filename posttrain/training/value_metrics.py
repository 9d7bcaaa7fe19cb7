"""Metrics of a value model: explained variance, calibration, errors by position and step, agreement with branches.

Every figure is made of sums over states (prefixes of completions). ``all_sum`` adds them up over the ranks, so that
several processes give the numbers of one. Values and outcomes are in reward units, computed in float64.

Sizes in the shape annotations: ``M`` states, ``B`` bins, ``P`` prefixes with ``K`` continuations each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch import Batch, Finish, identity
from posttrain.system.processes import Processes

AllSum = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; the identity in a run of one process."""


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Prefixes of completions whose outcome is known, one element each. The completions of a group are on one rank."""

    value: Float[Tensor, " M"]  # predicted value
    outcome: Float[Tensor, " M"]  # outcome of the completion that the state belongs to
    position: Float[Tensor, " M"]  # share of the completion before the state: 0 at the prompt's end, 1 at its own end
    step: Int[Tensor, " M"]  # reasoning step that the state ends in; -1 before the first token
    last: Bool[Tensor, " M"]  # True for the whole completion
    truncated: Bool[Tensor, " M"]  # True if the completion was cut off
    group: Int[Tensor, " M"]  # index of the prompt
    all_sum: AllSum = identity

    def __len__(self) -> int:
        return len(self.value)

    @property
    def error(self) -> Float[Tensor, " M"]:
        """Predicted value minus outcome."""
        return self.value - self.outcome

    def where(self, chosen: Bool[Tensor, " M"]) -> States:
        """The selected states."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "all_sum"]
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in names})


def states_of(
    batch: Batch, value: Float[Tensor, "N L"], outcome: Float[Tensor, " N"], at: Bool[Tensor, "N L"]
) -> States:
    """The states of all completions that have an outcome, without completions that are baselines only.

    Args:
        value: predictions.
        outcome: the outcome of each completion; NaN where it is unknown.
        at: True where there is a prediction, such as ``batch.states``.
    """
    rows = torch.isfinite(outcome) & ~batch.baseline_only
    chosen = (at & rows[:, None]).nonzero(as_tuple=True)
    count = batch.mask.cumsum(-1)
    last = torch.arange(batch.mask.shape[1]) == last_chosen(batch.mask)[:, None]
    return States(
        value=value[chosen].double(),
        outcome=outcome[chosen[0]].double(),
        position=(count / count[:, -1:].clamp(min=1))[chosen].double(),
        step=batch.step_id.cummax(-1).values[chosen],
        last=last[chosen],
        truncated=(batch.finish != Finish.STOPPED)[chosen[0]],
        group=batch.group[chosen[0]],
        all_sum=batch.all_sum,
    )


def last_chosen(mask: Bool[Tensor, "N L"]) -> Int[Tensor, " N"]:
    """Column of the last chosen token of each completion; -1 for a completion without any."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(-1) - 1


def on_mean_scale(reward: Tensor, kind: str, beta: float, top: float) -> Float[Tensor, ...]:
    """Puts rewards or values on the scale on which a correct value is the *mean* of the outcomes.

    A soft value ``V = beta log E[exp(r / beta)]`` is a mean of ``exp((r - top) / beta)``; ``top`` keeps it finite.
    Values of other kinds are returned unchanged.
    """
    return ((reward - top) / beta).exp() if kind == "soft" else reward


# ------------------------------------------------------------------------------------------------- one number from many


def mean(values: Tensor, all_sum: AllSum = identity) -> float:
    """Mean over all ranks; NaN if there are no values."""
    values = values.double()
    total, count = all_sum(torch.stack([values.sum(), torch.tensor(float(values.numel())).double()])).tolist()
    return total / count if count else math.nan


def explained_variance(value: Float[Tensor, " M"], target: Float[Tensor, " M"], all_sum: AllSum = identity) -> float:
    """Share of the targets' variance that the values explain: ``1 - Var(target - value) / Var(target)``.

    1: perfect up to a constant. 0: no better than a constant. NaN where the targets do not vary. The variances are over
    all ranks together, in two passes, which an average over ranks or micro-batches of local figures is not.
    """
    error, target = (target - value).double(), target.double()
    centred = torch.stack([error - mean(error, all_sum), target - mean(target, all_sum)])
    unexplained, whole = all_sum(centred.square().sum(-1)).tolist()
    return 1 - unexplained / whole if whole > 0 else math.nan


def brier_score(value: Float[Tensor, " M"], outcome: Float[Tensor, " M"], all_sum: AllSum = identity) -> float:
    """Mean squared difference of predicted probability and outcome in {0, 1}; NaN where an outcome is neither.

    Brier 1950, "Verification of forecasts expressed in terms of probability", of one of two classes.
    """
    not_binary = float(all_sum(((outcome != 0) & (outcome != 1)).sum().double()))
    return math.nan if not_binary else mean((value - outcome).square(), all_sum)


def global_quantiles(
    values: Float[Tensor, " M"], levels: Sequence[float], all_sum: AllSum = identity
) -> Float[Tensor, " B"]:
    """Quantiles over all ranks: the smallest values that at least a share ``levels`` of all values do not exceed.

    Exact for float32: floats are ordered as their bit patterns are, so each quantile is found by bisection over 32 bits
    with counts alone. NaN if there are no values.
    """
    keys = _ordered(values)
    total = float(all_sum(torch.tensor(float(len(keys))).double()))
    if not total:
        return torch.full((len(levels),), math.nan, dtype=torch.float64)
    ranks = (torch.tensor(list(levels), dtype=torch.float64) * total).ceil().clamp(min=1)
    low, high = torch.full(ranks.shape, -(2**31)), torch.full(ranks.shape, 2**31 - 1)
    for _ in range(32):
        middle = (low + high).div(2, rounding_mode="floor")
        enough = all_sum((keys[:, None] <= middle).sum(0).double()) >= ranks
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return _ordered_back(high).double()


def _ordered(values: Tensor) -> Int[Tensor, " M"]:
    """Integers in the same order as the float32 numbers; zeros of both signs give the same integer."""
    bits = (values.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, -(2**31) - bits - 1, bits)


def _ordered_back(keys: Tensor) -> Float[Tensor, " B"]:
    return torch.where(keys < 0, -(2**31) - keys - 1, keys).int().view(torch.float32)


# --------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True, slots=True)
class Curve:
    """Values and outcomes in each bin; NaN in bins without a state."""

    low: list[float]  # lower bound of each bin
    high: list[float]  # upper bound
    count: list[float]  # number of states
    value: list[float]  # mean value
    outcome: list[float]  # mean outcome
    rmse: list[float]  # root mean square of value - outcome
    standard_error: list[float]  # standard error of the mean of value - outcome; the states of a prompt are one cluster


def binned(states: States, bins: Int[Tensor, " M"], low: Sequence[float], high: Sequence[float]) -> Curve:
    """Values, outcomes and errors of the states in each bin.

    States of a prompt share outcomes, so a standard error that takes them for independent is far too small. Here the
    squares are taken of the sums over each prompt's states (Liang and Zeger 1986, "Longitudinal data analysis using
    generalized linear models", for a mean).
    """
    many = len(low)
    moments = torch.stack([torch.ones_like(states.value), states.value, states.outcome, states.error.square()])
    sums = states.all_sum(torch.zeros(4, many, dtype=torch.float64).index_add_(1, bins, moments))
    count, value, outcome, square = sums[0], *(sums[1:] / sums[0])
    _, prompt = states.group.unique(return_inverse=True)
    prompts = int(prompt.max()) + 1 if len(prompt) else 0
    of_prompt = torch.zeros(prompts * many, dtype=torch.float64)
    of_prompt.index_add_(0, prompt * many + bins, states.error - (value - outcome)[bins])
    spread = states.all_sum(of_prompt.view(prompts, many).square().sum(0)).sqrt() / count
    columns = (count, value, outcome, square.sqrt(), spread)
    return Curve(list(low), list(high), *(column.tolist() for column in columns))


def calibration(states: States, bins: int = 10) -> Curve:
    """Reliability: mean outcome against mean value in bins of the predicted value that hold equally many states.

    Equal values share a bin, so there can be fewer bins than asked for. Bins of equal mass: Nguyen and O'Connor 2015,
    arXiv:1508.05154.
    """
    inner = global_quantiles(states.value, [i / bins for i in range(1, bins)], states.all_sum)
    ends = global_quantiles(states.value, [0.0, 1.0], states.all_sum)
    edges = inner[inner < ends[1]].unique()
    index = torch.bucketize(states.value.float().double(), edges)
    return binned(states, index, [float(ends[0]), *edges.tolist()], [*edges.tolist(), float(ends[1])])


def expected_calibration_error(curve: Curve) -> float:
    """``sum_b count_b / M * |mean value_b - mean outcome_b|`` (Guo et al. 2017, eq. 3, arXiv:1706.04599).

    It is above 0 even for a perfect model, because the means of the bins are sampled.
    """
    total = sum(curve.count)
    gaps = [abs(v - o) * n for n, v, o in zip(curve.count, curve.value, curve.outcome, strict=True) if n]
    return sum(gaps) / total if total else math.nan


def by_position(states: States, bins: int = 10) -> Curve:
    """Values, outcomes and errors along the completion, in bins of equal width of the relative position."""
    index = (states.position * bins).long().clamp(max=bins - 1)
    return binned(states, index, [i / bins for i in range(bins)], [(i + 1) / bins for i in range(bins)])


def by_step(states: States, most: int = 16) -> Curve:
    """Values, outcomes and errors by reasoning step.

    Step -1 is before the first token; the last bin holds all steps from ``most`` on.
    """
    longest = int(global_quantiles(states.step.double(), [1.0], states.all_sum).nan_to_num(-1.0))
    names = [float(step) for step in range(-1, min(longest, most) + 1)]
    return binned(states, (states.step + 1).clamp(max=len(names) - 1), names, names)


def value_bands(states: States, bins: int = 10) -> dict[str, list[list[float]]]:
    """Quartiles of the value along the completion, for completions with an outcome above the mean and for the rest.

    Returns:
        ``above`` and ``below``, each a [25 %, 50 %, 75 %] triple for every bin of the relative position.
    """
    middle = mean(states.outcome, states.all_sum)
    index = (states.position * bins).long().clamp(max=bins - 1)
    bands: dict[str, list[list[float]]] = {}
    for name, side in (("above", states.outcome > middle), ("below", states.outcome <= middle)):
        values = [states.value[side & (index == i)] for i in range(bins)]
        bands[name] = [global_quantiles(in_bin, (0.25, 0.5, 0.75), states.all_sum).tolist() for in_bin in values]
    return bands


def error_histogram(states: States, bins: int = 40) -> dict[str, list[float]]:
    """Counts of value - outcome between its smallest and largest, in bins of equal width, with their edges."""
    low, high = global_quantiles(states.error, [0.0, 1.0], states.all_sum).nan_to_num(0.0).tolist()
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    index = torch.bucketize(states.error.clamp(low, high), edges[1:-1])
    count = states.all_sum(torch.zeros(bins, dtype=torch.float64).index_add_(0, index, torch.ones_like(states.error)))
    return {"edges": edges.tolist(), "count": count.tolist()}


# ------------------------------------------------------------------------------------------------------ whole summaries


def summary(states: States, curve: Curve) -> dict[str, float]:
    """The single figures of a value report, by the names they have in metrics.

    Every state counts once, so that long completions count more than short ones.

    Args:
        curve: the states' :func:`calibration`.

    ``bias_truncated`` is the mean of value - outcome at the last token of completions that were cut off, where the
    outcome is not what the policy was heading for; ``bias_finished`` is that of completions that ended.
    """
    share, finished = states.all_sum, states.where(~states.truncated)
    whole = states.where(states.last)
    return {
        "value/states": float(share(torch.tensor(float(len(states))).double())),
        "value/mean": mean(states.value, share),
        "value/outcome": mean(states.outcome, share),
        "value/bias": mean(states.error, share),
        "value/rmse": math.sqrt(mean(states.error.square(), share)),
        "value/explained_variance": explained_variance(states.value, states.outcome, share),
        "value/explained_variance_finished": explained_variance(finished.value, finished.outcome, share),
        "value/calibration_error": expected_calibration_error(curve),
        "value/brier": brier_score(states.value, states.outcome, share),
        "value/truncated": mean(whole.truncated, share),
        "value/bias_truncated": mean(whole.error[whole.truncated], share),
        "value/bias_finished": mean(whole.error[~whole.truncated], share),
    }


def agreement(
    value: Float[Tensor, " P"], outcomes: Float[Tensor, "P K"], all_sum: AllSum = identity
) -> dict[str, float]:
    """Compares values with the mean outcome of ``K`` continuations of the same prefixes.

    Kazemnejad et al. 2024, arXiv:2410.01679. Means of ``K`` samples are noisy themselves. With their
    standard error ``s`` at each prefix, ``rmse`` is ``sqrt(mean((value - mean)^2) - mean(s^2))``. The largest
    correlation that even the true values can be expected to reach is ``correlation_ceiling``,
    ``sqrt(1 - mean(s^2) / Var(mean))`` (Spearman 1904).

    Args:
        value: NaN where a prefix has no value; such prefixes are left out.
        outcomes: NaN where a continuation has no outcome; prefixes with fewer than two outcomes are left out.
    """
    known = torch.isfinite(outcomes)
    usable = (known.sum(-1) >= 2) & torch.isfinite(value)
    samples, known, value = outcomes[usable].double(), known[usable], value[usable].double()
    count = known.sum(-1)
    means = samples.where(known, 0.0).sum(-1) / count
    noise = (samples - means[:, None]).where(known, 0.0).square().sum(-1) / (count - 1) / count
    centred = torch.stack([value - mean(value, all_sum), means - mean(means, all_sum)])
    products = torch.stack([*centred.square().sum(-1), centred.prod(0).sum(), noise.sum()])
    value_square, mean_square, product, noise_sum = all_sum(products).tolist()
    square = mean((value - means).square(), all_sum)
    spread = math.sqrt(value_square * mean_square)
    return {
        "branches/prefixes": float(all_sum(torch.tensor(float(len(value))).double())),
        "branches/bias": mean(value - means, all_sum),
        "branches/rmse": math.sqrt(max(0.0, square - mean(noise, all_sum))) if math.isfinite(square) else math.nan,
        "branches/correlation": product / spread if spread > 0 else math.nan,
        "branches/correlation_ceiling": math.sqrt(max(0.0, 1 - noise_sum / mean_square)) if mean_square else math.nan,
    }


def value_metrics(
    batch: Batch, processes: Processes, *, support: Float[Tensor, " K"] | None = None
) -> dict[str, float]:
    """Quality of the critic in a training step, as ``value/*`` metrics; none if the batch has no values or targets.

    ``value/clipped`` is the share of targets outside the ``support`` of a categorical head, which it cannot express.
    ``value/bias_truncated`` is the mean of value - reward at the last token of completions that were cut off.
    """
    if batch.value is None or batch.target is None:
        return {}
    learned = batch.states & torch.isfinite(batch.target)
    value, target = batch.value[learned].double().cpu(), batch.target[learned].double().cpu()
    cut = (batch.finish != Finish.STOPPED) & batch.scored & batch.mask.any(-1)
    at_end = batch.value.gather(-1, last_chosen(batch.mask).clamp(min=0)[:, None]).squeeze(-1)
    share = processes.all_sum
    metrics = {
        "value/explained_variance": explained_variance(value, target, share),
        "value/mean": mean(value, share),
        "value/target": mean(target, share),
        "value/rmse": math.sqrt(mean((value - target).square(), share)),
        "value/bias_truncated": mean((at_end - batch.reward)[cut].cpu(), share),
    }
    if support is not None:
        outside = (target < float(support[0])) | (target > float(support[-1]))
        metrics["value/clipped"] = mean(outside, share)
    return metrics
