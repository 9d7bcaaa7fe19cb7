"""The data of ``preference_model.yaml``: pairs as questions which of two answers is better, in both orders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.data.examples.columns import explicit_prompt, need
from posttrain.data.read import read
from posttrain.errors import DataError
from posttrain.recipe.sections import DataSection
from reward_models.preference import ANSWERS, question


def comparisons(path: str, split: str = "train", name: str | None = None) -> Iterator[dict[str, str]]:
    """Two questions a pair: the chosen answer stands first in one and second in the other.

    Args:
        path: of pairs, as ``data.path`` of a recipe.
        split: of a data set of the hub.
        name: its configuration.

    Raises:
        DataError: for a row that is not a pair.
    """
    source = read(DataSection(path=path, split=split, name=name), None)
    need(source, ("chosen", "rejected"))
    for index, row in enumerate(source.rows):
        pair = explicit_prompt(dict(row))
        if isinstance(pair, str):
            raise DataError(f"{source.place(index)}: {pair}")
        chosen, rejected = text_of(pair["chosen"]), text_of(pair["rejected"])
        yield {"prompt": question(pair["prompt"], chosen, rejected), "completion": ANSWERS[0]}
        yield {"prompt": question(pair["prompt"], rejected, chosen), "completion": ANSWERS[1]}


def text_of(answer: Any) -> str:
    """An answer as a preference model reads it: text, or what the assistant's messages say."""
    return answer if isinstance(answer, str) else "\n\n".join(message["content"] for message in answer)
