"""Verifiers: text -> float. Each is ``(completion, *, <dataset columns by name>, <options>) -> float | None``.

``None`` says that the verifier does not apply. ``use: <name>`` in ``verify`` finds the functions of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from posttrain.verify.mathematics import math, math_quick
from posttrain.verify.text import exact, format, format_quick, length

__all__ = ["IN_PROCESS", "WRONG_IF_STUCK", "exact", "format", "length", "math"]

IN_PROCESS: Mapping[Callable[..., float | None], Callable[..., float | None]] = {
    exact: exact,
    format: format_quick,
    length: length,
    math: math_quick,
}
"""Fast versions of verifiers, which run in the calling process and cannot hang. ``None`` sends the call to a worker."""

WRONG_IF_STUCK: frozenset[Callable[..., float | None]] = frozenset({math})
"""Verifiers for which a time-out or a dead worker is the completion's fault (a tower of powers): it scores 0."""
