"""Collects the completions of a step: draws prompts, generates, verifies and selects until there are enough."""

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
from posttrain.errors import NothingSelected
from posttrain.micro_batches import blank_row
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.sections import SamplingSection
from posttrain.rollout.rollouts import Context, Prompts
from posttrain.seeds import prompt_seeds
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


@dataclass(frozen=True, kw_only=True)
class CompletionSource:
    """Everything that one rank needs to complete prompts and to score the completions."""

    engine: Engine | None  # None: nothing is sampled
    verifiers: VerifierPool
    rollout: Part
    decode: Callable[[Sequence[int]], str]
    decoder: Engine | None = None  # samples the completions of a step in place of the engine
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
    """The completions of a step on one rank, and what it took to get them."""

    batch: Batch
    values: dict[str, list[float | None]]  # values of each verifier, one a completion
    prompts_drawn: int  # on all ranks together
    rounds: int
    tokens: int  # tokens generated on this rank, discarded ones included; of dataset completions with their prompts
    seconds: dict[str, float]


def generate_and_verify(
    source: CompletionSource, prompts: Prompts, n: int, sampling: Sampling, seconds: dict[str, float]
) -> tuple[Batch, dict[str, list[float | None]]]:
    """Samples a batch and scores it. Other processes verify completions while further ones are still generated.

    Args:
        seconds: the times of ``generate`` and ``verify`` (the wait after the last token) are added here.

    Returns:
        The batch, and the values of each verifier, one a completion.
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
    per_prompt = len(batch) // max(1, len(prompts))
    ordered = [verdicts[i, j] for i in range(len(prompts)) for j in range(per_prompt)]
    score = torch.tensor([verdict.score for verdict in ordered], dtype=torch.float32)
    score = score.masked_fill(batch.by(Author.CALIBRATION), float("nan"))
    values = {name: [verdict.values.get(name) for verdict in ordered] for name in source.verifiers.names}
    seconds["generate"] = seconds.get("generate", 0.0) + generated - start
    seconds["verify"] = seconds.get("verify", 0.0) + time.perf_counter() - generated
    return batch.set(score=score, reward=score.clone()), values


def make_prompts(rows: Rows, index: Sequence[int], positions: Sequence[int], seeds: Sequence[int]) -> Prompts:
    """Makes prompts of the rows ``index``; ``positions`` number them over all ranks and rounds of the step."""
    return Prompts(
        tokens=[rows.prompt_tokens(i) for i in index],
        rows=[rows[i] for i in index],
        places=[rows.place(i) for i in index],
        group=list(positions),
        seeds=list(seeds),
    )


def complete_all(recipe: SamplingRecipe, rows: Rows, source: CompletionSource, processes: Processes) -> Batch:
    """Completes and scores this rank's share of all rows."""
    prompts = share_of_prompts(rows, recipe.seed, processes)
    sampling = Sampling.of(recipe.sampling)
    batch, _ = processes.together(partial(generate_and_verify, source, prompts, recipe.completions, sampling, {}))
    return batch


def share_of_prompts(rows: Rows, seed: int, processes: Processes) -> Prompts:
    """Makes prompts of this rank's share of all rows."""
    index = processes.every_nth(len(rows), "data")
    return make_prompts(rows, index, index, prompt_seeds(seed, 0, 0, index))


