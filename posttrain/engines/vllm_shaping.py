"""Shapers inside vLLM: its V1 interface of logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from posttrain.engines.base import Row, Shaper

KEY = "posttrain_shaped"
"""The request's argument that names its shaper and its row: ``[number, prompt, sample]``."""

_active: dict[int, Shaper] = {}  # of the calls of `generate` in progress; engines live in this process
_failures: dict[int, Exception] = {}  # what a shaper raised: vLLM would dump its whole state on an error


def register(shaper: Shaper) -> int:
    """A number under which requests find the shaper, until :func:`forget`."""
    number = max(_active, default=0) + 1
    _active[number] = shaper
    return number


def raise_failure(number: int) -> None:
    """Raises what the shaper has raised since the last call, if it has."""
    if number in _failures:
        raise _failures.pop(number)


def forget(number: int) -> None:
    """The shaper's requests have ended."""
    del _active[number]
    _failures.pop(number, None)


class _Request(NamedTuple):
    shaper: int
    prompt: int
    sample: int
    temperature: float
    prompt_tokens: Sequence[int]
    sampled: Sequence[int]  # vLLM's own list, which grows


class ShapingProcessor(LogitsProcessor):
    """Hands the rows of a shaper to it in one call; requests without one are left as they are.

    vLLM divides by the temperature afterwards, so the shaped log-probs are multiplied by it.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, _Request] = {}  # by row of the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, sampled in batch_update.added:
            self._requests.pop(row, None)
            arguments = params.extra_args or {}
            if KEY in arguments:
                shaper, at, sample = arguments[KEY]
                temperature = params.temperature or 1.0
                self._requests[row] = _Request(shaper, at, sample, temperature, prompt or [], sampled)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._requests[source] = replaced

    def apply(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        for number in {request.shaper for request in self._requests.values()} & _active.keys() - _failures.keys():
            rows = [row for row, request in self._requests.items() if request.shaper == number]
            try:
                self._shape(logits, rows, _active[number])
            except Exception as error:
                _failures[number] = error
        return logits

    def _shape(self, logits: Float[Tensor, "B V"], rows: Sequence[int], shaper: Shaper) -> None:
        requests = [self._requests[row] for row in rows]
        index = torch.tensor(rows, device=logits.device)
        temperature = torch.tensor([request.temperature for request in requests], device=logits.device)[:, None]
        described = [Row(r.prompt, r.sample, len(r.prompt_tokens), [*r.prompt_tokens, *r.sampled]) for r in requests]
        logits[index] = temperature * shaper((logits[index] / temperature).log_softmax(-1), described).to(logits)
