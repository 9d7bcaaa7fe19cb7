"""Examples from the rows of a data set: rated completions, solutions rated step by step, preferences, demonstrations.

In each of them ``prompt`` and completions are text or lists of messages. A text completion is taken as the policy's own
words after the prompt and gets the end-of-sequence token; messages go through the chat template. An optional column
``finish`` (``stopped``, ``length`` or ``aborted``) says how a completion ended: one that was cut off gets no
end-of-sequence token. Nothing is ever cut off here: rows of more than ``max_tokens`` are left out and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain import options
from posttrain.data.problems import Problems
from posttrain.data.read import read
from posttrain.data.rows import Rows, tokenise_rows, with_columns
from posttrain.errors import DataError
from posttrain.examples.columns import (
    clean,
    converted,
    explicit_prompt,
    find_reward,
    need,
    read_finishes,
    read_labels,
    read_numbers,
    read_steps,
    split_messages,
)
from posttrain.examples.encode import Encoded, Written, encode, ends_of, last_columns, step_ids, turn_ids
from posttrain.examples.given import Examples, Given, GivenExamples, with_mismatched


def demonstrations(
    data: options.Data,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    reward: float = 1.0,
    max_tokens: int | None = None,
) -> Examples:
    """Completions to imitate, one a group: columns ``prompt`` and ``completion``, or ``messages``.

    Of ``messages``, those before the assistant's first are the prompt, and all of the assistant's are learned.

    Args:
        reward: what each of them is worth.
        max_tokens: prompt plus completion; longer rows are left out and counted.

    Raises:
        DataError: naming file, row and column of all that does not fit.
    """
    source = with_columns(read(data, base), data.columns)
    if "messages" in source.rows.column_names and "completion" not in source.rows.column_names:
        source = converted(source, split_messages)
    rows = tokenise_rows(source, data, tokenizer)
    groups = [[replace(given, reward=reward)] for given in _completions(rows, data, tokenizer)]
    return _examples(rows, groups, tokenizer, max_tokens)


def rated(
    data: options.Data,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    reward: str | None = None,
    group: str | None = None,
    mismatched: bool = False,
    max_tokens: int | None = None,
) -> Examples:
    """Completions with a number or a verdict each: columns ``prompt``, ``completion`` and a rating.

    The rating is a number, or true or false; TRL's unpaired preferences (``label``) fit as they are.

    Args:
        reward: column of the rating. Default: ``reward``, ``score`` or ``label``, whichever is there.
        group: column whose equal values make a group, such as ``prompt``. Default: every row is one.
        mismatched: adds a completion of another prompt to each group, which is never trained on: for the baseline of
            that name.
        max_tokens: prompt plus completion; longer rows are left out and counted.

    Raises:
        DataError: naming file, row and column of all that does not fit.
    """
    rows = tokenise_rows(with_columns(read(data, base), data.columns), data, tokenizer)
    name = reward or find_reward(rows)
    rewards = read_numbers(rows, name)
    given = [replace(each, reward=r) for each, r in zip(_completions(rows, data, tokenizer), rewards, strict=True)]
    if group is not None:
        need(rows, (group,))
    keys = [each.row if group is None else _key(rows[each.row][group]) for each in given]
    examples = _examples(rows, _grouped(given, keys), tokenizer, max_tokens, whole=False)
    if mismatched:
        examples = replace(examples, groups=with_mismatched(examples.groups, max_tokens, rows.source.name))
    return examples


def stepwise(
    data: options.Data,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    separator: str = "\n",
    max_tokens: int | None = None,
) -> Examples:
    """Solutions with a label a step: TRL's stepwise supervision, columns ``prompt``, ``completions`` and ``labels``.

    The label (a number, true or false, null where it is not known) becomes ``step_reward`` at the step's last token,
    NaN for null. The reward is that of the column ``reward`` if there is one, or else the last label that is known.
    The end-of-sequence token belongs to the last step.

    Args:
        separator: stands after each step but the last, and belongs to it.
        max_tokens: prompt plus completion; longer rows are left out and counted.

    Raises:
        DataError: naming file, row and column of all that does not fit.
    """
    rows = tokenise_rows(with_columns(read(data, base), data.columns), data, tokenizer)
    need(rows, ("completions", "labels"))
    labels, pieces = read_labels(rows), read_steps(rows, separator)
    finishes = read_finishes(rows)
    texts = ["".join(texts) for texts in pieces]
    written = [Written(i, text, f, "completions") for i, (text, f) in enumerate(zip(texts, finishes, strict=True))]
    encoded = encode(rows, written, tokenizer, data.template)
    rewards = read_numbers(rows, "reward") if "reward" in rows.columns else [_last_known(values) for values in labels]
    problems, groups = Problems(), []
    for i, each in enumerate(encoded):
        try:
            steps = step_ids(each, ends_of(pieces[i]))
        except ValueError as error:
            problems.add(rows.place(i), f"column 'completions': {error}; try another `separator`")
            continue
        step_reward = np.zeros(len(each.tokens), np.float32)
        step_reward[last_columns(steps)] = labels[i]
        groups.append([Given(each.tokens, each.mask, i, finishes[i], rewards[i], steps, step_reward)])
    problems.raise_if_any()
    return _examples(rows, groups, tokenizer, max_tokens)


def pairs(
    data: options.Data,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    scores: tuple[str, str] | None = None,
    max_tokens: int | None = None,
) -> Examples:
    """Preferences: columns ``chosen`` and ``rejected``, and ``prompt`` unless both begin with it, as in TRL's format.

    A group has two completions: the chosen one with reward 1, then the rejected one with reward 0. Further columns,
    such as a margin, stay in ``batch.rows``.

    Args:
        scores: columns with the ratings of the chosen and of the rejected one, to be their rewards in place of 1 and 0.
            Where they are equal, or the other way round, a loss goes by them.
        max_tokens: prompt plus completion; pairs with a longer one are left out and counted.

    Raises:
        DataError: naming file, row and column of all that does not fit.
    """
    source = with_columns(read(data, base), data.columns)
    need(source, ("chosen", "rejected"))
    rows = tokenise_rows(converted(source, explicit_prompt), data, tokenizer)
    sides = []
    for i, side in enumerate(("chosen", "rejected")):
        rewards = [1.0 - i] * len(rows) if scores is None else read_numbers(rows, scores[i])
        encoded = _completions(rows, data, tokenizer, column=side)
        sides.append([replace(given, reward=reward) for given, reward in zip(encoded, rewards, strict=True)])
    return _examples(rows, list(zip(*sides, strict=True)), tokenizer, max_tokens)


def _completions(
    rows: Rows, data: options.Data, tokenizer: PreTrainedTokenizerBase, column: str = "completion"
) -> Iterator[Given]:
    """A column's completions, encoded, in the order of the rows."""
    need(rows, (column,))
    finishes = read_finishes(rows)
    written = [Written(i, clean(rows[i][column]), finishes[i], column) for i in range(len(rows))]
    for i, each in enumerate(encode(rows, written, tokenizer, data.template)):
        yield Given(each.tokens, each.mask, i, finishes[i], step_id=_turns(each))


