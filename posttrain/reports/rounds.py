"""The rounds of an outer loop in numbers: metrics of each stage, a table by round, and a picture of the table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a display

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from posttrain.output.tracking import read_metrics
from posttrain.reports.value_plots import DARK, STYLE
from posttrain.rollout.session import MEANS
from posttrain.system.files import read_rows

TAIL = 10
"""Number of steps at the end of a training run; its metrics are means over them."""

Rounds = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Round -> stage -> metrics."""


def stage_metrics(kind: str, folder: Path) -> dict[str, float]:
    """Reads the metrics of a finished stage from its folder.

    train: means over the last ``TAIL`` steps, and the last value of ``eval/*``. decode: means over completions, and the
    number of ``rows``. label: the number of ``rows``. eval: every number of the report, named by its path, such as
    ``calibration.error``.
    """
    if kind == "train":
        return _training_metrics(folder)
    if kind == "eval":
        return dict(_numbers(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))))
    rows = read_rows(folder / ("completions.jsonl" if kind == "decode" else "labels.jsonl"))
    means = {name: _mean(row.get(name) for row in rows) for name in ("score", *MEANS)} if kind == "decode" else {}
    return {name: value for name, value in means.items() if value is not None} | {"rows": float(len(rows))}


def _training_metrics(folder: Path) -> dict[str, float]:
    lines = [line for line in read_metrics(folder, timing=False) if line["step"]]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    metrics = {}
    for name in names:
        values = [value for line in lines if (value := line.get(name)) is not None]
        if values:
            metrics[name] = float(values[-1]) if name.startswith("eval/") else fmean(values[-TAIL:])
    return metrics


def _mean(values: Iterator[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None


def _numbers(report: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yields every finite number of nested mappings with the names that lead to it, joined by dots."""
    if isinstance(report, dict):
        for name, value in report.items():
            yield from _numbers(value, f"{path}.{name}" if path else str(name))
    elif isinstance(report, int | float) and not isinstance(report, bool) and math.isfinite(report):
        yield path, float(report)


def column(source: str, rounds: Rounds) -> dict[int, float]:
    """Returns a stage's metric by round, for the rounds that have it."""
    stage, _, metric = source.partition(".")
    return {number: stages[stage][metric] for number, stages in rounds.items() if metric in stages.get(stage, {})}


def rounds_table(columns: Mapping[str, str], rounds: Rounds, console: Console | None = None) -> None:
    """Prints a row for each round; names the metrics that there are if a column asks for one that no round has."""
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("round", *columns):
        table.add_column(name)
    values = {name: column(source, rounds) for name, source in columns.items()}
    for number in sorted(rounds):
        cells = [f"{values[name][number]:.4g}" if number in values[name] else "-" for name in columns]
        table.add_row(str(number), *cells)
    console.print(table)
    for name, source in columns.items():
        stage = source.partition(".")[0]
        if rounds and not values[name]:
            known = sorted({metric for stages in rounds.values() for metric in stages.get(stage, {})})
            print(f"table.{name}: no round has {source!r}; {stage} has {', '.join(known)}")


def draw_rounds(columns: Mapping[str, str], rounds: Rounds, file: Path) -> None:
    """Draws a panel for each column, with rounds from left to right."""
    with plt.rc_context(STYLE | {"figure.figsize": (3.2 * len(columns), 2.8)}):
        figure, panels = plt.subplots(1, len(columns), squeeze=False)
        for axes, (name, source) in zip(panels[0], columns.items(), strict=True):
            points = column(source, rounds)
            axes.plot(list(points), list(points.values()), marker="o", color=DARK)
            axes.set(title=name, xlabel="round", xticks=sorted(rounds))
        figure.savefig(file)
        plt.close(figure)
