"""Completions from a YAML file: ``posttrain decode recipes/decode/best_of_n.yaml`` decodes, verifies, writes, tells."""

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
from posttrain.errors import UserError
from posttrain.output.progress import TABLE_WIDTH
from posttrain.recipe.loading import load_as, placed
from posttrain.recipe.yaml_reader import Overrides
from posttrain.rollout.session import MEANS, completed, session
from posttrain.system.files import write_rows


def run_decode(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the decode recipe in a YAML file, prints what it took, and returns the file of completions.

    Raises:
        UserError: for what a person can mend.
    """
    recipe = load_as(DecodeRecipe, path, overrides)
    try:
        return decode(recipe)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error


def decode(recipe: DecodeRecipe) -> Path:
    """Completes prompts on all ranks; the main one writes a row for each completion.

    A row has the columns of the data set, ``completion``, ``tokens`` (their number), ``finish``, ``logp`` (of the whole
    completion, see :mod:`posttrain.decoding`), ``score`` where there are verifiers, and what the decoder measured.

    Raises:
        UserError: for what a person can mend.
    """
    check_models(recipe.decoder)
    with session(recipe) as on:
        processes = on.processes
        decoder = build_decoder(recipe.decoder, on.engine, on.tokenizer, processes, recipe.policy) or on.engine
        start = time.perf_counter()
        found = processes.together(lambda: completed(recipe, decoder, on))
        seconds = time.perf_counter() - start
        everything = [row for part in processes.gather(found) for row in part]
        if processes.is_main:
            _write(recipe.file, everything)
            print(f"{recipe.name}: {len(everything)} completions in {recipe.file}")
            Console(width=TABLE_WIDTH).print(summary(recipe, everything, seconds))
    return recipe.file


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [_storable(row.get(name)) for row in rows] for name in names}
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    else:
        write_rows(path, rows)


def _storable(value: Any) -> Any:
    """Messages and other nested values as JSON: their members may differ from row to row."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def summary(recipe: DecodeRecipe, rows: Sequence[dict[str, Any]], seconds: float) -> Table:
    """Means over completions: score with its standard error, tokens kept and generated, scorer calls, KL in nats."""
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
    known = [score for score in scores if score is not None]
    if not known:
        return "none"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((score - mean) ** 2 for score in known) / (len(known) - 1))
    return f"{mean:.3f} ± {deviation / math.sqrt(len(known)):.3f}"
