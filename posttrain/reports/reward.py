"""Measures reward models: accuracy on pairs, and best-of-n curves on stored rollouts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, seq_sum
from posttrain.data.rollout_files import find_rollouts, read_rollouts
from posttrain.errors import DataError, RecipeError
from posttrain.output.kept_work import (
    KeptWork,
    begin,
    finish,
    kept_report,
    say_finished,
    saying_what_is_kept,
    write_piece,
)
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import blocks_of, plain_settings
from posttrain.reports.metrics_file import write_metrics
from posttrain.reports.reward_accuracy import accuracy, compare_pairs, read_pairs, reward_statistics, score_pairs
from posttrain.reports.reward_curves import best_of_n_curve, draw_curve, moments, overoptimisation
from posttrain.reports.reward_suite import RewardSuite
from posttrain.system.files import check_output_folder, hash_of_files, writing
from posttrain.system.processes import Processes


def measure_rewards(suite: RewardSuite, *, resume: bool = False) -> Path:
    """Measures the reward models of a suite, prints the figures, and writes ``metrics.json`` and ``best_of_n.png``.

    Args:
        resume: go on with the scores that are kept.

    Returns:
        The report's folder.

    Raises:
        UserError: if a model is missing, or the pairs or rollouts do not fit; the message says what to change.
        Stopped: after a signal; the message says what is kept.
    """
    folder = suite.report_folder
    check_output_folder(folder, "folder")
    work = kept_report(folder, plain_settings(suite, "folder"), resume=resume, key="folder", unit="pairs and files")
    if work.finished:
        return say_finished(work)
    for part in suite.reward:
        if (needs := getattr(part.call, "needs", None)) is not None:
            needs()  # fails if a model is missing
    rows = [] if suite.data is None else read_pairs(suite.data, suite.base)
    files = [] if suite.rollouts is None else find_rollouts(suite.rollouts, suite.base)
    with saying_what_is_kept(work), Processes() as processes:
        begin(work, processes, _fingerprint(rows, files))
        return processes.from_main(lambda: _measure(suite, rows, files, work))


def _fingerprint(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> str:
    """Hash of the pairs and of the files of rollouts."""
    pairs = json.dumps(rows, default=str).encode()
    return hashlib.blake2b(pairs, digest_size=16).hexdigest() + hash_of_files(files)


def _measure(suite: RewardSuite, rows: Sequence[dict[str, Any]], files: Sequence[Path], work: KeptWork) -> Path:
    """Scores pairs and rollouts, piece by piece, and writes the report."""
    work.total = len(rows) + len(files)
    report: dict[str, Any] = {}
    if suite.data is not None:
        report["pairs"] = measure_pairs(suite, rows, work)
    if suite.rollouts is not None:
        report["best_of_n"] = measure_best_of_n(suite.reward, files, suite.sizes, work)
    print(*report_lines(report), sep="\n")
    folder = suite.report_folder
    with writing(folder, "folder"):
        write_metrics(folder, report)
        if suite.rollouts is not None:
            figure = draw_curve(report["best_of_n"]["curve"], report["best_of_n"]["law"])
            figure.savefig(folder / "best_of_n.png")
    finish(work)
    print(f"  {folder}")
    return folder


def _kept(work: KeptWork, kind: str, number: int, size: int, make: Callable[[], Any]) -> Any:
    """Returns the kept piece of that number; makes it if there is none. ``size`` is how many things it is about."""
    path = work.piece(kind, number, ".json")
    if not path.is_file():
        made = json.dumps(make())
        write_piece(path, lambda temporary: temporary.write_text(made, encoding="utf-8"))
    work.done += size
    return json.loads(path.read_text(encoding="utf-8"))


def measure_pairs(suite: RewardSuite, rows: Sequence[dict[str, Any]], work: KeptWork) -> dict[str, Any]:
    """Computes accuracies on pairs, of one judge that compares, or of the weighted sum of models that score."""
    compare = getattr(suite.reward[0].call, "probabilities", None) if len(suite.reward) == 1 else None
    scorers = [] if compare else [(part.weight, _text_scorer(part)) for part in suite.reward]

    def total(prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        return torch.stack([weight * scorer(prompts, completions) for weight, scorer in scorers]).sum(0)

    results: list[dict[str, float]] = []
    for block in blocks_of(len(rows), suite.save_every):
        some = rows[block.start : block.stop]
        score = partial(compare_pairs, some, compare) if compare else partial(score_pairs, some, total)
        results += _kept(work, "pairs", block.start, len(block), score)
    return accuracy(rows, results) | ({} if compare else {"rewards": reward_statistics(results)})


def _text_scorer(part: Part) -> Callable[[Sequence[Any], Sequence[str]], Float[Tensor, " M"]]:
    scorer = getattr(part.call, "of_texts", None)
    if scorer is None:
        raise RecipeError(f"reward: {part.name} cannot score texts, so it has no accuracy on pairs; leave `data` out")
    return scorer


def measure_best_of_n(
    parts: Iterable[Part], files: Sequence[Path], sizes: Iterable[int], work: KeptWork
) -> dict[str, Any]:
    """Computes the gold reward of the completion that the reward models rank highest, against n and KL.

    Args:
        parts: reward models, the proxy.
        files: rollouts whose verifiers' scores are the gold rewards.
        sizes: n's; those above the number of completions of a prompt are left out.
        work: keeps the rewards of each file.

    Returns:
        ``prompts`` and ``completions`` (their numbers), ``curve``, ``law`` (the fit of :func:`overoptimisation`; None
        for fewer than two sizes above 1), and ``moments`` of the proxy, for ``shift`` and ``scale`` of a reward model.
    """
    proxies, golds = [], []
    for number, file in enumerate(files):
        kept = _kept(work, "rollouts", number, 1, partial(_rewards_of_file, parts, file))
        proxies += [torch.tensor(group, dtype=torch.float32) for group in kept["proxy"]]
        golds += [torch.tensor(group, dtype=torch.float32) for group in kept["gold"]]
    proxy, gold = _even(proxies), _even(golds)
    if not len(proxy):
        raise DataError(f"rollouts: no prompt in {files[0].parent} has a completion with a score")
    usable = sorted(n for n in set(sizes) if n <= proxy.shape[1])
    curve = best_of_n_curve(proxy, gold, usable)
    fit = overoptimisation(curve["kl"], curve["gold"]) if len(usable) > 2 else None
    spread = moments(proxy) if float(proxy.std()) > 0 else None
    numbers = {"prompts": proxy.shape[0], "completions": proxy.shape[1]}
    return {**numbers, "curve": _with_known_errors(curve), "law": fit, "moments": spread}


def _rewards_of_file(parts: Iterable[Part], file: Path) -> dict[str, list[list[float]]]:
    """Proxy and gold rewards of each prompt's completions in a file of rollouts."""
    batch = read_rollouts(file)
    batch = batch[batch.score.isfinite() & ~batch.baseline_only & batch.mask.any(-1)]
    if not len(batch):
        return {"proxy": [], "gold": []}
    proxy, gold = _by_group(batch, _sum_of_rewards(parts, batch))
    return {"proxy": [group.tolist() for group in proxy], "gold": [group.tolist() for group in gold]}


