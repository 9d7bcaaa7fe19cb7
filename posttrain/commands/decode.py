"""``posttrain decode recipes/decode/best_of_n.yaml``: completes prompts with a decoder and verifies the completions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table

from posttrain.data import Rows
from posttrain.decoding.build import check_models
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.output.kept_completions import keep_completions, kept_rows
from posttrain.output.kept_work import KeptWork, begin, finish, kept_work, record_of, say_finished, saying_what_is_kept
from posttrain.output.progress import TABLE_WIDTH
from posttrain.recipe.loading import run_file
from posttrain.recipe.sampling import plain_settings
from posttrain.recipe.yaml_reader import Overrides
from posttrain.rollout.session import MEANS, session
from posttrain.system.files import check_output, join_files
from posttrain.system.processes import Processes


def run_decode(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> Path:
    """Runs the decode recipe in a YAML file, prints a table of means, and returns the file of completions.

    Args:
        resume: go on with the completions that are kept.

    Raises:
        UserError: if the file or its data are wrong; the message says where and what to change.
    """
    return run_file(DecodeRecipe, path, overrides, partial(decode, resume=resume))


def decode(recipe: DecodeRecipe, *, resume: bool = False) -> Path:
    """Completes prompts on all ranks; the main one writes a row for each completion, in the order of the prompts.

    A row has the columns of the dataset, ``completion``, ``tokens`` (their number), ``finish``, ``logp`` (log-prob of
    the whole completion, see :mod:`posttrain.decoding`), ``score`` if there are verifiers, and the decoder's own
    measurements. Until all are written, those of each block of prompts are kept (:mod:`posttrain.output.kept_work`).

    Args:
        resume: go on with the completions that are kept.

    Raises:
        UserError: if policy, decoder, data or verifiers do not fit together; the message says what to change.
        Stopped: after a signal; the message says what is kept.
    """
    settings, file = plain_settings(recipe, "output"), recipe.file
    check_output(file, "output")
    work = kept_work(file, settings, record=record_of(file), resume=resume)
    if work.finished:
        return say_finished(work)
    check_models(recipe.decoder)

    def begin_work(processes: Processes, rows: Rows) -> None:
        begin(work, processes, rows.fingerprint())

    with saying_what_is_kept(work), session(recipe, begin_work) as on:
        for _ in keep_completions(recipe, [("prompts", recipe.decoder)], on, work):
            on.processes.from_main(partial(_finish, recipe, work, on.rows))
    return file


def _finish(recipe: DecodeRecipe, work: KeptWork, prompts: Rows) -> None:
    """Joins the kept rows to the file of completions, and prints the table of means."""
    rows, seconds = kept_rows(recipe, "prompts", len(prompts), work)
    if work.output.suffix == ".parquet":
        finish(work, partial(_write_parquet, rows=rows, prompts=prompts))
    else:
        finish(work, partial(join_files, work.pieces()))
    print(f"{recipe.name}: {len(rows)} completions in {recipe.file}")
    Console(width=TABLE_WIDTH).print(means_table(recipe, rows, seconds))


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]], prompts: Rows) -> None:
    """Writes rows as columns. Kept rows are JSON; values of the dataset that JSON does not have are read again."""
    each = len(rows) // len(prompts)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(len(prompts)):
        as_read = prompts[i]
        as_kept = json.loads(json.dumps(as_read, default=str))
        for row in rows[i * each : (i + 1) * each]:
            for name in names:
                value = as_read[name] if name in as_read and as_kept[name] == row[name] else row.get(name)
                columns[name].append(_storable(value))
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def _storable(value: Any) -> Any:
    """Turns messages and other nested values into JSON text: their members may differ from row to row."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def means_table(recipe: DecodeRecipe, rows: Sequence[dict[str, Any]], seconds: float) -> Table:
    """Makes the table of means over completions: score with its standard error, tokens, scorer calls, KL in nats."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    cells: list[str] = []
    if recipe.verify:
        table.add_column("score")
        cells.append(_mean_and_error([row["score"] for row in rows]))
    for name, decimals in MEANS.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            table.add_column(name)
            cells.append(f"{sum(values) / len(values):.{decimals}f}")
    table.add_column("seconds")
    table.add_row(*cells, f"{seconds:.1f}")
    return table


def _mean_and_error(scores: Iterable[float | None]) -> str:
    numbers = [score for score in scores if score is not None]
    if not numbers:
        return "none"
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((score - mean) ** 2 for score in numbers) / (len(numbers) - 1))
    return f"{mean:.3f} ± {deviation / math.sqrt(len(numbers)):.3f}"
