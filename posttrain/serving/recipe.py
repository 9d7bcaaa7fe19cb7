"""The recipe of a server, and its ``server`` section."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from posttrain.decoding.recipe import DecodeRecipe
from posttrain.option_types import Breadth, Count
from posttrain.recipe import sections


@dataclass(
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False), kw_only=True, frozen=True
)
class Server:
    """The ``server`` section."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 admits everyone who can reach the machine: there is no authentication."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes any free port."""
    name: str | None = None
    """Name of the model for clients. Default: ``policy.model``, or the name of that folder."""
    requests: Breadth = 64
    """Most requests that are decoded at the same time; further ones wait in the queue."""
    queue: Count = 256
    """Most requests that may wait; further ones are refused with status 429."""
    max_body_mb: int = Field(default=4, ge=1, le=1024)
    """Most MiB of a request's body; longer ones are refused with status 413."""


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class ServeRecipe(DecodeRecipe):
    """A recipe for a server: policy and decoder. A decode recipe works too; its data section is ignored.

    Raises:
        RecipeConflict: if settings do not go together.
    """

    data: sections.DataSection | None = None  # type: ignore[assignment]  # prompts come from clients
    server: Server = field(default_factory=Server)
    name: str = "serve"

    @property
    def model_name(self) -> str:
        """Name of the model for clients."""
        model = self.policy.model
        return self.server.name or (Path(model).name if Path(model).is_dir() else model)
