"""Reports as one HTML file each: figures, pictures, and completions coloured by their value."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums } td.what { color: #555 }
th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #999 } th.number { text-align: right }
img { width: 30rem; max-width: 100% } figure { display: inline-block; margin: .5rem }
pre { white-space: pre-wrap; font: 13px/1.9 ui-monospace, monospace; border-left: 3px solid #ccc; padding-left: .8rem }
pre .prompt { color: #777 } .scale span { padding: .1rem .6rem }
.note { color: #555 }
"""

MEANINGS = {
    "value/states": "states (prefixes of completions) with a known outcome",
    "value/mean": "mean predicted value, each state counting once",
    "value/outcome": "mean outcome",
    "value/bias": "mean of value - outcome",
    "value/rmse": "root mean square of value - outcome",
    "value/explained_variance": "1 - Var(outcome - value) / Var(outcome), over all states",
    "value/explained_variance_finished": "explained variance without completions that were cut off",
    "value/calibration_error": "mean gap of value and outcome, in bins of equally many states",
    "value/brier": "mean square of value - outcome, where outcomes are 0 or 1",
    "value/truncated": "share of completions that were cut off",
    "value/bias_truncated": "mean of value - outcome at the last token of completions that were cut off",
    "value/bias_finished": "mean of value - outcome at the last token of completions that were not cut off",
    "branches/prefixes": "prefixes with Monte-Carlo continuations",
    "branches/bias": "mean of value - mean outcome of the continuations",
    "branches/rmse": "root mean square of value - mean outcome of the continuations, without the noise of the means",
    "branches/correlation": "correlation of value and mean outcome of the continuations",
    "branches/correlation_ceiling": "correlation expected of the true values, with as many continuations",
}
"""Explanations of the metrics in the table of figures."""


@dataclass(frozen=True, slots=True)
class Example:
    """A completion to show token by token."""

    prompt: str
    pieces: Sequence[str]  # text of each token
    start: float  # value before the first token; NaN: unknown
    values: Sequence[float]  # value after each token
    outcome: float
    finish: str


def write_page(
    folder: Path, title: str, report: Mapping[str, Any], pictures: Mapping[str, str], examples: Sequence[Example]
) -> Path:
    """Writes ``index.html`` with the folder's pictures embedded."""
    body = [
        "<h2>Figures</h2>",
        _table(report["metrics"]),
        "<h2>Pictures</h2>",
        *(embedded_picture(folder / name, title) for name, title in pictures.items()),
        *_completions(examples, report["unit"]),
    ]
    path = folder / "index.html"
    path.write_text(document(title, report["notes"], body, report["suite"]), encoding="utf-8")
    return path


def document(title: str, notes: Sequence[str], body: Sequence[str], suite: str) -> str:
    """Builds a whole page: the title, the notes below it, the body, and the suite that was run as YAML."""
    return "\n".join(
        [
            f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p class=note>{html.escape(note)}</p>" for note in notes),
            *body,
            "<h2>What was run</h2>",
            f"<pre>{html.escape(suite)}</pre>\n",
        ]
    )


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Builds a table whose first ``words`` columns are text and whose other columns are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if i < words else " class=number" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}" for kind, cell in zip(kinds, cells, strict=True))

    return "<table>" + "\n".join([row(headings, "th"), *(row(cells, "td") for cells in rows)]) + "</table>"


def figure(value: float | None) -> str:
    """Formats a number for the page and the terminal."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.4f}"


def _table(metrics: Mapping[str, float | None]) -> str:
    rows = (
        f"<tr><td>{html.escape(name)}<td class=number>{figure(value)}<td class=what>{MEANINGS.get(name, '')}"
        for name, value in metrics.items()
    )
    return "<table>" + "\n".join(rows) + "</table>"


def embedded_picture(path: Path, title: str) -> str:
    """Builds the element that holds a PNG file itself, so that the page needs no other file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>'


def _completions(examples: Sequence[Example], unit: str) -> list[str]:
    values = [value for example in examples for value in example.values if math.isfinite(value)]
    if not values:
        return []
    low, high = min(values), max(values)
    marks = [low + (high - low) * i / 4 for i in range(5)]
    scale = "".join(f'<span style="{_colour(v, low, high)}">{v:.2f}</span>' for v in marks)
    return [
        "<h2>Completions, token by token</h2>",
        f"<p class=scale>Value of the text up to and with each token ({html.escape(unit)}), darker is higher: {scale}"
        "<br>Rest the pointer on a token to see its exact value.</p>",
        *(_completion(example, low, high) for example in examples),
    ]


def _completion(example: Example, low: float, high: float) -> str:
    tokens = "".join(
        f'<span style="{_colour(value, low, high)}" title="{figure(value)}">{_visible(piece)}</span>'
        for piece, value in zip(example.pieces, example.values, strict=True)
    )
    end = example.values[-1] if example.values else example.start
    return (
        f"<p>outcome {example.outcome:.3g}, {example.finish}; value of the prompt {figure(example.start)}, "
        f"at the end {figure(end)}</p><pre><span class=prompt>{html.escape(example.prompt)}</span>{tokens}</pre>"
    )


def _visible(piece: str) -> str:
    """Escapes the text of a token and makes its line breaks visible."""
    return html.escape(piece).replace("\n", "&crarr;\n")


def _colour(value: float, low: float, high: float) -> str:
    """Background from white to a mid blue, on which black text can be read; empty if the value is NaN."""
    if not math.isfinite(value):
        return ""
    share = (value - low) / (high - low) if high > low else 0.5
    red, green, blue = (round(255 - share * (255 - end)) for end in (120, 160, 210))
    return f"background:rgb({red},{green},{blue})"
