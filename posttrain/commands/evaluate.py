"""``posttrain eval``: runs the evaluation suite in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from posttrain.errors import CheckFailed, RecipeError, UserError
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import placed
from posttrain.recipe.resolve import resolve
from posttrain.recipe.yaml_reader import Document, Overrides, suggestion


class Suite(NamedTuple):
    """Names of the functions for one kind of suite. The code that measures is imported only after the file was read."""

    kind: str  # dataclass that a file of this kind describes
    read: str  # function that reads a suite: (path, overrides) -> suite
    measure: str  # function that runs it: (suite, resume) -> folder of the report


SUITES = {
    "value": Suite(
        kind="posttrain.reports.value_suite.ValueSuite",
        read="posttrain.reports.value_suite.read_suite",
        measure="posttrain.reports.value.evaluate_value",
    ),
    "reward": Suite(
        kind="posttrain.reports.reward_suite.RewardSuite",
        read="posttrain.reports.reward_suite.read_suite",
        measure="posttrain.reports.reward.measure_rewards",
    ),
    "verifier": Suite(
        kind="posttrain.reports.verifier_suite.VerifierSuite",
        read="posttrain.reports.verifier_suite.read_suite",
        measure="posttrain.reports.verifier.measure_verifiers",
    ),
    "decode": Suite(
        kind="posttrain.reports.decoding_suite.DecodeSuite",
        read="posttrain.reports.decoding_suite.read_suite",
        measure="posttrain.reports.decoding.measure_decoders",
    ),
}
"""Suites by the name that a file gives under ``suite:``."""


def run_suite(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> Path:
    """Runs the suite in a YAML file, with ``--key.path=value`` overrides; returns the folder of its report.

    Args:
        resume: go on with the completions and scores that are kept.

    Raises:
        UserError: if the file or its data are wrong; one line for each problem, with its place and what to change.
        CheckFailed: if the suite asks for a check and it failed.
    """
    path = Path(path)
    functions = SUITES[suite_name(read_document(path, overrides))]
    suite = resolve(functions.read)(path, overrides)
    try:
        return resolve(functions.measure)(suite, resume=resume)
    except CheckFailed:
        raise
    except UserError as error:
        raise placed(error, path, overrides) from error


def suite_name(document: Document) -> str:
    """Returns the name of the suite that a file describes.

    Raises:
        RecipeError: if the file does not say, or there is no such suite.
    """
    name = document.data.get("suite")
    if name not in SUITES:
        problem = "says what to measure and is missing" if name is None else f"{name!r} is no suite"
        raise RecipeError(document.problem(("suite",), f"{problem}; {suggestion(name, SUITES)}"))
    return name
