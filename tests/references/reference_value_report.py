"""Scalar reference of a value report: its figures as loops over completions and columns."""

from __future__ import annotations

import math
import statistics

from posttrain.batch import Batch, Finish


def states(batch: Batch, value, outcome) -> list[dict]:
    """One dict for each state of every completion with an outcome."""
    found = []
    for n in range(len(batch)):
        if math.isnan(float(outcome[n])) or bool(batch.baseline_only[n]):
            continue
        chosen = [t for t in range(batch.mask.shape[1]) if bool(batch.mask[n, t])]
        at = sorted(set(chosen) | {t - 1 for t in chosen})
        for column in at:
            before = [t for t in chosen if t <= column]
            found.append(
                {
                    "value": float(value[n, column]),
                    "outcome": float(outcome[n]),
                    "position": len(before) / len(chosen),
                    "step": int(batch.step_id[n, before[-1]]) if before else -1,
                    "last": column == chosen[-1],
                    "truncated": int(batch.finish[n]) != Finish.STOPPED,
                    "group": int(batch.group[n]),
                }
            )
    return found


def explained_variance(values: list[float], targets: list[float]) -> float:
    errors = [t - v for v, t in zip(values, targets, strict=True)]
    return 1 - statistics.pvariance(errors) / statistics.pvariance(targets)


def quantile(values: list[float], level: float) -> float:
    return sorted(values)[max(1, math.ceil(level * len(values))) - 1]


def calibration(found: list[dict], bins: int) -> list[dict]:
    """Bins of equal mass, each with its states, from low to high."""
    values = [state["value"] for state in found]
    edges = sorted({quantile(values, i / bins) for i in range(1, bins)} - {max(values)}) + [math.inf]
    below = -math.inf
    curve = []
    for edge in edges:
        inside = [state for state in found if below < state["value"] <= edge]
        curve.append(
            {
                "count": len(inside),
                "value": statistics.mean(state["value"] for state in inside),
                "outcome": statistics.mean(state["outcome"] for state in inside),
                "standard_error": clustered_error(inside),
            }
        )
        below = edge
    return curve


def clustered_error(inside: list[dict]) -> float:
    """Standard error of the mean of value - outcome; the states of a prompt are one cluster."""
    errors = [state["value"] - state["outcome"] for state in inside]
    mean = statistics.mean(errors)
    squares = 0.0
    for group in {state["group"] for state in inside}:
        squares += sum(e - mean for e, state in zip(errors, inside, strict=True) if state["group"] == group) ** 2
    return math.sqrt(squares) / len(inside)


def calibration_error(curve: list[dict]) -> float:
    total = sum(one["count"] for one in curve)
    return sum(one["count"] / total * abs(one["value"] - one["outcome"]) for one in curve)


def agreement(values: list[float], outcomes: list[list[float]]) -> dict[str, float]:
    """Agreement over the prefixes with a value and at least two outcomes that are not NaN."""
    pairs = []
    for value, row in zip(values, outcomes, strict=True):
        known = [x for x in row if not math.isnan(x)]
        if len(known) >= 2 and not math.isnan(value):
            pairs.append((value, statistics.mean(known), statistics.variance(known) / len(known)))
    predicted, means, noise = map(list, zip(*pairs, strict=True))
    square = statistics.mean((v - m) ** 2 for v, m in zip(predicted, means, strict=True))
    return {
        "branches/prefixes": len(pairs),
        "branches/bias": statistics.mean(predicted) - statistics.mean(means),
        "branches/rmse": math.sqrt(max(0.0, square - statistics.mean(noise))),
        "branches/correlation": statistics.correlation(predicted, means),
        "branches/correlation_ceiling": math.sqrt(max(0.0, 1 - statistics.mean(noise) / statistics.pvariance(means))),
    }