def _last_known(labels: Sequence[float]) -> float:
    return next((label for label in reversed(labels) if not math.isnan(label)), math.nan)


def _turns(encoded: Encoded) -> np.ndarray | None:
    return turn_ids(encoded.mask) if encoded.starts is None else None


def _examples(
    rows: Rows,
    groups: Sequence[Sequence[Given]],
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    whole: bool = True,
) -> GivenExamples:
    """The groups without completions that are too long: with ``whole``, without each group that has one."""
    kept = groups
    if longest is not None:
        fitting = [[given for given in group if len(given) <= longest] for group in groups]
        kept = [new for new, old in zip(fitting, groups, strict=True) if (len(new) == len(old) if whole else new)]
    if not kept:
        shortest = min(len(given) for group in groups for given in group)
        raise DataError(
            f"{rows.source.name}: every row has more than {longest} tokens (`max_tokens`); the shortest has {shortest}"
        )
    dropped = len({g.row for group in groups for g in group} - {g.row for group in kept for g in group})
    return GivenExamples(
        groups=kept,
        columns=rows.__getitem__,
        place_of=rows.place,
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        left_out=rows.left_out + dropped,
    )


def _grouped(given: Sequence[Given], keys: Sequence[Hashable]) -> list[list[Given]]:
    groups: dict[Hashable, list[Given]] = {}
    for each, key in zip(given, keys, strict=True):
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _key(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else json.dumps(value, sort_keys=True, default=str)
