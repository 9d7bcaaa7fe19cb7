"""Scalar reference of value models: their formulas as plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence


def decode(kind: str, outputs: Sequence[float], low: float, high: float) -> float:
    """Value of one state from the outputs of a head."""
    if kind == "categorical":
        centres = [low + i * (high - low) / (len(outputs) - 1) for i in range(len(outputs))]
        largest = max(outputs)
        weights = [math.exp(x - largest) for x in outputs]
        return sum(w * c for w, c in zip(weights, centres, strict=True)) / sum(weights)
    if kind == "quantile":
        return sum(outputs) / len(outputs)
    if kind == "bernoulli":
        return 1 / (1 + math.exp(-outputs[0]))
    return outputs[0]


def reduce(values: Sequence[float], how: str, deviations: float) -> float:
    """Combines the values of the members into one."""
    if how == "min":
        return min(values)
    if how == "max":
        return max(values)
    mean = sum(values) / len(values)
    if how == "mean":
        return mean
    return mean - deviations * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def back_up(probabilities: Sequence[float], next_values: Sequence[float], kind: str, beta: float) -> float:
    """Value of a state from the values of all next tokens."""
    if kind == "mean":
        return sum(p * q for p, q in zip(probabilities, next_values, strict=True))
    if kind == "soft":
        return beta * math.log(sum(p * math.exp(q / beta) for p, q in zip(probabilities, next_values, strict=True)))
    if kind == "max":
        return max(next_values)
    return next_values[probabilities.index(max(probabilities))]


def running_moments(batches: Sequence[Sequence[float]], decay: float) -> tuple[float, float]:
    """Running mean and deviation: batch i of n weighs decay ** (n - 1 - i)."""
    weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    mean = sum(w * sum(x) / len(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    square = sum(w * sum(v * v for v in x) / len(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    return mean, math.sqrt(max(square - mean * mean, 0.01))
