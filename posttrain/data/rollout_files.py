"""Completions as Parquet files, a row a completion: to look at with pandas, and to train on again later.

Columns of a file: ``step``, ``group``, ``prompt``, ``completion``, ``reward``, ``score``, ``verify/<name>`` for each
verifier, ``length`` (tokens the policy chose), ``finish`` (its name), ``baseline_only``, ``version``, ``row`` (the dataset's
columns, as JSON), and the lists ``tokens``, ``mask``, ``step_id``, ``logp_sampler``, ``step_reward`` and whichever of
``logp_old``, ``logp_ref``, ``entropy``, ``value``, ``advantage``, ``target``, ``loss_share`` the batch has. A list has one
element a token, prompt included: element ``t`` belongs to token ``t``, as everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.errors import DataError
from posttrain.system.files import sync

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
_OFF_MASK = {"step_id": -1}  # value of padding columns; 0 for the others


def write_rollouts(
    path: Path | str, batch: Batch, prompts: Sequence[str], values: Mapping[str, Sequence[float | None]] | None = None
) -> None:
    """Writes a batch to a Parquet file (zstd), atomically.

    Args:
        path: the file; its folder is made.
        batch: the completions; may lie on any device.
        prompts: the prompt of each completion as text.
        values: the values of each verifier, one a completion; None or NaN where it did not apply.
    """
    batch = batch.to("cpu").trim()
    columns: dict[str, Any] = {
        "step": np.full(len(batch), batch.step),
        "prompt": list(prompts),
        "completion": list(batch.texts),
        "length": batch.tokens_chosen.numpy(),
        "finish": [Finish(code).name.lower() for code in batch.finish.tolist()],
        "row": [json.dumps(row, default=str, ensure_ascii=False) for row in batch.rows],
    }
    columns |= {name: getattr(batch, name).numpy() for name in _NUMBERS}
    columns |= {f"verify/{name}": pa.array(numbers, pa.float32()) for name, numbers in (values or {}).items()}
    for name, dtype in _LISTS.items():
        tensor = getattr(batch, name)
        if tensor is not None:
            columns[name] = _as_lists(tensor.to(dtype), batch.length)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    sync(temporary)
    temporary.replace(path)


def read_rollouts(path: Path | str) -> Batch:
    """The batch that ``write_rollouts`` was given, without columns that are padding in every row.

    Dataset columns that JSON does not know (dates, bytes) come back as text.

    Raises:
        DataError: for a file that is not there, or that lacks columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of rollouts")
    table = pq.read_table(path)
    needed = {"step", "row", "completion", "finish", *_NUMBERS, "tokens", "mask", "step_id", "logp_sampler"}
    if missing := sorted(needed - set(table.column_names)):
        raise DataError(f"{path}: not a file of rollouts: column {', '.join(missing)} is missing")
    fields: dict[str, Any] = {name: _tensor(table[name]) for name in _NUMBERS}
    fields["length"] = torch.tensor(np.diff(table["tokens"].combine_chunks().offsets.to_numpy()), dtype=torch.long)
    for name in _LISTS:
        if name in table.column_names:
            fields[name] = _from_lists(table[name], fields["length"], _OFF_MASK.get(name, 0))
    fields["finish"] = torch.tensor([int(Finish[name.upper()]) for name in table["finish"].to_pylist()])
    fields["rows"] = tuple(json.loads(row) for row in table["row"].to_pylist())
    fields["texts"] = tuple(table["completion"].to_pylist())
    step = int(table["step"][0].as_py()) if len(table) else 0
    known = {field.name for field in dataclasses.fields(Batch)}
    return Batch(**{name: value for name, value in fields.items() if name in known}, step=step)


def _as_lists(tensor: Tensor, length: Tensor) -> pa.ListArray:
    """The first ``length`` elements of each row [N, L] as one list a row."""
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).to(torch.int32)
    flat = tensor[torch.arange(tensor.shape[1]) < length[:, None]]
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(flat.numpy()))


def _from_lists(column: pa.ChunkedArray, length: Tensor, fill: int) -> Tensor:
    flat = torch.from_numpy(column.combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())
    flat = flat.long() if flat.dtype == torch.int32 else flat
    columns = int(length.max()) if len(length) else 0
    tensor = torch.full((len(length), columns), fill, dtype=flat.dtype)
    tensor[torch.arange(columns) < length[:, None]] = flat
    return tensor


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
