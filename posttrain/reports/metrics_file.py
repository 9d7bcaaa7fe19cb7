"""``metrics.json``: the numbers of a report, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.system.files import atomic_write, json_number


def write_metrics(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes ``metrics.json`` into a report's folder; NaN and infinity, which JSON does not have, become null."""
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(without_nan(report), indent=1) + "\n", encoding="utf-8")


def without_nan(data: Any) -> Any:
    """Returns nested data with None in place of NaN and infinity."""
    if isinstance(data, Mapping):
        return {name: without_nan(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return json_number(data) if isinstance(data, float) else data