def collect(
    recipe: StepSettings, processes: Processes, source: CompletionSource, rows: Rows, sampler: PromptSampler, step: int
) -> Collected:
    """Collects completions of ``prompts_per_step`` prompts that ``select`` keeps, on all ranks together.

    Every rank draws the same list of rows and takes its share. Rounds of generation go on until all ranks have their
    share of prompts, or ``max_refills`` is used up. Prompts beyond the share are dropped.

    Raises:
        NothingSelected: if not one prompt was kept on any rank.
    """
    sampling = Sampling.of(recipe.sampling)
    guided = replace(source, engine=source.decoder or source.engine)
    missing = recipe.prompts_per_step // processes.world
    batches: list[Batch] = []
    values: dict[str, list[float | None]] = {name: [] for name in source.verifiers.names}
    seconds: dict[str, float] = {}
    drawn = tokens = rounds = 0
    while (size := processes.all_max(missing)) and rounds <= (recipe.max_refills if recipe.select else 0):
        index = sampler.draw(size * processes.world)
        own_index = index[processes.rank * size : (processes.rank + 1) * size]
        positions = range(drawn + processes.rank * size, drawn + (processes.rank + 1) * size)
        prompts = make_prompts(rows, own_index, positions, prompt_seeds(recipe.seed, step, rounds, positions))
        batch, verdicts = processes.together(
            partial(generate_and_verify, guided, prompts, recipe.completions, sampling, seconds)
        )
        batch = batch.set(step=step, all_sum=processes.all_sum)
        update_sampler(sampler, processes, own_index, batch)
        chosen = _first_groups(batch.group, _select(recipe.select, batch), missing)
        missing -= len(batch.group[chosen].unique())
        batches.append(batch[chosen])
        for name, column in verdicts.items():
            values[name] += [column[i] for i in chosen.nonzero().squeeze(-1).tolist()]
        drawn, tokens, rounds = drawn + len(index), tokens + int(batch.mask.sum()), rounds + 1
    collected = Batch.concatenate(batches)
    if processes.all_max(len(collected)) == 0:
        raise NothingSelected(_nothing_selected(recipe, drawn, rounds))
    if not len(collected):
        collected = blank_row(batch)
        values = {name: [None] for name in source.verifiers.names}
    return Collected(collected, values, drawn, rounds, tokens, seconds)


def draw_examples(
    recipe: StepSettings, processes: Processes, examples: Examples, sampler: PromptSampler, step: int
) -> Collected:
    """Draws ``prompts_per_step`` groups of dataset completions on all ranks together, in the form of sampled ones.

    Every rank draws the same list and takes its share.
    """
    start = time.perf_counter()
    index = sampler.draw(recipe.prompts_per_step)
    own_index = processes.share_of(index)
    batch = processes.together(lambda: examples.batch(own_index))
    group = batch.group.unique(return_inverse=True)[1] + processes.rank * len(own_index)
    batch = batch.set(group=group, step=step, all_sum=processes.all_sum)
    chosen = _select(recipe.select, batch)
    selected = batch[chosen] if bool(chosen.any()) else blank_row(batch)
    return Collected(selected, {}, len(index), 1, int(batch.length.sum()), {"read": time.perf_counter() - start})


def index_chunks(size: int, length: int) -> list[list[int]]:
    """Cuts the numbers below ``size`` into consecutive lists of ``length``; the last one may be shorter."""
    return [list(range(start, min(start + length, size))) for start in range(0, size, length)]


def update_sampler(sampler: PromptSampler, processes: Processes, index: Sequence[int], batch: Batch) -> None:
    """Gives the prompt sampler the scores of the prompts of all ranks, in the same order on every rank."""
    scores = batch.score.where(~batch.baseline_only & batch.by(Author.POLICY), float("nan"))
    outcomes = [scores[batch.group == group].tolist() for group in batch.group.unique().tolist()]
    for rank_index, rank_outcomes in processes.gather((list(index), outcomes)):
        sampler.update(rank_index, rank_outcomes)


def _select(parts: Sequence[Part], batch: Batch) -> Tensor:
    chosen = torch.ones(len(batch), dtype=torch.bool)
    for part in parts:
        chosen &= part(batch)
    return chosen


def _first_groups(group: Tensor, chosen: Tensor, limit: int) -> Tensor:
    """Narrows ``chosen`` to the first ``limit`` groups that have a chosen completion."""
    first = group[chosen].unique()[:limit]
    return chosen & torch.isin(group, first)


def _nothing_selected(recipe: StepSettings, drawn: int, rounds: int) -> str:
    parts = ", ".join(part.name for part in recipe.select) or "none"
    return (
        f"not one of {drawn} prompts passed `select` ({parts}) in {rounds} rounds. Are the problems too hard or too "
        "easy for this policy, so that all completions of a prompt have the same score? Or does the verifier not "
        "recognise its answers? The rollouts of earlier steps show its completions. After a fix, --resume continues."
    )


def verifier_means(values: dict[str, list[Any]], processes: Processes) -> dict[str, float]:
    """Mean value of each verifier over the completions it applied to, on all ranks; NaN where it applied to none."""
    means = {}
    for name, column in values.items():
        numbers = torch.tensor([v for v in column if v is not None], dtype=torch.float64)
        total, count = processes.all_sum(torch.stack([numbers.sum(), torch.tensor(len(numbers)).double()])).tolist()
        means[f"verify/{name}"] = total / count if count else float("nan")
    return means
