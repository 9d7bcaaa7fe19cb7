"""The folder of a run: its files, checkpoints that are whole or absent, and the rewind of a resumed run.

::

    runs/<name>/
      recipe.yaml                    the resolved recipe
      left_out.json                  rows of the data that are not used, and why
      metrics.jsonl                  a line for each step (posttrain.output.tracking)
      rollouts/step-000010.parquet   a row for each completion; those that were drawn and not kept are in
                                     rollouts/dropped/, those of evaluations in rollouts/evaluation/
      tensorboard/
      checkpoints/step-000050/       everything that an exact resume needs
      model/                         the final model, in the Hugging Face format
      dump/                          last batch of a run that stopped on an error
      finished.json                  the number of steps, once the trained models are saved
      stopped-1/                     metrics and rollouts of an attempt that was stopped before its first checkpoint
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.data.left_out import LeftOut, as_plain
from posttrain.data.rollout_files import RolloutKind
from posttrain.errors import UserError
from posttrain.output.tracking import truncate_metrics
from posttrain.system.files import atomic_write, sync, sync_tree, writing

MARKER = "complete.json"  # the last file written into a checkpoint
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of one run. Making the object touches no file."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def value(self) -> Path:
        """Folder of the trained value model."""
        return self.path / "value"

    @property
    def dump(self) -> Path:
        return self.path / "dump"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> Path:
        return self.path / "finished.json"

    def rollouts(self, step: int, rank: int = 0, kind: RolloutKind = "training") -> Path:
        """File of one process's completions of a step; a run of one process has ``step-000010.parquet``."""
        folder = self.path / "rollouts" / ("" if kind == "training" else kind)
        return folder / f"{step_name(step)}{f'-rank-{rank}' if rank else ''}.parquet"

    def latest_checkpoint(self) -> Path | None:
        """Returns the complete checkpoint of the highest step, if there is one."""
        return max(self._complete_checkpoints(), key=step_of, default=None)

    def _complete_checkpoints(self) -> list[Path]:
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return [path for path in paths if _STEP.fullmatch(path.name) and (path / MARKER).is_file()]


def step_name(step: int) -> str:
    """Name of a step's file or folder, such as ``step-000050``; names sort by step."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Reads the step from the name of a checkpoint or a rollout file."""
    match = _STEP.match(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} does not start with 'step-' and a number")
    return int(match[1])


def open_run(
    path: Path | str, resolved: Mapping[str, Any], *, resume: bool = False, keep: int | None = None
) -> tuple[RunFolder, Path | None]:
    """Makes the folder of a new run, or rewinds that of an old one to its last checkpoint. Main process only.

    Rewinding drops the metrics and rollouts of the steps after the checkpoint, which the resumed run makes again. A run
    that was stopped before its first checkpoint starts again from its first step; what it wrote is set aside. A folder
    that a kill left while it was made counts as new.

    Args:
        path: the run folder.
        resolved: the whole recipe as plain data, written to ``recipe.yaml``.
        resume: go on with the run in the folder.
        keep: number of checkpoints that are kept.

    Returns:
        The folder, and the checkpoint to go on from (None: start with the first step).

    Raises:
        UserError: if the folder is in use and ``resume`` is not set, if there is nothing to resume, if the run is
            finished and cannot get more steps, or if the folder cannot be written.
    """
    folder = RunFolder(Path(path))
    with writing(folder.path, "run.folder"):
        if folder.path.exists() and not folder.path.is_dir():
            raise UserError(f"{folder.path} is a file; `--run.folder=...` names another place for the run")
        _check_use(folder, resume)
        checkpoint = folder.latest_checkpoint()
        if checkpoint is None and folder.finished.is_file():
            raise UserError(_finished_without_checkpoint(folder))
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.recipe.exists():
            write_recipe(folder, resolved)  # first, so that from here on the folder holds a run that can be resumed
        for made in (folder.checkpoints, folder.path / "rollouts"):
            made.mkdir(exist_ok=True)
        if checkpoint is None:
            set_aside(folder)
        rewind(folder, step_of(checkpoint) if checkpoint else -1)
        if keep is not None:
            prune_checkpoints(folder, keep)
        folder.finished.unlink(missing_ok=True)
        write_recipe(folder, resolved)
    return folder, checkpoint


def _check_use(folder: RunFolder, resume: bool) -> None:
    """Raises ``UserError`` if a new run would share its folder, or if there is nothing to resume."""
    used = folder.path.is_dir() and not is_unused(folder.path)
    if used and not resume:
        problem = "already holds a run" if folder.recipe.exists() else "is not empty"
        go_on = "`--resume` goes on with it, " if folder.recipe.exists() else ""
        raise UserError(f"{folder.path} {problem}: {go_on}`--run.folder=...` puts this run elsewhere")
    if resume and not folder.recipe.exists():
        raise UserError(f"nothing to resume: {folder.path} holds no run; leave out `--resume` to start one")


def is_unused(folder: Path) -> bool:
    """True if a folder is empty, or holds only what a kill leaves while its recipe is written."""
    return all(re.fullmatch(r"\.recipe\.yaml\.\d+\.writing", path.name) for path in folder.iterdir())


def _finished_without_checkpoint(folder: RunFolder) -> str:
    steps = json.loads(folder.finished.read_text(encoding="utf-8"))["step"]
    return (
        f"{folder.path} holds a run that finished its {steps} steps, and no checkpoint to add steps from "
        "(`run.keep_finished: 1` keeps one). To train its result further, start a run elsewhere: "
        f"`--policy.model={folder.model} --run.folder=...`"
    )


