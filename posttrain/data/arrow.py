"""Makes an Arrow table of Python rows; an error names the first row that does not fit its column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from posttrain.data.problems import Problems, shown

CHUNK = 10_000  # rows converted at a time: Python objects take ten times the memory of Arrow's
ARROW_ERRORS = (pa.ArrowException, OverflowError)


def to_table(make_rows: Callable[[], Iterable[dict[str, Any]]], place: Callable[[int], str]) -> pa.Table:
    """Puts all rows into one table; a key that a row lacks is null there.

    Args:
        make_rows: function that yields the rows from the start; called again to find the row of an error.
        place: function that names the row of an index.

    Raises:
        DataError: if the values of a column have different types; the message names the first row that does not fit.
    """
    tables, rows = [], iter(make_rows())
    try:
        while chunk := list(islice(rows, CHUNK)):
            tables.append(pa.table({name: [row.get(name) for row in chunk] for name in _names(chunk)}))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    except ARROW_ERRORS as error:
        problems = Problems()
        everything = list(make_rows())
        for name in _names(everything):
            _explain(name, [row.get(name) for row in everything], place, problems)
        problems.raise_if_any()
        raise error


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
    if first == bad:
        problems.add(place(bad), f"{wrong}: a dataset cannot hold that; use text, numbers, lists and objects of them")
    else:
        problems.add(place(bad), f"{wrong}, but {shown(values[first])} at {place(first)}: use one type for all rows")


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except ARROW_ERRORS:
        return False
    return True
