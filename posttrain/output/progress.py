"""The display of a run: a live table on a terminal, or a plain line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from posttrain.output.tracking import as_number
from posttrain.system.interrupts import uninterrupted


class Column(NamedTuple):
    """A column of the display."""

    metric: str  # name of the metric that it shows
    heading: str
    form: str  # format of the number


LENGTH_COLUMN = Column("length/mean", "tokens", "{:.1f}")
COST_COLUMNS = (
    Column("time/tokens_per_second", "tokens/s", "{:,.0f}"),
    Column("time/step", "s/step", "{:.2f}"),
    Column("time/peak_memory_mb", "memory MB", "{:,.0f}"),
)
SAMPLED_COLUMNS = (Column("reward/mean", "reward", "{:.3f}"), Column("accuracy", "accuracy", "{:.3f}"))
SCORE_COLUMN = Column("eval/score", "eval", "{:.3f}")
LOSS_COLUMN = Column("loss", "loss", "{:.4g}")
COLUMNS = (*SAMPLED_COLUMNS, SCORE_COLUMN, LOSS_COLUMN, LENGTH_COLUMN, *COST_COLUMNS)
TABLE_WIDTH = 160  # width of tables with many columns, on any terminal: a cell that is cut off says nothing
ROWS = 8  # number of steps in the live table


class Progress:
    """Shows the steps of a run as they end; use it as a context manager.

    On a terminal it is a live table with a bar; warnings, prints and log records appear above it. Anywhere else it is
    one plain line a step, at most one every ``every`` seconds, and always for the first and the last step.

    Args:
        total: number of steps of the whole run.
        start: number of steps done before, by the run that is resumed.
        stream: stream to write to. Characters that it cannot encode are replaced.
        every: seconds between plain lines.
        active: False shows nothing, as on all processes but the main one.
        columns: columns of the display, in order; a column is left out if the run does not have its metric.
        unit: name of a step.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        every: float = 5.0,
        active: bool = True,
        columns: Sequence[Column] = COLUMNS,
        unit: str = "step",
    ) -> None:
        self.unit = unit
        self.total, self.start, self.every, self.active, self.columns = total, start, every, active, columns
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=False)
        self.step = start
        self.history: list[tuple[int, dict[str, float]]] = []  # the steps shown by this process
        self._began = time.monotonic()
        self._printed = float("-inf")
        self._live: Live | None = None
        self._moved_handlers: list[tuple[logging.StreamHandler, Any]] = []

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self.active and self.console.is_terminal:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4, vertical_overflow="crop")
            self._live.start()
            self._moved_handlers = _redirect_handlers()
        return self

    def __exit__(self, *exception: object) -> None:
        with uninterrupted():
            if self._live is not None:
                for handler, stream in self._moved_handlers:
                    handler.setStream(stream)
                self._live.update(self._view())
                self._live.stop()
                self._live = None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that ``step`` has ended. Metrics without a column are ignored."""
        shown = {column.metric: _number(metrics[column.metric]) for column in self.columns if column.metric in metrics}
        self.step = step
        self.history.append((step, shown))
        with uninterrupted():
            if self._live is not None:
                self._live.update(self._view())
            elif self.active:
                self._print_line(step, shown)

    def note(self, message: str) -> None:
        """Prints one line for the person who watches, above the live table."""
        with uninterrupted():
            if self.active:
                self._write(message)

    @property
    def eta(self) -> float:
        """Seconds that the remaining steps take at the mean pace so far; NaN before the first step."""
        done = self.step - self.start
        return (time.monotonic() - self._began) / done * (self.total - self.step) if done else float("nan")

    def _print_line(self, step: int, shown: Mapping[str, float]) -> None:
        now = time.monotonic()
        if step < self.total and now - self._printed < self.every:
            return
        self._printed = now
        parts = [f"{self.unit} {step}/{self.total}"]
        parts += [f"{column.heading} {text}" for column, text in self._cells(shown)]
        self._write("  ".join([*parts, f"ETA {duration(self.eta)}"]))

    def _cells(self, shown: Mapping[str, float]) -> Iterator[tuple[Column, str]]:
        for column in self.columns:
            if column.metric in shown:
                yield column, column.form.format(shown[column.metric])

    def _view(self) -> Group:
        """Builds the live display: the bar, and the table of the newest steps."""
        elapsed = duration(time.monotonic() - self._began)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(self.total, 1), completed=self.step, width=40),
            f"{self.step}/{self.total}",
            f"elapsed {elapsed}  ETA {duration(self.eta)}",
        )
        present = {name for _, shown in self.history for name in shown}
        columns = [column for column in self.columns if column.metric in present]
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        for heading in (self.unit, *(column.heading for column in columns)):
            table.add_column(heading, justify="right")
        for step, shown in self.history[-ROWS:]:
            cells = {column.metric: text for column, text in self._cells(shown)}
            table.add_row(str(step), *(cells.get(column.metric, "") for column in columns))
        return Group(bar, table)

    def _write(self, text: str) -> None:
        """Prints text without markup or wrapping; characters that the stream cannot encode become question marks."""
        encoding = self.console.encoding or "utf-8"
        self.console.print(text.encode(encoding, errors="replace").decode(encoding), markup=False, soft_wrap=True)
        self.console.file.flush()


def _number(value: Any) -> float:
    number = as_number(value)
    return float("nan") if number is None else float(number)


def duration(seconds: float) -> str:
    """Formats a time as ``42s``, ``3m07s`` or ``2h05m``; ``?`` for NaN."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _redirect_handlers() -> list[tuple[logging.StreamHandler, Any]]:
    """Redirects log handlers from the terminal's own streams to the streams that ``Live`` has put in their place.

    ``Live`` replaces ``sys.stdout`` and ``sys.stderr``, but a handler made earlier keeps the stream that it was made
    with and would write across the table. Returns the handlers with their earlier streams.
    """
    replaced = {id(sys.__stdout__): sys.stdout, id(sys.__stderr__): sys.stderr}
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    moved = []
    for handler in {handler for logger in (logging.root, *loggers) for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in replaced:
            moved.append((handler, handler.stream))
            handler.setStream(replaced[id(handler.stream)])
    return moved
