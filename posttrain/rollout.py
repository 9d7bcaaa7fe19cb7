"""Prompts and an engine make a :class:`Batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.engines.base import Completion, Engine, Sampling, sample_seed
from posttrain.report.tokens import steps_by_text


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one round of generation, on one rank."""

    tokens: Sequence[Sequence[int]]
    rows: Sequence[dict[str, Any]]  # the dataset columns of each prompt
    places: Sequence[str]  # where each row is, for messages: problems.jsonl:7
    group: Sequence[int]  # unique over ranks and rounds of a step
    seeds: Sequence[int]  # what each prompt's samples depend on

    def __len__(self) -> int:
        return len(self.tokens)


OnText = Callable[[int, int, str, list[int]], None]
"""Called as a completion ends: prompt's position, sample's index, text and token ids. Verification starts there."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rollout may use beside the engine and the prompts."""

    sampling: Sampling
    decode: Callable[[Sequence[int]], str]  # token ids to text, special tokens left out
    on_text: OnText | None = None


def single_turn(
    engine: Engine, prompts: Prompts, n: int, context: Context, *, greedy: bool = False, separator: str | None = None
) -> Batch:
    """``n`` independent completions of each prompt.

    Args:
        greedy: one more completion a prompt, decoded greedily, as the baseline of ``outcome(center="greedy")``
            (ReMax, Li et al. 2023, arXiv:2310.10505). It is verified like the others and never trained on.
        separator: what a reasoning step ends with, such as a line break; without one a completion is a single step.
    """
    texts: dict[tuple[int, int], str] = {}

    def on_completion(offset: int) -> Callable[[int, int, Completion], None]:
        def done(prompt: int, sample: int, completion: Completion) -> None:
            text = texts[prompt, offset + sample] = context.decode(completion.tokens)
            if context.on_text is not None:
                context.on_text(prompt, offset + sample, text, completion.tokens)

        return done

    sampled = engine.generate(prompts.tokens, context.sampling, n, seeds=prompts.seeds, on_completion=on_completion(0))
    if greedy:
        at_zero = replace(context.sampling, temperature=0.0)
        extra = engine.generate(prompts.tokens, at_zero, 1, seeds=prompts.seeds, on_completion=on_completion(n))
        sampled = [mine + its for mine, its in zip(sampled, extra, strict=True)]
    batch = to_batch(prompts, sampled, texts, greedy_from=n)
    return batch if separator is None else batch.set(step_id=steps_by_text(batch, context.decode, separator))


def to_batch(
    prompts: Prompts,
    completions: Sequence[Sequence[Completion]],
    texts: dict[tuple[int, int], str],
    *,
    greedy_from: int | None = None,
) -> Batch:
    """Right-padded tensors of all completions, prompt by prompt; not verified yet (scores and rewards are NaN).

    Args:
        completions: one list a prompt.
        texts: decoded completions by (prompt's position, sample's index).
        greedy_from: samples from this index on are greedy baselines.
    """
    flat = [(i, j, c) for i, group in enumerate(completions) for j, c in enumerate(group)]
    lengths = [len(prompts.tokens[i]) + len(c.tokens) for i, _, c in flat]
    shape = (len(flat), max(lengths, default=0))
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    logps = torch.zeros(shape)
    for row, (i, _, completion) in enumerate(flat):
        start, stop = len(prompts.tokens[i]), lengths[row]
        tokens[row, :start] = torch.tensor(prompts.tokens[i])
        tokens[row, start:stop] = torch.tensor(completion.tokens, dtype=torch.long)
        mask[row, start:stop] = True
        logps[row, start:stop] = torch.tensor(completion.logps)
    unscored = torch.full((len(flat),), float("nan"))
    return Batch(
        tokens=tokens,
        mask=mask,
        length=torch.tensor(lengths, dtype=torch.long),
        group=_integers(prompts.group[i] for i, _, _ in flat),
        finish=_integers(int(c.finish) for _, _, c in flat),
        logp_sampler=logps,
        version=_integers(c.version for _, _, c in flat),
        step_id=torch.where(mask, 0, -1),
        greedy=torch.tensor([greedy_from is not None and j >= greedy_from for _, j, _ in flat], dtype=torch.bool),
        rows=tuple(prompts.rows[i] for i, _, _ in flat),
        texts=tuple(texts[i, j] for i, j, _ in flat),
        score=unscored,
        reward=unscored.clone(),
        step_reward=torch.zeros(shape),
    )


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def prompt_seeds(seed: int, step: int, round_: int, positions: Sequence[int]) -> list[int]:
    """A seed a prompt, from its place in the step alone: the same rollouts on one process as on several."""
    base = sample_seed(sample_seed(seed, step), round_)
    return [sample_seed(base, position) for position in positions]
