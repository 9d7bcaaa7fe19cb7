"""The metrics of a run: written to ``metrics.jsonl`` always, and to TensorBoard, Weights & Biases or trackio if asked.

A line of ``metrics.jsonl`` is one JSON object, ``{"step": 12, "reward/mean": 0.5, ...}``, and follows two rules:

* Numbers that depend on the machine (seconds, tokens a second, memory) have a key that starts with ``time/``. All other
  numbers are a function of recipe and data: a run that was killed and resumed has the same lines as one that was not.
* JSON has no NaN and no infinity: they are written as ``null``.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from posttrain.errors import CannotWrite, RecipeError, UserError
from posttrain.system.files import atomic_write, writing
from posttrain.system.interrupts import uninterrupted

TIMING = "time/"  # prefix of the metrics that differ between two equal runs

Metrics = Mapping[str, float | int | None]


class Sink(NamedTuple):
    """A place to which metrics are written."""

    log: Callable[[int, Metrics], None]
    close: Callable[[], None]


class Trackers:
    """Writes the metrics of each step to ``metrics.jsonl`` and to trackers.

    Args:
        names: any of ``tensorboard``, ``wandb``, ``trackio``.
        folder: the run folder, in which all of them keep their files.
        project: project of the run in wandb and trackio; the run is named after the folder.
        config: plain data to show beside the curves, such as the resolved recipe.
        start: the step that a resumed run goes on from; TensorBoard hides later points of the earlier run.
        active: False writes nothing, as on all processes but the main one.

    Raises:
        RecipeError: if a tracker is unknown or not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | str,
        project: str = "posttrain",
        config: Mapping[str, Any] | None = None,
        *,
        start: int = 0,
        active: bool = True,
    ) -> None:
        check_trackers(names)
        self._sinks: list[Sink] = []
        if not active:
            return
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._sinks.append(open_jsonl(folder / "metrics.jsonl"))
        for name in dict.fromkeys(names):
            self._sinks.append(open_tracker(name, folder, project, dict(config or {}), start))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes and flushes the metrics of one step; tensors and NumPy scalars become plain numbers."""
        plain = {name: as_number(value) for name, value in metrics.items()}
        with uninterrupted():
            for sink in self._sinks:
                sink.log(step, plain)

    def close(self) -> None:
        """Closes all trackers. Closing twice is harmless."""
        with uninterrupted(), ExitStack() as closing_all:
            while self._sinks:
                closing_all.callback(self._sinks.pop(0).close)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CannotWrite:
            if kind is None:  # else the run ends on an error already, mostly of the same full disk
                raise


def as_number(value: Any) -> float | int | None:
    """Converts a metric to a plain number; None stays None, and NaN and infinity become None.

    Raises:
        TypeError: if it is not a single number.
    """
    if value is None:
        return None
    if hasattr(value, "item"):  # a tensor or a NumPy scalar
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"a metric must be a number, not {value!r}")
    return value if math.isfinite(value) else None


def finite(metrics: Metrics) -> dict[str, float | int]:
    """Returns the metrics that have a finite value."""
    return {name: value for name, value in metrics.items() if value is not None}


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers are installed, before anything expensive has started.

    Raises:
        RecipeError: if one is unknown or missing; the message has the command that installs it.
    """
    problems = []
    for name in names:
        if name not in _OPENERS:
            problems.append(f"run.trackers: there is no tracker {name!r}; there are {', '.join(_OPENERS)}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"run.trackers: {name} is not installed; {_INSTALL[name]}, or remove it from the list")
    if problems:
        raise RecipeError(problems)


# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def open_jsonl(path: Path) -> Sink:
    """Opens ``metrics.jsonl`` to append a line for each step, flushed at once."""
    file = path.open("ab", buffering=0)  # without a buffer, which would hold a line that could not be written

    def log(step: int, metrics: Metrics) -> None:
        size = file.tell()
        line = (json.dumps({"step": step, **metrics}, allow_nan=False) + "\n").encode()
        with writing(path):
            if file.write(line) < len(line):  # the disk is full: no half line may stay
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Sink(log, file.close)


def read_metrics(path: Path | str, *, timing: bool = True) -> list[dict[str, float | int | None]]:
    """Reads the lines of a ``metrics.jsonl``, oldest first.

    A last line that was cut short by a kill is left out.

    Args:
        path: the file, or the run folder that it is in.
        timing: keep the keys that start with ``time/``. Without them the metrics of a resumed run and of one that was
            never killed are equal.

    Raises:
        UserError: if a line inside the file is not JSON; the message has its number.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise UserError(f"{path}:{number}: not a line of JSON ({error.msg}); was the file edited?") from None
        lines.append({name: value for name, value in entry.items() if timing or not name.startswith(TIMING)})
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that was cut short, in one atomic replacement."""
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in read_metrics(path) if (entry["step"] or 0) <= step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- trackers


def open_tracker(name: str, folder: Path, project: str, config: dict[str, Any], start: int) -> Sink:
    """Opens a tracker by name; a failed write of it names the run folder.

    Raises:
        UserError: if it cannot start.
    """
    try:
        with writing(folder):
            sink = _OPENERS[name](folder, project, config, start)
    except UserError:
        raise
    except Exception as error:  # every tracker has errors of its own, such as for a wrong key or no connection
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecipeError(
            f"run.trackers: {name} cannot start: {first}; remove it from the list to go without"
        ) from error

    def log(step: int, metrics: Metrics) -> None:
        with writing(folder):
            sink.log(step, metrics)

    def close() -> None:
        with writing(folder):
            sink.close()

    return Sink(log, close)


def open_tensorboard(folder: Path, project: str, config: dict[str, Any], start: int) -> Sink:
    """Opens event files under ``tensorboard/``; NaN and infinity are left out of the curves."""
    from torch.utils.tensorboard import SummaryWriter

    with ExitStack() as opened:
        opened.enter_context(_thread_errors_once())
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if config and not start:
            writer.add_text("recipe", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")
        opened.callback(writer.close)
        until_closed = opened.pop_all()

    def log(step: int, metrics: Metrics) -> None:
        for name, value in finite(metrics).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Sink(log, until_closed.close)


@contextmanager
def _thread_errors_once() -> Iterator[None]:
    """Keeps TensorBoard's writing thread from printing a traceback: the next write raises its error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def open_wandb(folder: Path, project: str, config: dict[str, Any], start: int) -> Sink:
    """Opens Weights & Biases; without an API key and ``WANDB_MODE`` the run is kept offline for ``wandb sync``."""
    import wandb

    offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    run = wandb.init(
        project=project,
        name=folder.resolve().name,
        id=tracker_id(folder),
        resume="allow",
        dir=str(folder),
        config=config,
        mode="offline" if offline else None,
    )
    return Sink(lambda step, metrics: run.log(finite(metrics), step=step), run.finish)


def open_trackio(folder: Path, project: str, config: dict[str, Any], start: int) -> Sink:
    """Opens trackio, with its database in the run folder (or in ``TRACKIO_DIR``): ``TRACKIO_DIR=... trackio show``."""
    os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
    import trackio

    run = trackio.init(project=project, name=folder.resolve().name, config=config, resume="allow")
    return Sink(lambda step, metrics: run.log(finite(metrics), step=step), run.finish)


_OPENERS: dict[str, Callable[[Path, str, dict[str, Any], int], Sink]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}

_INSTALL = {name: f"`pip install 'posttrain[{name}]'`" for name in ("wandb", "trackio")}  # extras of pyproject.toml
_INSTALL["tensorboard"] = "`pip install tensorboard`"  # which posttrain itself requires


def tracker_id(folder: Path) -> str:
    """Returns a random name that stays the same when the run is resumed."""
    path = folder / "tracker_id"
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
