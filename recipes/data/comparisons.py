"""The data of ``recipes/preference/preference_model.yaml``: each pair asks which of two answers is better, twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.data.examples.columns import explicit_prompt, need
from posttrain.data.read import read
from posttrain.errors import DataError
from posttrain.recipe.sections import DataSection
from reward_models.preference import ANSWERS, question


def comparisons(path: str, split: str = "train", name: str | None = None) -> Iterator[dict[str, str]]:
    """Two questions for each pair: one shows the chosen answer first, the other shows it second.

    Args:
        path: where the pairs are, written like ``data.path`` in a recipe.
        split: the split to read, for a dataset on the hub.
        name: the dataset's configuration, for a dataset on the hub.

    Raises:
        DataError: for a row that is not a pair.
    """
    source = read(DataSection(path=path, split=split, name=name), None)
    need(source, ("chosen", "rejected"))
    for index, row in enumerate(source):
        pair = explicit_prompt(row)
        if isinstance(pair, str):
            raise DataError(f"{source.place(index)}: {pair}")
        chosen, rejected = answer_text(pair["chosen"]), answer_text(pair["rejected"])
        yield {"prompt": question(pair["prompt"], chosen, rejected), "completion": ANSWERS[0]}
        yield {"prompt": question(pair["prompt"], rejected, chosen), "completion": ANSWERS[1]}


def answer_text(answer: Any) -> str:
    """An answer as plain text; the messages of a conversation are joined."""
    return answer if isinstance(answer, str) else "\n\n".join(message["content"] for message in answer)
