"""Collects the completions of a step: draws prompts, generates, verifies and selects until there are enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from posttrain.batch import Author, Batch, RewardColumns
from posttrain.data import PromptSampler, Rows
from posttrain.data.examples.dataset_examples import Examples
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.errors import NothingSelected
from posttrain.micro_batches import blank_row
from posttrain.models.text import Decode
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.sections import SamplingSection
from posttrain.rollout.refills import first_groups, prompts_to_draw, selected
from posttrain.rollout.rollouts import Context, Prompts
from posttrain.rollout.verifying import submitter
from posttrain.seeds import prompt_seeds
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


@dataclass(frozen=True, kw_only=True)
class CompletionSource:
    """Everything that one rank needs to complete prompts and to score the completions."""

    engine: Engine | None  # None: nothing is sampled
    verifiers: VerifierPool
    rollout: Part
    decode: Decode  # token ids to text as it was written
    decoder: Engine | None = None  # samples the completions of a step in place of the engine
    opponent: Engine | None = None
    encode: Callable[[str, bool], list[int]] | None = None


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
    def short_steps(self) -> Literal["warn", "error"]: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Collected:
    """The completions of a step on one rank, and what it took to get them."""

    batch: Batch
    values: dict[str, list[float | None]]  # values of each verifier, one a completion
    dropped: Batch | None  # completions that were drawn and not kept; None: there are none on this rank
    dropped_values: dict[str, list[float | None]]  # values of each verifier for these
    prompts_drawn: int  # on all ranks together
    prompts_missing: int  # prompts by which the step falls short of ``prompts_per_step``, on all ranks together
    rounds: int
    tokens: int  # tokens generated on this rank, discarded ones included; of dataset completions with their prompts
    seconds: dict[str, float]


def generate_and_verify(
    source: CompletionSource,
    prompts: Prompts,
    n: int,
    sampling: Sampling,
    seconds: dict[str, float],
    *,
    work: LongWork | None = None,
) -> tuple[Batch, dict[str, list[float | None]]]:
    """Samples a batch and scores it. Other processes verify completions while further ones are still generated.

    Args:
        seconds: the times of ``generate`` and ``verify`` (the wait after the last token) are added here.
        work: counts the completions, for the person who waits.

    Returns:
        The batch, and the values of each verifier, one a completion.
    """
    start = time.perf_counter()
    submit = submitter(source.verifiers, source.decode)

    def on_text(prompt: int, sample: int, text: str, completion: Completion) -> None:
        row, place = prompts.rows[prompt], prompts.places[prompt]
        submit((prompt, sample), text, completion, prompts.tokens[prompt], row, place)
        if work is not None:
            work.count()

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
    numbers = [[math.nan if value is None else value for value in column] for column in values.values()]
    rewards = torch.tensor(numbers, dtype=torch.float32).view(len(values), len(batch)).T.contiguous()
    columns = RewardColumns(source.verifiers.names, source.verifiers.weights, verifiers=len(values))
    seconds["generate"] = seconds.get("generate", 0.0) + generated - start
    seconds["verify"] = seconds.get("verify", 0.0) + time.perf_counter() - generated
    return batch.set(score=score, reward=score.clone(), rewards=rewards, reward_columns=columns), values


def make_prompts(rows: Rows, index: Sequence[int], positions: Sequence[int], seeds: Sequence[int]) -> Prompts:
    """Makes prompts of the rows ``index``; ``positions`` number them over all ranks and rounds of the step."""
    return Prompts(
        tokens=[rows.prompt_tokens(i) for i in index],
        rows=[rows[i] for i in index],
        places=[rows.place(i) for i in index],
        group=list(positions),
        seeds=list(seeds),
    )


def complete_some(
    recipe: SamplingRecipe, rows: Rows, index: Sequence[int], source: CompletionSource, work: LongWork | None = None
) -> Batch:
    """Completes and scores the rows of these numbers on this rank; ``group`` is the number of the row."""
    prompts = prompts_of(rows, index, recipe.seed)
    return generate_and_verify(source, prompts, recipe.completions, Sampling.of(recipe.sampling), {}, work=work)[0]


def own_share(block: Sequence[int], processes: Processes) -> list[int]:
    """This rank's share of a block of prompts: every ``world``-th one."""
    return list(block[processes.rank :: processes.world])


def prompts_of(rows: Rows, index: Sequence[int], seed: int) -> Prompts:
    """Makes prompts of the rows of these numbers, with seeds that depend on seed and number alone."""
    return make_prompts(rows, index, index, prompt_seeds(seed, 0, 0, index))


