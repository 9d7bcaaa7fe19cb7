"""An account of the rows of a dataset that are left out, cut, or taken as they are written, with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Treatment = Literal["left out", "cut", "as written"]
FIRST = 5  # number of rows that are named


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that are left out, cut, or taken as they are written, for the same reason."""

    what: Treatment
    reason: str  # such as "more than 2048 tokens (`max_tokens`)"
    count: int
    first: tuple[str, ...]  # places of the first few, such as ``pairs.jsonl:7``

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count:,} {rows} {self.what}: {self.reason} ({', '.join(self.first)}{more})"


def left_out(
    reason: str, rows: Iterable[int], place: Callable[[int], str], what: Treatment = "left out"
) -> tuple[LeftOut, ...]:
    """Makes the entry of these rows, as a tuple that is empty if there are no rows."""
    numbers = sorted(set(rows))
    return (LeftOut(what, reason, len(numbers), tuple(place(row) for row in numbers[:FIRST])),) if numbers else ()


def as_plain(entries: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """The entries as plain dicts, for JSON."""
    return [asdict(entry) for entry in entries]
