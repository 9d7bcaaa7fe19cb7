"""Makes an Arrow table of Python rows; an error names the first row that does not fit its column.

Arrow gives all objects of a column the same keys, and fills in null where one lacks a key. Columns with objects are
therefore kept as JSON text, so that they read back as they were written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from posttrain.data.problems import Problems, shown

CHUNK = 10_000  # rows converted at a time: Python objects take ten times the memory of Arrow's
ARROW_ERRORS = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def to_table(
    make_rows: Callable[[], Iterable[dict[str, Any]]], place: Callable[[int], str]
) -> tuple[pa.Table, frozenset[str]]:
    """Puts all rows into one table; a key that a row lacks is null there.

    Args:
        make_rows: function that yields the rows from the start; called again to find the row of an error.
        place: function that names the row of an index.

    Returns:
        The table, and the names of the columns that it keeps as JSON text, because their values contain objects.

    Raises:
        DataError: if the values of a column have different types; the message names the first row that does not fit.
    """
    chunks, rows = [], iter(make_rows())
    try:
        while chunk := list(islice(rows, CHUNK)):
            columns = {name: [row.get(name) for row in chunk] for name in _names(chunk)}
            texts = {name: text for name, values in columns.items() if (text := _as_json(values)) is not None}
            chunks.append((pa.table({**columns, **texts}), frozenset(texts)))
        return _together(chunks)
    except ARROW_ERRORS as error:
        problems = Problems()
        everything = list(make_rows())
        for name in _names(everything):
            _explain(name, [row.get(name) for row in everything], place, problems)
        problems.raise_if_any()
        raise error


def _as_json(values: Sequence[Any]) -> list[str | None] | None:
    """The values as JSON texts, if they are all objects or all lists, and objects are among them; else None."""
    kinds = {type(value) for value in values if value is not None}
    if kinds not in ({list}, {dict}) or not any(map(_has_object, values)):
        return None
    try:
        return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    except TypeError:  # dates or bytes, which Arrow can hold
        return None


def _has_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_object, value)))


def _together(chunks: Sequence[tuple[pa.Table, frozenset[str]]]) -> tuple[pa.Table, frozenset[str]]:
    """Joins the tables of all chunks; a column that is JSON text in one of them becomes it in all."""
    objects = frozenset[str]().union(*(texts for _, texts in chunks))
    tables = []
    for table, texts in chunks:
        for name in (objects - texts) & set(table.column_names):
            values = table[name].to_pylist()
            if any(value is not None and not isinstance(value, list) for value in values):
                raise pa.ArrowInvalid("values of several types")
            text = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
            table = table.set_column(table.column_names.index(name), name, text)
        tables.append(table)
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({}), objects


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _explain(name: str, values: list[Any], place: Callable[[int], str], problems: Problems) -> None:
    """Adds the first row that keeps a column from being one Arrow array, found by bisection, to the problems."""
    if _fits(values):
        return
    low, high = 0, len(values)  # values[:low] fits, values[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(values[:middle]) else (low, middle)
    bad = high - 1
    first = next((i for i, value in enumerate(values) if value is not None), bad)
    wrong = f"column {name!r} is {shown(values[bad])}"
    if has_half_surrogate(values[bad]):
        problem = (
            "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: write the whole character"
        )
        problems.add(place(bad), f"column {name!r} {problem}")
        return
    if first == bad:
        problems.add(place(bad), f"{wrong}: a dataset cannot hold that; use text, numbers, lists and objects of them")
    else:
        problems.add(place(bad), f"{wrong}, but {shown(values[first])} at {place(first)}: use one type for all rows")


def has_half_surrogate(value: Any) -> bool:
    """True if a text, or one in a list or an object, has half of a surrogate pair, which is no character."""
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(map(has_half_surrogate, (*value, *value.values())))
    return isinstance(value, list) and any(map(has_half_surrogate, value))


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(_as_json(values) or values)
    except ARROW_ERRORS:
        return False
    return True
