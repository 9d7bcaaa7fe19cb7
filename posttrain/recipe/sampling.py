"""What recipes and suites have in common that sample completions and train nothing."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from posttrain.option_types import PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.part import Checked, Part


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class SamplingRecipe(Checked):
    """How completions are sampled."""

    policy: sections.PolicySection | None  # none where nothing is sampled after all
    sampling: sections.SamplingSection = field(default_factory=sections.SamplingSection)
    engine: sections.EngineSection = field(default_factory=sections.EngineSection)
    completions: PositiveCount = 1  # a prompt
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    path: Path | None = None  # of the YAML file

    @property
    def base(self) -> Path | None:
        """The folder that local paths are relative to."""
        return self.path.parent if self.path else None

    def plain(self, *names: str) -> dict[str, Any]:
        """Plain data of these settings, defaults included; without those that are None."""
        values = {name: _plain(getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(each, Part) for each in value):
        return [{"use": part.name, **part.options} for part in value]
    return TypeAdapter(Any).dump_python(value, mode="json")