def finished_steps(folder: RunFolder) -> int | None:
    """Number of steps of a run that is finished and whose models are saved; None for any other."""
    if not folder.finished.is_file() or not (folder.model.is_dir() or folder.value.is_dir()):
        return None
    return json.loads(folder.finished.read_text(encoding="utf-8"))["step"]


def note_finished(folder: RunFolder, step: int, keep: int) -> None:
    """Notes that the trained models are saved, and removes all checkpoints except the ``keep`` newest."""
    with atomic_write(folder.finished, durable=True) as temporary:
        temporary.write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    prune_checkpoints(folder, keep)
    remove_leftovers(folder)


def set_aside(folder: RunFolder) -> Path | None:
    """Moves metrics and rollouts of an attempt without a checkpoint into ``stopped-<number>``; None if there are none.

    A resumed run starts such an attempt again, and writes the same files.
    """
    rollouts = folder.path / "rollouts"
    written = list(rollouts.glob("**/step-*"))
    if not written and not (folder.metrics.is_file() and folder.metrics.stat().st_size):
        return None
    numbers = [int(path.name.removeprefix("stopped-")) for path in folder.path.glob("stopped-*")]
    aside = folder.path / f"stopped-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for path in (folder.metrics, rollouts, folder.path / "tensorboard"):
        if path.exists():
            path.rename(aside / path.name)
    rollouts.mkdir()
    return aside


def write_recipe(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    """Writes ``recipe.yaml``, atomically."""
    text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(folder.recipe) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_left_out(folder: RunFolder, dropped: Mapping[str, Sequence[LeftOut]]) -> None:
    """Writes ``left_out.json``: rows of the data that a run does not use, and why. No file if it uses all rows."""
    if dropped:
        plain = {name: as_plain(entries) for name, entries in dropped.items()}
        with atomic_write(folder.path / "left_out.json") as temporary:
            temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def changed_settings(recipe: Path, resolved: Mapping[str, Any]) -> list[str]:
    """Lists the settings that differ from those in the file that a run was started with.

    An example is ``optimizer.eps: 1e-08 -> 1e-06``. A resumed run repeats the one that was stopped only if the list is
    empty, or names nothing but ``steps`` and ``run.*``.
    """
    old = _flat(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {})
    new = _flat(yaml.safe_load(yaml.safe_dump(dict(resolved))))
    absent = object()

    def show(value: Any) -> str:
        return "(absent)" if value is absent else repr(value)

    names = sorted(old.keys() | new.keys())
    pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in names]
    return [f"{name}: {show(before)} -> {show(after)}" for name, before, after in pairs if before != after]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested data to dotted names with their values."""
    if isinstance(value, dict) and value:
        children = value.items()
    elif isinstance(value, list) and value:
        children = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, child in children:
        flat |= _flat(child, f"{prefix}.{name}" if prefix else str(name))
    return flat


def rewind(folder: RunFolder, step: int) -> None:
    """Drops the metrics and rollouts of all steps after ``step``, and files that a kill left half written."""
    if folder.metrics.exists():
        truncate_metrics(folder.metrics, step)
    for path in (folder.path / "rollouts").rglob("*"):
        if path.is_file() and (not path.name.startswith("step-") or step_of(path) > step):
            path.unlink()
    remove_leftovers(folder)


def remove_leftovers(folder: RunFolder) -> None:
    """Removes what a kill left half written or half removed: such files and folders begin with a dot."""
    for path in folder.checkpoints.glob(".*"):
        shutil.rmtree(path)
    for ending in ("writing", "removing"):  # the latter are old models, which give way to new ones
        for path in folder.path.glob(f".*.{ending}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ------------------------------------------------------------------------------------------------------ checkpoints


@contextmanager
def write_checkpoint(
    folder: RunFolder, step: int, *, main: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields a directory to write a checkpoint into. It gets its name only when all of it is on disk.

    A process killed at any moment leaves either the whole checkpoint or none: the files are flushed to disk, then a
    marker is written, then the directory is renamed. After an exception or Ctrl-C nothing is left. The metrics and
    rollouts of ``step`` must be written before.

    Args:
        folder: the run folder.
        step: number of optimiser steps done.
        main: True on exactly one process, which makes, marks and renames the directory.
        barrier: waits for all processes; all of them enter and leave together, and each may write files.
    """
    final = folder.checkpoints / step_name(step)
    temporary = folder.checkpoints / f".{final.name}.writing"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(final):
            temporary.mkdir(parents=True)
    barrier()
    try:
        with writing(final):
            yield temporary
            sync_tree(temporary)
    except BaseException:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    barrier()
    if main:
        if folder.metrics.exists():
            sync(folder.metrics)
        (temporary / MARKER).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        sync_tree(temporary)
        remove_checkpoint(final)
        temporary.rename(final)
        sync(folder.checkpoints)
    barrier()


def prune_checkpoints(folder: RunFolder, keep: int) -> None:
    """Removes all complete checkpoints except the ``keep`` newest."""
    complete = sorted(folder._complete_checkpoints(), key=step_of)
    for path in complete[: max(0, len(complete) - keep)]:
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, if there is one, in such a way that half of it is never taken for a whole one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removing")
        path.rename(hidden)
        shutil.rmtree(hidden)
