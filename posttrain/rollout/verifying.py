"""Gives completions to the verifiers: the text as it was written, how it ended, and the prompt as the model read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from posttrain.batch import Finish
from posttrain.engines.base import Completion
from posttrain.models.text import Decode
from posttrain.verify import VerifierPool

Submit = Callable[[Hashable, str, Completion, Sequence[int], Mapping[str, Any], str], None]
"""Function that submits a completion: ``(key, text, completion, prompt's token ids, row, place)``."""


def submitter(verifiers: VerifierPool, decode: Decode) -> Submit:
    """Makes the function by which all commands submit completions, so that verifiers read the same in each of them.

    Args:
        decode: token ids to text as it was written.
    """
    prompt_texts: dict[tuple[int, ...], str] = {}

    def prompt_text(prompt: Sequence[int]) -> str:
        if not verifiers.reads_prompts:
            return ""
        ids = tuple(prompt)
        if ids not in prompt_texts:
            prompt_texts[ids] = decode(ids)
        return prompt_texts[ids]

    def submit(
        key: Hashable, text: str, completion: Completion, prompt: Sequence[int], row: Mapping[str, Any], place: str
    ) -> None:
        finish = Finish(completion.finish).name.lower()
        verifiers.submit(key, text, completion.tokens, row, place=place, finish=finish, prompt_text=prompt_text(prompt))

    return submit
