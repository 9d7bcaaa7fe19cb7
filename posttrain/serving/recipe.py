"""What a recipe of a server says."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from posttrain.decoding.recipe import DecodeRecipe
from posttrain.recipe import sections


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), kw_only=True, frozen=True)
class Server:
    host: str = "127.0.0.1"
    """0.0.0.0 lets everyone in who can reach the machine: there are no passwords."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any that is free."""
    name: str | None = None
    """Of the model, for clients. Default: ``policy.model``, or the name of that folder."""
    requests: int = Field(default=64, ge=1)
    """That run at the same time; more of them wait."""
    queue: int = Field(default=256, ge=0)
    """Requests that may wait; more of them are refused with status 429."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class ServeRecipe(DecodeRecipe):
    """Which policy is served, and by which decoder. A decode recipe is one: what it says of data plays no part then.

    Raises:
        RecipeConflict: when built from settings that do not go together.
    """

    data: sections.DataSection | None = None  # type: ignore[assignment]  # where prompts come from is the clients' business
    server: Server = field(default_factory=Server)
    name: str = "serve"

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        model = self.policy.model
        return self.server.name or (Path(model).name if Path(model).is_dir() else model)
