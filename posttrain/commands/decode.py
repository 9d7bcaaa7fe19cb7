"""``posttrain decode recipes/decode/best_of_n.yaml``: completes prompts with a decoder and verifies the completions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table

from posttrain.decoding.build import build_decoder, check_models
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.output.progress import TABLE_WIDTH
from posttrain.recipe.loading import run_file
from posttrain.recipe.yaml_reader import Overrides
from posttrain.rollout.session import MEANS, completed, session
from posttrain.system.files import atomic_write, check_output, write_rows


def run_decode(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the decode recipe in a YAML file, prints a table of means, and returns the file of completions.

    Raises:
        UserError: if the file or its data are wrong; the message says where and what to change.
    """
    return run_file(DecodeRecipe, path, overrides, decode)


def decode(recipe: DecodeRecipe) -> Path:
    """Completes prompts on all ranks; the main one writes a row for each completion.

    A row has the columns of the dataset, ``completion``, ``tokens`` (their number), ``finish``, ``logp`` (log-prob of
    the whole completion, see :mod:`posttrain.decoding`), ``score`` if there are verifiers, and the decoder's own
    measurements.

    Raises:
        UserError: if policy, decoder, data or verifiers do not fit together; the message says what to change.
    """
    check_output(recipe.file, "output")
    check_models(recipe.decoder)
    with session(recipe) as current:
        processes = current.processes
        decoder = build_decoder(recipe.decoder, current.engine, current.tokenizer, processes, recipe.policy)
        decoder = decoder or current.engine
        start = time.perf_counter()
        share = processes.together(lambda: completed(recipe, decoder, current))
        seconds = time.perf_counter() - start
        rows = [row for part in processes.gather(share) for row in part]
        if processes.is_main:
            _write(recipe.file, rows)
            print(f"{recipe.name}: {len(rows)} completions in {recipe.file}")
            Console(width=TABLE_WIDTH).print(means_table(recipe, rows, seconds))
    return recipe.file


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [_storable(row.get(name)) for row in rows] for name in names}
        with atomic_write(path) as temporary:
            datasets.Dataset.from_dict(columns).to_parquet(str(temporary))
    else:
        write_rows(path, rows)


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