def _sum_of_rewards(parts: Iterable[Part], batch: Batch) -> Float[Tensor, " N"]:
    """Adds the parts' rewards up with their weights; step rewards are summed over the completion."""
    total = torch.zeros(len(batch))
    for part in parts:
        value = part.weight * part(batch)
        total += value if value.dim() == 1 else seq_sum(value, batch.mask)
    return total


def _by_group(batch: Batch, proxy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Splits proxy and gold rewards into one tensor for each prompt."""
    groups = [batch.group == name for name in batch.group.unique().tolist()]
    return [proxy[group] for group in groups], [batch.score[group] for group in groups]


def _even(groups: Sequence[Tensor]) -> Float[Tensor, "P N"]:
    """Stacks the first rewards of each prompt, as many as the prompt with the fewest completions has."""
    fewest = min(map(len, groups), default=0)
    return torch.stack([group[:fewest] for group in groups]) if groups else torch.zeros(0, 0)


def _with_known_errors(curve: dict[str, Any]) -> dict[str, Any]:
    """Returns the curve without standard errors if there are none, as for one prompt: ``gold_error`` is then None."""
    known = not any(math.isnan(error) for error in curve["gold_error"])
    return curve if known else {**curve, "gold_error": None}


def report_lines(report: dict[str, Any]) -> list[str]:
    """Lines for the terminal: accuracies, and the best-of-n curve."""
    lines = []
    if pairs := report.get("pairs"):
        parts = pairs["sections"] or pairs["subsets"]
        lines.append(f"accuracy {pairs['all']:.3f} of {sum(pairs['counts'].values())} pairs")
        lines += [f"  {name}: {value:.3f}" for name, value in parts.items()]
        lines += [
            f"  reward of {side}: mean {of['mean']:.3f}, standard deviation {of['std']:.3f}, {of['missing']} missing"
            for side, of in pairs.get("rewards", {}).items()
        ]
    if best := report.get("best_of_n"):
        curve = best["curve"]
        lines.append(f"best of n by the reward, {best['prompts']} prompts of {best['completions']} completions")
        columns = zip(curve["n"], curve["kl"], curve["proxy"], curve["gold"], curve["oracle"], strict=True)
        lines += [f"  n {n}: KL {kl:.2f}, reward {p:.3f}, gold {g:.3f} of {o:.3f}" for n, kl, p, g, o in columns]
    return lines
