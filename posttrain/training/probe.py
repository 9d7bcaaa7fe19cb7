"""A made-up batch and made-up outputs that note which of their fields a part reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch, Finish, Outputs
from posttrain.training.recipe import Recipe

FIELDS = frozenset(f.name for f in fields(Batch)) | frozenset(f.name for f in fields(Outputs))


@dataclass
class ReadLog:
    """Names of the fields and dataset columns that parts have read."""

    seen: set[str] = field(default_factory=set)  # fields of a batch, and "outputs.<field>" of outputs
    columns: set[str] = field(default_factory=set)  # dataset columns
    paused: bool = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, reads are not noted."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def noting_reads(kind: type[Any], log: ReadLog, prefix: str = "") -> type[Any]:
    """A subclass of ``Batch`` or ``Outputs`` whose instances note in the log which fields are read."""

    def read(self: Any, name: str) -> Any:
        if name in FIELDS and not log.paused:
            log.seen.add(f"{prefix}{name}")
        return object.__getattribute__(self, name)

    return type(f"Noting{kind.__name__}", (kind,), {"__slots__": (), "__getattribute__": read})


def noting_batch(log: ReadLog) -> type[Batch]:
    """A subclass of ``Batch`` that notes reads. Copying a batch does not count as reading."""

    class NotingBatch(noting_reads(Batch, log)):
        __slots__ = ()

        def set(self, **changes: Any) -> Batch:
            with log.pause():
                return replace(self, **changes)

        def _map(self, tensor: Callable[[Tensor], Tensor], column: Callable[[tuple], tuple]) -> Batch:
            with log.pause():
                return Batch._map(self, tensor, column)

    return NotingBatch


class AnyRow(dict[str, float]):
    """A dataset row that has every column, and notes which ones are read."""

    def __init__(self, log: ReadLog) -> None:
        super().__init__()
        self._log = log

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> float:
        self._log.columns.add(name)
        return 0.5


def probe_batch(log: ReadLog, *, every_next: bool = False, baseline: bool = False) -> Batch:
    """A small made-up batch of two groups of four completions.

    Args:
        every_next: fill ``value_next``, as a Q head does.
        baseline: fill ``baseline``.
    """
    generator = torch.Generator().manual_seed(0)
    n, columns, prompt = 8, 6, 2
    length = torch.tensor([6, 4, 5, 6, 3, 6, 5, 4])
    column = torch.arange(columns)
    mask = (column >= prompt) & (column < length[:, None])
    logp = -torch.rand(n, columns, generator=generator) * mask
    score = torch.tensor([1.0, 0, 0, 0, 1, 0, 1, 1])
    noise = torch.randn(n, columns, generator=generator) * mask
    return noting_batch(log)(
        tokens=torch.randint(0, 9, (n, columns), generator=generator),
        mask=mask,
        length=length,
        group=torch.arange(2).repeat_interleave(4),
        finish=torch.tensor([int(Finish.STOPPED), int(Finish.LENGTH)] * 4),
        logp_sampler=logp,
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, 0, -1),
        baseline_only=torch.tensor([False, False, False, True] * 2),
        rows=tuple(AnyRow(log) for _ in range(n)),
        texts=tuple("" for _ in range(n)),
        score=score,
        reward=score.clone(),
        step_reward=0.1 * noise,
        logp_old=logp,
        logp_ref=logp + 0.1 * noise,
        entropy=noise.abs(),
        value=torch.rand(n, columns, generator=generator),
        value_next=torch.rand(n, columns, generator=generator) if every_next else None,
        advantage=noise,
        loss_share=mask / mask.sum(),
        baseline=torch.zeros(n) if baseline else None,
        target=torch.rand(n, columns, generator=generator),
        value_share=mask / mask.sum(),
    )


def probe_outputs(log: ReadLog, batch: Batch, recipe: Recipe) -> Outputs:
    """Made-up outputs like those of the recipe's models. The head of a saved value model is not known yet."""
    with log.pause():
        assert batch.logp_old is not None and batch.entropy is not None and batch.value is not None
        logp = (batch.logp_old + 0.05).where(batch.mask, 0.0).requires_grad_()
        entropy, value = batch.entropy.clone().requires_grad_(), batch.value.clone().requires_grad_()
        noise = 0.1 * batch.entropy
        made = noting_reads(Outputs, log, "outputs.")(
            logp=logp, entropy=entropy, value=value, kl_ref=noise.clone().requires_grad_(), collision=-noise
        )
        head = recipe.value.head if recipe.value else None
        unknown = head is None and recipe.value is not None and recipe.value.model is not None
        if not unknown and (head is None or head.type in ("scalar", "per_token")):
            return made
        outputs = {"bernoulli": 1, "implicit": 1}.get(head.type, head.bins) if head else 11
        logits = torch.zeros(*batch.mask.shape, outputs, requires_grad=True)
        low, high = (head.low, head.high) if head else (-1.0, 2.0)
        support = torch.linspace(low, high, outputs) if head is None or head.type == "categorical" else None
        return replace(made, value_logits=logits, support=support)
