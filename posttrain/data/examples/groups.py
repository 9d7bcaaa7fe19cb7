"""Pure functions of groups of dataset completions: change their kind, shorten them, merge annotators.

A pair is a group of two, a list a larger one, and an unpaired preference a group of one; ``reward`` is the label.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from posttrain.batch import Finish
from posttrain.data.examples.dataset_examples import EncodedCompletion, prompt_tokens

Group = Sequence[EncodedCompletion]
Into = Literal["groups", "pairs", "best_and_worst", "single"]
"""Kind of group. groups: unchanged. pairs: one for each two completions of different reward. best_and_worst: one for
the best and the worst completion. single: one for each completion."""

TooLong = Literal["leave_out", "cut_prompt", "cut_completion"]
"""Treatment of a group with too many tokens. ``cut_prompt`` removes the beginning of the prompt, equally in the whole
group. ``cut_completion`` removes the end of a completion, which then counts as unfinished, unless nothing would be left
of it, or of the difference between the completions of the group."""


class Fitted(NamedTuple):
    """Groups without completions that are too long, and the rows that were cut or left out."""

    groups: list[Group]
    cut: list[int]
    too_long: list[int]
    indistinct: list[int]  # rows of groups whose completions would be the same after the cut


def grouped(completions: Sequence[EncodedCompletion], keys: Sequence[Hashable]) -> list[list[EncodedCompletion]]:
    """Makes a group of the completions of each key."""
    groups: dict[Hashable, list[EncodedCompletion]] = {}
    for completion, key in zip(completions, keys, strict=True):
        groups.setdefault(key, []).append(completion)
    return list(groups.values())


def convert(groups: Iterable[Group], into: Into) -> tuple[list[Group], list[int]]:
    """Converts groups to another kind; also returns the rows of groups without a pair of different rewards."""
    if into == "groups":
        return list(groups), []
    if into == "single":
        return [[completion] for group in groups for completion in group], []
    converted, unpaired = [], []
    for group in groups:
        pairs = pairs_of(group) if into == "pairs" else pairs_of(group)[:1]
        converted += pairs
        unpaired += [] if pairs else [completion.row for completion in group]
    return converted, unpaired


def pairs_of(group: Group) -> list[Group]:
    """Pairs of different completions of different reward, the better one first; the largest difference comes first."""
    both = [sorted(two, key=lambda completion: -completion.reward) for two in combinations(group, 2)]
    differing = [two for two in both if two[0].reward > two[1].reward and len(_texts(two)) > 1]
    return sorted(differing, key=lambda two: two[1].reward - two[0].reward)


def distinct(groups: Iterable[Group]) -> tuple[list[Group], list[int]]:
    """Separates groups whose completions differ from the rows of groups whose completions are all the same."""
    differing, alike = [], []
    for group in groups:
        if len(group) > 1 and len(_texts(group)) == 1:
            alike += [completion.row for completion in group]
        else:
            differing.append(group)
    return differing, alike


def fit(groups: Iterable[Group], longest: int | None, too_long: TooLong, *, whole: bool = True) -> Fitted:
    """Cuts or leaves out completions of more than ``longest`` tokens, prompt included.

    Args:
        whole: a completion that is left out takes its group with it.
    """
    fitted = Fitted([], [], [], [])
    for group in groups:
        long = [completion for completion in group if longest is not None and len(completion) > longest]
        if longest is None or not long:
            fitted.groups.append(group)
        elif too_long == "leave_out":
            fitted.too_long.extend(completion.row for completion in long)
            rest = [] if whole else [completion for completion in group if len(completion) <= longest]
            fitted.groups.extend([rest] if rest else [])
        else:
            _cut(fitted, group, longest, too_long)
    return fitted


def _cut(fitted: Fitted, group: Group, longest: int, too_long: TooLong) -> None:
    rows = [completion.row for completion in group]
    cut = cut_prompts(group, longest) if too_long == "cut_prompt" else cut_completions(group, longest)
    if cut is None:
        fitted.too_long.extend(rows)
    elif len(_texts(cut)) < len(_texts(group)):
        fitted.indistinct.extend(rows)
    else:
        fitted.groups.append(cut)
        fitted.cut.extend(rows)


def cut_prompts(group: Group, longest: int) -> list[EncodedCompletion] | None:
    """Cuts the beginning of the prompt, equally in the whole group; None if nothing of the prompt would be left."""
    excess = max(len(completion) for completion in group) - longest
    if any(prompt_tokens(completion) <= excess for completion in group):
        return None
    return [_sliced(completion, slice(excess, None)) for completion in group]


def cut_completions(group: Group, longest: int) -> list[EncodedCompletion] | None:
    """Cuts the ends of completions that are too long; None if nothing of one would be left."""
    if any(prompt_tokens(completion) >= longest for completion in group):
        return None
    return [
        _sliced(completion, slice(longest), Finish.LENGTH) if len(completion) > longest else completion
        for completion in group
    ]


def _sliced(completion: EncodedCompletion, part: slice, finish: Finish | None = None) -> EncodedCompletion:
    return replace(
        completion,
        tokens=completion.tokens[part],
        mask=completion.mask[part],
        step_id=None if completion.step_id is None else completion.step_id[part],
        step_reward=None if completion.step_reward is None else completion.step_reward[part],
        finish=completion.finish if finish is None else finish,
    )


def _texts(group: Group) -> set[bytes]:
    return {completion.tokens.tobytes() + completion.mask.tobytes() for completion in group}


# ------------------------------------------------------------------------------------------------------- annotators


class Judged(NamedTuple):
    """Pairs with the judgement of their annotators."""

    groups: list[Group]
    columns: dict[int, dict[str, float]]  # further columns of a row


def merge_annotators(pairs: Iterable[Group]) -> Judged:
    """Merges pairs of the same two completions, in either order, into one with the column ``probability``.

    ``probability`` is the share of the pairs that agree with the merged one on the chosen completion, so at least ½;
    the target ``soft`` reads it. The column ``annotators`` is the number of pairs that were merged.
    """
    groups, columns = [], {}
    for first, *rest in grouped_pairs(pairs):
        votes = [1.0, *(float(_texts(pair[:1]) == _texts(first[:1])) for pair in rest)]
        groups.append(_majority(first, float(np.mean(votes)), columns, len(votes)))
    return Judged(groups, columns)


def soften_votes(pairs: Iterable[Group], votes: Callable[[int], Sequence[float]]) -> Judged:
    """Adds the column ``probability``: the mean of the votes of the pair's row, 1 for the chosen completion."""
    groups, columns = [], {}
    for pair in pairs:
        row_votes = votes(pair[0].row)
        groups.append(_majority(pair, float(np.mean(row_votes)), columns, len(row_votes)))
    return Judged(groups, columns)


def repeat_votes(pairs: Iterable[Group], votes: Callable[[int], Sequence[float]]) -> list[Group]:
    """Makes a pair for each vote, with the completion it prefers as the chosen one; none for a vote of ½."""
    return [
        pair if vote > 0.5 else _swapped(pair) for pair in pairs for vote in votes(pair[0].row) if float(vote) != 0.5
    ]


def grouped_pairs(pairs: Iterable[Group]) -> list[list[Group]]:
    """Puts pairs of the same two completions together, in either order."""
    by_texts: dict[Hashable, list[Group]] = {}
    for pair in pairs:
        by_texts.setdefault(frozenset(_texts(pair)), []).append(pair)
    return list(by_texts.values())


def _majority(pair: Group, share: float, columns: dict[int, dict[str, float]], count: int) -> Group:
    """Puts the completion that most annotators prefer first, and notes their share in ``columns``."""
    columns[pair[0].row] = {"probability": max(share, 1 - share), "annotators": float(count)}
    return pair if share >= 0.5 else _swapped(pair)


def _swapped(pair: Group) -> Group:
    first, second = pair
    return [replace(second, reward=first.reward), replace(first, reward=second.reward)]
