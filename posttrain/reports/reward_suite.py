"""The suite ``reward``: which reward models are measured, on pairs, on stored rollouts or on both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.option_types import OutputPath, PlaceName, PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Checked, Part
from posttrain.recipe.yaml_reader import Location, Overrides


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class RewardSuite(Checked):
    """Measures how good reward models are. Several are added up with their weights, as in a recipe."""

    modules: ClassVar[Mapping[str, str]] = {"reward": "posttrain.parts.rewards"}

    suite: Literal["reward"]
    """Kind of the suite."""
    reward: tuple[InstanceOf[Part], ...]
    data: sections.DataSection | None = None
    """Pairs in RewardBench's format: prompt, chosen, rejected, subset."""
    rollouts: PlaceName | None = None
    """Rollouts, whose scores are the gold rewards: a file, a run's folder, or a folder of them."""
    sizes: tuple[int, ...] = field(default=(1, 2, 4, 8, 16, 32, 64))
    """Values of n for best-of-n, up to the number of stored completions."""
    save_every: PositiveCount | None = None
    """Number of pairs that are scored together, and then kept on disk. Default: a sixteenth of all, and at least 32."""
    folder: OutputPath | None = None
    """Folder of the report. Default: ``reports/<suite's name>``."""

    name: str = "reward"
    path: Path | None = None  # path of the YAML file

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        if not self.reward:
            yield ("reward",), "is empty: there is no reward model to measure"
        if self.data is None and self.rollouts is None:
            yield (), "nothing to measure on: give `data` (pairs), `rollouts` (completions with scores) or both"
        if 1 not in self.sizes:
            yield ("sizes",), "must hold 1: the reward of the policy itself, with which the other sizes are compared"

    @property
    def base(self) -> Path | None:
        """The folder that local paths are relative to."""
        return self.path.parent if self.path else None

    @property
    def report_folder(self) -> Path:
        """Folder that the report is written to."""
        return Path(self.folder or Path("reports") / self.name)


def read_suite(path: str | Path, overrides: Overrides = ()) -> RewardSuite:
    """Reads the reward suite in a YAML file.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    return load_as(RewardSuite, path, overrides)
