"""Evaluation of reward models: ``posttrain eval eval/reward.yaml`` measures accuracy on pairs and best-of-n curves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass
from torch import Tensor

from posttrain.batch import Batch, seq_sum
from posttrain.data.read import find
from posttrain.data.rollout_files import read_rollouts
from posttrain.errors import DataError, RecipeError
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Checked, Part
from posttrain.recipe.yaml_reader import Location, Overrides
from posttrain.reports.reward_accuracy import accuracy, compare_pairs, read_pairs, score_pairs
from posttrain.reports.reward_curves import best_of_n_curve, draw_curve, moments, overoptimisation


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class RewardSuite(Checked):
    """How good reward models are; several are added up with their weights, as in a recipe."""

    modules: ClassVar[Mapping[str, str]] = {"reward": "posttrain.parts.rewards"}

    suite: Literal["reward"]
    reward: tuple[InstanceOf[Part], ...]
    data: sections.DataSection | None = None  # pairs in RewardBench's format: prompt, chosen, rejected, subset
    rollouts: str | None = None  # completions with the verifiers' scores, the gold rewards: a file, or a folder of them
    sizes: tuple[int, ...] = field(
        default=(1, 2, 4, 8, 16, 32, 64)
    )  # n's of best-of-n, up to the completions there are
    folder: str | None = None  # of the report; default: ``reports/<suite's name>``

    name: str = "reward"
    path: Path | None = None  # of the YAML file

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if not self.reward:
            yield ("reward",), "is empty: there is no reward model to measure"
        if self.data is None and self.rollouts is None:
            yield (), "nothing to measure on: give `data` (pairs), `rollouts` (completions with scores) or both"
        if 1 not in self.sizes:
            yield ("sizes",), "must hold 1: the reward of the policy itself, which the others are compared with"


def run_reward_suite(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the suite in a YAML file, prints its figures, and returns the folder of its report.

    Raises:
        UserError: for what a person can mend.
    """
    suite = load_as(RewardSuite, path, overrides)
    for part in suite.reward:
        if (needs := getattr(part.call, "needs", None)) is not None:
            needs()  # fails where a model is missing
    report: dict[str, Any] = {}
    folder = Path(suite.folder or Path("reports") / suite.name)
    folder.mkdir(parents=True, exist_ok=True)
    if suite.data is not None:
        report["pairs"] = measure_pairs(suite)
    if suite.rollouts is not None:
        report["best_of_n"] = measure_best_of_n(suite)
        figure = draw_curve(report["best_of_n"]["curve"], report["best_of_n"]["law"])
        figure.savefig(folder / "best_of_n.png")
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(*summary(report), f"  {folder}", sep="\n")
    return folder


def measure_pairs(suite: RewardSuite) -> dict[str, Any]:
    """Accuracies on the pairs: of one judge that compares, or of the sum of models that score."""
    assert suite.data is not None
    rows = read_pairs(suite.data, suite.path.parent if suite.path else None)
    compare = getattr(suite.reward[0].call, "probabilities", None)
    if compare is not None and len(suite.reward) == 1:
        return accuracy(rows, compare_pairs(rows, compare))
    scorers = [(part.weight, _text_scorer(part)) for part in suite.reward]

    def total(prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        return torch.stack([weight * scorer(prompts, completions) for weight, scorer in scorers]).sum(0)

    return accuracy(rows, score_pairs(rows, total))


def _text_scorer(part: Part) -> Callable[[Sequence[Any], Sequence[str]], Float[Tensor, " M"]]:
    scorer = getattr(part.call, "of_texts", None)
    if scorer is None:
        raise RecipeError(f"reward: {part.name} scores no texts, so it has no accuracy on pairs; leave `data` out")
    return scorer


def measure_best_of_n(suite: RewardSuite) -> dict[str, Any]:
    """Gold reward (the verifiers' scores) of the completion that the reward models like best, against n and KL.

    ``law`` is fitted where there are two sizes or more beside 1; ``moments`` are those of the reward models' sum, for
    ``shift`` and ``scale``.
    """
    assert suite.rollouts is not None
    proxies, golds = [], []
    for file in _files(suite.rollouts, suite.path.parent if suite.path else None):
        batch = read_rollouts(file)
        batch = batch[batch.score.isfinite() & ~batch.baseline_only & batch.mask.any(-1)]
        if len(batch):
            proxy, gold = _by_group(batch, _sum_of_rewards(suite.reward, batch))
            proxies += proxy
            golds += gold
    proxy, gold = _even(proxies), _even(golds)
    if not len(proxy):
        raise DataError(f"{suite.rollouts}: no prompt has a completion with a score")
    sizes = sorted(n for n in set(suite.sizes) if n <= proxy.shape[1])
    curve = best_of_n_curve(proxy, gold, sizes)
    law = overoptimisation(curve["kl"], curve["gold"]) if len(sizes) > 2 else None
    spread = moments(proxy) if float(proxy.std()) > 0 else None
    numbers = {"prompts": proxy.shape[0], "completions": proxy.shape[1]}
    return {**numbers, "curve": _without_nan(curve), "law": law, "moments": spread}


def _sum_of_rewards(parts: Iterable[Part], batch: Batch) -> Float[Tensor, " N"]:
    """The parts' rewards with their weights; step rewards are summed over the completion."""
    total = torch.zeros(len(batch))
    for part in parts:
        value = part.weight * part(batch)
        total += value if value.dim() == 1 else seq_sum(value, batch.mask)
    return total


def _by_group(batch: Batch, proxy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    groups = [batch.group == name for name in batch.group.unique().tolist()]
    return [proxy[group] for group in groups], [batch.score[group] for group in groups]


def _even(groups: Sequence[Tensor]) -> Float[Tensor, "P N"]:
    """As many completions of each prompt as the prompt with the fewest has."""
    fewest = min(map(len, groups), default=0)
    return torch.stack([group[:fewest] for group in groups]) if groups else torch.zeros(0, 0)


def _files(path: str, base: Path | None) -> list[Path]:
    found = find(path, base)
    files = [] if found is None else [found] if found.is_file() else sorted(found.glob("**/step-*.parquet"))
    if not files:
        raise DataError(f"rollouts: there is no Parquet file of rollouts in {path}")
    return files


def _without_nan(curve: dict[str, Any]) -> dict[str, Any]:
    """The standard error of one prompt is not known, and JSON knows no NaN."""
    known = not any(math.isnan(error) for error in curve["gold_error"])
    return curve if known else {**curve, "gold_error": None}


def summary(report: dict[str, Any]) -> list[str]:
    """The figures a reader wants first."""
    lines = []
    if pairs := report.get("pairs"):
        parts = pairs["sections"] or pairs["subsets"]
        lines.append(f"accuracy {pairs['all']:.3f} of {sum(pairs['counts'].values())} pairs")
        lines += [f"  {name}: {value:.3f}" for name, value in parts.items()]
    if found := report.get("best_of_n"):
        curve = found["curve"]
        lines.append(f"best of n by the reward, {found['prompts']} prompts of {found['completions']} completions")
        columns = zip(curve["n"], curve["kl"], curve["proxy"], curve["gold"], curve["oracle"], strict=True)
        lines += [f"  n {n}: KL {kl:.2f}, reward {p:.3f}, gold {g:.3f} of {o:.3f}" for n, kl, p, g, o in columns]
    return lines
