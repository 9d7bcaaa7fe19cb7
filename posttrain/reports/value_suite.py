"""The suite ``value``: which value model is measured, and on which completions; run by ``posttrain eval SUITE``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.option_types import Breadth, Count, OutputPath, PlaceName, PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location, Overrides


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ValueModelSection:
    """The value model to measure."""

    model: PlaceName
    """A value model saved by a run, or a reward or process model: local folder or hub name."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class BranchPointsSection:
    """Monte-Carlo continuations of prefixes of the completions."""

    prompts: Count = 32
    """Number of prompts whose completions are continued. 0 switches branches off."""
    prefixes: PositiveCount = 2
    """Number of prefixes for each prompt, spread over the length of its completions."""
    completions: int = Field(default=16, ge=2, le=2**16)
    """Number of continuations of each prefix."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ValueReportSection:
    """The report and its curves."""

    folder: OutputPath | None = None
    """Folder of the report. Default: ``reports/<suite's name>``. A report in it is replaced."""
    bins: int = Field(default=10, ge=2, le=2**16)
    """Number of bins of the calibration curve and of the curve over positions."""
    separator: str | None = Field(default="\n", min_length=1)
    """Text that ends a reasoning step. null: the steps that were stored with the rollouts."""
    shown: Count = 6
    """Number of completions that the page shows token by token."""


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class ValueSuite(SamplingRecipe):
    """Compares a value model with the outcomes of fresh completions of held-out prompts, or of stored rollouts."""

    modules: ClassVar[Mapping[str, str]] = {"verify": "posttrain.verify.functions"}

    suite: Literal["value"]
    """Kind of the suite."""
    value: ValueModelSection
    policy: sections.PolicySection | None = None
    """Policy that samples the completions and the branches."""
    data: sections.DataSection | None = None
    rollouts: PlaceName | None = None
    """Stored rollouts, instead of sampling: a file, a run's folder, or a folder of them."""
    verify: tuple[InstanceOf[Part], ...] = ()
    completions: Breadth = 4
    """Number of completions of a prompt."""
    branches: BranchPointsSection = field(default_factory=BranchPointsSection)
    report: ValueReportSection = field(default_factory=ValueReportSection)
    micro_batch_tokens: PositiveCount = 16384
    """Most padded tokens in one forward pass."""

    name: str = "value"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        branching = self.branches.prompts > 0
        if self.rollouts is not None and self.data is not None:
            yield ("data",), "and `rollouts` both say where completions come from: leave one of them out"
        if self.rollouts is None and self.data is None:
            yield (), "no completions to measure on: give `data` (prompts to sample from) or `rollouts`"
        for name in ("policy", "verify"):
            if not getattr(self, name) and (self.rollouts is None or branching):
                use = "samples and verifies completions" if self.rollouts is None else "continues prefixes (`branches`)"
                hint = "" if self.rollouts is None else "; `branches: {prompts: 0}` switches that off"
                yield (), f"the section {name!r} is missing: the suite {use}{hint}"
        if self.sampling.temperature == 0 and (branching or self.rollouts is None and self.completions > 1):
            yield (
                ("sampling", "temperature"),
                "0 decodes greedily: all completions of a prefix are equal. A value is a mean over sampled ones; "
                "use the temperature that the value model was trained for",
            )

    @property
    def folder(self) -> Path:
        """Folder that the report is written to."""
        return Path(self.report.folder or Path("reports") / self.name)

    @property
    def resolved(self) -> dict[str, Any]:
        """Settings as plain data, defaults included."""
        names = ("suite", "value", "policy", "data", "rollouts", "sampling", "engine", "completions", "branches")
        return self.plain(*names, "verify", "report", "seed")


def read_suite(path: str | Path, overrides: Overrides = ()) -> ValueSuite:
    """Reads the value suite in a YAML file.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    return load_as(ValueSuite, path, overrides)
