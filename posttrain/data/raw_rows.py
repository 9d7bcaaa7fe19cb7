"""Rows of a dataset as they were read, before anything is rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from posttrain.data.arrow import to_table

BATCH = 1000  # number of rows that become Python objects at a time
CONVERSATIONS = frozenset(["prompt", "completion", "completions", "chosen", "rejected", "messages"])
"""Columns that may hold messages."""
FREE = frozenset(["tools", "chat_template_kwargs"])
"""Columns that the chat template reads beside messages; a null in them may have a meaning."""


@dataclass(frozen=True)
class RawRows:
    """Rows as they were read, with the names by which messages refer to them.

    Objects in JSON files and of generators read back as they were written. Those of Parquet files and of the hub have
    the same keys in all rows, with null where one was not given; in messages these nulls are left out, and with them
    any that somebody wrote on purpose, which Arrow does not tell apart.
    """

    rows: datasets.Dataset
    place: Callable[[int], str]  # name of a row, such as ``problems.jsonl:7``
    name: str  # name of the dataset
    objects: frozenset[str] = frozenset()  # columns that ``rows`` keeps as JSON text

    @classmethod
    def of(cls, make: Callable[[], Iterable[dict[str, Any]]], place: Callable[[int], str], name: str) -> RawRows:
        """Makes rows of Python objects; see :func:`posttrain.data.arrow.to_table`."""
        table, objects = to_table(make, place)
        return cls(datasets.Dataset(table), place, name, objects)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._value(name, value) for name, value in self.rows[int(index)].items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {name: self._value(name, value) for name, value in row.items()}  # pyright: ignore[reportAttributeAccessIssue]

    def batches(self, names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yields these columns of the rows, ``BATCH`` rows at a time."""
        for batch in self.rows.select_columns(list(names)).iter(BATCH):
            columns = [[self._value(name, value) for value in batch[name]] for name in names]  # pyright: ignore
            yield [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _value(self, name: str, value: Any) -> Any:
        if name in self.objects and value is not None:
            value = json.loads(value)
        if name in CONVERSATIONS:
            return without_nulls(value, free=("arguments",) if name in self.objects else ())
        return without_nulls(value) if name in FREE - self.objects else value


def without_nulls(value: Any, free: Sequence[str] = ()) -> Any:
    """The value without the keys of its objects whose value is null, at every level.

    Args:
        free: keys below which nothing is left out.
    """
    if isinstance(value, list):
        return [without_nulls(element, free) for element in value]
    if not isinstance(value, dict):
        return value
    return {key: part if key in free else without_nulls(part, free) for key, part in value.items() if part is not None}
