"""The data of ``step_dpo.yaml``: pairs of reasoning steps behind the steps that both sides share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}\n"
    "Please reason step by step, and put your final answer within \\boxed{{}}.<|im_end|>\n"
    "<|im_start|>assistant\n{steps}"
)
"""Qwen's chat format, left open behind the steps so far: a chat template would close the assistant's message."""


def pair(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as text. A step is not a whole answer, so it gets no end-of-sequence token."""
    prompt = PROMPT.format(question=row["prompt"], steps=row["initial_reason_steps"])
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], "finish": "length"}


def math_steps() -> Iterator[dict[str, str]]:
    """10,795 pairs of Lai et al. 2024: the first wrong step of a solution, and a right one in its place."""
    from datasets import load_dataset

    for row in load_dataset("xinlai/Math-Step-DPO-10K", split="train"):
        yield pair(dict(row))
