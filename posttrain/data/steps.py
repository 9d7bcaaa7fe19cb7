"""Cuts completions into reasoning steps, by the text of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.batch import Batch
from posttrain.errors import DataError
from posttrain.models.text import Decode


def pieces(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; a character of several tokens is at the last of them."""
    texts: list[str] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = decode(waiting)
        unfinished = text.endswith("\ufffd") and len(waiting) < 4  # bytes of one character
        texts.append("" if unfinished else text)
        waiting = waiting if unfinished else []
    if waiting:
        texts[-1] = decode(waiting)
    return texts


def steps_by_text(batch: Batch, decode: Decode, separator: str) -> Int[Tensor, "N L"]:
    """Computes ``step_id`` of completions whose reasoning steps end with ``separator``, such as a line break.

    A token belongs to the step that its first character is in; -1 off the mask.
    """
    steps = torch.full_like(batch.step_id, -1)
    for row, mask in enumerate(batch.mask):
        steps[row, mask] = step_numbers(batch.tokens[row][mask].tolist(), decode, separator)
    return steps


def step_numbers(ids: Sequence[int], decode: Decode, separator: str) -> Int[Tensor, " L"]:
    """Number of each token's step in one completion, from 0 on: the step that has the token's first character.

    A run of separators ends one step; at the end of the completion it belongs to the last step.
    """
    text, starts = "", []
    for piece in pieces(ids, decode):
        starts.append(len(text))
        text += piece
    ends = _ends(text.rstrip(separator), separator)
    return torch.bucketize(torch.tensor(starts, dtype=torch.long), torch.tensor(ends, dtype=torch.long), right=True)


def _ends(text: str, separator: str) -> list[int]:
    """Positions at which runs of separators end."""
    ends: list[int] = []
    at = text.find(separator)
    while at >= 0:
        end = at + len(separator)
        if ends and ends[-1] == at:
            ends[-1] = end
        else:
            ends.append(end)
        at = text.find(separator, end)
    return ends


def cut(text: str, separator: str, count: int) -> list[str]:
    """Cuts a text into its steps. Joined by the separator they are the text again.

    A run of separators ends one step; all but one of it stay in that step, those at the end of the text in the last
    step, and those at its beginning in the first.

    Raises:
        DataError: if the text does not have ``count`` steps.
    """
    body = text.strip(separator)
    start = text.find(body)
    steps: list[str] = []
    for piece in body.split(separator):
        if steps and not piece:
            steps[-1] += separator
        else:
            steps.append(piece)
    steps[0] = text[:start] + steps[0]
    steps[-1] += text[start + len(body) :]
    if len(steps) != count:
        raise DataError(f"step labels: {text[:60]!r} has {len(steps)} steps, but its tokens are in {count}")
    return steps
