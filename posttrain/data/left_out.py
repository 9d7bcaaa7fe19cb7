"""What of a data set is not used, or not as it stands, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FIRST = 5  # rows that are named


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that share a reason."""

    what: Literal["left out", "cut"]
    reason: str  # such as "more than 2048 tokens (`max_tokens`)"
    count: int
    first: tuple[str, ...]  # where the first few are, such as ``pairs.jsonl:7``

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count:,} {rows} {self.what}: {self.reason} ({', '.join(self.first)}{more})"


def left_out(
    reason: str, rows: Iterable[int], place: Callable[[int], str], what: Literal["left out", "cut"] = "left out"
) -> tuple[LeftOut, ...]:
    """The entry for these rows; none where there are none."""
    numbers = sorted(set(rows))
    return (LeftOut(what, reason, len(numbers), tuple(place(row) for row in numbers[:FIRST])),) if numbers else ()


def as_plain(entries: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """For a JSON file."""
    return [asdict(entry) for entry in entries]
