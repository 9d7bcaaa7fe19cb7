"""The data of ``recipes/preference/step_dpo.yaml``: pairs of reasoning steps that follow the same earlier steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}\n"
    "Please reason step by step, and put your final answer within \\boxed{{}}.<|im_end|>\n"
    "<|im_start|>assistant\n{steps}"
)
"""Qwen's chat format. The assistant's message stays open after the steps so far; a chat template would close it."""


def pair(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as a text pair. A step is not a whole answer, so no end-of-sequence token is added."""
    prompt = PROMPT.format(question=row["prompt"], steps=row["initial_reason_steps"])
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], "finish": "length"}


def math_steps() -> Iterator[dict[str, str]]:
    """The 10,795 pairs of Lai et al. 2024: the first wrong step of a solution (rejected) and a right one (chosen)."""
    from datasets import load_dataset

    for row in load_dataset("xinlai/Math-Step-DPO-10K", split="train"):
        yield pair(dict(row))
