"""Data: files, folders, hub data sets and generators become rows with prompt tokens; samplers choose among the rows."""

from __future__ import annotations

from posttrain.data.checks import check_columns
from posttrain.data.rows import Rows, load_rows
from posttrain.data.samplers import PromptSampler, by_failure, sequential, uniform

__all__ = ["PromptSampler", "Rows", "by_failure", "check_columns", "load_rows", "sequential", "uniform"]
