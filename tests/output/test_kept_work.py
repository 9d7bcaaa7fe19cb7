"""Work that is kept piece by piece: killed at any write, refused, finished, and on a full disk."""

from __future__ import annotations

import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills import kill_at_change

from posttrain.errors import CannotWrite, Stopped, UserError
from posttrain.output.kept_work import (
    begin,
    finish,
    kept_work,
    record_of,
    say_finished,
    saying_what_is_kept,
    write_piece,
)
from posttrain.system.files import join_files
from posttrain.system.processes import Processes

SETTINGS = {"seed": 3, "sampling": {"temperature": 1.0}}
TEXTS = [f"{number}\n" * 40 for number in range(4)]


def work_on(output: Path, *, resume: bool = False, stop: int = 4, data: str = "rows", **settings: Any) -> bool:
    """Makes four pieces and the output, as the commands do; False if it was finished already."""
    work = kept_work(output, SETTINGS | settings, record=record_of(output), resume=resume)
    if work.finished:
        say_finished(work)
        return False
    with saying_what_is_kept(work):
        begin(work, Processes(), data)
        work.total = len(TEXTS)
        for number, text in enumerate(TEXTS if "seed" not in settings else TEXTS[::-1]):
            if number == stop:
                raise Stopped(code=143)
            piece = work.piece("prompts", number, ".jsonl")
            if not piece.is_file():
                write_piece(piece, lambda path, text=text: path.write_text(text))
            work.done += 1
        finish(work, partial(join_files, work.pieces()))
    return True


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_kill_at_any_write_leaves_work_that_goes_on_or_starts_anew(tmp_path: Path):
    ways = []
    for moment in range(1, 100):
        output = tmp_path / str(moment) / "out.jsonl"
        if not kill_at_change(moment, output.parent, lambda output=output: work_on(output)):
            break
        try:
            ways.append(work_on(output, resume=output.exists()))
        except UserError:
            ways.append("resumed" if work_on(output, resume=True) else "?")
        assert output.read_text() == "".join(TEXTS)
        assert names(output.parent) == ["out.jsonl", "out.recipe.yaml"], moment
    assert ways.count("resumed") > 5 and ways.count(True) > 2 and ways.count(False) > 1 and "?" not in ways


def test_finished_work_is_not_done_again_and_never_lost(tmp_path: Path, capsys):
    output = tmp_path / "out.jsonl"
    assert work_on(output)
    output.with_suffix(".recipe.yaml").read_text().index("temperature: 1.0")
    assert not work_on(output, resume=True)
    with pytest.raises(UserError, match=r"settings have changed(?s:.*)seed: 3 -> 4"):
        work_on(output, resume=True, seed=4)
    assert work_on(output, seed=4)
    assert "it is out-1.jsonl now" in capsys.readouterr().out
    assert names(tmp_path) == ["out-1.jsonl", "out-1.recipe.yaml", "out.jsonl", "out.recipe.yaml"]


def test_unfinished_work_is_not_begun_anew_by_mistake(tmp_path: Path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="nothing to resume"):
        work_on(output, resume=True)
    with pytest.raises(Stopped, match=r"stopped after 0 of 4 prompts; nothing is kept"):
        work_on(output, stop=0)
    assert names(tmp_path) == []
    with pytest.raises(Stopped, match=r"stopped after 2 of 4 prompts, kept in .*; --resume goes on"):
        work_on(output, stop=2)
    with pytest.raises(UserError, match=r"holds 2 pieces of work that was not finished: `--resume` goes on"):
        work_on(output)
    with pytest.raises(UserError, match=r"settings have changed(?s:.*)seed: 3 -> 4"):
        work_on(output, resume=True, seed=4)
    with pytest.raises(UserError, match="the data have other rows"):
        work_on(output, resume=True, data="other rows")
    assert work_on(output, resume=True) and output.read_text() == "".join(TEXTS)


def test_a_full_disk_loses_no_piece(tmp_path: Path):
    output = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * len(TEXTS[0]), limits[1]))  # bytes: fits a piece, not the output
    try:
        with pytest.raises(CannotWrite, match=r"File too large(?s:.*)stopped after 4 of 4 prompts, kept in .*--resume"):
            work_on(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not output.exists() and len(list(tmp_path.glob("out.jsonl.unfinished/prompts-*"))) == 4
    assert work_on(output, resume=True) and output.read_text() == "".join(TEXTS)
    assert not os.listdir(tmp_path).count("out.jsonl.unfinished")
