"""Checks that the rows of a dataset have the columns that the verifiers ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.data.problems import Problems
from posttrain.data.rows import Rows
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import suggestion
from posttrain.verify.columns import Reader, readers_of
from posttrain.verify.signature import NOT_COLUMNS, signature_of


def check_columns(rows: Rows, verifiers: Sequence[Part]) -> None:
    """Checks that every column that a verifier asks for is there, and that it can read every value.

    Null is refused if the annotation rules it out, other values by the verifier's readers: see
    :func:`posttrain.verify.columns.reads`.

    Raises:
        DataError: if one is missing, null or unreadable; the message names the verifier and the rows without a value.
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
        for name, reader in readers_of(part.call).items():
            if name in rows.columns and name not in part.options:
                _check_values(rows, name, part.name, reader, problems)
    problems.raise_if_any()


def _check_values(rows: Rows, name: str, verifier: str, reader: Reader, problems: Problems) -> None:
    """Adds the rows whose value the verifier cannot read."""
    for index, value in enumerate(rows.values(name)):
        if value is None:
            continue  # whether null is allowed is the annotation's matter
        try:
            reader(value)
        except (ValueError, TypeError) as error:
            problems.add(rows.place(index), f"column {name!r}: the verifier {verifier!r} cannot read it: {error}")


def _check_nulls(rows: Rows, name: str, verifier: str, problems: Problems) -> None:
    for index in np.flatnonzero(rows.column(name).is_null().to_numpy()):
        problems.add(rows.place(int(index)), f"column {name!r} is missing or null; the verifier {verifier!r} needs it")
