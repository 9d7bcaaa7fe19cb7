"""Examples of rated completions, of solutions rated step by step, and of demonstrations, from the rows of a dataset.

``prompt`` and completions are text or lists of messages. A text completion counts as the policy's own words after the
prompt and gets the end-of-sequence token; messages go through the chat template. An optional column
``finish`` (``stopped``, ``length`` or ``aborted``) says how a completion ended: one that was cut off gets no
end-of-sequence token. Rows of more than ``max_tokens`` are left out or cut, as ``too_long`` says, and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.data.examples.build import GroupOptions, completions, make_examples
from posttrain.data.examples.columns import (
    converted,
    find_reward,
    need,
    read_finishes,
    read_labels,
    read_numbers,
    read_steps,
    split_messages,
)
from posttrain.data.examples.dataset_examples import EncodedCompletion, Examples
from posttrain.data.examples.encode import RawCompletion, encode, ends_of, last_columns, step_ids
from posttrain.data.examples.groups import Into, TooLong, grouped
from posttrain.data.problems import Problems
from posttrain.data.rows import Rows, read_columns, tokenise_rows
from posttrain.option_types import facts
from posttrain.recipe import sections


def demonstrations(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    reward: float = 1.0,
    max_tokens: int | None = None,
    too_long: TooLong = "leave_out",
) -> Examples:
    """Reads completions to imitate, one a group: columns ``prompt`` and ``completion``, or ``messages``.

    The ``messages`` before the assistant's first one are the prompt; all messages of the assistant are learned.

    Args:
        reward: reward of each completion.
        max_tokens: most tokens of prompt plus completion; longer rows are treated by ``too_long``, and counted.
        too_long: ``leave_out`` the row, ``cut_prompt`` at its beginning, or ``cut_completion`` at its end.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    source = read_columns(data, base)
    if "messages" in source.rows.column_names and "completion" not in source.rows.column_names:
        source = converted(source, split_messages)
    rows = tokenise_rows(source, data, tokenizer)
    groups = [[replace(completion, reward=reward)] for completion in completions(rows, tokenizer)]
    return make_examples(rows, groups, tokenizer, GroupOptions(max_tokens=max_tokens, too_long=too_long))


@facts(gives_mismatched=lambda options: options["mismatched"])
def rated(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    reward: str | None = None,
    group: str | None = None,
    into: Into = "groups",
    mismatched: bool = False,
    max_tokens: int | None = None,
    too_long: TooLong = "leave_out",
) -> Examples:
    """Reads rated completions: columns ``prompt``, ``completion`` and a rating.

    The rating is a number, or true or false. TRL's unpaired preferences (``label``) need no change.

    Args:
        reward: column of the rating. Default: ``reward``, ``score`` or ``label``, whichever is there.
        group: column whose equal values make a group, such as ``prompt``. Default: every row is a group.
        into: with ``group``, ``pairs``: a pair for each two completions of a group with different ratings;
            ``best_and_worst``: one pair a group.
        mismatched: add a completion of another prompt to each group, for the baseline of that name. It is never trained
            on.
        max_tokens: most tokens of prompt plus completion; longer rows are treated by ``too_long``, and counted.
        too_long: ``leave_out`` the completion; ``cut_prompt`` at its beginning, for the whole group; ``cut_completion``
            at its end, but never so that completions of a group become the same.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    rows = tokenise_rows(read_columns(data, base), data, tokenizer)
    name = reward or find_reward(rows)
    rewards = read_numbers(rows, name)
    with_rewards = [
        replace(completion, reward=number)
        for completion, number in zip(completions(rows, tokenizer), rewards, strict=True)
    ]
    if group is not None:
        need(rows, (group,))
        _check_groups(rows, group)
    keys = [c.row if group is None else _key(rows[c.row][group]) for c in with_rewards]
    whole = into != "groups"
    options = GroupOptions(max_tokens=max_tokens, too_long=too_long, into=into, whole=whole, mismatched=mismatched)
    return make_examples(rows, grouped(with_rewards, keys), tokenizer, options)


def stepwise(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    separator: str = "\n",
    max_tokens: int | None = None,
) -> Examples:
    """Reads solutions with a label for each step: TRL's columns ``prompt``, ``completions`` and ``labels``.

    The label (a number, true or false, null if it is not known) becomes ``step_reward`` at the step's last token,
    NaN for null. The reward is that of the column ``reward`` if there is one, or else the last label that is known.
    The end-of-sequence token belongs to the last step.

    Args:
        separator: text after each step but the last; it belongs to the step before it.
        max_tokens: most tokens of prompt plus completion; longer rows are left out and counted.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    rows = tokenise_rows(read_columns(data, base), data, tokenizer)
    need(rows, ("completions", "labels"))
    labels, pieces = read_labels(rows), read_steps(rows, separator)
    finishes = read_finishes(rows)
    texts = ["".join(texts) for texts in pieces]
    raw = [RawCompletion(i, text, f, "completions") for i, (text, f) in enumerate(zip(texts, finishes, strict=True))]
    encoded = encode(rows, raw, tokenizer)
    rewards = read_numbers(rows, "reward") if "reward" in rows.columns else [_last_known(values) for values in labels]
    problems, groups = Problems(), []
    for i, solution in enumerate(encoded):
        try:
            steps = step_ids(solution, ends_of(pieces[i]))
        except ValueError as error:
            problems.add(rows.place(i), f"column 'completions': {error}; try another `separator`")
            continue
        step_reward = np.zeros(len(solution.tokens), np.float32)
        step_reward[last_columns(steps)] = labels[i]
        groups.append(
            [EncodedCompletion(solution.tokens, solution.mask, i, finishes[i], rewards[i], steps, step_reward)]
        )
    problems.raise_if_any()
    return make_examples(rows, groups, tokenizer, GroupOptions(max_tokens=max_tokens))


def _last_known(labels: Sequence[float]) -> float:
    return next((label for label in reversed(labels) if not math.isnan(label)), math.nan)


def _check_groups(rows: Rows, group: str) -> None:
    """Refuses rows without a key: they would be a group of different prompts."""
    problems = Problems()
    for index, key in enumerate(rows.values(group)):
        if key is None or (isinstance(key, float) and math.isnan(key)):
            problem = "by which completions are grouped, is missing or null: give each group a key"
            problems.add(rows.place(index), f"column {group!r}, {problem}")
    problems.raise_if_any()


def _key(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else json.dumps(value, sort_keys=True, default=str)
