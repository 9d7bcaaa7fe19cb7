"""Examples from the rollouts that earlier runs stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.batch import OPTIONAL_FIELDS, Batch
from posttrain.data.examples.dataset_examples import Examples, fingerprint
from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.read import find
from posttrain.data.rollout_files import find_rollouts, read_rollouts
from posttrain.data.steps import steps_by_text
from posttrain.errors import DataError
from posttrain.models.text import reads_as, text_of, written_text
from posttrain.recipe import sections


@dataclass(frozen=True)
class StoredExamples:
    """Groups of completions in stored batches. See :class:`posttrain.data.examples.dataset_examples.Examples`."""

    batches: Sequence[Batch]
    groups: Sequence[tuple[int, torch.Tensor]]  # for each group the number of the batch, and the rows in it
    files: Sequence[Path]  # the file of each batch
    dropped: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def fingerprint(self) -> str:
        return fingerprint(
            [
                (batch.tokens[row, : batch.length[row]].numpy(), batch.mask[row, : batch.length[row]].numpy())
                for row in rows.tolist()
            ]
            for batch, rows in ((self.batches[number], rows) for number, rows in self.groups)
        )

    @property
    def extent(self) -> tuple[int, int]:
        longest = max(int(self.batches[number].length[rows].max()) for number, rows in self.groups)
        return max(len(rows) for _, rows in self.groups), longest

    def with_ids_from(self, size: int) -> Iterator[tuple[str, int]]:
        for number, rows in self.groups:
            for row in rows.tolist():
                tokens = self.batches[number].tokens[row, : self.batches[number].length[row]]
                if (largest := int(tokens.max())) >= size:
                    yield f"{self.files[number]}, row {row + 1}", largest

    def batch(self, index: Sequence[int]) -> Batch:
        """Makes a batch of the completions of these groups."""
        parts = []
        for position, i in enumerate(index):
            number, rows = self.groups[i]
            part = self.batches[number][rows].trim()
            parts.append(part.set(group=torch.full_like(part.group, position), step=0))
        return Batch.concatenate(parts)


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
    """Reads the rollouts of earlier runs, with the scores that their verifiers gave.

    ``data.path`` is a file of rollouts, a run's folder, its ``rollouts``, or a folder of runs. Groups are those of the
    run. Log-probs and values by that run's policy, reference and critic are dropped; ``logp_sampler`` and ``version``
    stay.

    Args:
        tokenizer: the policy's tokenizer; the stored token ids must be its own.
        first_step: the first step whose rollouts are taken.
        last_step: the last step whose rollouts are taken. Default: the last one that is stored.
        reward: ``score`` takes the verifiers' score alone, so that this recipe's ``reward`` parts can be added;
            ``reward`` takes the result of that run's reward parts, token-level rewards included.
        max_tokens: most tokens of prompt plus completion; groups with a longer one are left out and counted.
        separator: end of a reasoning step, such as a line break. Default: the steps that were stored.

    Raises:
        DataError: if there are no such rollouts, or they were written with another tokenizer.
    """
    files = _files(data, base, first_step, last_step)
    batches = [_fresh(read_rollouts(file), reward) for file in files]
    _check_tokenizer(batches[0], files[0], tokenizer)
    if separator is not None:
        batches = [batch.set(step_id=steps_by_text(batch, written_text(tokenizer), separator)) for batch in batches]
    everything = [(i, rows) for i, batch in enumerate(batches) for rows in _groups(batch)]
    everything = everything[: data.limit]

    def fits(group: tuple[int, torch.Tensor]) -> bool:
        return not max_tokens or int(batches[group[0]].length[group[1]].max()) <= max_tokens

    fitting = [group for group in everything if fits(group)]
    if not fitting:
        raise DataError(f"{data.path}: every group has a completion of more than {max_tokens} tokens (`max_tokens`)")
    places = [f"{files[i]}, row {int(rows[0]) + 1}" for i, rows in everything]
    too_long = [number for number, group in enumerate(everything) if not fits(group)]
    reason = f"groups with a completion of more than {max_tokens} tokens (`max_tokens`)"
    return StoredExamples(batches, fitting, files, left_out(reason, too_long, places.__getitem__))


def _files(data: sections.DataSection, base: Path | None, first_step: int, last_step: int | None) -> list[Path]:
    files = find_rollouts(data.path, base, setting="data.path")
    if files == [find(data.path, base)]:  # a file may have any name; all of its rollouts are taken
        return files
    chosen = [f for f in files if first_step <= _step(f) and (last_step is None or _step(f) <= last_step)]
    if not chosen:
        steps = [_step(file) for file in files]
        raise DataError(
            f"data.path: {data.path} has no rollouts of steps {first_step} to {last_step}; there are those of steps "
            f"{min(steps)} to {max(steps)}"
        )
    return chosen


def _step(file: Path) -> int:
    match = re.match(r"step-(\d+)", file.name)
    assert match is not None
    return int(match[1])


def _fresh(batch: Batch, reward: str) -> Batch:
    """The batch without the results that the earlier run computed."""
    batch = batch.set(**dict.fromkeys(OPTIONAL_FIELDS))
    if reward == "reward":
        return batch
    return batch.set(reward=batch.score.clone(), step_reward=torch.zeros_like(batch.step_reward))


def _groups(batch: Batch) -> list[torch.Tensor]:
    return [(batch.group == group).nonzero().squeeze(-1) for group in batch.group.unique().tolist()]


def _check_tokenizer(batch: Batch, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the tokenizer decodes the stored ids to the stored text: training itself would not notice."""
    row = int(batch.tokens_chosen.argmax())
    ids, stored = batch.tokens[row][batch.mask[row]].tolist(), batch.texts[row]
    if not reads_as(tokenizer, ids, stored):
        text = text_of(tokenizer, special=True)(ids)
        raise DataError(
            f"{file}, row {row + 1}: the tokens are not those of this policy's tokenizer: they read {text[:40]!r}, "
            f"and the completion is {stored[:40]!r}. Use rollouts of a model with the same tokenizer"
        )
