"""Accuracy of reward models on pairs in RewardBench's format: columns prompt, chosen, rejected, subset."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from posttrain.data.examples.columns import converted, explicit_prompt
from posttrain.data.problems import Problems, shown
from posttrain.data.raw_rows import RawRows
from posttrain.data.rows import read_columns
from posttrain.errors import DataError
from posttrain.recipe import sections
from posttrain.recipe.yaml_reader import suggestion

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""RewardBench's sections with the weight of each subset. The weight is the subset's number of pairs, except math-prm:
its 447 pairs have weight 984, as much as all subsets of code together. Lambert et al. 2024, arXiv:2403.13787."""

Scorer = Callable[[Sequence[Any], Sequence[str]], Float[Tensor, " M"]]
"""Function from prompts and completions to rewards, such as ``reward_models.outcome(model=...).of_texts``."""
Comparer = Callable[[Sequence[tuple[Any, str, str]]], Float[Tensor, " P"]]
"""Function from (prompt, first, second) to the probability that the first completion is better, such as
``pairwise_judge(...).probabilities``."""


def read_pairs(data: sections.DataSection, base: Path | None = None) -> list[dict[str, Any]]:
    """Reads pairs in RewardBench's format, or in TRL's formats of preferences.

    ``chosen`` and ``rejected`` are text or the assistant's messages; without a ``prompt`` both begin with it, as whole
    texts or conversations. Rows without a ``subset`` get the subset ``all``.

    Raises:
        DataError: if a column is missing or is neither text nor one answer; the message names file, row and column.
    """
    source = read_columns(data, base)
    _check_columns(source)
    source = converted(source, explicit_prompt)
    problems, rows = Problems(), []
    for i, row in enumerate(source):
        for name in ("chosen", "rejected"):
            if (text := _answer(row[name])) is None:
                problem = f"column {name!r} is {shown(row[name])}; it must be text, or one message of the assistant"
                problems.add(source.place(i), problem)
            row[name] = text
        rows.append({**row, "subset": row.get("subset") or "all"})
    problems.raise_if_any()
    return rows


def _check_columns(source: RawRows) -> None:
    columns = source.rows.column_names
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise DataError(f"{source.name}: no column {missing[0]!r}; {suggestion(missing[0], columns)}")


def _answer(side: Any) -> str | None:
    """The text of a side that is text or a single message of the assistant; None if it is something else."""
    if isinstance(side, list) and len(side) == 1 and isinstance(side[0], dict) and side[0].get("role") == "assistant":
        side = side[0].get("content")
    return side if isinstance(side, str) else None


def score_pairs(rows: Sequence[Mapping[str, Any]], scorer: Scorer) -> list[dict[str, float]]:
    """Scores both completions of each pair: ``chosen``, ``rejected``, and ``correct`` (1, for a tie 1/2, or 0).

    ``correct`` is NaN if a reward is NaN: such a pair is left out of every accuracy, and counted.
    """
    prompts = [_messages(row["prompt"]) for row in rows]
    chosen = scorer(prompts, [row["chosen"] for row in rows]).double().tolist()
    rejected = scorer(prompts, [row["rejected"] for row in rows]).double().tolist()
    return [
        {"chosen": c, "rejected": r, "correct": math.nan if math.isnan(c + r) else 0.5 if c == r else float(c > r)}
        for c, r in zip(chosen, rejected, strict=True)
    ]


def compare_pairs(rows: Sequence[Mapping[str, Any]], comparer: Comparer) -> list[dict[str, float]]:
    """Compares each pair: ``probability`` that the chosen one is better, and ``correct`` (1, at one half 1/2, or 0)."""
    pairs = [(_messages(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]
    probabilities = comparer(pairs).double().tolist()
    return [{"probability": p, "correct": 0.5 if p == 0.5 else float(p > 0.5)} for p in probabilities]


def accuracy(
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, float]],
    sections: Mapping[str, Mapping[str, int]] = SECTIONS,
) -> dict[str, Any]:
    """Computes accuracies by subset and section.

    section = Σ weight · accuracy of its subsets / Σ weight;  score = mean of the sections;  all = mean over pairs

    Lambert et al. 2024 (RewardBench), arXiv:2403.13787. Subsets and sections without pairs are left out.

    Args:
        rows: pairs with their ``subset``.
        results: results of :func:`score_pairs` or :func:`compare_pairs`, with ``correct``.
        sections: weights of the subsets of each section.

    Returns:
        ``subsets`` and ``sections`` (name -> accuracy), ``counts`` (subset -> pairs), ``all``, and ``score`` if
        there are sections.

    Raises:
        DataError: if no pair has a reward for both of its completions.
    """
    by_subset: dict[str, list[float]] = defaultdict(list)
    known = [(row, result) for row, result in zip(rows, results, strict=True) if not math.isnan(result["correct"])]
    if not known:
        raise DataError("no pair has a reward for both of its completions")
    for row, result in known:
        by_subset[row["subset"]].append(result["correct"])
    subsets = {name: sum(correct) / len(correct) for name, correct in by_subset.items()}
    by_section = {}
    for section, weights in sections.items():
        present = {name: weight for name, weight in weights.items() if name in subsets}
        if present:
            total = sum(subsets[name] * weight for name, weight in present.items())
            by_section[section] = total / sum(present.values())
    accuracies = {
        "all": sum(result["correct"] for _, result in known) / len(known),
        "subsets": subsets,
        "counts": {name: len(correct) for name, correct in by_subset.items()},
        "sections": by_section,
    }
    return accuracies | ({"score": sum(by_section.values()) / len(by_section)} if by_section else {})


def reward_statistics(results: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and missing number of the rewards of the two sides; empty for a judge that compares."""
    sides = [side for side in ("chosen", "rejected") if results and side in results[0]]
    statistics = {}
    for side in sides:
        known = [result[side] for result in results if math.isfinite(result[side])]
        mean = sum(known) / len(known) if known else math.nan
        spread = math.sqrt(sum((value - mean) ** 2 for value in known) / len(known)) if known else math.nan
        statistics[side] = {"mean": mean, "std": spread, "missing": len(results) - len(known)}
    return statistics


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
