"""Settings of recipes and suites that sample completions and train nothing."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from posttrain.option_types import Breadth
from posttrain.recipe import sections
from posttrain.recipe.part import Checked, Part


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class SamplingRecipe(Checked):
    """Base of recipes that sample completions: policy, engine, sampling and seed."""

    policy: sections.PolicySection | None
    """Policy that samples. null: nothing is sampled."""
    sampling: sections.SamplingSection = field(default_factory=sections.SamplingSection)
    engine: sections.EngineSection = field(default_factory=sections.EngineSection)
    completions: Breadth = 1
    """Number of completions of a prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything that is drawn."""

    path: Path | None = None  # path of the YAML file

    @property
    def base(self) -> Path | None:
        """Folder that local paths are relative to."""
        return self.path.parent if self.path else None

    def plain(self, *names: str) -> dict[str, Any]:
        """The named settings as plain data, defaults included; settings that are None are left out."""
        values = {name: _plain(getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(item, Part) for item in value):
        return [{"use": part.name, **part.options} for part in value]
    return TypeAdapter(Any).dump_python(value, mode="json")
