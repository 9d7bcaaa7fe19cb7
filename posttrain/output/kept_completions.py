"""Completions of prompts that are kept block by block, for ``posttrain decode`` and the suite ``decode``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.decoding.recipe import DecodeSettings
from posttrain.output.kept_work import KeptWork, write_piece
from posttrain.recipe.part import Part
from posttrain.rollout.session import Session, complete_block
from posttrain.system.files import read_rows, write_rows
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes


def keep_completions(
    recipe: DecodeSettings, decoders: Sequence[tuple[str, Part | None]], on: Session, work: KeptWork
) -> Iterator[str]:
    """Completes all prompts with each decoder, block by block; blocks that are kept already are not completed again.

    Args:
        decoders: name of the pieces of each decoder, and the decoder; None: the policy alone.

    Yields:
        The name of each decoder, once all of its completions are kept.
    """
    blocks = recipe.blocks(len(on.rows))
    done = [(name, block) for name, _ in decoders for block in blocks if _is_kept(work, name, block, on.processes)]
    work.total, work.done = len(decoders) * len(on.rows), sum(len(block) for _, block in done)
    own = recipe.completions / on.processes.world
    counting = LongWork("completions", round(work.total * own), round(work.done * own))
    for name, decoder in decoders:
        for block in blocks:
            if (name, block) in done:
                continue
            start = time.perf_counter()
            rows = complete_block(recipe, decoder, block, on, counting)
            write = partial(_keep, work, name, block, rows, time.perf_counter() - start)
            on.processes.from_main(write)
            work.done += len(block)
        yield name


def _is_kept(work: KeptWork, name: str, block: range, processes: Processes) -> bool:
    return processes.from_main(work.piece(name, block.start, ".jsonl").is_file)


def _keep(work: KeptWork, name: str, block: range, rows: list[dict[str, Any]], seconds: float) -> None:
    """Writes the rows of a block, after the seconds that they took."""
    write_piece(_seconds_file(work, name, block), lambda path: path.write_text(json.dumps(seconds)))
    write_piece(work.piece(name, block.start, ".jsonl"), lambda path: write_rows(path, rows))


def _seconds_file(work: KeptWork, name: str, block: range) -> Path:
    return work.folder / f"{name}_{block.start:06d}.seconds.json"


def kept_rows(recipe: DecodeSettings, name: str, size: int, work: KeptWork) -> tuple[list[dict[str, Any]], float]:
    """Reads the rows of a decoder's completions of all ``size`` prompts, and the seconds that they took."""
    rows, seconds = [], 0.0
    for block in recipe.blocks(size):
        rows += read_rows(work.piece(name, block.start, ".jsonl"))
        seconds += json.loads(_seconds_file(work, name, block).read_text())
    return rows, seconds
