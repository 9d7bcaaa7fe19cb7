"""Checks that the rows of a dataset have the columns that the verifiers ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.problems import Problems
from posttrain.data.rows import Rows
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import suggestion
from posttrain.verify.signature import NOT_COLUMNS, signature_of


def check_columns(rows: Rows, verifiers: Sequence[Part]) -> None:
    """Checks that every column that a verifier asks for is there, and not null if its annotation rules that out.

    Raises:
        DataError: if one is missing or null; the message names the verifier and the rows without a value.
    """
    problems = Problems()
    for part in verifiers:
        signature = signature_of(part.call, part.options)
        for name in signature.required:
            if name in NOT_COLUMNS:
                continue
            if name not in rows.columns:
                copy = f"`columns: {{{name}: <column>}}` copies one, `{name}: ...` in `verify` sets it for all rows"
                asked = f"no column {name!r}, which the verifier {part.name!r} asks for"
                problems.add(rows.source.name, f"{asked}; {suggestion(name, rows.columns)}; {copy}")
            elif name in signature.not_null:
                _check_nulls(rows, name, part.name, problems)
    problems.raise_if_any()


def _check_nulls(rows: Rows, name: str, verifier: str, problems: Problems) -> None:
    for index in np.flatnonzero(rows.column(name).is_null().to_numpy()):
        problems.add(rows.place(int(index)), f"column {name!r} is missing or null; the verifier {verifier!r} needs it")
