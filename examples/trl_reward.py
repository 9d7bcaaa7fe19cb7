"""A reward function with TRL's signature: it takes lists over the whole batch and returns a number a completion."""

from typing import Any


def short_enough(completions: list[Any], answer: list[str], words: float = 1.5, **columns: Any) -> list[float]:
    """1 if a completion has at most ``words`` times as many words as the worked solution in the dataset, else 0.

    ``completions`` are lists of messages if the prompts are chats, and text if they are text.
    """
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [
        float(len(text.split()) <= words * len(solution.split())) for text, solution in zip(texts, answer, strict=True)
    ]