def collect(
    recipe: StepSettings, processes: Processes, source: CompletionSource, rows: Rows, sampler: PromptSampler, step: int
) -> Collected:
    """Collects completions of ``prompts_per_step`` prompts that ``select`` keeps, on all ranks together.

    Every rank draws the same list of rows and takes its share. Rounds of generation go on until enough prompts are
    kept, or until ``max_refills`` rounds or as many times ``prompts_per_step`` prompts were drawn in addition. The
    first prompts that pass, in the order of drawing, are kept; what passes beyond them is dropped.

    Raises:
        NothingSelected: if not one prompt was kept on any rank, or fewer than asked for under ``short_steps: error``.
    """
    sampling = Sampling.of(recipe.sampling)
    guided = replace(source, engine=source.decoder or source.engine)
    asked, refills = recipe.prompts_per_step, recipe.max_refills if recipe.select else 0
    most = asked * (1 + refills)
    parts: list[tuple[Batch, dict[str, list[float | None]], Tensor]] = []  # completions, values, True where kept
    seconds: dict[str, float] = {}
    drawn = kept = tokens = rounds = 0
    while (size := prompts_to_draw(asked, kept, drawn, most)) and rounds <= (
        recipe.max_refills if recipe.select else 0
    ):
        index, order = sampler.draw(size), range(drawn, drawn + size)
        own = processes.share_of(range(size)) if not rounds else list(range(processes.rank, size, processes.world))
        own_index, positions = [index[i] for i in own], [order[i] for i in own]
        prompts = make_prompts(rows, own_index, positions, prompt_seeds(recipe.seed, step, rounds, positions))
        batch, values = processes.together(
            partial(generate_round, guided, prompts, recipe.completions, sampling, seconds, parts)
        )
        batch = batch.set(step=step, all_sum=processes.all_sum)
        update_sampler(sampler, processes, own_index, batch)
        chosen, count = first_groups(batch.group, selected(recipe.select, batch), asked - kept, processes)
        parts.append((batch, values, chosen))
        drawn, kept = drawn + size, kept + count
        tokens, rounds = tokens + int(batch.mask.sum()), rounds + 1
    if not kept or (kept < asked and recipe.short_steps == "error"):
        error = NothingSelected(_too_few_selected(recipe, kept, drawn, rounds))
        error.drawn = _joined([(batch, values, torch.ones_like(chosen)) for batch, values, chosen in parts])
        raise error
    batch, values = _joined(parts)
    dropped, dropped_values = _joined([(batch, values, ~chosen) for batch, values, chosen in parts])
    if not len(batch):
        batch, unknown = blank_row(parts[0][0]), list[float | None]([None])
        values = dict.fromkeys(source.verifiers.names, unknown)
    return Collected(
        batch=batch,
        values=values,
        dropped=dropped if len(dropped) else None,
        dropped_values=dropped_values,
        prompts_drawn=drawn,
        prompts_missing=asked - kept,
        rounds=rounds,
        tokens=tokens,
        seconds=seconds,
    )


def generate_round(
    source: CompletionSource,
    prompts: Prompts,
    n: int,
    sampling: Sampling,
    seconds: dict[str, float],
    earlier: Sequence[tuple[Batch, dict[str, list[float | None]], Tensor]],
) -> tuple[Batch, dict[str, list[float | None]]]:
    """Like :func:`generate_and_verify`; a rank without prompts in a small refill gives no rows and calls no engine."""
    if not len(prompts):
        return earlier[0][0][[]], {name: [] for name in source.verifiers.names}
    return generate_and_verify(source, prompts, n, sampling, seconds)


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
    chosen = selected(recipe.select, batch)
    return Collected(
        batch=batch[chosen] if bool(chosen.any()) else blank_row(batch),
        values={},
        dropped=None if bool(chosen.all()) else batch[~chosen],
        dropped_values={},
        prompts_drawn=len(index),
        prompts_missing=0,
        rounds=1,
        tokens=int(batch.length.sum()),
        seconds={"read": time.perf_counter() - start},
    )


def index_chunks(size: int, length: int) -> list[list[int]]:
    """Cuts the numbers below ``size`` into consecutive lists of ``length``; the last one may be shorter."""
    return [list(range(start, min(start + length, size))) for start in range(0, size, length)]


def update_sampler(sampler: PromptSampler, processes: Processes, index: Sequence[int], batch: Batch) -> None:
    """Gives the prompt sampler the scores of the prompts of all ranks, in the same order on every rank."""
    scores = batch.score.where(~batch.baseline_only & batch.by(Author.POLICY), float("nan"))
    outcomes = [scores[batch.group == group].tolist() for group in batch.group.unique().tolist()]
    for rank_index, rank_outcomes in processes.gather((list(index), outcomes)):
        sampler.update(rank_index, rank_outcomes)


def _joined(
    parts: Sequence[tuple[Batch, dict[str, list[float | None]], Tensor]],
) -> tuple[Batch, dict[str, list[float | None]]]:
    """Joins the chosen completions of all rounds, with the values of each verifier."""
    batches, joined = [], {name: [] for name in parts[0][1]}
    for batch, values, chosen in parts:
        rows = chosen.nonzero().squeeze(-1)
        batches.append(batch[rows])
        for name, column in values.items():
            joined[name] += [column[i] for i in rows.tolist()]
    return Batch.concatenate(batches), joined


def _too_few_selected(recipe: StepSettings, kept: int, drawn: int, rounds: int) -> str:
    parts = ", ".join(part.name for part in recipe.select) or "none"
    if kept:
        return (
            f"only {kept} of the {recipe.prompts_per_step} prompts of a step passed `select` ({parts}), of {drawn} "
            f"drawn in {rounds} rounds, and `short_steps` is `error`. Raise `max_refills`, take problems of another "
            "difficulty, or go on with smaller steps by `short_steps: warn`; --resume continues."
        )
    return (
        f"not one of {drawn} prompts passed `select` ({parts}) in {rounds} rounds. Are the problems too hard or too "
        "easy for this policy, so that all completions of a prompt have the same score? Or does the verifier not "
        "recognise its answers? The completions are in `rollouts/dropped` of the run. After a fix, --resume continues."
    )


def verifier_means(values: dict[str, list[Any]], processes: Processes) -> dict[str, float]:
    """Mean value of each verifier over the completions it applied to, on all ranks; NaN where it applied to none."""
    means = {}
    for name, column in values.items():
        numbers = torch.tensor([v for v in column if v is not None], dtype=torch.float64)
        total, count = processes.all_sum(torch.stack([numbers.sum(), torch.tensor(len(numbers)).double()])).tolist()
        means[f"verify/{name}"] = total / count if count else float("nan")
    return means
