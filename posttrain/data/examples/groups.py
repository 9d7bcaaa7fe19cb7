"""Groups of given completions: from one kind to another, and made to fit. Pure functions.

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
"""What groups become: as they are; a group for each two completions of different reward; one for the best and the worst
completion; one for each completion."""

TooLong = Literal["leave_out", "cut_prompt", "cut_completion"]
"""What becomes of a group with too many tokens. ``cut_prompt`` takes the beginning of the prompt away, from all of the
group alike; ``cut_completion`` the end of a completion, which then counts as unfinished, unless nothing would be left
of it, or of what tells the completions of the group apart."""


class Fitted(NamedTuple):
    """Groups of at most so many tokens, and the rows of those that were cut or left out."""

    groups: list[Group]
    cut: list[int]
    too_long: list[int]
    indistinct: list[int]  # would be alike if they were cut


def grouped(given: Sequence[EncodedCompletion], keys: Sequence[Hashable]) -> list[list[EncodedCompletion]]:
    """Completions of equal keys together."""
    groups: dict[Hashable, list[EncodedCompletion]] = {}
    for each, key in zip(given, keys, strict=True):
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def convert(groups: Iterable[Group], into: Into) -> tuple[list[Group], list[int]]:
    """Groups of another kind, and the rows of those that cannot be it: without two different rewards, no pair."""
    if into == "groups":
        return list(groups), []
    if into == "single":
        return [[given] for group in groups for given in group], []
    made, unpaired = [], []
    for group in groups:
        found = pairs_of(group) if into == "pairs" else pairs_of(group)[:1]
        made += found
        unpaired += [] if found else [given.row for given in group]
    return made, unpaired


def pairs_of(group: Group) -> list[Group]:
    """Each two completions of different reward, the better one first; those that are furthest apart come first."""
    both = [sorted(two, key=lambda given: -given.reward) for two in combinations(group, 2)]
    differing = [two for two in both if two[0].reward > two[1].reward]
    return sorted(differing, key=lambda two: two[1].reward - two[0].reward)


def distinct(groups: Iterable[Group]) -> tuple[list[Group], list[int]]:
    """Groups whose completions are not all the same, and the rows of the others."""
    kept, alike = [], []
    for group in groups:
        if len(group) > 1 and len(_texts(group)) == 1:
            alike += [given.row for given in group]
        else:
            kept.append(group)
    return kept, alike


def fit(groups: Iterable[Group], longest: int | None, too_long: TooLong, *, whole: bool = True) -> Fitted:
    """Groups without completions of more than ``longest`` tokens, prompt included.

    Args:
        whole: a completion that is left out takes its group with it.
    """
    fitted = Fitted([], [], [], [])
    for group in groups:
        long = [given for given in group if longest is not None and len(given) > longest]
        if longest is None or not long:
            fitted.groups.append(group)
        elif too_long == "leave_out":
            fitted.too_long.extend(given.row for given in long)
            rest = [] if whole else [given for given in group if len(given) <= longest]
            fitted.groups.extend([rest] if rest else [])
        else:
            _cut(fitted, group, longest, too_long)
    return fitted


def _cut(fitted: Fitted, group: Group, longest: int, too_long: TooLong) -> None:
    rows = [given.row for given in group]
    cut = cut_prompts(group, longest) if too_long == "cut_prompt" else cut_completions(group, longest)
    if cut is None:
        fitted.too_long.extend(rows)
    elif len(_texts(cut)) < len(_texts(group)):
        fitted.indistinct.extend(rows)
    else:
        fitted.groups.append(cut)
        fitted.cut.extend(rows)


def cut_prompts(group: Group, longest: int) -> list[EncodedCompletion] | None:
    """The group without the beginning of its prompt; None where nothing of the prompt would be left."""
    excess = max(len(given) for given in group) - longest
    if any(prompt_tokens(given) <= excess for given in group):
        return None
    return [_sliced(given, slice(excess, None)) for given in group]


def cut_completions(group: Group, longest: int) -> list[EncodedCompletion] | None:
    """The group without the ends of its longer completions; None where nothing of one would be left."""
    if any(prompt_tokens(given) >= longest for given in group):
        return None
    return [_sliced(given, slice(longest), Finish.LENGTH) if len(given) > longest else given for given in group]


def _sliced(given: EncodedCompletion, part: slice, finish: Finish | None = None) -> EncodedCompletion:
    steps = (None if array is None else array[part] for array in (given.step_id, given.step_reward))
    step_id, step_reward = steps
    cut = replace(given, tokens=given.tokens[part], mask=given.mask[part], step_id=step_id, step_reward=step_reward)
    return cut if finish is None else replace(cut, finish=finish)


def _texts(group: Group) -> set[bytes]:
    return {given.tokens.tobytes() + given.mask.tobytes() for given in group}


# ------------------------------------------------------------------------------------------------------- annotators


class Judged(NamedTuple):
    """Pairs with what annotators said of them."""

    groups: list[Group]
    columns: dict[int, dict[str, float]]  # further columns of a row


def merge_annotators(pairs: Iterable[Group]) -> Judged:
    """Pairs of the same two completions, in either order, as one, with the column ``probability``.

    It is the share of the pairs in which the completion that is now the chosen one was it, so at least ½; the target
    ``soft`` reads it. The column ``annotators`` is how many pairs there were.
    """
    same = grouped_pairs(pairs)
    groups, columns = [], {}
    for first, *others in same:
        votes = [1.0, *(float(_texts(pair[:1]) == _texts(first[:1])) for pair in others)]
        groups.append(_majority(first, float(np.mean(votes)), columns, len(votes)))
    return Judged(groups, columns)


def soften_votes(pairs: Iterable[Group], votes: Callable[[int], Sequence[float]]) -> Judged:
    """Pairs with the column ``probability``: the mean of the votes of the pair's row, 1 for the chosen completion."""
    groups, columns = [], {}
    for pair in pairs:
        its = votes(pair[0].row)
        groups.append(_majority(pair, float(np.mean(its)), columns, len(its)))
    return Judged(groups, columns)


def repeat_votes(pairs: Iterable[Group], votes: Callable[[int], Sequence[float]]) -> list[Group]:
    """A pair for each vote, with the completion that it is for as the chosen one; none for a vote of ½."""
    return [
        pair if vote > 0.5 else _swapped(pair) for pair in pairs for vote in votes(pair[0].row) if float(vote) != 0.5
    ]


def grouped_pairs(pairs: Iterable[Group]) -> list[list[Group]]:
    """Pairs of the same two completions together, in either order."""
    found: dict[Hashable, list[Group]] = {}
    for pair in pairs:
        found.setdefault(frozenset(_texts(pair)), []).append(pair)
    return list(found.values())


def _majority(pair: Group, share: float, columns: dict[int, dict[str, float]], count: int) -> Group:
    """The pair with the completion in front that most prefer, and the share of those in ``columns``."""
    columns[pair[0].row] = {"probability": max(share, 1 - share), "annotators": float(count)}
    return pair if share >= 0.5 else _swapped(pair)


def _swapped(pair: Group) -> Group:
    first, second = pair
    return [replace(second, reward=first.reward), replace(first, reward=second.reward)]
