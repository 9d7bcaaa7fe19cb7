"""The page and the lines of ``real_model.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.reports.page import document, html_table

HEADINGS = ("part", "what is measured", "size", "before", "after", "held-out rows", "seconds", "peak memory MB")


def with_error(figures: Mapping[str, Any], when: str) -> str:
    """A number with its standard error, if it has one; a dash if there is no number."""
    if figures.get(when) is None:
        return "-"
    error = figures.get(f"{when}_error")
    return f"{figures[when]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def line(name: str, figures: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    change = f"{with_error(figures, 'before')} -> {with_error(figures, 'after')}"
    return f"{name:10} {change:36} {figures['seconds']:.0f} s, {figures['peak_memory_mb']:,} MB  ({figures['meaning']})"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the page of all parts."""
    rows = [
        [
            name,
            figures["meaning"],
            figures["size"],
            with_error(figures, "before"),
            with_error(figures, "after"),
            str(figures["rows"]),
            f"{figures['seconds']:.0f}",
            f"{figures['peak_memory_mb']:,}",
        ]
        for name, figures in content["parts"].items()
    ]
    notes = [f"{content['date']}, {content['cpu']}, {content['cores']} cores", "± is one standard error."]
    page = document(
        "SmolLM2-135M-Instruct, before and after", notes, [html_table(HEADINGS, rows, words=3)], content["command"]
    )
    path.write_text(page, encoding="utf-8")
