"""``metrics.json``: valid JSON whatever a report holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

from posttrain.reports.metrics_file import write_metrics


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    """Strict JSON parsers refuse NaN and infinity."""
    report = {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (math.inf, 2)}, "e": "text", "f": True, "g": None}
    write_metrics(tmp_path / "new", report)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "new" / "metrics.json").read_text(encoding="utf-8")
    plain = json.loads(text, parse_constant=refuse)
    assert plain == {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "text", "f": True, "g": None}
