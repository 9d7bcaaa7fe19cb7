"""Long work in pieces, each of which is kept on disk once it is done, so that a command that was ended can go on.

Until the output (a file or a folder) is whole, the work has a folder beside it::

    completions/beam.jsonl.unfinished/
      recipe.yaml              the settings
      data.json                a hash of the data
      prompts-000000.jsonl     a piece, named after its first prompt; it is whole or absent

The folder disappears when the output gets its name. Then the settings are beside the output, in ``beam.recipe.yaml``.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import CannotWrite, Stopped, UserError
from posttrain.output.run_folder import RunFolder, changed_settings, write_recipe
from posttrain.system.files import atomic_write, sync, writing
from posttrain.system.processes import Processes


@dataclass
class KeptWork:
    """The work on one output: where its pieces are, and how far it is."""

    output: Path  # file or folder that the work makes
    record: Path  # file that holds the settings once the output is whole
    settings: Mapping[str, Any]  # settings that the output depends on
    key: str = "output"  # setting that names the output
    unit: str = "prompts"  # kind of things that are counted
    done: int = 0  # number of them whose results are kept
    total: int = 0  # number of them altogether
    finished: bool = False  # True if the output was whole already and is asked for again

    @property
    def folder(self) -> Path:
        """Folder of the pieces."""
        return self.output.with_name(f"{self.output.name}.unfinished")

    @property
    def begun(self) -> bool:
        """True if the folder holds work that can go on."""
        return (self.folder / "recipe.yaml").is_file()

    def pieces(self) -> list[Path]:
        """Lists the pieces that are kept, in order."""
        return sorted(path for path in self.folder.glob("*-*") if not path.name.startswith("."))

    def piece(self, kind: str, number: int, suffix: str) -> Path:
        """Path of a piece, such as ``prompts-000032.jsonl``."""
        return self.folder / f"{kind}-{number:06d}{suffix}"


def kept_work(
    output: Path, settings: Mapping[str, Any], *, record: Path, resume: bool, key: str = "output", unit: str = "prompts"
) -> KeptWork:
    """Looks at the work on an output, which may have been begun or finished before. Nothing is written.

    Args:
        output: file or folder that the work makes.
        settings: settings that the output depends on, as plain data.
        record: file that holds the settings once the output is whole.
        resume: go on with the work that was begun; ``finished`` is set if there is nothing left to do.
        key: setting that names the output, for messages.
        unit: kind of things that are counted, in the plural.

    Raises:
        UserError: if there are pieces and ``resume`` is not set, if there is nothing to resume, or if the settings have
            changed.
    """
    work = KeptWork(output, record, settings, key=key, unit=unit)
    elsewhere = f"`--{key}=...` puts this work elsewhere"
    if not resume:
        if work.begun and (pieces := work.pieces()):
            raise UserError(
                f"{work.folder} holds {len(pieces)} pieces of work that was not finished: `--resume` goes on with it, "
                f"{elsewhere}; remove the folder to begin anew"
            )
        return work
    before = work.folder / "recipe.yaml" if work.begun else record
    if not before.is_file() or not (work.begun or output.exists()):
        raise UserError(f"nothing to resume: there is no {work.folder}; leave out `--resume` to begin")
    if changed := changed_settings(before, settings):
        problem = "these settings have changed since it was begun, and the results would not fit together"
        raise UserError(f"{work.folder if work.begun else output}: {problem} ({elsewhere}):", *_indented(changed))
    work.finished = not work.begun
    return work


def kept_report(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, key: str, unit: str = "prompts"
) -> KeptWork:
    """Looks at the work on a report's folder; see :func:`kept_work`. The settings end up in its ``suite.yaml``.

    The report is written into the folder when all pieces are there; a report that is in it is replaced.
    """
    return kept_work(folder, settings, record=folder / "suite.yaml", resume=resume, key=key, unit=unit)


def say_finished(work: KeptWork) -> Path:
    """Says that an output is whole already, and removes what a kill left of its pieces; returns the output."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{work.output} is finished: there is nothing left to do")
        shutil.rmtree(work.folder, ignore_errors=True)
    return work.output


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def begin(work: KeptWork, processes: Processes, fingerprint: str) -> None:
    """Makes the folder of the pieces, or goes on with the one that is there. Called on all ranks.

    Args:
        fingerprint: hash of the data.

    Raises:
        UserError: if the folder cannot be written, or the data have changed.
    """
    processes.from_main(lambda: _begin(work, fingerprint))


