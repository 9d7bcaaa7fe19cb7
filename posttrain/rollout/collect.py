"""Draws prompts, generates, verifies and selects until a step has the prompts it wants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.batch import Author, Batch
from posttrain.data import PromptSampler, Rows
from posttrain.data.examples.dataset_examples import Examples
from posttrain.engines.base import Engine, Sampling
from posttrain.errors import DataError, NothingSelected
from posttrain.micro_batches import blank_row
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.sections import SamplingSection
from posttrain.rollout.rollouts import Context, Prompts
from posttrain.seeds import prompt_seeds
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where completions come from, on one rank."""

    engine: Engine | None  # None: nothing is sampled
    verifiers: VerifierPool
    rollout: Part
    decode: Callable[[Sequence[int]], str]
    decoder: Engine | None = None  # what a step's completions are drawn from, if not from the engine itself
    opponent: Engine | None = None
    encode: Callable[[str], list[int]] | None = None


class StepSettings(Protocol):
    """The settings of a recipe that say how the completions of a step are collected."""

    @property
    def prompts_per_step(self) -> int: ...
    @property
    def completions(self) -> int: ...
    @property
    def sampling(self) -> SamplingSection: ...
    @property
    def select(self) -> Sequence[Part]: ...
    @property
    def max_refills(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Collected:
    """Completions of a step on one rank, and what it took to get them."""

    batch: Batch
    values: dict[str, list[float | None]]  # of each verifier, one a completion
    prompts_drawn: int  # over all ranks
    rounds: int
    tokens: int  # generated on this rank, discarded ones too; of given completions those of their prompts too
    seconds: dict[str, float]


def generate_and_verify(
    source: Source, prompts: Prompts, n: int, sampling: Sampling, seconds: dict[str, float]
) -> tuple[Batch, dict[str, list[float | None]]]:
    """A batch with its scores. Completions are verified, in other processes, while the rest is still generated.

    Args:
        seconds: ``generate`` and ``verify`` (the wait after the last token) are added to.
    """
    start = time.perf_counter()

    def on_text(prompt: int, sample: int, text: str, tokens: list[int]) -> None:
        source.verifiers.submit((prompt, sample), text, tokens, prompts.rows[prompt], place=prompts.places[prompt])

    context = Context(
        sampling=sampling,
        decode=source.decode,
        on_text=on_text,
        opponent=source.opponent,
        encode=source.encode,
    )
    batch = source.rollout(source.engine, prompts, n, context)
    generated = time.perf_counter()
    verdicts = source.verifiers.collect()
    each = len(batch) // max(1, len(prompts))
    ordered = [verdicts[i, j] for i in range(len(prompts)) for j in range(each)]
    score = torch.tensor([verdict.score for verdict in ordered], dtype=torch.float32)
    score = score.masked_fill(batch.by(Author.CALIBRATION), float("nan"))
    values = {name: [verdict.values.get(name) for verdict in ordered] for name in source.verifiers.names}
    seconds["generate"] = seconds.get("generate", 0.0) + generated - start
    seconds["verify"] = seconds.get("verify", 0.0) + time.perf_counter() - generated
    return batch.set(score=score, reward=score.clone()), values


def make_prompts(rows: Rows, index: Sequence[int], positions: Sequence[int], seeds: Sequence[int]) -> Prompts:
    """Prompts of the data set's rows ``index``; ``positions`` number them over all ranks and rounds of the step."""
    return Prompts(
        tokens=[rows.prompt_tokens(i) for i in index],
        rows=[rows[i] for i in index],
        places=[rows.place(i) for i in index],
        group=list(positions),
        seeds=list(seeds),
    )


def complete_all(recipe: SamplingRecipe, rows: Rows, source: Source, processes: Processes) -> Batch:
    """Completions of this rank's share of all rows, with their scores."""
    prompts = share_of_prompts(rows, recipe.seed, processes)
    sampling = Sampling.of(recipe.sampling)
    batch, _ = processes.together(partial(generate_and_verify, source, prompts, recipe.completions, sampling, {}))
    return batch


def share_of_prompts(rows: Rows, seed: int, processes: Processes) -> Prompts:
    """This rank's share of all rows as prompts."""
    mine = every_nth(len(rows), processes, "data")
    return make_prompts(rows, mine, mine, prompt_seeds(seed, 0, 0, mine))


def every_nth(prompts: int, processes: Processes, setting: str) -> range:
    """This rank's share of so many prompts from a setting such as ``data``: every ``world``-th of them.

    Raises:
        DataError: on all ranks, where one would have none.
    """
    if prompts < processes.world:
        raise DataError(f"{setting}: {prompts} prompts cannot be shared by {processes.world} processes")
    return range(processes.rank, prompts, processes.world)


def collect(
    recipe: StepSettings, processes: Processes, source: Source, rows: Rows, sampler: PromptSampler, step: int
) -> Collected:
    """Completions of ``prompts_per_step`` prompts that ``select`` keeps, on all ranks together.

    Every rank draws the same list of rows and takes its share. Rounds of generation go on until all ranks have their
    share of prompts, or ``max_refills`` is used up; what a round brings beyond the share is dropped.

    Raises:
        NothingSelected: where not one prompt was kept on any rank.
    """
    sampling = Sampling.of(recipe.sampling)
    guided = replace(source, engine=source.decoder or source.engine)
    missing = recipe.prompts_per_step // processes.world
    kept: list[Batch] = []
    values: dict[str, list[float | None]] = {name: [] for name in source.verifiers.names}
    seconds: dict[str, float] = {}
    drawn = tokens = rounds = 0
    while (wanted := processes.all_max(missing)) and rounds <= (recipe.max_refills if recipe.select else 0):
        index = sampler.draw(wanted * processes.world)
        mine = index[processes.rank * wanted : (processes.rank + 1) * wanted]
        positions = range(drawn + processes.rank * wanted, drawn + (processes.rank + 1) * wanted)
        prompts = make_prompts(rows, mine, positions, prompt_seeds(recipe.seed, step, rounds, positions))
        batch, verdicts = processes.together(
            partial(generate_and_verify, guided, prompts, recipe.completions, sampling, seconds)
        )
        batch = batch.set(step=step, all_sum=processes.all_sum)
        report(sampler, processes, mine, batch)
        chosen = _first_groups(batch.group, _select(recipe.select, batch), missing)
        missing -= len(batch.group[chosen].unique())
        kept.append(batch[chosen])
        for name, column in verdicts.items():
            values[name] += [column[i] for i in chosen.nonzero().squeeze(-1).tolist()]
        drawn, tokens, rounds = drawn + len(index), tokens + int(batch.mask.sum()), rounds + 1
    whole = Batch.concatenate(kept)
    if processes.all_max(len(whole)) == 0:
        raise NothingSelected(_nothing_kept(recipe, drawn, rounds))
    if not len(whole):
        whole = blank_row(batch)
        values = {name: [None] for name in source.verifiers.names}
    return Collected(whole, values, drawn, rounds, tokens, seconds)


def draw_examples(
    recipe: StepSettings, processes: Processes, examples: Examples, sampler: PromptSampler, step: int
) -> Collected:
    """``prompts_per_step`` groups of given completions on all ranks together, as if they had just been sampled.

    Every rank draws the same list and takes its share.
    """
    start = time.perf_counter()
    index = sampler.draw(recipe.prompts_per_step)
    mine = share_of(index, processes)
    batch = processes.together(lambda: examples.batch(mine))
    group = batch.group.unique(return_inverse=True)[1] + processes.rank * len(mine)
    batch = batch.set(group=group, step=step, all_sum=processes.all_sum)
    chosen = _select(recipe.select, batch)
    kept = batch[chosen] if bool(chosen.any()) else blank_row(batch)
    return Collected(kept, {}, len(index), 1, int(batch.length.sum()), {"read": time.perf_counter() - start})


def in_order(size: int, each: int) -> list[list[int]]:
    """All numbers below ``size``, ``each`` at a time."""
    return [list(range(start, min(start + each, size))) for start in range(0, size, each)]


def share_of(index: Sequence[int], processes: Processes) -> list[int]:
    """This rank's part of a list; the last ranks have less where it does not come out even."""
    share = -(-len(index) // processes.world)
    return list(index[processes.rank * share : (processes.rank + 1) * share])


def report(sampler: PromptSampler, processes: Processes, index: Sequence[int], batch: Batch) -> None:
    """Tells the prompt sampler how the prompts of every rank went, in the same order on all of them."""
    scores = batch.score.where(~batch.baseline_only & batch.by(Author.POLICY), float("nan"))
    outcomes = [scores[batch.group == group].tolist() for group in batch.group.unique().tolist()]
    for rows, theirs in processes.gather((list(index), outcomes)):
        sampler.update(rows, theirs)


def _select(parts: Sequence[Part], batch: Batch) -> Tensor:
    chosen = torch.ones(len(batch), dtype=torch.bool)
    for part in parts:
        chosen &= part(batch)
    return chosen


def _first_groups(group: Tensor, chosen: Tensor, limit: int) -> Tensor:
    """Of the chosen completions, those of the first ``limit`` groups that have any."""
    first = group[chosen].unique()[:limit]
    return chosen & torch.isin(group, first)


def _nothing_kept(recipe: StepSettings, drawn: int, rounds: int) -> str:
    parts = ", ".join(part.name for part in recipe.select) or "none"
    return (
        f"not one of {drawn} prompts passed `select` ({parts}) in {rounds} rounds. Are the problems too hard or "
        "too easy for this policy, so that all completions of a prompt score alike, or does the verifier not recognise "
        "its answers? The rollouts of earlier steps show what it writes. Once that is mended, --resume goes on here."
    )


def verifier_means(values: dict[str, list[Any]], processes: Processes) -> dict[str, float]:
    """Mean value of each verifier over the completions it applied to, on all ranks; NaN where it applied to none."""
    means = {}
    for name, column in values.items():
        numbers = torch.tensor([v for v in column if v is not None], dtype=torch.float64)
        total, count = processes.all_sum(torch.stack([numbers.sum(), torch.tensor(len(numbers)).double()])).tolist()
        means[f"verify/{name}"] = total / count if count else float("nan")
    return means
