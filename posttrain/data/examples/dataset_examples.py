"""Dataset examples: groups of completions from a dataset, which become batches on demand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.batch import Batch, Finish, pad
from posttrain.data.left_out import LeftOut
from posttrain.data.problems import Problems, shown
from posttrain.errors import DataError
from posttrain.recipe.yaml_reader import suggestion


class Examples(Protocol):
    """Groups of dataset completions. The loop draws numbers of groups and uses their batch like a sampled one."""

    @property
    def dropped(self) -> tuple[LeftOut, ...]:
        """Account of the rows of the dataset that are left out or cut."""
        ...

    def __len__(self) -> int:
        """Number of groups."""
        ...

    def batch(self, index: Sequence[int]) -> Batch:
        """Makes a batch of the completions of these groups; ``group`` is the position in ``index``.

        Their log-probs at the time of writing are unknown: ``logp_sampler`` is NaN on the chosen tokens, unless the
        completions were sampled by an earlier run.
        """
        ...

    def fingerprint(self) -> str:
        """Hash of all token ids, of their masks, and of the grouping."""
        ...

    @property
    def extent(self) -> tuple[int, int]:
        """Number of completions of the largest group, and tokens of the longest prompt with its completion."""
        ...

    def with_ids_from(self, size: int) -> Iterator[tuple[str, int]]:
        """Yields place and largest token id of each row that has an id of ``size`` or above."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedCompletion:
    """A prompt with a completion, as token ids."""

    tokens: np.ndarray  # int32 [length]
    mask: np.ndarray  # bool [length]: True on the tokens that count as the policy's
    row: int  # number of the row in the dataset
    finish: Finish
    reward: float = float("nan")
    step_id: np.ndarray | None = None  # int32 [length], -1 off the mask; None: all one step
    step_reward: np.ndarray | None = None  # float32 [length], NaN at the end of a step without a label
    baseline_only: bool = False  # serves only as a baseline, and is never trained on

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class DatasetExamples:
    """Completions of a dataset's rows, encoded once. See :class:`Examples`."""

    groups: Sequence[Sequence[EncodedCompletion]]
    columns: Callable[[int], dict[str, Any]]  # columns of a row
    place: Callable[[int], str]  # place of a row for messages
    decode: Callable[[Sequence[int]], str]
    dropped: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def fingerprint(self) -> str:
        return fingerprint([(completion.tokens, completion.mask) for completion in group] for group in self.groups)

    @property
    def extent(self) -> tuple[int, int]:
        return max(map(len, self.groups)), max(len(each) for group in self.groups for each in group)

    def with_ids_from(self, size: int) -> Iterator[tuple[str, int]]:
        largest: dict[int, int] = {}
        for completion in (completion for group in self.groups for completion in group):
            largest[completion.row] = max(largest.get(completion.row, 0), int(completion.tokens.max()))
        yield from ((self.place(row), token) for row, token in largest.items() if token >= size)

    def check_numbers(self, names: Sequence[str]) -> None:
        """Checks that columns which the parts of a loss read hold numbers.

        Raises:
            DataError: if one of them does not; the message names the rows.
        """
        problems = Problems()
        for row in sorted({completion.row for group in self.groups for completion in group}) if names else ():
            columns = self.columns(row)
            for name in names:
                value = columns.get(name)
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    problem = f"is {shown(value)}" if name in columns else f"is missing; {suggestion(name, columns)}"
                    problems.add(self.place(row), f"column {name!r}, in which the loss reads a number, {problem}")
        problems.raise_if_any()

    def batch(self, index: Sequence[int]) -> Batch:
        """Makes a batch of the completions of these groups; their rewards are both scores and rewards."""
        chosen = [completion for i in index for completion in self.groups[i]]
        columns = {row: self.columns(row) for row in {completion.row: None for completion in chosen}}
        mask = pad([completion.mask for completion in chosen])
        reward = torch.tensor([completion.reward for completion in chosen], dtype=torch.float32)
        return Batch(
            tokens=pad([completion.tokens for completion in chosen]).long(),
            mask=mask,
            length=torch.tensor([len(completion) for completion in chosen]),
            group=torch.tensor([position for position, i in enumerate(index) for _ in self.groups[i]]),
            finish=torch.tensor([int(completion.finish) for completion in chosen]),
            logp_sampler=torch.where(mask, float("nan"), 0.0),
            version=torch.full((len(chosen),), -1),
            step_id=pad([_step_id(completion) for completion in chosen], -1).long(),
            baseline_only=torch.tensor([completion.baseline_only for completion in chosen], dtype=torch.bool),
            rows=tuple(columns[completion.row] for completion in chosen),
            texts=tuple(self.decode(completion.tokens[completion.mask].tolist()) for completion in chosen),
            score=reward,
            reward=reward.clone(),
            step_reward=pad([_step_reward(completion) for completion in chosen]),
        )


def fingerprint(groups: Iterable[Iterable[tuple[np.ndarray, np.ndarray]]]) -> str:
    """Hash of groups of completions, each with token ids [length] and mask [length]."""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        digest.update(b"group")
        for tokens, mask in group:
            digest.update(len(tokens).to_bytes(8, "little") + tokens.astype(np.int32).tobytes() + mask.tobytes())
    return digest.hexdigest()


def with_mismatched(
    groups: Sequence[Sequence[EncodedCompletion]], longest: int | None, name: str
) -> list[list[EncodedCompletion]]:
    """Adds to each group, after its prompt, the completion of the next group that has another prompt.

    Ethayarajh et al. 2024 (KTO), arXiv:2402.01306. A completion that would make more than ``longest``
    tokens is left out.

    Args:
        name: name of the dataset, for the message.

    Raises:
        DataError: if all prompts are equal.
    """
    firsts = [group[0] for group in groups]
    prompts = [first.tokens[: prompt_tokens(first)].tobytes() for first in firsts]
    other = len(groups)  # the nearest group after i, cyclically, with another prompt than i's
    partners = [0] * len(groups)
    for i in reversed(range(2 * len(groups))):
        current, following = i % len(groups), (i + 1) % len(groups)
        other = i + 1 if prompts[current] != prompts[following] else other
        partners[current] = other % len(groups)
    if len(set(prompts)) < 2:
        raise DataError(f"{name}: all rows have the same prompt, so there is no completion of another one to compare")
    added = [_mismatched(first, firsts[j]) for first, j in zip(firsts, partners, strict=True)]
    pairs = zip(groups, added, strict=True)
    return [[*group, *([new] if not longest or len(new) <= longest else [])] for group, new in pairs]


def prompt_tokens(completion: EncodedCompletion) -> int:
    """Number of tokens of the prompt: those before the first one of the mask."""
    return int(completion.mask.argmax())


def _mismatched(prompt: EncodedCompletion, other: EncodedCompletion) -> EncodedCompletion:
    """The prompt of one completion followed by the text of the other, without a rating."""
    start, other_start = prompt_tokens(prompt), prompt_tokens(other)
    tokens = np.concatenate([prompt.tokens[:start], other.tokens[other_start:]])
    mask = np.concatenate([prompt.mask[:start], other.mask[other_start:]])
    return EncodedCompletion(tokens, mask, prompt.row, other.finish, baseline_only=True)


def _step_id(completion: EncodedCompletion) -> np.ndarray:
    if completion.step_id is None:
        return np.where(completion.mask, 0, -1).astype(np.int32)
    return completion.step_id


def _step_reward(completion: EncodedCompletion) -> np.ndarray:
    return np.zeros(len(completion), np.float32) if completion.step_reward is None else completion.step_reward
