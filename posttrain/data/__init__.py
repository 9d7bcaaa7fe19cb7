"""Data: files, folders, hub datasets and generators become rows with prompt tokens. Read ``rows.py`` first.

Exports rows, their checks, and the prompt samplers (parts of the slot ``prompts``); ``examples`` has the parts of the
slot ``examples``. May import from recipe, parts, models, verify and engines, and from the single files before them.
"""

from __future__ import annotations

from posttrain.data.checks import check_columns
from posttrain.data.rows import Rows, load_rows
from posttrain.data.samplers import PromptSampler, by_failure, sequential, uniform

__all__ = ["PromptSampler", "Rows", "by_failure", "check_columns", "load_rows", "sequential", "uniform"]
