"""What the parts of the ``examples`` slot return: groups of given completions that become batches on demand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.data.left_out import LeftOut
from posttrain.data.problems import Problems, shown
from posttrain.errors import DataError
from posttrain.recipe.yaml_reader import suggestion


class Examples(Protocol):
    """Groups of given completions. The loop draws group numbers and goes on with their batch as after sampling."""

    @property
    def left_out(self) -> int:
        """Rows of the data set that are not used."""
        ...

    @property
    def dropped(self) -> tuple[LeftOut, ...]:
        """Why not, and what was cut."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + completion."""
        ...

    def __len__(self) -> int:
        """Number of groups."""
        ...

    def batch(self, index: Sequence[int]) -> Batch:
        """The completions of these groups; ``group`` is the position in ``index``.

        Nothing is known of how likely they were when they were written: ``logp_sampler`` is NaN on the chosen tokens,
        unless the completions were sampled by an earlier run.
        """
        ...

    def place(self, index: int) -> str:
        """Where a group comes from, such as ``ratings.jsonl:7``."""
        ...

    def fingerprint(self) -> str:
        """Hash of all token ids, of which of them are the policy's, and of how they are grouped."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedCompletion:
    """A prompt with a completion, as token ids."""

    tokens: np.ndarray  # int32 [length]
    mask: np.ndarray  # bool [length]: what the policy is to have written
    row: int  # of the data set
    finish: Finish
    reward: float = float("nan")
    step_id: np.ndarray | None = None  # int32 [length], -1 off the mask; None: all one step
    step_reward: np.ndarray | None = None  # float32 [length], NaN at the end of a step without a label
    baseline_only: bool = False  # serves as a baseline alone, and is never trained on

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class DatasetExamples:
    """Completions of a data set's rows, encoded once; see :class:`Examples`."""

    groups: Sequence[Sequence[EncodedCompletion]]
    columns: Callable[[int], dict[str, Any]]  # of a row
    place_of: Callable[[int], str]  # of a row
    decode: Callable[[Sequence[int]], str]
    left_out: int
    dropped: tuple[LeftOut, ...] = ()

    @property
    def longest(self) -> int:
        return max(len(given) for group in self.groups for given in group)

    def __len__(self) -> int:
        return len(self.groups)

    def place(self, index: int) -> str:
        return self.place_of(self.groups[index][0].row)

    def fingerprint(self) -> str:
        return fingerprint([(given.tokens, given.mask) for given in group] for group in self.groups)

    def check_numbers(self, names: Sequence[str]) -> None:
        """Columns that the parts of a loss read.

        Raises:
            DataError: naming the rows where one of them is not a number.
        """
        problems = Problems()
        for row in sorted({given.row for group in self.groups for given in group}) if names else ():
            found = self.columns(row)
            for name in names:
                value = found.get(name)
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    what = f"is {shown(value)}" if name in found else f"is missing; {suggestion(name, found)}"
                    problems.add(self.place_of(row), f"column {name!r}, in which the loss reads a number, {what}")
        problems.raise_if_any()

    def batch(self, index: Sequence[int]) -> Batch:
        """The completions of these groups as a batch; their rewards are scores and rewards at once."""
        chosen = [(position, given) for position, i in enumerate(index) for given in self.groups[i]]
        rows = {given.row: self.columns(given.row) for _, given in chosen}
        mask = _padded([given.mask for _, given in chosen], False)
        reward = torch.tensor([given.reward for _, given in chosen], dtype=torch.float32)
        return Batch(
            tokens=_padded([given.tokens for _, given in chosen], 0).long(),
            mask=mask,
            length=torch.tensor([len(given) for _, given in chosen]),
            group=torch.tensor([position for position, _ in chosen]),
            finish=torch.tensor([int(given.finish) for _, given in chosen]),
            logp_sampler=torch.where(mask, float("nan"), 0.0),
            version=torch.full((len(chosen),), -1),
            step_id=_padded([_step_id(given) for _, given in chosen], -1).long(),
            baseline_only=torch.tensor([given.baseline_only for _, given in chosen], dtype=torch.bool),
            rows=tuple(rows[given.row] for _, given in chosen),
            texts=tuple(self.decode(given.tokens[given.mask].tolist()) for _, given in chosen),
            score=reward,
            reward=reward.clone(),
            step_reward=_padded([_step_reward(given) for _, given in chosen], 0.0),
        )


def fingerprint(groups: Iterable[Iterable[tuple[np.ndarray, np.ndarray]]]) -> str:
    """Hash of groups of completions, each with token ids [length] and mask [length]."""
    made = hashlib.blake2b(digest_size=16)
    for group in groups:
        made.update(b"group")
        for tokens, mask in group:
            made.update(len(tokens).to_bytes(8, "little") + tokens.astype(np.int32).tobytes() + mask.tobytes())
    return made.hexdigest()


def with_mismatched(
    groups: Sequence[Sequence[EncodedCompletion]], longest: int | None, name: str
) -> list[list[EncodedCompletion]]:
    """Groups with one more completion behind the same prompt: that of the next group with another prompt.

    Ethayarajh et al. 2024 (KTO), section 4.1, arXiv:2402.01306. A completion that would make more than ``longest``
    tokens is left out.

    Args:
        name: of the data, for the message.

    Raises:
        DataError: where all prompts are equal.
    """
    firsts = [group[0] for group in groups]
    prompts = [given.tokens[: prompt_tokens(given)].tobytes() for given in firsts]
    other = len(groups)  # the nearest group behind i, cyclically, with another prompt than i's
    found = [0] * len(groups)
    for i in reversed(range(2 * len(groups))):
        here, behind = i % len(groups), (i + 1) % len(groups)
        other = i + 1 if prompts[here] != prompts[behind] else other
        found[here] = other % len(groups)
    if len(set(prompts)) < 2:
        raise DataError(f"{name}: all rows have the same prompt, so there is no completion of another one to compare")
    added = [_behind(prompt, firsts[j]) for prompt, j in zip(firsts, found, strict=True)]
    pairs = zip(groups, added, strict=True)
    return [[*group, *([new] if not longest or len(new) <= longest else [])] for group, new in pairs]


def prompt_tokens(given: EncodedCompletion) -> int:
    """Tokens before the first that the policy is to have written."""
    return int(given.mask.argmax())


def _behind(prompt: EncodedCompletion, other: EncodedCompletion) -> EncodedCompletion:
    """The completion of the one behind the prompt of the other, without a rating."""
    own, its = prompt_tokens(prompt), prompt_tokens(other)
    tokens = np.concatenate([prompt.tokens[:own], other.tokens[its:]])
    mask = np.concatenate([prompt.mask[:own], other.mask[its:]])
    return EncodedCompletion(tokens, mask, prompt.row, other.finish, baseline_only=True)


def _step_id(given: EncodedCompletion) -> np.ndarray:
    return np.where(given.mask, 0, -1).astype(np.int32) if given.step_id is None else given.step_id


def _step_reward(given: EncodedCompletion) -> np.ndarray:
    return np.zeros(len(given), np.float32) if given.step_reward is None else given.step_reward


def _padded(rows: Sequence[np.ndarray], fill: float) -> Tensor:
    """Rows of different lengths as one tensor [N, L], filled up on the right."""
    columns = max(len(row) for row in rows)
    whole = np.full((len(rows), columns), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
    return torch.from_numpy(whole)
