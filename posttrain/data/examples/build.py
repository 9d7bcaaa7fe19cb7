"""Makes examples of the rows of a dataset: encodes completions, converts and fits groups, accounts for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.data.examples.columns import need, read_finishes
from posttrain.data.examples.dataset_examples import DatasetExamples, EncodedCompletion, with_mismatched
from posttrain.data.examples.encode import Encoded, RawCompletion, encode
from posttrain.data.examples.groups import Group, Into, TooLong, convert, distinct, fit
from posttrain.data.examples.turns import turn_ids
from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.rows import Rows
from posttrain.errors import DataError
from posttrain.models.text import written_text


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options by which completions become groups: their length, their kind, what is added."""

    max_tokens: int | None = None
    too_long: TooLong = "leave_out"
    whole: bool = True  # a completion that is left out takes its group with it
    distinct: bool = False  # groups whose completions are all the same are left out
    mismatched: bool = False  # each group gets a completion of another prompt, as a baseline
    into: Into = "groups"
    columns: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # further columns of a row


def completions(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, column: str = "completion"
) -> Iterator[EncodedCompletion]:
    """Encodes the completions of a column, in the order of the rows."""
    need(rows, (column,))
    finishes = read_finishes(rows)
    raw = [RawCompletion(i, rows[i][column], finishes[i], column) for i in range(len(rows))]
    for completion, encoded in zip(raw, encode(rows, raw, tokenizer), strict=True):
        yield without_reward(completion, encoded)


def without_reward(raw: RawCompletion, encoded: Encoded) -> EncodedCompletion:
    """The encoded completion without a reward; the turns of several messages are its steps."""
    steps: np.ndarray | None = turn_ids(encoded.mask) if encoded.starts is None else None
    return EncodedCompletion(encoded.tokens, encoded.mask, raw.index, raw.finish, step_id=steps)


def make_examples(
    rows: Rows, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, options: GroupOptions
) -> DatasetExamples:
    """Makes examples of the groups, with an account of everything that was left out or cut.

    Raises:
        DataError: if nothing is left.
    """
    differing, alike = distinct(groups) if options.distinct else (groups, [])
    converted, unpaired = convert(differing, options.into)
    fitted = fit(converted, options.max_tokens, options.too_long, whole=options.whole)
    limit = f"more than {options.max_tokens} tokens (`max_tokens`)"
    reasons = {
        "the completions are all the same": alike,
        "no two completions of the prompt have different ratings": unpaired,
        limit: fitted.too_long,
        f"differ only beyond {options.max_tokens} tokens (`max_tokens`)": fitted.indistinct,
    }
    dropped = rows.dropped + sum((left_out(reason, numbers, rows.place) for reason, numbers in reasons.items()), ())
    if not fitted.groups:
        raise DataError(_nothing_left(rows, groups, dropped, options.max_tokens, len(fitted.too_long)))
    final_groups = fitted.groups
    if options.mismatched:
        final_groups = with_mismatched(final_groups, options.max_tokens, rows.source.name)
    return DatasetExamples(
        groups=final_groups,
        columns=lambda row: {**rows[row], **options.columns.get(row, {})},
        place=rows.place,
        decode=written_text(tokenizer),
        dropped=dropped + left_out(limit, fitted.cut, rows.place, "cut"),
    )


def _nothing_left(
    rows: Rows, groups: Sequence[Group], dropped: Sequence[LeftOut], longest: int | None, too_long: int
) -> str:
    if too_long:
        shortest = min(len(completion) for group in groups for completion in group)
        return (
            f"{rows.source.name}: every row has more than {longest} tokens (`max_tokens`); the shortest has {shortest}"
        )
    return f"{rows.source.name}: no row is left; " + "; ".join(map(str, dropped))
