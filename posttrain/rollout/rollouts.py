"""Prompts and an engine make a :class:`Batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.batch import Author, Batch, Finish
from posttrain.data.steps import steps_by_text
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.errors import DataError
from posttrain.option_types import PositiveCount, facts
from posttrain.seeds import OPPONENTS, sample_seed


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
    opponent: Engine | None = None  # whom `against` plays
    encode: Callable[[str], list[int]] | None = None  # a completion as the policy would write it, to its end token


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
    sampled = _sampled(engine, prompts, n, context, texts)
    if greedy:
        at_zero = replace(context, sampling=replace(context.sampling, temperature=0.0))
        sampled = _beside(sampled, _sampled(engine, prompts, 1, at_zero, texts, first=n))
    batch = to_batch(prompts, sampled, texts, baseline_from=n)
    return batch if separator is None else batch.set(step_id=steps_by_text(batch, context.decode, separator))


@facts(others_write=True, plays_opponent=True)
def against(
    engine: Engine,
    prompts: Prompts,
    n: int,
    context: Context,
    *,
    opponents: PositiveCount = 1,
    role: Literal["player", "baseline", "calibration"] = "player",
) -> Batch:
    """``n`` completions of each prompt by the policy, and beside them some by the recipe's ``opponent``.

    Munos et al. 2024 (Nash-MD), section 7, arXiv:2312.00886, with ``role: baseline``; Xie et al. 2024 (XPO), algorithm
    1, arXiv:2405.21046, with the reference as a player.

    Args:
        opponents: completions that the opponent writes of each prompt.
        role: a ``player``'s completions are compared and learned from; a ``baseline``'s are compared with, and never
            learned from; ``calibration`` samples have no score, and a regulariser alone reads them.

    Raises:
        ValueError: without an opponent.
    """
    if context.opponent is None:
        raise ValueError("against: there is no opponent; the recipe's section `opponent` says who it is")
    texts: dict[tuple[int, int], str] = {}
    sampled = _sampled(engine, prompts, n, context, texts)
    others = replace(prompts, seeds=[sample_seed(seed, OPPONENTS) for seed in prompts.seeds])
    sampled = _beside(sampled, _sampled(context.opponent, others, opponents, context, texts, first=n))
    batch = to_batch(prompts, sampled, texts, baseline_from=n if role == "baseline" else None)
    author = Author.CALIBRATION if role == "calibration" else Author.OPPONENT
    return batch.set(author=torch.tensor(([int(Author.POLICY)] * n + [int(author)] * opponents) * len(prompts)))


@facts(others_write=True)
def beside_given(engine: Engine, prompts: Prompts, n: int, context: Context, *, given: str = "completion") -> Batch:
    """``n`` completions of each prompt by the policy, and beside them the one that the data set gives.

    Chen et al. 2024 (SPIN), algorithm 1, arXiv:2401.01335.

    Args:
        given: the column with it: plain text, which is cut at the longest completion.

    Raises:
        DataError: naming the row without such a text.
    """
    assert context.encode is not None
    texts: dict[tuple[int, int], str] = {}
    sampled = _sampled(engine, prompts, n, context, texts)
    record, written = _recorder(context, texts, n), []
    for i, (row, place) in enumerate(zip(prompts.rows, prompts.places, strict=True)):
        text = row.get(given)
        if not isinstance(text, str) or not text:
            raise DataError(f"{place}: column {given!r} is to hold the given completion as text, not {text!r}")
        whole = context.encode(text)
        ids = whole[: context.sampling.max_tokens]
        finish = Finish.STOPPED if len(ids) == len(whole) else Finish.LENGTH
        written.append([Completion(ids, [float("nan")] * len(ids), finish, engine.version)])
        record(i, 0, written[-1][0])
    batch = to_batch(prompts, _beside(sampled, written), texts)
    return batch.set(author=torch.tensor(([int(Author.POLICY)] * n + [int(Author.GIVEN)]) * len(prompts)))


def _recorder(
    context: Context, texts: dict[tuple[int, int], str], first: int
) -> Callable[[int, int, Completion], None]:
    """What an engine calls as completions end: keeps their texts, and passes them on, as samples from ``first`` on."""

    def done(prompt: int, sample: int, completion: Completion) -> None:
        text = texts[prompt, first + sample] = context.decode(completion.tokens)
        if context.on_text is not None:
            context.on_text(prompt, first + sample, text, completion.tokens)

    return done


def _sampled(
    engine: Engine, prompts: Prompts, n: int, context: Context, texts: dict[tuple[int, int], str], first: int = 0
) -> list[list[Completion]]:
    record = _recorder(context, texts, first)
    return engine.generate(prompts.tokens, context.sampling, n, seeds=prompts.seeds, on_completion=record)


def _beside(mine: list[list[Completion]], others: list[list[Completion]]) -> list[list[Completion]]:
    return [own + its for own, its in zip(mine, others, strict=True)]


def to_batch(
    prompts: Prompts,
    completions: Sequence[Sequence[Completion]],
    texts: dict[tuple[int, int], str],
    *,
    baseline_from: int | None = None,
) -> Batch:
    """Right-padded tensors of all completions, prompt by prompt; not verified yet (scores and rewards are NaN).

    Args:
        completions: one list a prompt.
        texts: decoded completions by (prompt's position, sample's index).
        baseline_from: samples from this index on are greedy baselines.
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
        baseline_only=torch.tensor(
            [baseline_from is not None and j >= baseline_from for _, j, _ in flat], dtype=torch.bool
        ),
        rows=tuple(prompts.rows[i] for i, _, _ in flat),
        texts=tuple(texts[i, j] for i, j, _ in flat),
        score=unscored,
        reward=unscored.clone(),
        step_reward=torch.zeros(shape),
    )


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
