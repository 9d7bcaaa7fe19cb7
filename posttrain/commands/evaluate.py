"""``posttrain eval``: runs the evaluation suite in a YAML file."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.recipe.loading import read_document
from posttrain.recipe.resolve import resolve
from posttrain.recipe.yaml_reader import Document, Overrides, suggestion

SUITES = {
    "value": "posttrain.reports.value_suite.run_value_suite",
    "reward": "posttrain.reports.reward_suite.run_reward_suite",
    "decode": "posttrain.reports.decoding_suite.run_decode_suite",
}
"""What runs the suite that a file's ``suite:`` names: ``(path, overrides) -> Path`` of the report's folder."""


KINDS = {
    "value": "posttrain.reports.value_suite.ValueSuite",
    "reward": "posttrain.reports.reward_suite.RewardSuite",
    "decode": "posttrain.reports.decoding_suite.DecodeSuite",
}
"""The dataclass that such a file describes."""


def run_suite(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the suite in a YAML file, with ``--key.path=value`` overrides; returns the folder of its report.

    Raises:
        UserError: for what a person can mend, one line for each problem, with its place and a suggestion.
    """
    path = Path(path)
    return resolve(SUITES[suite_name(read_document(path, overrides))])(path, overrides)


def suite_name(document: Document) -> str:
    """Which suite a file is.

    Raises:
        RecipeError: if it does not say, or there is no such suite.
    """
    name = document.data.get("suite")
    if name not in SUITES:
        what = "says what to measure and is missing" if name is None else f"{name!r} is no suite"
        raise RecipeError(document.problem(("suite",), f"{what}; {suggestion(name, SUITES)}"))
    return name
