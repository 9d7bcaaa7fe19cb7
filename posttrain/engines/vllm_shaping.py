"""Shapers inside vLLM, through its V1 interface of logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from posttrain.engines.base import Request, Row

KEY = "posttrain_shaped"
"""Name of the argument of a vLLM request that holds the number of the engine's request."""

shaped: WeakValueDictionary[int, Request] = WeakValueDictionary()
"""Requests with a shaper, by number, as long as their engine holds them."""

failures: dict[int, Exception] = {}
"""Errors of shapers, by number of the request. They do not pass through vLLM, which dumps its state on an error."""


class _Slot(NamedTuple):
    """A row of vLLM's batch."""

    number: int  # number of the request
    sampled: Sequence[int]  # tokens sampled so far: vLLM's own list, which grows


class ShapingProcessor(LogitsProcessor):
    """Passes all rows of a shaper to it in one call. Requests without a shaper are not changed.

    vLLM divides by the temperature afterwards, so the shaped log-probs are multiplied by it.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._slots: dict[int, _Slot] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._slots.pop(row, None)
        for row, params, _, sampled in batch_update.added:
            self._slots.pop(row, None)
            arguments = params.extra_args or {}
            if KEY in arguments:
                self._slots[row] = _Slot(arguments[KEY], sampled)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._slots.pop(source, None), self._slots.pop(target, None)
            if moved is not None:
                self._slots[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._slots[source] = replaced

    def apply(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        groups: dict[int, list[tuple[int, Request, Sequence[int]]]] = {}  # rows by shaper
        for row, slot in self._slots.items():
            request = shaped.get(slot.number)
            if request is not None and slot.number not in failures:
                groups.setdefault(id(request.shaper), []).append((row, request, slot.sampled))
        for group in groups.values():
            try:
                _shape(logits, group)
            except Exception as error:
                failures.update((self._slots[row].number, error) for row, _, _ in group)
        return logits


def _shape(logits: Float[Tensor, "B V"], group: Sequence[tuple[int, Request, Sequence[int]]]) -> None:
    """Shapes rows that have one shaper, in place."""
    index = torch.tensor([row for row, _, _ in group], device=logits.device)
    temperature = torch.tensor([request.sampling.temperature or 1.0 for _, request, _ in group], device=logits.device)
    temperature, shaper = temperature[:, None], group[0][1].shaper
    rows = [Row(*request.place, len(request.prompt), [*request.prompt, *sampled]) for _, request, sampled in group]
    assert shaper is not None
    logits[index] = temperature * shaper((logits[index] / temperature).log_softmax(-1), rows).to(logits)
