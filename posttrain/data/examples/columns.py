"""Reads and checks the columns of examples; errors name the file and row of everything that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trl.data_utils import extract_prompt

from posttrain.batch import Finish
from posttrain.data.problems import Problems, shown
from posttrain.data.raw_rows import RawRows
from posttrain.data.rows import Rows
from posttrain.errors import DataError
from posttrain.recipe.yaml_reader import suggestion

REWARD_COLUMNS = ("reward", "score", "label")


def need(rows: Rows | RawRows, names: Sequence[str]) -> None:
    """Checks that there are columns of these names.

    Raises:
        DataError: if one of the columns is missing.
    """
    source, present = (rows.source, rows.columns) if isinstance(rows, Rows) else (rows, rows.rows.column_names)
    problems = Problems()
    for name in names:
        if name not in present:
            copy = f"`columns: {{{name}: <column>}}` copies one"
            problems.add(source.name, f"no column {name!r}; {suggestion(name, present)}; {copy}")
    problems.raise_if_any()


def find_reward(rows: Rows) -> str:
    """Finds the one column whose name says that it is the rating.

    Raises:
        DataError: if there is none or several.
    """
    candidates = [name for name in REWARD_COLUMNS if name in rows.columns]
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(map(repr, candidates or rows.columns))
    if candidates:
        problem = f"several columns may be the rating ({names})"
    else:
        problem = f"none of the columns is a rating ({names})"
    raise DataError(f"{rows.source.name}: {problem}; name it: `examples: {{use: rated, reward: <column>}}`")


def read_numbers(rows: Rows, name: str) -> list[float]:
    """Reads a column of numbers, or of true and false."""
    need(rows, (name,))
    problems, numbers = Problems(), []
    for i, value in enumerate(rows.column(name).to_pylist()):
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            problems.add(rows.place(i), f"column {name!r} is {shown(value)}; it should be a number, or true or false")
        else:
            numbers.append(float(value))
    problems.raise_if_any()
    return numbers


def read_number_lists(
    rows: Rows,
    name: str,
    *,
    lengths: Sequence[int] | None = None,
    within: tuple[float, float] | None = None,
    null: bool = False,
) -> list[list[float]]:
    """Reads a column of lists of numbers, or of true and false; null becomes NaN.

    Args:
        lengths: number of numbers in each row, as in the column ``completions``. Default: at least one.
        within: smallest and largest number.
        null: allow null in the lists.
    """
    need(rows, (name,))
    problems, lists = Problems(), []
    low, high = within or (-math.inf, math.inf)
    for i, numbers in enumerate(rows.column(name).to_pylist()):
        if not isinstance(numbers, list) or not numbers:
            problems.add(rows.place(i), f"column {name!r} is {shown(numbers)}; it should be a list of numbers")
            continue
        if lengths is not None and len(numbers) != lengths[i]:
            problems.add(
                rows.place(i), f"column {name!r} has {len(numbers)} elements; there are {lengths[i]} in 'completions'"
            )
            continue
        wrong = [number for number in numbers if not _is_number(number, low, high) and not (null and number is None)]
        if wrong:
            between = "" if within is None else f" from {low:g} to {high:g}"
            problems.add(rows.place(i), f"column {name!r} holds {shown(wrong[0])}; each should be a number{between}")
            continue
        lists.append([math.nan if number is None else float(number) for number in numbers])
    problems.raise_if_any()
    return lists


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value) and low <= value <= high


def read_answers(rows: Rows) -> list[list[Any]]:
    """Reads the list of completions of each row; a completion is text or messages."""
    problems, lists = Problems(), []
    for i in range(len(rows)):
        answers = rows[i]["completions"]
        if not isinstance(answers, list) or not answers:
            problems.add(rows.place(i), f"column 'completions' is {shown(answers)}; it should be a list of completions")
        else:
            lists.append(answers)
    problems.raise_if_any()
    return lists


def read_finishes(rows: Rows) -> list[Finish]:
    """Reads the column ``finish``, which says how each completion ended; without the column all of them stopped."""
    if "finish" not in rows.columns:
        return [Finish.STOPPED] * len(rows)
    problems, finishes, names = Problems(), [], [finish.name.lower() for finish in Finish]
    for i, value in enumerate(rows.column("finish").to_pylist()):
        if value not in names:
            problems.add(rows.place(i), f"column 'finish' is {shown(value)}; {suggestion(value, names)}")
        else:
            finishes.append(Finish[value.upper()])
    problems.raise_if_any()
    return finishes


def read_steps(rows: Rows, separator: str) -> list[list[str]]:
    """Reads the steps of each solution; every step but the last gets the separator at its end."""
    problems, pieces = Problems(), []
    for i, steps in enumerate(rows.column("completions").to_pylist()):
        wrong = [step for step in steps or () if not isinstance(step, str) or not step]
        if not isinstance(steps, list) or not steps:
            problems.add(rows.place(i), f"column 'completions' is {shown(steps)}; it should be a list of steps")
        elif wrong:
            problems.add(rows.place(i), f"column 'completions' holds {shown(wrong[0])}; each step should be some text")
        else:
            pieces.append([step + separator for step in steps[:-1]] + steps[-1:])
    problems.raise_if_any()
    return pieces


def read_labels(rows: Rows) -> list[list[float]]:
    """Reads the labels of each solution as numbers; null becomes NaN."""
    problems, lists = Problems(), []
    steps = rows.column("completions").to_pylist()
    for i, labels in enumerate(rows.column("labels").to_pylist()):
        if not isinstance(labels, list) or len(labels) != len(steps[i] or ()):
            has = f"has {len(labels)} elements" if isinstance(labels, list) else f"is {shown(labels)}"
            problems.add(
                rows.place(i), f"column 'labels' {has}; there are {len(steps[i] or ())} steps in 'completions'"
            )
        elif wrong := [label for label in labels if not isinstance(label, bool | int | float | None)]:
            problems.add(rows.place(i), f"column 'labels' holds {shown(wrong[0])}; a label is a number, true or false")
        else:
            lists.append([float("nan") if label is None else float(label) for label in labels])
    problems.raise_if_any()
    return lists


def converted(source: RawRows, convert: Callable[[dict[str, Any]], dict[str, Any] | str]) -> RawRows:
    """Converts each row; for a row that does not fit, ``convert`` returns text that says what is wrong."""
    problems = Problems()
    for i, row in enumerate(source):
        if isinstance(problem := convert(row), str):
            problems.add(source.place(i), problem)
    problems.raise_if_any()
    return RawRows.of(partial(map, convert, source), source.place, source.name)  # type: ignore[arg-type]


def split_messages(row: dict[str, Any]) -> dict[str, Any] | str:
    """Splits ``messages`` into ``prompt`` and ``completion``, before the assistant's first message."""
    messages = row.pop("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return f"column 'messages' is {shown(messages)}; it should be a list of messages with role and content"
    first = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), None)
    if not first:
        return "column 'messages' " + (
            "begins with the assistant's" if first == 0 else "has no message of the assistant"
        )
    return {**row, "prompt": messages[:first], "completion": messages[first:]}


def explicit_prompt(row: dict[str, Any]) -> dict[str, Any] | str:
    """Adds the ``prompt`` to a preference that has it only as the common beginning of both sides."""
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        return f"columns 'chosen' and 'rejected' are {shown(chosen)} and {shown(rejected)}: both text, or both messages"
    prompt = row.get("prompt")
    whole_conversations = isinstance(chosen, list) and any(message.get("role") != "assistant" for message in chosen[:1])
    if prompt is not None and not whole_conversations:
        return {**row, "chosen": chosen, "rejected": rejected}
    return {**row, **extract_prompt({"chosen": chosen, "rejected": rejected})}
