"""Parts of the slot ``rollout``: prompts and an engine make a :class:`Batch` of completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.batch import Author, Batch, Finish
from posttrain.data.steps import steps_by_text
from posttrain.engines.base import Completion, Engine, RefusedRequest, Sampling
from posttrain.errors import DataError
from posttrain.models.text import Decode
from posttrain.option_types import Breadth, facts
from posttrain.seeds import OPPONENTS, sample_seed


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one round of generation on one rank."""

    tokens: Sequence[Sequence[int]]
    rows: Sequence[dict[str, Any]]  # dataset columns of each prompt
    places: Sequence[str]  # place of each row for messages, such as problems.jsonl:7
    group: Sequence[int]  # group of each prompt, unique over ranks and rounds of a step
    seeds: Sequence[int]  # seed of each prompt, on which its samples depend

    def __len__(self) -> int:
        return len(self.tokens)


@contextmanager
def refusals_placed(prompts: Prompts) -> Iterator[None]:
    """Names file and row of a prompt that an engine refuses inside the block.

    Raises:
        DataError: in place of ``RefusedRequest``, with what to change.
    """
    try:
        yield
    except RefusedRequest as error:
        if error.prompt is None:
            raise
        raise DataError(
            f"{prompts.places[error.prompt]}: the engine refuses this prompt: {error}. Lower sampling.max_tokens, "
            "raise engine.max_model_len, or leave long prompts out by data.max_prompt_tokens"
        ) from error


OnText = Callable[[int, int, str, Completion], None]
"""Function that is called as a completion ends: ``(prompt's position, sample's index, text, completion)``.

Verification starts there."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that a rollout may use beside the engine and the prompts."""

    sampling: Sampling
    decode: Decode  # token ids to text as it was written
    on_text: OnText | None = None
    opponent: Engine | None = None  # opponent that `against` samples from
    encode: Callable[[str, bool], list[int]] | None = None  # text, after a rendered prompt or not, to ids with an end


def single_turn(
    engine: Engine, prompts: Prompts, n: int, context: Context, *, greedy: bool = False, separator: str | None = None
) -> Batch:
    """Samples ``n`` independent completions of each prompt.

    Args:
        greedy: add one completion a prompt that is decoded greedily, as the baseline of ``outcome(center="greedy")``
            (ReMax, Li et al. 2023, arXiv:2310.10505). It is verified and never trained on.
        separator: end of a reasoning step, such as a line break. By default a completion is a single step.
    """
    texts: dict[tuple[int, int], str] = {}
    sampled = _sampled(engine, prompts, n, context, texts)
    if greedy:
        at_zero = replace(context, sampling=replace(context.sampling, temperature=0.0))
        sampled = _joined(sampled, _sampled(engine, prompts, 1, at_zero, texts, first=n))
    batch = to_batch(prompts, sampled, texts, baseline_from=n)
    return batch if separator is None else batch.set(step_id=steps_by_text(batch, context.decode, separator))


@facts(others_write=True, plays_opponent=True)
def against(
    engine: Engine,
    prompts: Prompts,
    n: int,
    context: Context,
    *,
    opponents: Breadth = 1,
    role: Literal["player", "baseline", "calibration"] = "player",
) -> Batch:
    """Samples ``n`` completions of each prompt from the policy, and some from the recipe's ``opponent``.

    Munos et al. 2023 (Nash-MD), arXiv:2312.00886, with ``role: baseline``; Xie et al. 2024 (XPO),
    arXiv:2405.21046, with the reference as a player.

    Args:
        opponents: number of completions that the opponent writes of each prompt.
        role: a ``player``'s completions are compared with the policy's and learned from. A ``baseline``'s are compared
            with the policy's and never learned from. ``calibration`` samples have no score: only a regulariser reads
            them.

    Raises:
        ValueError: if there is no opponent.
    """
    if context.opponent is None:
        raise ValueError("against: there is no opponent; the recipe's section `opponent` sets one")
    texts: dict[tuple[int, int], str] = {}
    sampled = _sampled(engine, prompts, n, context, texts)
    for_opponent = replace(prompts, seeds=[sample_seed(seed, OPPONENTS) for seed in prompts.seeds])
    sampled = _joined(sampled, _sampled(context.opponent, for_opponent, opponents, context, texts, first=n))
    batch = to_batch(prompts, sampled, texts, baseline_from=n if role == "baseline" else None)
    author = Author.CALIBRATION if role == "calibration" else Author.OPPONENT
    return batch.set(author=torch.tensor(([int(Author.POLICY)] * n + [int(author)] * opponents) * len(prompts)))