def _begin(work: KeptWork, fingerprint: str) -> None:
    folder, data = work.folder, work.folder / "data.json"
    with writing(work.output, work.key):
        folder.mkdir(parents=True, exist_ok=True)
        in_parent = work.output.parent.glob(f".{work.output.name}.*.writing")
        for half_written in [*folder.glob(".*.writing"), *work.output.glob(".*.writing"), *in_parent]:
            half_written.unlink(missing_ok=True)
        if not work.begun:
            for left in folder.iterdir():  # of work that was finished, but for the removal of its folder
                left.unlink()
            write_recipe(RunFolder(folder), work.settings)
        if not data.is_file():
            write_piece(data, lambda path: path.write_text(json.dumps(fingerprint), encoding="utf-8"))
        elif json.loads(data.read_text(encoding="utf-8")) != fingerprint:
            raise UserError(
                f"{folder}: the data have other rows than when it was begun, and the results would not fit together: "
                f"`--{work.key}=...` puts this work elsewhere"
            )


def write_piece(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a piece by calling ``write`` with a path; it gets its name once it is on disk."""
    with atomic_write(path, durable=True) as temporary:
        write(temporary)
    sync(path.parent)


def finish(work: KeptWork, write: Callable[[Path], Any] | None = None) -> None:
    """Gives the output its name and removes the pieces. Main process only.

    An older file of that name with other contents is moved aside, to ``NAME-1.jsonl``.

    Args:
        write: writes the output, a file, to the path that it is called with. None: the output is there already.
    """
    if write is not None:
        whole = work.folder / f"whole{work.output.suffix}"
        write_piece(whole, write)
        with writing(work.output, work.key):
            if work.output.exists() and not filecmp.cmp(work.output, whole, shallow=False):
                aside = _set_aside(work)
                print(f"{work.output} was there already: it is {aside.name} now")
            whole.replace(work.output)
            sync(work.output.parent)
    with writing(work.record):
        (work.folder / "recipe.yaml").replace(work.record)
    shutil.rmtree(work.folder)


def _set_aside(work: KeptWork) -> Path:
    """Renames an older output, and its record, by the first number that is free."""
    number = 1
    while (aside := work.output.with_stem(f"{work.output.stem}-{number}")).exists():
        number += 1
    if work.record.exists():
        work.record.replace(record_of(aside))
    work.output.rename(aside)
    return aside


def record_of(output: Path) -> Path:
    """File beside an output that holds its settings, such as ``beam.recipe.yaml`` for ``beam.jsonl``."""
    return output.with_suffix(".recipe.yaml")


@contextmanager
def saying_what_is_kept(work: KeptWork) -> Iterator[None]:
    """Adds what is kept, and how to go on, to signals and errors inside the block; removes a folder without pieces."""
    try:
        yield
    except KeyboardInterrupt as raised:
        code = raised.code if isinstance(raised, Stopped) else Stopped().code
        raise Stopped(f"stopped after {_kept(work)}", code) from None
    except CannotWrite as error:
        raise CannotWrite(error.problems, f"  stopped after {_kept(work)}, once there is room") from error
    except UserError as error:
        if not work.pieces():
            raise
        raise UserError(error.problems, f"  stopped after {_kept(work)}") from error
    except Exception as error:
        error.add_note(f"stopped after {_kept(work)}")
        raise
    finally:
        if os.environ.get("RANK", "0") == "0" and work.folder.is_dir() and not work.pieces():
            shutil.rmtree(work.folder, ignore_errors=True)


def _kept(work: KeptWork) -> str:
    far = f"{work.done:,} of {work.total:,} {work.unit}" if work.total else "nothing"
    if not work.pieces():
        return f"{far}; nothing is kept: start again without --resume"
    return f"{far}, kept in {work.folder}; --resume goes on"
