"""Evaluation suites: strict YAML like a recipe, which says what to measure; run by ``posttrain eval SUITE``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.option_types import PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as, placed
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location, Overrides


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ValueModelOptions:
    model: str
    """A value model saved by a run, or a reward or process model: local folder or hub name."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class Branches:
    """Monte-Carlo continuations of prefixes of the completions."""

    prompts: int = Field(default=32, ge=0)
    """Of so many prompts' completions; 0: none."""
    prefixes: int = Field(default=2, ge=1)
    """Prefixes a prompt, spread over the length of its completions."""
    completions: int = Field(default=16, ge=2)
    """Continuations a prefix."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class Report:
    folder: str | None = None
    """Default: ``reports/<suite's name>``. A report that is there is replaced."""
    bins: int = Field(default=10, ge=2)
    """Of the calibration curve and of positions."""
    separator: str | None = Field(default="\n", min_length=1)
    """What a reasoning step ends with. null: the steps that stored rollouts have."""
    shown: int = Field(default=6, ge=0)
    """Completions that the page shows token by token."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class ValueSuite(SamplingRecipe):
    """Whether a value model's numbers are right: on fresh completions of held-out prompts, or on stored rollouts."""

    modules: ClassVar[Mapping[str, str]] = {"verify": "posttrain.verify.functions"}

    suite: Literal["value"]
    value: ValueModelOptions
    policy: sections.PolicySection | None = None  # samples the completions and the branches
    data: sections.DataSection | None = None
    rollouts: str | None = None  # a Parquet file that a run stored, or a folder of them, instead of sampling
    verify: tuple[InstanceOf[Part], ...] = ()
    completions: PositiveCount = 4  # a prompt
    branches: Branches = field(default_factory=Branches)
    report: Report = field(default_factory=Report)
    micro_batch_tokens: PositiveCount = 16384  # padded tokens in one forward pass

    name: str = "value"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        branching = self.branches.prompts > 0
        if self.rollouts is not None and self.data is not None:
            yield ("data",), "completions come from `rollouts`, prompts and columns with them: leave one of both out"
        if self.rollouts is None and self.data is None:
            yield (), "nothing says which completions to look at: give `data` (prompts to sample from) or `rollouts`"
        for name in ("policy", "verify"):
            if not getattr(self, name) and (self.rollouts is None or branching):
                what = (
                    "samples and verifies completions" if self.rollouts is None else "continues prefixes (`branches`)"
                )
                hint = "" if self.rollouts is None else "; `branches: {prompts: 0}` does without"
                yield (), f"the section {name!r} is missing: the suite {what}{hint}"
        if self.sampling.temperature == 0 and (branching or self.rollouts is None and self.completions > 1):
            yield (
                ("sampling", "temperature"),
                "0 decodes greedily: all completions of a prefix are equal. A value is a mean over what the policy "
                "samples; use the temperature it was trained for",
            )

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.report.folder or Path("reports") / self.name)

    @property
    def resolved(self) -> dict[str, Any]:
        """Plain data of the settings, defaults included."""
        of_samples = ("policy", "data", "rollouts", "sampling", "engine", "completions")
        return self.plain("suite", "value", *of_samples, "branches", "verify", "report", "seed")


def run_value_suite(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the value suite in a YAML file, prints its figures, and returns the folder of its report.

    Raises:
        UserError: for what a person can mend.
    """
    suite = load_as(ValueSuite, path, overrides)
    from posttrain.reports.value import evaluate_value  # after loading: mistakes show at once

    try:
        return evaluate_value(suite)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error
