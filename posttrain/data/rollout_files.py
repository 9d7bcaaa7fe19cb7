"""Rollouts as Parquet files with a row for each completion: to look at with pandas, and to train on again later.

Columns of a file: ``step``, ``group``, ``prompt``, ``completion``, ``reward``, ``score``, ``verify/<name>`` for each
verifier, ``rewards/<name>`` for each reward before its weight, ``used_for`` (``training``, ``dropped`` or
``evaluation``), ``length`` (tokens the policy chose), ``finish`` (its name), ``baseline_only``, ``version``, ``row``
(columns of the dataset, as JSON), and the lists ``tokens``, ``mask``, ``step_id``, ``logp_sampler``, ``step_reward``
and whichever of ``logp_old``, ``logp_ref``, ``entropy``, ``value``, ``advantage``, ``target``, ``loss_share`` the batch
has. A list has one element for each token, prompt included: element ``t`` belongs to token ``t``, as everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from posttrain.batch import Batch, Finish, RewardColumns
from posttrain.data.read import find
from posttrain.errors import DataError
from posttrain.system.files import atomic_write

RolloutKind = Literal["training", "dropped", "evaluation"]
"""Use of a completion: the update learned from it, ``select`` or ``keep`` dropped it, or it is of an evaluation."""
OTHER_FOLDERS = ("dump", "dropped", "evaluation")
"""Folders of completions that no update learned from; they are read only if a path names them."""
MOST_FILES = 100_000
"""Most files in a folder of runs, among which those of rollouts are looked for."""
_NUMBERS = ("group", "version", "baseline_only", "score", "reward")
_LISTS = {
    "tokens": torch.int32,
    "mask": torch.bool,
    "step_id": torch.int32,
    "logp_sampler": torch.float32,
    "step_reward": torch.float32,
    "logp_old": torch.float32,
    "logp_ref": torch.float32,
    "entropy": torch.float32,
    "value": torch.float32,
    "advantage": torch.float32,
    "target": torch.float32,
    "loss_share": torch.float32,
}
_REWARD_COLUMNS = b"posttrain.reward_columns"  # key in the metadata of a file: names and weights of the rewards
_PADDING = {"step_id": -1}  # value in the columns after a completion's end; 0 for lists that are not named here


def find_rollouts(path: str, base: Path | None, *, setting: str = "rollouts") -> list[Path]:
    """Finds the files of rollouts that a path stands for, sorted by path, and so by step within a run.

    The path may be a file; a run's folder, of which the files in ``rollouts`` are taken; that folder itself; or any
    folder with such folders below it. In folders the files are called ``step-*.parquet``, as a run names them. The
    batch that a broken run left in ``dump``, and the completions in ``dropped`` and ``evaluation``, are taken only if
    the path names their folder.

    Args:
        base: the recipe's folder, in which the path is looked up first, and then in the current folder.
        setting: the key of the recipe that names the path, for the message.

    Raises:
        DataError: if there is no such path, or no file of rollouts in the folder.
    """
    place = find(path, base)
    if place is None:
        raise DataError(f"{setting}: there is no file or folder {path!r}")
    if place.is_file():
        return [place]
    folder = place / "rollouts" if (place / "rollouts").is_dir() else place
    below = ((path, path.relative_to(folder).parts) for path in _steps_below(folder, setting))
    files = sorted(path for path, parts in below if not set(parts) & set(OTHER_FOLDERS))
    if not files:
        raise DataError(
            f"{setting}: no rollouts (step-*.parquet) in {folder}. Name a file, a run's folder or a folder of them; "
            "`run.rollouts_every: 0` stores none"
        )
    return files


def _steps_below(folder: Path, setting: str) -> Iterator[Path]:
    """Yields the files of rollouts below a folder; a folder such as ``/`` is refused before it has cost minutes."""
    count = 0
    for root, _, names in os.walk(folder):
        count += len(names)
        if count > MOST_FILES:
            raise DataError(f"{setting}: {folder} has more than {MOST_FILES:,} files; name the folder of a run")
        yield from (Path(root, name) for name in names if fnmatch(name, "step-*.parquet"))


def write_rollouts(
    path: Path | str,
    batch: Batch,
    prompts: Sequence[str],
    values: Mapping[str, Sequence[float | None]] | None = None,
    used_for: Sequence[str] | None = None,
) -> None:
    """Writes a batch to a Parquet file (zstd), atomically, and flushes it to disk.

    Args:
        path: the file; its folder is made.
        batch: the completions, on any device.
        prompts: the prompt of each completion as text.
        values: the values of each verifier, one a completion; None or NaN where it did not apply.
        used_for: what each completion was used for. Default: training.
    """
    batch = batch.to("cpu").trim()
    columns: dict[str, Any] = {
        "step": np.full(len(batch), batch.step),
        "prompt": list(prompts),
        "completion": list(batch.texts),
        "used_for": list(used_for) if used_for is not None else ["training"] * len(batch),
        "length": batch.tokens_chosen.numpy(),
        "finish": [Finish(code).name.lower() for code in batch.finish.tolist()],
        "row": [_json(row) for row in batch.rows],
    }
    columns |= {name: getattr(batch, name).numpy() for name in _NUMBERS}
    columns |= {f"verify/{name}": pa.array(numbers, pa.float32()) for name, numbers in (values or {}).items()}
    for name, dtype in _LISTS.items():
        tensor = getattr(batch, name)
        if tensor is not None:
            columns[name] = _as_lists(tensor.to(dtype), batch.length)
    if batch.rewards is not None:
        names = batch.reward_columns.names
        columns |= {f"rewards/{name}": column.numpy() for name, column in zip(names, batch.rewards.T, strict=True)}
    table = pa.table(columns).replace_schema_metadata(
        {_REWARD_COLUMNS: json.dumps(dataclasses.asdict(batch.reward_columns))}
    )
    with atomic_write(Path(path), durable=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rollouts(path: Path | str) -> Batch:
    """Reads the batch that ``write_rollouts`` wrote, without columns that are padding in every row.

    Dataset columns that JSON does not know (dates, bytes) come back as text.

    Raises:
        DataError: if there is no such file, or it lacks columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of rollouts")
    try:
        return _batch_of(pq.read_table(path), path)
    except DataError:
        raise
    except Exception as error:  # Arrow, NumPy and torch have errors of their own for each kind of damage
        first = next(iter(str(error).strip().splitlines()), "")
        raise DataError(f"{path}: not a file of rollouts, or damaged: {type(error).__name__}: {first}") from error


