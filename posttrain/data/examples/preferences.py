"""Examples of preferences from the rows of a dataset: pairs, lists, and judgements of several annotators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from posttrain.data.examples.build import GroupOptions, completions, make_examples, without_reward
from posttrain.data.examples.columns import (
    converted,
    explicit_prompt,
    need,
    read_answers,
    read_finishes,
    read_number_lists,
    read_numbers,
)
from posttrain.data.examples.dataset_examples import Examples
from posttrain.data.examples.encode import RawCompletion, encode
from posttrain.data.examples.groups import Group, Into, Judged, TooLong, merge_annotators, repeat_votes, soften_votes
from posttrain.data.rows import read_columns, tokenise_rows
from posttrain.errors import DataError
from posttrain.option_types import facts
from posttrain.recipe import sections


@facts(gives_mismatched=lambda options: options["mismatched"])
def pairs(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    scores: tuple[str, str] | None = None,
    annotator: str | None = None,
    votes: str | None = None,
    per_annotator: Literal["soft", "each"] = "soft",
    into: Into = "groups",
    mismatched: bool = False,
    max_tokens: int | None = None,
    too_long: TooLong = "leave_out",
) -> Examples:
    """Reads pairs: columns ``chosen`` and ``rejected``, and ``prompt`` unless both begin with it, as in TRL's format.

    A group has two completions: the chosen one with reward 1, then the rejected one with reward 0. Further columns,
    such as a margin, stay in ``batch.rows``. Pairs whose sides are equal are left out and counted.

    Args:
        scores: columns with the ratings of the chosen and of the rejected one, which become their rewards in place of 1
            and 0. A loss follows these ratings, even if they are equal or prefer the rejected one.
        annotator: column that names the annotator, if several rows may be about the same two completions. With
            ``per_annotator: soft`` these are one pair with the column ``probability``: the share that prefers the
            chosen one.
        votes: column with a list of the votes of several annotators on a row's pair: 1 for chosen, 0 for rejected, or a
            probability; or true and false.
        per_annotator: ``soft``: one pair with the column ``probability``, for the target of that name; ``each``: one
            pair for each annotator.
        into: ``single``: each completion is a group of its own, like an unpaired preference.
        mismatched: as in ``rated``; with ``into: single``.
        max_tokens: most tokens of prompt plus completion; longer rows are treated by ``too_long``, and counted.
        too_long: ``leave_out`` the pair; ``cut_prompt`` at its beginning, equally for both sides; ``cut_completion`` at
            its end, but never so that both sides are the same.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    if mismatched and into != "single":
        raise DataError("examples: `mismatched` is for completions without a partner: set `into: single`")
    source = read_columns(data, base)
    need(source, ("chosen", "rejected", *(name for name in (annotator, votes) if name)))
    rows = tokenise_rows(converted(source, explicit_prompt), data, tokenizer)
    sides = []
    for i, side in enumerate(("chosen", "rejected")):
        rewards = [1.0 - i] * len(rows) if scores is None else read_numbers(rows, scores[i])
        encoded = completions(rows, tokenizer, side)
        sides.append([replace(completion, reward=reward) for completion, reward in zip(encoded, rewards, strict=True)])
    lists = read_number_lists(rows, votes, within=(0.0, 1.0)) if votes is not None else None
    votes_of = lists.__getitem__ if lists else None
    judged = by_annotators(list(zip(*sides, strict=True)), annotator, votes_of, per_annotator)
    options = GroupOptions(
        max_tokens=max_tokens,
        too_long=too_long,
        into=into,
        distinct=True,
        mismatched=mismatched,
        columns=judged.columns,
    )
    return make_examples(rows, judged.groups, tokenizer, options)


@facts(gives_mismatched=lambda options: options["mismatched"])
def lists(
    data: sections.DataSection,
    tokenizer: PreTrainedTokenizerBase,
    base: Path | None,
    *,
    scores: str = "scores",
    into: Into = "groups",
    mismatched: bool = False,
    max_tokens: int | None = None,
    too_long: TooLong = "leave_out",
) -> Examples:
    """Reads lists of rated completions: columns ``prompt``, ``completions`` and ``scores`` (a list of numbers).

    A group has the completions of a row, with their scores as rewards; a score of null is unknown.

    Args:
        scores: column of the ratings.
        into: ``pairs``: a pair for each two completions with different scores; ``best_and_worst``: one pair a row;
            ``single``: each completion is a group of its own.
        mismatched: as in ``rated``; with ``into: single``.
        max_tokens: most tokens of prompt plus completion; longer rows are treated by ``too_long``, and counted.
        too_long: as in ``pairs``, for all completions of a group.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    if mismatched and into != "single":
        raise DataError("examples: `mismatched` is for completions without a partner: set `into: single`")
    rows = tokenise_rows(read_columns(data, base), data, tokenizer)
    need(rows, ("completions", scores))
    answers, finishes = read_answers(rows), read_finishes(rows)
    rewards = read_number_lists(rows, scores, lengths=[len(row_answers) for row_answers in answers], null=True)
    raw = [
        RawCompletion(i, answer, finishes[i], "completions")
        for i, row_answers in enumerate(answers)
        for answer in row_answers
    ]
    encoded = iter(zip(raw, encode(rows, raw, tokenizer), strict=True))
    groups: list[Group] = [
        [replace(without_reward(*next(encoded)), reward=reward) for reward in row_rewards] for row_rewards in rewards
    ]
    options = GroupOptions(
        max_tokens=max_tokens,
        too_long=too_long,
        into=into,
        whole=into != "groups",
        distinct=True,
        mismatched=mismatched,
    )
    return make_examples(rows, groups, tokenizer, options)


def by_annotators(
    groups: Sequence[Group],
    annotator: str | None,
    votes: Callable[[int], Sequence[float]] | None,
    per_annotator: Literal["soft", "each"],
) -> Judged:
    """Applies the annotators' judgements to pairs: merged into one pair, or one pair for each annotator."""
    if votes is not None:
        return Judged(repeat_votes(groups, votes), {}) if per_annotator == "each" else soften_votes(groups, votes)
    if annotator is not None and per_annotator == "soft":
        return merge_annotators(groups)
    return Judged(list(groups), {})
