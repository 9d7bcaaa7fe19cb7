"""From the rows of a data set to examples: completions encoded, groups converted, made to fit, and accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.data.examples.columns import clean, need, read_finishes
from posttrain.data.examples.dataset_examples import DatasetExamples, EncodedCompletion, with_mismatched
from posttrain.data.examples.encode import Encoded, Written, encode, turn_ids
from posttrain.data.examples.groups import Group, Into, TooLong, convert, distinct, fit
from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.rows import Rows
from posttrain.errors import DataError
from posttrain.recipe import sections


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What groups of completions are to become."""

    max_tokens: int | None = None
    too_long: TooLong = "leave_out"
    whole: bool = True  # a completion that is left out takes its group with it
    distinct: bool = False  # groups whose completions are all the same are left out
    mismatched: bool = False  # each group gets a completion of another prompt, as a baseline
    into: Into = "groups"
    columns: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # further columns of a row


def completions(
    rows: Rows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase, column: str = "completion"
) -> Iterator[EncodedCompletion]:
    """A column's completions, encoded, in the order of the rows."""
    need(rows, (column,))
    finishes = read_finishes(rows)
    written = [Written(i, clean(rows[i][column]), finishes[i], column) for i in range(len(rows))]
    for each, encoded in zip(written, encode(rows, written, tokenizer, data.template), strict=True):
        yield given_of(each, encoded)


def given_of(written: Written, encoded: Encoded) -> EncodedCompletion:
    """The completion without a reward; the turns of several messages are its steps."""
    steps: np.ndarray | None = turn_ids(encoded.mask) if encoded.starts is None else None
    return EncodedCompletion(encoded.tokens, encoded.mask, written.index, written.finish, step_id=steps)


def make_examples(
    rows: Rows, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, wanted: Wanted
) -> DatasetExamples:
    """Examples of the groups, with an account of what was left out or cut.

    Raises:
        DataError: where nothing is left.
    """
    differing, alike = distinct(groups) if wanted.distinct else (groups, [])
    converted, unpaired = convert(differing, wanted.into)
    fitted = fit(converted, wanted.max_tokens, wanted.too_long, whole=wanted.whole)
    limit = f"more than {wanted.max_tokens} tokens (`max_tokens`)"
    reasons = {
        "the completions are all the same": alike,
        "no two completions of the prompt have different ratings": unpaired,
        limit: fitted.too_long,
        f"differ only beyond {wanted.max_tokens} tokens (`max_tokens`)": fitted.indistinct,
    }
    gone = rows.dropped + sum((left_out(reason, found, rows.place) for reason, found in reasons.items()), ())
    if not fitted.groups:
        raise DataError(_nothing_left(rows, groups, gone, wanted.max_tokens, len(fitted.too_long)))
    made = fitted.groups
    if wanted.mismatched:
        made = with_mismatched(made, wanted.max_tokens, rows.source.name)
    kept = {given.row for group in fitted.groups for given in group}
    used = {given.row for group in groups for given in group}
    return DatasetExamples(
        groups=made,
        columns=lambda row: {**rows[row], **wanted.columns.get(row, {})},
        place_of=rows.place,
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        left_out=rows.left_out + len(used - kept),
        dropped=gone + left_out(limit, fitted.cut, rows.place, "cut"),
    )


def _nothing_left(
    rows: Rows, groups: Sequence[Group], gone: Sequence[LeftOut], longest: int | None, too_long: int
) -> str:
    if too_long:
        shortest = min(len(given) for group in groups for given in group)
        return (
            f"{rows.source.name}: every row has more than {longest} tokens (`max_tokens`); the shortest has {shortest}"
        )
    return f"{rows.source.name}: no row is left; " + "; ".join(map(str, gone))