@facts(others_write=True, plays_opponent=True)
def from_opponent(engine: Engine, prompts: Prompts, n: int, context: Context) -> Batch:
    """Samples all completions of each prompt from the recipe's ``opponent``, for off-policy methods.

    Calandriello et al. 2024 (IPO-MD), arXiv:2403.08635: both completions of a pair come from the mixture of policy and
    reference.

    Raises:
        ValueError: if there is no opponent.
    """
    if context.opponent is None:
        raise ValueError("from_opponent: there is no opponent; the recipe's section `opponent` sets one")
    texts: dict[tuple[int, int], str] = {}
    batch = to_batch(prompts, _sampled(context.opponent, prompts, n, context, texts), texts)
    return batch.set(author=torch.full_like(batch.group, int(Author.OPPONENT)))


@facts(others_write=True)
def beside_given(engine: Engine, prompts: Prompts, n: int, context: Context, *, given: str = "completion") -> Batch:
    """Samples ``n`` completions of each prompt from the policy, and adds the completion from the dataset.

    Chen et al. 2024 (SPIN), algorithm 1, arXiv:2401.01335.

    Args:
        given: column with the dataset completion: plain text, which is cut to ``sampling.max_tokens``.

    Raises:
        DataError: if a row has no such text; the message names the row.
    """
    assert context.encode is not None
    texts: dict[tuple[int, int], str] = {}
    sampled = _sampled(engine, prompts, n, context, texts)
    record, from_dataset = _recorder(context, texts, n), []
    for i, (row, place) in enumerate(zip(prompts.rows, prompts.places, strict=True)):
        text = row.get(given)
        if not isinstance(text, str) or not text:
            raise DataError(
                f"{place}: column {given!r} should hold the completion from the dataset as text, not {text!r}"
            )
        all_ids = context.encode(text, isinstance(row.get("prompt"), list))
        ids = all_ids[: context.sampling.max_tokens]
        finish = Finish.STOPPED if len(ids) == len(all_ids) else Finish.LENGTH
        from_dataset.append([Completion(ids, [float("nan")] * len(ids), finish, engine.version)])
        record(i, 0, from_dataset[-1][0])
    batch = to_batch(prompts, _joined(sampled, from_dataset), texts)
    return batch.set(author=torch.tensor(([int(Author.POLICY)] * n + [int(Author.GIVEN)]) * len(prompts)))


def _recorder(
    context: Context, texts: dict[tuple[int, int], str], first: int
) -> Callable[[int, int, Completion], None]:
    """Returns a function for the engine to call as completions end: it keeps their texts and passes them on.

    Args:
        first: index of the first sample of a prompt.
    """

    def done(prompt: int, sample: int, completion: Completion) -> None:
        text = texts[prompt, first + sample] = context.decode(completion.tokens)
        if context.on_text is not None:
            context.on_text(prompt, first + sample, text, completion)

    return done


def _sampled(
    engine: Engine, prompts: Prompts, n: int, context: Context, texts: dict[tuple[int, int], str], first: int = 0
) -> list[list[Completion]]:
    record = _recorder(context, texts, first)
    with refusals_placed(prompts):
        return engine.generate(prompts.tokens, context.sampling, n, seeds=prompts.seeds, on_completion=record)


def _joined(first: list[list[Completion]], second: list[list[Completion]]) -> list[list[Completion]]:
    return [a + b for a, b in zip(first, second, strict=True)]


def to_batch(
    prompts: Prompts,
    completions: Sequence[Sequence[Completion]],
    texts: dict[tuple[int, int], str],
    *,
    baseline_from: int | None = None,
) -> Batch:
    """Puts all completions, prompt by prompt, into right-padded tensors. Scores and rewards are NaN until verified.

    Args:
        completions: list of completions of each prompt.
        texts: decoded completions by (prompt's position, sample's index).
        baseline_from: samples from this index on are baselines only.
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
