"""Completions and branches of a value report, kept block by block by each rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.data import Rows
from posttrain.data.rollout_files import read_rollouts, write_rollouts
from posttrain.engines.base import Sampling
from posttrain.output.kept_work import KeptWork, write_piece
from posttrain.recipe.sampling import blocks_of
from posttrain.reports.value_suite import ValueSuite
from posttrain.rollout.branches import BranchPoint, branch_scores
from posttrain.rollout.collect import CompletionSource, complete_some, own_share
from posttrain.rollout.session import forget_prefixes
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes


def keep_batches(
    suite: ValueSuite, rows: Rows, source: CompletionSource, processes: Processes, work: KeptWork
) -> Batch:
    """Completes this rank's share of all prompts, block by block, and returns it; kept blocks are read."""
    blocks = [block for block in suite.blocks(len(rows)) if len(block) >= processes.world]
    if sum(map(len, blocks)) < len(rows):  # a last block of fewer prompts than ranks joins the one before it
        blocks[-1] = range(blocks[-1].start, len(rows))
    work.total = len(rows)
    own = suite.completions / processes.world
    counting = LongWork("completions", round(len(rows) * own))
    batches = []
    for block in blocks:
        index, path = own_share(block, processes), _piece(work, "completions", block.start, ".parquet", processes)

        def make(path: Path, index: list[int] = index) -> None:
            batch = complete_some(suite, rows, index, source, counting)
            write_rollouts(path, batch, [""] * len(batch))

        _keep(path, make, source, processes)
        batch = read_rollouts(path)
        dataset_rows = [rows[i] for i in batch.group.tolist()]  # as the dataset has them: a file turns dates into text
        batches.append(batch.set(rows=tuple(dataset_rows)))
        work.done += len(block)
        counting.batch_ended()
    return Batch.concatenate(batches)


def keep_branches(
    suite: ValueSuite, points: Sequence[BranchPoint], source: CompletionSource, processes: Processes, work: KeptWork
) -> Float[Tensor, "P K"]:
    """Scores of continuations of this rank's branch points, sampled block by block; kept blocks are read."""
    n, sampling = suite.branches.completions, Sampling.of(suite.sampling)
    length = suite.save_every and suite.save_every * suite.branches.prefixes
    most = max(processes.gather(len(points)))
    scores = [torch.zeros(0, n)]
    for block in blocks_of(most, length):
        path = _piece(work, "branches", block.start, ".json", processes)

        def make(path: Path, block: range = block) -> None:
            found = branch_scores(source, points[block.start : block.stop], n, sampling)
            path.write_text(json.dumps(found.tolist()), encoding="utf-8")

        _keep(path, make, source, processes)
        kept: list[Any] = json.loads(path.read_text(encoding="utf-8"))
        scores.append(torch.tensor(kept, dtype=torch.float32).view(-1, n))
    return torch.cat(scores)


def _piece(work: KeptWork, kind: str, number: int, suffix: str, processes: Processes) -> Path:
    """Path of this rank's piece."""
    return work.piece(kind, number, f"-rank-{processes.rank}{suffix}" if processes.world > 1 else suffix)


def _keep(path: Path, make: Callable[[Path], None], source: CompletionSource, processes: Processes) -> None:
    """Makes a piece on all ranks, unless every rank has its own already."""
    if not processes.all_max(not path.is_file()):
        return
    if source.engine is not None:
        forget_prefixes(source.engine)
    processes.together(partial(write_piece, path, make))