def _batch_of(table: pa.Table, path: Path) -> Batch:
    needed = {"step", "row", "completion", "finish", *_NUMBERS, "tokens", "mask", "step_id", "logp_sampler"}
    if missing := sorted(needed - set(table.column_names)):
        raise DataError(f"{path}: not a file of rollouts: column {', '.join(missing)} is missing")
    fields: dict[str, Any] = {name: _tensor(table[name]) for name in _NUMBERS}
    fields["length"] = torch.tensor(np.diff(table["tokens"].combine_chunks().offsets.to_numpy()), dtype=torch.long)
    for name in _LISTS:
        if name in table.column_names:
            fields[name] = _from_lists(table[name], fields["length"], _PADDING.get(name, 0))
    fields["finish"] = torch.tensor([int(Finish[name.upper()]) for name in table["finish"].to_pylist()])
    fields["rows"] = tuple(json.loads(row) for row in table["row"].to_pylist())
    fields["texts"] = tuple(table["completion"].to_pylist())
    fields |= _rewards_of(table)
    step = int(table["step"][0].as_py()) if len(table) else 0
    known = {field.name for field in dataclasses.fields(Batch)}
    return Batch(**{name: value for name, value in fields.items() if name in known}, step=step)


def _rewards_of(table: pa.Table) -> dict[str, Any]:
    """The fields ``rewards`` and ``reward_columns``; none for a file in which rewards are not stored one by one."""
    stored = json.loads((table.schema.metadata or {}).get(_REWARD_COLUMNS, b"{}"))
    names = tuple(stored.get("names", ()))
    if not names:
        return {}
    columns = RewardColumns(names, tuple(stored["weights"]), verifiers=stored["verifiers"])
    return {
        "rewards": torch.stack([_tensor(table[f"rewards/{name}"]).float() for name in names], -1),
        "reward_columns": columns,
    }


def _json(row: Mapping[str, Any]) -> str:
    """A row as JSON, which knows neither NaN nor infinity: both become null."""
    try:
        return json.dumps(row, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(row), default=str, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_lists(tensor: Tensor, length: Tensor) -> pa.ListArray:
    """A list for each row of a tensor [N, L]: its first ``length`` elements."""
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).to(torch.int32)
    flat = tensor[torch.arange(tensor.shape[1]) < length[:, None]]
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(flat.numpy()))


def _from_lists(column: pa.ChunkedArray, length: Tensor, fill: int) -> Tensor:
    """A tensor [N, L] with a row for each list, padded with ``fill``: the inverse of :func:`_as_lists`."""
    flat = torch.from_numpy(column.combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())
    flat = flat.long() if flat.dtype == torch.int32 else flat
    columns = int(length.max()) if len(length) else 0
    tensor = torch.full((len(length), columns), fill, dtype=flat.dtype)
    tensor[torch.arange(columns) < length[:, None]] = flat
    return tensor


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
