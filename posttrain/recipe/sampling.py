"""Settings of recipes and suites that sample completions and train nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from posttrain.option_types import Breadth, PositiveCount
from posttrain.recipe import sections
from posttrain.recipe.part import Checked, Part

BLOCKS = 16
"""Number of blocks that much work is cut into: a kill costs at most one, and a few of them fill an engine."""
MIN_BLOCK = 32
"""Number of prompts of the smallest block, unless ``save_every`` says otherwise."""


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
    save_every: PositiveCount | None = None
    """Number of prompts that are completed together. Then what was made of them is kept on disk, and ``--resume`` goes
    on behind them. Default: a sixteenth of all prompts, and at least 32."""

    path: Path | None = None  # path of the YAML file

    @property
    def base(self) -> Path | None:
        """Folder that local paths are relative to."""
        return self.path.parent if self.path else None

    def plain(self, *names: str) -> dict[str, Any]:
        """The named settings as plain data, defaults included; settings that are None are left out."""
        values = {name: _plain(getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def blocks(self, size: int) -> list[range]:
        """Cuts the numbers below ``size`` into blocks of ``save_every``."""
        return blocks_of(size, self.save_every)


def blocks_of(size: int, length: int | None) -> list[range]:
    """Cuts the numbers below ``size`` into blocks. Default length: a sixteenth of them, and at least 32."""
    length = length or max(MIN_BLOCK, -(-size // BLOCKS))
    return [range(start, min(start + length, size)) for start in range(0, size, length)]


def plain_settings(recipe: Any, *without: str) -> dict[str, Any]:
    """All settings of a recipe as plain data, defaults included, except the named ones."""
    names = [each.name for each in dataclasses.fields(recipe) if each.name not in ("name", "path", *without)]
    values = {name: _plain(getattr(recipe, name)) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return {"use": value.name, **{name: _plain(option) for name, option in value.options.items()}}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if callable(value):  # an option that is a function, such as a rule of a decoder in its default form
        return getattr(value, "__name__", str(value))
    return TypeAdapter(Any).dump_python(value, mode="json")
