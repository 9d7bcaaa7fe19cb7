"""Accuracy of reward models on pairs in RewardBench's format: columns prompt, chosen, rejected, subset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from posttrain.data.problems import Problems, shown
from posttrain.data.read import RawRows, read
from posttrain.data.rows import with_columns
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
"""RewardBench's sections, and the weight of each subset in them: its pairs, but 984 for the 447 of math-prm, which then
weighs as much as all of code. Lambert et al. 2024, arXiv:2403.13787."""

Scorer = Callable[[Sequence[Any], Sequence[str]], Float[Tensor, " M"]]
"""Prompts and completions to rewards, such as ``reward_models.outcome(model=...).of_texts``."""
Comparer = Callable[[Sequence[tuple[Any, str, str]]], Float[Tensor, " P"]]
"""Pairs to the probability that the first is better, such as ``pairwise_judge(...).probabilities``."""


def read_pairs(data: sections.DataSection, base: Path | None = None) -> list[dict[str, Any]]:
    """Rows of a preference set in RewardBench's format; without ``subset`` all are of one.

    Raises:
        DataError: naming file, row and column of what does not fit.
    """
    source = with_columns(read(data, base), data.columns)
    _need(source)
    problems, rows = Problems(), []
    for i, row in enumerate(source.rows):
        row = dict(row)
        for name in ("chosen", "rejected"):
            if not isinstance(row[name], str):
                problems.add(source.place(i), f"column {name!r} is {shown(row[name])}; it is to be text")
        rows.append({**row, "subset": row.get("subset") or "all"})
    problems.raise_if_any()
    return rows


def _need(source: RawRows) -> None:
    there = source.rows.column_names
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in there]
    if missing:
        raise DataError(f"{source.name}: no column {missing[0]!r}; {suggestion(missing[0], there)}")


def score_pairs(rows: Sequence[Mapping[str, Any]], scorer: Scorer) -> list[dict[str, float]]:
    """The rewards of each pair, ``chosen`` and ``rejected``, and whether the chosen one's is higher; a tie is half."""
    prompts = [_messages(row["prompt"]) for row in rows]
    chosen = scorer(prompts, [row["chosen"] for row in rows]).double().tolist()
    rejected = scorer(prompts, [row["rejected"] for row in rows]).double().tolist()
    return [
        {"chosen": c, "rejected": r, "correct": 0.5 if c == r else float(c > r)}
        for c, r in zip(chosen, rejected, strict=True)
    ]


def compare_pairs(rows: Sequence[Mapping[str, Any]], comparer: Comparer) -> list[dict[str, float]]:
    """The probability of each pair that the chosen one is better, and whether it is above one half; half is half."""
    likely = comparer([(_messages(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]).double().tolist()
    return [{"probability": p, "correct": 0.5 if p == 0.5 else float(p > 0.5)} for p in likely]


def accuracy(
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, float]],
    sections: Mapping[str, Mapping[str, int]] = SECTIONS,
) -> dict[str, Any]:
    """Accuracies by subset and section.

    section = Σ weight · accuracy of its subsets / Σ weight;  score = mean of the sections;  all = mean over pairs

    Lambert et al. 2024 (RewardBench), arXiv:2403.13787. Subsets and sections without pairs are left out.

    Args:
        rows: with ``subset``.
        results: with ``correct``, of :func:`score_pairs` or :func:`compare_pairs`.
        sections: the weights of their subsets.

    Returns:
        ``subsets`` and ``sections`` (name -> accuracy), ``counts`` (subset -> pairs), ``all``, and ``score`` where
        there are sections.
    """
    by_subset: dict[str, list[float]] = defaultdict(list)
    for row, result in zip(rows, results, strict=True):
        by_subset[row["subset"]].append(result["correct"])
    subsets = {name: sum(each) / len(each) for name, each in by_subset.items()}
    found = {}
    for section, weights in sections.items():
        there = {name: weight for name, weight in weights.items() if name in subsets}
        if there:
            found[section] = sum(subsets[name] * weight for name, weight in there.items()) / sum(there.values())
    whole = {
        "all": sum(result["correct"] for result in results) / len(results),
        "subsets": subsets,
        "counts": {name: len(each) for name, each in by_subset.items()},
        "sections": found,
    }
    return whole | ({"score": sum(found.values()) / len(found)} if found else {})


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
