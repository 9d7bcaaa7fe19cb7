"""Datasets for a policy: prompts with the columns of verifiers, and tokens that the model has weights for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from posttrain.data.checks import check_columns
from posttrain.data.examples.dataset_examples import Examples
from posttrain.data.problems import Problems
from posttrain.data.rows import Rows, load_rows
from posttrain.models.load import embedding_rows
from posttrain.models.text import text_of
from posttrain.recipe.part import Part
from posttrain.recipe.sections import DataSection, PolicySection


def load_prompts(
    data: DataSection,
    policy: PolicySection,
    verifiers: Sequence[Part],
    *,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
) -> Rows:
    """Reads and tokenises prompts to complete and verify, and checks them against the policy and the verifiers.

    Args:
        base: the recipe's folder, for relative paths.

    Raises:
        DataError: if rows are wrong, if a verifier lacks a column or cannot read it, or if the model has no weights for
            a token; the message names the file and row of each.
    """
    rows = load_rows(data, tokenizer=tokenizer, base=base)
    check_columns(rows, verifiers)
    refuse_ids_without_weights(rows, policy, tokenizer)
    return rows


def refuse_ids_without_weights(
    data: Rows | Examples, policy: PolicySection, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks that every token id of a dataset has a row in the policy's embedding.

    Some tokenizers have special tokens, such as one for images, that their model has no weights for; a text or a chat
    template may hold them all the same. Rollouts of another model may have ids beyond this one's embedding.

    Raises:
        DataError: if one has none; names file, row and token, and what to do.
    """
    size = embedding_rows(policy)
    problems, decode = Problems(), text_of(tokenizer, special=True)
    for place, token in data.with_ids_from(size):
        problems.add(
            place,
            f"has the token {decode([token])!r} (id {token}), for which {policy.model!r} has no weights: its embedding "
            f"has {size} rows. Take the token out of the row or of the chat template, or give the model rows for it by "
            f"`model.resize_token_embeddings({token + 1})` and save it",
        )
    problems.raise_if_any()
