"""Recipes for decoding: which prompts are completed, by which decoder, and how completions are verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.decoding.checks import decoder_conflicts
from posttrain.option_types import OutputPath
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location

OUTPUTS = (".jsonl", ".parquet")


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class DecodeSettings(SamplingRecipe):
    """Settings of decoding without the decoder: prompts, policy, verifiers."""

    modules: ClassVar[Mapping[str, str]] = {
        "verify": "posttrain.verify.functions",
        "decoder": "posttrain.decoding.decoders",
    }

    policy: sections.PolicySection
    data: sections.DataSection
    verify: tuple[InstanceOf[Part], ...]


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class DecodeRecipe(DecodeSettings):
    """A recipe for decoding: prompts, policy, decoder, verifiers and the file of completions."""

    decoder: InstanceOf[Part] | None = None
    """Draws the completions. Default: the policy alone."""
    verify: tuple[InstanceOf[Part], ...] = ()
    output: OutputPath | None = None
    """File of the completions, ``.jsonl`` or ``.parquet``. Default: ``completions/<name of this file>.jsonl``."""

    name: str = "decode"

    @property
    def file(self) -> Path:
        """The file to which the completions are written."""
        return Path(self.output or Path("completions") / f"{self.name}.jsonl")

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if self.file.suffix not in OUTPUTS:
            yield ("output",), f"{self.output!r} should end with {' or '.join(OUTPUTS)}"
        if self.decoder is not None:
            yield from decoder_conflicts(self.decoder, self.sampling, self.engine)
        elif self.sampling.temperature == 0 and self.completions > 1:
            yield ("completions",), f"at temperature 0 all {self.completions} completions of a prompt are equal"
