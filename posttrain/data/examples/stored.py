"""Examples from the rollouts that earlier runs stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.batch import OPTIONAL_FIELDS, Batch
from posttrain.data.examples.dataset_examples import Examples, fingerprint
from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.read import find
from posttrain.data.rollout_files import read_rollouts
from posttrain.data.steps import Decode, steps_by_text
from posttrain.errors import DataError
from posttrain.recipe import sections


@dataclass(frozen=True)
class StoredExamples:
    """Groups of stored batches; see :class:`posttrain.data.examples.dataset_examples.Examples`."""

    batches: Sequence[Batch]
    files: Sequence[Path]
    groups: Sequence[tuple[int, torch.Tensor]]  # number of the batch, rows in it
    left_out: int
    dropped: tuple[LeftOut, ...] = ()

    @property
    def longest(self) -> int:
        return max(int(self.batches[file].length[rows].max()) for file, rows in self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def place(self, index: int) -> str:
        file, rows = self.groups[index]
        return f"{self.files[file]}, row {int(rows[0]) + 1}"

    def fingerprint(self) -> str:
        return fingerprint(
            [
                (batch.tokens[row, : batch.length[row]].numpy(), batch.mask[row, : batch.length[row]].numpy())
                for row in rows.tolist()
            ]
            for batch, rows in ((self.batches[file], rows) for file, rows in self.groups)
        )

    def batch(self, index: Sequence[int]) -> Batch:
        """The completions of these groups."""
        found = []
        for position, i in enumerate(index):
            file, rows = self.groups[i]
            batch = self.batches[file][rows].trim()
            found.append(batch.set(group=torch.full_like(batch.group, position), step=0))
        return Batch.concatenate(found)


def rollouts(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    first_step: int = 0,
    last_step: int | None = None,
    reward: Literal["score", "reward"] = "score",
    max_tokens: int | None = None,
    separator: str | None = None,
) -> Examples:
    """Completions of earlier runs, with the scores that their verifiers gave: ``data.path`` is a file of rollouts, a
    ``rollouts`` folder, or a run's folder.

    Groups are those of the run. What that run's policy, reference and critic thought of the tokens is left behind;
    ``logp_sampler`` and ``version`` stay.

    Args:
        tokenizer: of the policy; the stored token ids must be its own.
        first_step: the first step whose rollouts are taken.
        last_step: the last one. Default: of all there are.
        reward: ``score`` takes the verifiers' score alone, so that this recipe's ``reward`` parts can be added;
            ``reward`` takes what that run's reward parts made of it, token-level rewards too.
        max_tokens: prompt plus completion; groups with a longer one are left out and counted.
        separator: what a reasoning step ends with, such as a line break. Default: the steps that were stored.

    Raises:
        DataError: where there are no such rollouts, or they were written with another tokenizer.
    """
    files = _files(data, base, first_step, last_step)
    batches = [_fresh(read_rollouts(file), reward) for file in files]
    _check_tokenizer(batches[0], files[0], tokenizer)
    if separator is not None:
        batches = [batch.set(step_id=steps_by_text(batch, _decoder(tokenizer), separator)) for batch in batches]
    everything = [(i, rows) for i, batch in enumerate(batches) for rows in _groups(batch)]
    everything = everything[: data.limit]

    def fits(group: tuple[int, torch.Tensor]) -> bool:
        return not max_tokens or int(batches[group[0]].length[group[1]].max()) <= max_tokens

    kept = [group for group in everything if fits(group)]
    if not kept:
        raise DataError(f"{data.path}: every group has a completion of more than {max_tokens} tokens (`max_tokens`)")
    places = [f"{files[i]}, row {int(rows[0]) + 1}" for i, rows in everything]
    gone = [number for number, group in enumerate(everything) if not fits(group)]
    reason = f"groups with a completion of more than {max_tokens} tokens (`max_tokens`)"
    return StoredExamples(batches, files, kept, len(gone), left_out(reason, gone, places.__getitem__))


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _files(data: sections.DataSection, base: Path | None, first_step: int, last_step: int | None) -> list[Path]:
    path = find(data.path, base)
    if path is None:
        raise DataError(f"data.path {data.path!r}: there is no such file or folder of rollouts")
    if path.is_file():
        return [path]
    folder = path / "rollouts" if (path / "rollouts").is_dir() else path
    files = sorted(folder.glob("step-*.parquet"))
    if not files:
        raise DataError(f"{folder}: no rollouts (step-*.parquet); `run.rollouts_every: 0` stores none")
    chosen = [f for f in files if first_step <= _step(f) and (last_step is None or _step(f) <= last_step)]
    if not chosen:
        raise DataError(
            f"{folder}: no rollouts of steps {first_step} to {last_step}; there are those of steps "
            f"{_step(files[0])} to {_step(files[-1])}"
        )
    return chosen


def _step(file: Path) -> int:
    found = re.match(r"step-(\d+)", file.name)
    assert found is not None
    return int(found[1])


def _fresh(batch: Batch, reward: str) -> Batch:
    """Without what the earlier run computed."""
    batch = batch.set(**dict.fromkeys(OPTIONAL_FIELDS))
    if reward == "reward":
        return batch
    return batch.set(reward=batch.score.clone(), step_reward=torch.zeros_like(batch.step_reward))


def _groups(batch: Batch) -> list[torch.Tensor]:
    return [(batch.group == group).nonzero().squeeze(-1) for group in batch.group.unique().tolist()]


def _check_tokenizer(batch: Batch, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stored ids mean nothing to another tokenizer, and training on them would not fail by itself."""
    row = int(batch.tokens_chosen.argmax())
    ids, stored = batch.tokens[row][batch.mask[row]].tolist(), batch.texts[row]
    found = str(tokenizer.decode(ids, skip_special_tokens=True))
    if int(batch.tokens.max()) >= len(tokenizer) or found != stored:
        raise DataError(
            f"{file}, row {row + 1}: the tokens are not those of this policy's tokenizer: they read {found[:40]!r}, "
            f"and the completion is {stored[:40]!r}. Use rollouts of a model with the same tokenizer"
        )
